"""torch files: the layout is, byte for byte, what torch.save writes, for torch 2.13 and for torch 1.12."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import evaluate, names, random_tensor, read_torch, shapes, to_bytes

from weightops.errors import UsageError
from weightops.formats.containers import find_aliases
from weightops.formats.layout import Data, Layout, Literal
from weightops.formats.torch.writer import Flavour, torch_layout
from weightops.spec import DType, TensorSpec

DTYPES = [d for d in DType if not d.is_packed]
OLD_ONLY = [
    d for d in DTYPES if d.name in ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "C64", "F64", "I64", "C128"]
]
GOLDEN = Path(__file__).parents[2] / "golden" / "torch-1.12"
ROOT = "model-00001-of-00002"

Tensors = dict[str, torch.Tensor]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(DType(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))


def render(layout: Layout, data: Mapping[str, bytes]) -> bytes:
    crcs = {name: zlib.crc32(d) for name, d in data.items()}
    parts = []
    for piece in layout.pieces:
        if isinstance(piece, Literal):
            parts.append(piece.data)
        else:
            parts.append(data[piece.name] if isinstance(piece, Data) else piece.render(crcs))
        assert len(parts[-1]) == piece.nbytes
    return b"".join(parts)


def render_zeros(layout: Layout) -> Iterator[bytes]:
    """The file, block by block, of tensors that hold zeros."""
    zeros = bytes(1 << 20)
    crcs: dict[str, int] = {}
    for piece in layout.pieces:
        if isinstance(piece, Data):
            crc = 0
            for start in range(0, piece.nbytes, len(zeros)):
                block = zeros[: piece.nbytes - start]
                crc = zlib.crc32(block, crc)
                yield block
            crcs[piece.name] = crc
        else:
            yield piece.data if isinstance(piece, Literal) else piece.render(crcs)


def write(tensors: Tensors, aliases: Mapping[str, str], flavour: Flavour = "torch", root: str = ROOT) -> bytes:
    layout = torch_layout([(n, spec_of(t)) for n, t in tensors.items()], aliases, flavour=flavour, root=root)
    assert layout.aliases == aliases
    data = {name: to_bytes(tensor) for name, tensor in tensors.items()}
    result = render(layout, data)
    assert layout.nbytes == len(result)
    return result


def saved(tensors: Tensors, folder: Path, root: str = ROOT) -> bytes:
    path = folder / f"{root}.bin"
    torch.save(tensors, path)
    return path.read_bytes()


@st.composite
def state_dicts(draw: st.DrawFn) -> tuple[Tensors, dict[str, str]]:
    """Tensors, and which of them share the storage of an earlier one."""
    tensors: Tensors = {}
    aliases = {}
    for i, name in enumerate(draw(st.lists(names | st.sampled_from("0123456789"), max_size=16, unique=True))):
        sources = [n for n in tensors if n not in aliases and tensors[n].numel()]
        if sources and draw(st.integers(0, 3)) == 0:
            aliases[name] = draw(st.sampled_from(sources))
            tensors[name] = tensors[aliases[name]].view(tensors[aliases[name]].shape)
        else:
            tensors[name] = random_tensor(draw(st.sampled_from(DTYPES)), draw(shapes), i)
    return tensors, aliases


@pytest.fixture(autouse=True)
def _no_notice_about_complex_halves() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        yield


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(state_dicts())
def test_layout_is_byte_identical_to_torch_save(tmp_path: Path, drawn: tuple[Tensors, dict[str, str]]) -> None:
    tensors, aliases = drawn
    assert write(tensors, aliases) == saved(tensors, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path: Path, dtype: DType) -> None:
    tensors = {"a": random_tensor(dtype, (3, 5), 1), "b": random_tensor(dtype, (2, 1, 2, 2), 2)}
    assert write(tensors, {}) == saved(tensors, tmp_path)


# 13, 29, 59 ... members are where torch's set of names grows; 1000 is the length of a pickle's batch.
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 23, 24, 53, 54, 60, 999, 1000, 1001, 2000, 2001])
def test_every_count(tmp_path: Path, count: int) -> None:
    tensors = {f"t{i}": torch.full((i % 3,), i) for i in range(count)}
    assert write(tensors, {}) == saved(tensors, tmp_path)


@pytest.mark.parametrize("root", ["a", "model.safetensors.old", "weights é"])
def test_folder_in_the_archive_is_named_after_the_file(tmp_path: Path, root: str) -> None:
    tensors = {"weight": torch.arange(3)}
    assert write(tensors, {}, root=root) == saved(tensors, tmp_path, root)


def test_data_that_looks_like_a_descriptor_changes_the_serialization_id_alone(tmp_path: Path) -> None:
    """The one exception to being identical: torch takes such data for part of the archive, when it makes its id."""
    tensors = {"w": torch.frombuffer(bytearray(b"PK\7\x08" + bytes(60)), dtype=torch.uint8)}
    ours, theirs = write(tensors, {}), saved(tensors, tmp_path)
    at = theirs.index(b".data/serialization_id")
    assert ours[:at] == theirs[:at]
    assert (len(ours), ours != theirs) == (len(theirs), True)


@pytest.mark.parametrize("name", ["empty", "single", "dtypes", "shapes", "shared"])
def test_layout_is_byte_identical_to_torch_1_12(name: str) -> None:
    golden = read_torch(GOLDEN / f"{name}.bin")
    data = {n: evaluate(t) for n, t in golden.tensors.items()}
    specs = [(n, t.spec) for n, t in golden.tensors.items()]
    layout = torch_layout(specs, find_aliases(golden.tensors), flavour="torch-1.12", root="other")
    assert render(layout, data) == (GOLDEN / f"{name}.bin").read_bytes()


def md5_of_zeros(specs: Sequence[tuple[str, TensorSpec]], flavour: Flavour) -> str:
    state = hashlib.md5()
    for block in render_zeros(torch_layout(specs, {}, flavour=flavour, root="archive")):
        state.update(block)
    return state.hexdigest()


def expected_md5(name: str) -> str:
    lines = (GOLDEN / "expected.md5").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.split()[1] == name)


def vector(dtype: DType, count: int) -> TensorSpec:
    return TensorSpec(dtype, (count,))


def counted(count: int) -> list[tuple[str, TensorSpec]]:
    return [(f"t{i}", vector(DType.U8, i % 3)) for i in range(count)]


@pytest.mark.parametrize("count", [1000, 2001])
def test_many_tensors_of_torch_1_12(count: int) -> None:
    assert md5_of_zeros(counted(count), "torch-1.12") == expected_md5(f"count-{count}")


LARGE = {
    "member": [
        ("first", vector(DType.U8, 5)),
        ("large", vector(DType.U8, (1 << 32) - 1)),
        ("after", vector(DType.F16, 6)),
        ("empty", vector(DType.U8, 0)),
    ],
    "numel": [("large", vector(DType.I16, (1 << 31) + 8)), ("after", vector(DType.U8, 3))],
    "offsets": [(f"layer.{i}", vector(DType.F32, 3 << 27)) for i in range(3)],
    "count-65600": counted(65600),
}


class Md5:
    """A file that keeps its digest alone. Inside such a file, torch names the folder `archive`."""

    def __init__(self) -> None:
        self.state = hashlib.md5()

    def write(self, data: bytes) -> int:
        self.state.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_above_4_gib_of_torch(name: str) -> None:
    file = Md5()
    torch.save({n: torch.zeros(s.shape, dtype=getattr(torch, s.dtype.value)) for n, s in LARGE[name]}, file)
    assert md5_of_zeros(LARGE[name], "torch") == file.state.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_above_4_gib_of_torch_1_12(name: str) -> None:
    assert md5_of_zeros(LARGE[name], "torch-1.12") == expected_md5(name)


@pytest.mark.parametrize("dtype", [DType.F4, DType.F6_E2M3, DType.F6_E3M2])
@pytest.mark.parametrize("flavour", ["torch", "torch-1.12"])
def test_packed_dtypes_are_refused(dtype: DType, flavour: Flavour) -> None:
    with pytest.raises(UsageError, match=f"w: torch cannot store {dtype.value}"):
        torch_layout([("w", TensorSpec(dtype, (4,)))], {}, flavour=flavour, root="x")


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in OLD_ONLY])
def test_dtypes_newer_than_torch_1_12_are_refused(dtype: DType) -> None:
    with pytest.raises(UsageError, match=f"w: torch 1.12 cannot store {dtype.value}"):
        torch_layout([("w", TensorSpec(dtype, (4,)))], {}, flavour="torch-1.12", root="x")
