"""torch's zip files: what is read equals what torch.load loads, storages are left alone, hostile files are refused."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import resave
from support import evaluate, random_tensor, read_torch, to_bytes

from weightops.errors import CorruptInput
from weightops.formats.layout import Data, Literal
from weightops.formats.torch import objects
from weightops.formats.torch.objects import TorchFile
from weightops.formats.torch.pickle_reader import Call
from weightops.formats.torch.writer import Flavour, torch_layout
from weightops.io.source_file import SourceFile
from weightops.spec import DType, TensorSpec
from weightops.stores.reader import FileReader

GOLDEN = Path(__file__).parents[2] / "golden" / "torch-1.12"


def assert_equal(found: TorchFile, expected: dict[str, torch.Tensor]) -> None:
    assert list(found.tensors) == list(expected)
    for name, lazy in found.tensors.items():
        assert f"torch.{lazy.spec.dtype.value}" == str(expected[name].dtype)
        assert lazy.spec.shape == expected[name].shape
        assert evaluate(lazy) == evaluate(lazy, block=7 * lazy.spec.dtype.itemsize) == to_bytes(expected[name])


def state_dict() -> dict[str, torch.Tensor]:
    """Every way for a tensor to lie in its storage."""
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    half = base.to(torch.bfloat16)
    return {
        "whole": base,
        "same": base,
        "view": base.view(20, 6),
        "row": base[2],
        "slice": base[1:3, 2:4, ::2],
        "transposed": base.transpose(0, 2),
        "row expanded": half[0, :1].expand(3, 6),
        "half": half[:, 1],
        "parameter": torch.nn.Parameter(base[:, :, 0]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "picked": base[3, 4, 5],
        "empty": torch.empty(0, 3),
        "empty view": base[:, 5:],
        "fp8": base.to(torch.float8_e4m3fn)[1:, 2],
        "bool": base > 7,
        "unit": base[:, :1],
        "é\n": base[0, 0],
    }


def test_tensors_equal_those_of_torch_load(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(state_dict(), path)
    found = read_torch(path)
    assert_equal(found, torch.load(path, weights_only=True))
    assert found.extras == ()
    assert found.tensors["whole"] == found.tensors["same"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    torch.save(state_dict(), path, pickle_protocol=protocol)
    assert_equal(read_torch(path), state_dict())


@pytest.mark.parametrize("dtype", [d for d in DType if not d.is_packed and d is not DType.C32])
def test_every_dtype(tmp_path: Path, dtype: DType) -> None:
    path = tmp_path / "model.bin"
    tensor = random_tensor(dtype, (5, 3), 1)
    torch.save({"whole": tensor, "part": tensor[1:3, 1:]}, path)
    assert_equal(read_torch(path), {"whole": tensor, "part": tensor[1:3, 1:]})


@pytest.mark.parametrize("name", ["empty", "single", "dtypes", "shapes", "shared"])
def test_files_of_torch_1_12(name: str) -> None:
    path = GOLDEN / f"{name}.bin"
    assert_equal(read_torch(path), torch.load(path, weights_only=True))


def test_renamed_files_and_files_of_other_zip_tools(tmp_path: Path) -> None:
    path = tmp_path / "first.bin"
    torch.save(state_dict(), path)
    renamed = tmp_path / "second.pt"
    shutil.copy(path, renamed)
    assert_equal(read_torch(renamed), state_dict())
    resave(renamed, lambda members: members[::-1])
    assert_equal(read_torch(renamed), state_dict())


@pytest.mark.parametrize("flavour", ["torch", "torch-1.12"])
def test_files_above_4_gib(tmp_path: Path, flavour: Flavour) -> None:
    """Members of more than 4 GiB and members behind them, in a file of holes."""
    counts = {"first": 5, "large": 1 << 33, "after": 70_000, "empty": 0}
    specs = [(name, TensorSpec(DType.U8, (count,))) for name, count in counts.items()]
    layout = torch_layout(specs, {}, flavour=flavour, root="x")
    crcs = {name: zlib.crc32(bytes(count)) if count < 1 << 20 else 1 for name, count in counts.items()}
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for piece in layout.pieces:
            if isinstance(piece, Data):
                file.seek(piece.nbytes, os.SEEK_CUR)
            else:
                file.write(piece.data if isinstance(piece, Literal) else piece.render(crcs))
    found = read_torch(path)
    assert {name: lazy.nbytes for name, lazy in found.tensors.items()} == counts
    assert not any(evaluate(found.tensors["first"]) + evaluate(found.tensors["after"]))


def test_state_dict_of_a_module_has_metadata_that_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), path)
    assert_equal(read_torch(path), dict(module.state_dict()))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module", "net"])
def test_a_wrapper_is_taken_off(tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "model.bin"
    torch.save(
        {"epoch": 3, wrapper: {"w": torch.ones(2), "note": "x"}, "args": {"lr": [0.1], "dtype": torch.half}}, path
    )
    found = read_torch(path)
    assert_equal(found, {"w": torch.ones(2)})
    assert found.extras == ("epoch", "args", "note")


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_model_is_taken_out_of_a_training_checkpoint(tmp_path: Path) -> None:
    """As PyTorch's tutorials, Lightning, DeepSpeed and nested scripts save it, with tensors beside the model."""
    path = tmp_path / "model.bin"
    model, optimizer = trained()
    state, moments = dict(model.state_dict()), optimizer.state_dict()
    for beside in (
        {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": moments, "loss": torch.ones(())},
        {"state_dict": state, "optimizer_states": [moments], "lr_schedulers": [], "callbacks": {"x": {"best": None}}},
        {"module": state, "optimizer": moments, "cuda_rng_state": torch.ones(4, dtype=torch.uint8), "ds_version": "1"},
        {"model": {"state_dict": state, "step": 3}, "best_loss": torch.ones(())},
    ):
        torch.save(beside, path)
        found = read_torch(path)
        assert_equal(found, state)
        assert {*beside} - {"model_state_dict", "state_dict", "module", "model"} <= {*found.extras}


def test_a_checkpoint_that_holds_itself_ends(tmp_path: Path) -> None:
    value: dict[str, Any] = {"epoch": torch.ones(1)}
    value["model"] = value
    torch.save(value, tmp_path / "model.bin")
    with pytest.raises(CorruptInput, match="nested under 'model'"):
        read_torch(tmp_path / "model.bin")


RIGHT = Call(lambda *arguments: arguments)
ATTRIBUTES: list[dict[str, Any]] = [
    {"partition_dim": 0},
    {"label": "w", "shape_was": torch.Size([2, 3]), "tags": ["a", ("b", 1.5)]},
    {"main_grad": torch.ones(5)},
]
"""What people hang onto tensors: Megatron's partitions, a name, a second tensor."""


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=["plain", "several", "tensor"])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_attributes_of_tensors_are_passed_over(
    tmp_path: Path, attributes: dict[str, Any], kind: Callable[[torch.Tensor], torch.Tensor], is_zip: bool
) -> None:
    path = tmp_path / "model.bin"
    tensor = kind(torch.arange(6.0).reshape(2, 3))
    for name, value in attributes.items():
        setattr(tensor, name, value)
    torch.save({"w": tensor, "v": torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(torch.load(path, weights_only=True)["w"], tensor)
    assert_equal(read_torch(path), {"w": tensor.detach(), "v": torch.ones(2)})


@pytest.mark.parametrize(
    ("rebuild", "kind", "arguments"),
    [(print, objects._PLAIN, ()), (RIGHT, OrderedDict, ()), (RIGHT, objects._PLAIN, [])],
)
def test_only_plain_tensors_have_attributes(rebuild: object, kind: object, arguments: object) -> None:
    with pytest.raises(ValueError, match="a tensor of a class that is not torch's own"):
        objects._with_attributes(rebuild, kind, arguments, None)
    assert objects._with_attributes(RIGHT, objects._PLAIN, (1, 2), None) == (1, 2)


class Sub(torch.Tensor):
    """A class of somebody's own."""


def test_tensors_of_other_classes_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2).as_subclass(Sub)}, tmp_path / "model.bin")
    with pytest.raises(CorruptInput, match=r"asks to run `test_torch_zip\.Sub`"):
        read_torch(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}, "optimizer": [torch.ones(1)]},
            "nested under 'ema'",
        ),
        ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "several models: state_dict and model"),
        ({"generator": {"w": torch.ones(1)}, "discriminator": {"w": torch.ones(1)}}, "nested under 'generator'"),
        ({"w": torch.ones(1), "optimizer": {"m": torch.ones(1)}}, "nested under 'optimizer'"),
        ({"w": torch.ones(1), "model": {"v": torch.ones(1)}}, "nested under 'model'"),
        ({"model": {"a": {"w": torch.ones(1)}}}, "nested under 'a'"),
        ({"generator": (1, [torch.ones(1)])}, "nested under 'generator'"),
        ({"storage": torch.ones(1).untyped_storage()}, "nested under 'storage'"),
        ({1: torch.ones(1)}, "a int is a key"),
        (torch.ones(1), "holds a single tensor, expected a state dict"),
        ([torch.ones(1)], "holds a list, expected a state dict"),
    ],
)
def test_tensors_in_other_places_are_refused(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "model.bin"
    torch.save(value, path)
    with pytest.raises(CorruptInput, match=message):
        read_torch(path)


def test_the_same_tensors_in_two_places_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    inner = {"w": torch.ones(1)}
    torch.save({"model": inner, "ema": inner}, path)
    with pytest.raises(CorruptInput, match="nested under 'ema'"):
        read_torch(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "a sparse tensor"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "w: is a lazy conjugate"),
        (lambda: torch.ones(3, device="meta"), "a tensor without values"),
        (lambda: torch.ones(4, dtype=torch.uint8).view(torch.bits8), "dtype"),
    ],
)
def test_other_kinds_of_tensors_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": make()}, path)
    with pytest.raises(CorruptInput, match=message):
        read_torch(path)


class Watched(FileReader):
    """Notes which ranges are read."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        self.ranges.append((offset, offset + len(out)))
        super().read_into(file, offset, out, following)


@pytest.mark.parametrize("is_zip", [True, False])
def test_storages_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(100_000), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    files = Watched()
    monkeypatch.setattr("support.FileReader", lambda: files)
    read_torch(path)
    assert sum(stop - start for start, stop in files.ranges) < 80_000


def test_files_that_torch_wrote_without_crcs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read_torch(path), state_dict())
