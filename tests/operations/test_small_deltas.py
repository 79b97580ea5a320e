"""Compressed deltas end to end: the plain delta in other files, exact, and refused as that is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import TORCH_DTYPES, digests, random_tensor, same_bits, write_checkpoint
from tiny_models import save_tiny

import weightops
from weightops.cli.main import run
from weightops.engine import preflight
from weightops.errors import IncompatibleInputs, NoRoom, UsageError
from weightops.formats.layout import Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.lazy import Evaluator
from weightops.spec import DType, TensorSpec

State = dict[str, torch.Tensor]


def weights(folder: Path) -> State:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_every_bit_of_every_dtype_comes_back(tmp_path: Path, data: st.DataObject) -> None:
    """Random bits, NaNs of all kinds among them; all of them changed, some, or none."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    raw: State = {}
    tuned: State = {}
    for i in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(TORCH_DTYPES))
        shape = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=2)))
        side = data.draw(st.sampled_from(["same", "changed", "some", "grown", "retyped", "added"]))
        base = random_tensor(dtype, shape, i)
        if side != "added":
            raw[f"t{i}"] = base
        if side == "grown":
            shape = (shape[0] + 3, *shape[1:])
        if side == "retyped":
            dtype = data.draw(st.sampled_from(TORCH_DTYPES))
        tuned[f"t{i}"] = random_tensor(dtype, shape, 1000 + i)
        if side == "same":
            tuned[f"t{i}"] = base.clone()
        elif side == "some" and base.numel():
            tuned[f"t{i}"] = base.clone()
            tuned[f"t{i}"][0] = random_tensor(dtype, shape, 1000 + i)[0]
    write_checkpoint(tmp_path / "raw", raw)
    write_checkpoint(tmp_path / "tuned", tuned)
    plain = weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "plain")
    small = weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "small", compress=True, max_shard_size=2000)
    assert plain.manifest is not None
    assert small.manifest is not None
    assert small.manifest.content_id == plain.manifest.content_id
    document = "weightops-delta.json"
    assert (tmp_path / "small" / document).read_bytes() == (tmp_path / "plain" / document).read_bytes()
    weightops.recover(tmp_path / "raw", tmp_path / "small", tmp_path / "out", max_shard_size=3000)
    assert same_bits(weights(tmp_path / "out"), tuned)


def test_types_that_torch_cannot_compute_with_come_back(tmp_path: Path) -> None:
    dtypes = [d for d in DType if d.in_safetensors]
    layout = safetensors_layout([(d.name, TensorSpec(d, (8, 20))) for d in dtypes], {"format": "pt"})
    random = np.random.default_rng(0)
    for side, most in (("raw", 256), ("tuned", 3)):
        (tmp_path / side).mkdir()
        parts = [
            p.data if isinstance(p, Literal) else random.integers(0, most, p.nbytes, np.uint8).tobytes()
            for p in layout.pieces
        ]
        (tmp_path / side / "model.safetensors").write_bytes(b"".join(parts))
    weightops.diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "delta", compress=True)
    weightops.recover(tmp_path / "raw", tmp_path / "delta", tmp_path / "out")
    recovered, tuned = (tmp_path / side / "model.safetensors" for side in ("out", "tuned"))
    assert recovered.read_bytes() == tuned.read_bytes()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw, tuned, and the delta `small`: matrices of several blocks, a grown one, and one that stays."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    raw = {f"layers.{i}.weight": torch.randn(333, 1111).bfloat16() for i in range(8)}
    raw |= {"embed": torch.randn(1000, 700).half(), "same": torch.randn(2000, 600).bfloat16()}
    tuned = {n: t + (0.01 * torch.randn_like(t) if n[0] == "l" else 0) for n, t in raw.items()}
    tuned["embed"] = torch.cat([raw["embed"], torch.randn(3, 700).half()])
    write_checkpoint(folder / "raw", raw)
    write_checkpoint(folder / "tuned", tuned)
    weightops.diff(folder / "raw", folder / "tuned", folder / "small", compress=True, max_shard_size="3MB")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw, and deltas `plain` and `small`, of models that could be run."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "raw", "llama", 0)
    save_tiny(folder / "tuned", "llama", 1)
    for name in ("plain", "small"):
        weightops.diff(folder / "raw", folder / "tuned", folder / name, compress=name == "small")
    return folder


def test_workers_and_threads_change_no_byte(family: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        made = tmp_path / f"small-{workers}"
        weightops.diff(family / "raw", family / "tuned", made, compress=True, max_shard_size="3MB", workers=workers)
        assert digests(made) == digests(family / "small")
        out = tmp_path / f"out-{workers}"
        weightops.recover(family / "raw", made, out, workers=workers, max_shard_size="source")
        assert digests(out / "model.safetensors") == digests(family / "tuned/model.safetensors")


def test_it_is_smaller_and_what_stays_takes_nothing(family: Path) -> None:
    result = weightops.diff(family / "raw", family / "tuned", family / "x", compress=True, dry_run=True)
    made = sum(path.stat().st_size for path in (family / "small").glob("*.wdelta"))
    assert made < 0.6 * result.nbytes
    same = weightops.open_checkpoint(family / "small")["same"].op
    assert same.extent[0] == same.extent[1]


@pytest.mark.parametrize("threads", [1, 4])
def test_any_range_is_what_it_is_in_the_whole(family: Path, threads: int) -> None:
    """Ranges in and out of order, across blocks, and of one block again and again."""
    small = weightops.open_checkpoint(family / "small")
    tensor = small["embed"]
    whole = bytes(tensor.read())
    random = np.random.default_rng(0)
    with Evaluator(threads=threads) as read:
        position = 0
        for _ in range(40):
            nbytes = int(random.choice([1, 7, 4096, 300_000, 1 << 20, len(whole)]))
            start = position if random.random() < 0.6 else int(random.integers(0, len(whole)))
            out = bytearray(min(nbytes, len(whole) - start))
            read(tensor, start, memoryview(out))
            assert bytes(out) == whole[start : start + len(out)]
            position = (start + len(out)) % len(whole)
            if random.random() < 0.2:  # another tensor in between
                read(small["layers.0.weight"], 5, memoryview(bytearray(100)))


def test_another_original_is_refused_by_name_and_nothing_is_written(family: Path, tmp_path: Path) -> None:
    changed = weights(family / "raw")
    changed["same"].view(torch.int16)[3] ^= 1
    write_checkpoint(tmp_path / "raw", changed)
    before = digests(tmp_path)
    with pytest.raises(IncompatibleInputs, match="raw is not the base of this delta: same differs"):
        weightops.recover(tmp_path / "raw", family / "small", tmp_path / "out")
    assert digests(tmp_path) == before
    assert not (tmp_path / "out.partial").exists()


def test_several_outputs_of_one_recipe_are_made_from_one_read(family: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"sources: {{raw: {family / 'raw'}, tuned: {family / 'tuned'}}}\n"
        "tensors:\n"
        "  small: {diff: {raw: raw, tuned: tuned, compress: true}}\n"
        "  plain: {diff: {raw: raw, tuned: tuned}}\n"
        "  half: {cast: {source: tuned, dtype: float32}}\n"
        f"outputs:\n  {tmp_path / 'a'}: {{from: small, max_shard_size: 3MB}}\n"
        f"  {tmp_path / 'b'}: {{from: plain}}\n  {tmp_path / 'c'}: {{from: half}}\n"
    )
    weightops.run(tmp_path / "recipe.yaml")
    names = {path.name for path in (family / "small").iterdir()} - {"weightops-manifest.json"}
    assert {n: (tmp_path / "a" / n).read_bytes() for n in names} == {
        n: (family / "small" / n).read_bytes() for n in names
    }
    assert same_bits(weights(tmp_path / "c"), {n: t.float() for n, t in weights(family / "tuned").items()})


def test_a_dry_run_says_that_its_sizes_are_the_most_there_can_be(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["diff", "--raw", str(family / "raw"), "--tuned", str(family / "tuned"), "--out", str(tmp_path / "x")]
    said = []
    for more in ((), ("--compress",)):
        assert run([*command, "--dry-run", *more]) == 0
        said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk")]
    assert [line.startswith("disk     at most ") for line in said] == [False, True]


def test_room_is_asked_for_no_more_than_is_known_to_be_needed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_disk", lambda out: preflight._SPARE_NBYTES + 6_000_000)
    with pytest.raises(NoRoom, match="the output needs"):
        weightops.diff(family / "raw", family / "tuned", tmp_path / "plain")
    weightops.diff(family / "raw", family / "tuned", tmp_path / "small", compress=True)


def test_what_does_not_go_with_it_is_refused_in_a_sentence(family: Path, tmp_path: Path) -> None:
    sides = (family / "raw", family / "tuned", tmp_path / "out")
    with pytest.raises(UsageError, match="no compressed file is"):
        weightops.diff(*sides, method="subtract", compress=True)
    with pytest.raises(UsageError, match="wdelta files, not safetensors"):
        weightops.diff(*sides, compress=True, format="safetensors")


def test_shard_makes_a_plain_delta_of_it(family: Path, tmp_path: Path) -> None:
    weightops.shard(family / "small", tmp_path / "plain")
    weightops.recover(family / "raw", tmp_path / "plain", tmp_path / "out")
    assert same_bits(weights(tmp_path / "out"), weights(family / "tuned"))
    assert not list((tmp_path / "plain").glob("*.wdelta*"))


@pytest.mark.parametrize("part", [False, True], ids=["the folder", "one of its files"])
@pytest.mark.parametrize("kind", ["plain", "small"])
def test_readers_say_what_it_is(models: Path, kind: str, part: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a file that is named alone, without the document."""
    folder = models / kind
    name = "delta.wdelta" if kind == "small" else "delta.safetensors"
    delta = str(folder / name if part else folder)
    is_what = "is a delta, not a model"
    commands = [
        (["inspect", delta], 0, "exact delta" + (", compressed" if kind == "small" else "")),
        (["check", delta], 0, "it is an exact delta, no model"),
        (["verify", str(folder)], 0, f"{name}: ok"),
        (["compare", delta, str(models / "raw")], 1, is_what),
        (["cast", delta, "--dtype", "float16", "--out", "x"], 1, is_what),
        (["convert", delta, "--to", "meta", "--out", "x"], 1, is_what),
        (["recover", "--raw", delta, "--diff", delta, "--out", "x"], 1, is_what),
        (["generate", delta, "--prompt", "hi"], 1, is_what),
        (["quantize", delta, "--out", "x"], 1, is_what),
    ]
    if part:
        recover = ["recover", "--raw", str(models / "raw"), "--diff", delta, "--out", "x"]
        commands.append((recover, 13, "part of an exact delta, without weightops-delta.json"))
    for command, code, words in commands:
        assert (run(command), command) == (code, command)
        captured = capsys.readouterr()
        assert words in captured.out + captured.err
