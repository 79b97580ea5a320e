"""dequantize: the weights are what the integers stand for, however they are stored; and what contradicts is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_models import Quantised, Scheme, bloom, llama, quantised, without
from safetensors.torch import load_file
from support import digests, evaluate, given_tensor, to_bytes, write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.ops.gptq.tensors import dequantized
from weightops.ops.numbers.bitpack import BITS, pack, pack_columns
from weightops.spec import DType

SCHEMES = [
    *(Scheme(bits=bits) for bits in BITS),
    Scheme(group_size=-1),
    Scheme(group_size=40),
    Scheme(shuffled=True),
    Scheme(bits=3, sym=False, ends=True),
    Scheme(bits=8, sym=False, ends=True, checkpoint_format="gptq_v2", shuffled=True),
    Scheme(sym=False, ends=True, checkpoint_format="gptq_v2"),
]
Q = "model.layers.0.self_attn.q_proj"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def exact(found: Quantised, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The plain state: weights rounded once to `dtype`, all else as it is."""
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    state = {name: tensor for name, tensor in found.state.items() if not name.endswith(parts)}
    return state | {name: torch.from_numpy(weight).to(dtype) for name, weight in found.weights.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_scale_times_integer_less_zero_rounded_once(tmp_path: Path, scheme: Scheme) -> None:
    found = quantised(llama(), scheme)
    found.save(tmp_path / "model", max_shard_size=40_000)
    weightops.dequantize(tmp_path / "model", tmp_path / "plain")
    assert same(weights(tmp_path / "plain"), exact(found, torch.float16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_every_type_of_scales_and_weights_is_rounded_once(dtype: str, scales: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    q = generator.integers(0, 256, (64, 32), dtype=np.uint8)
    zeros = generator.integers(0, 256, (2, 32), dtype=np.uint8)
    values = torch.from_numpy(generator.uniform(0.001, 0.01, (2, 32))).to(scales)
    parts = (
        given_tensor(torch.from_numpy(pack(q, 8))),
        given_tensor(torch.from_numpy(pack_columns(zeros, 8))),
        given_tensor(values),
        None,
    )
    made = dequantized("P", parts, 8, "as-stored", 32, DType(dtype))
    wide = values.double().numpy().repeat(32, 0) * (q.astype(int) - zeros.astype(int).repeat(32, 0))
    # numpy rounds float64 to float16 once; torch by way of float32, and so twice
    narrow = torch.from_numpy(wide.T.astype(np.float16 if dtype == "float16" else np.float32))
    if dtype != "bfloat16" or scales is not torch.float32:
        assert evaluate(made) == to_bytes(narrow.to(getattr(torch, dtype)))
    assert evaluate(made, 128 * 3 + 2) == evaluate(made)


def test_a_module_is_the_same_in_any_blocks_and_order() -> None:
    found = quantised(llama(), Scheme(shuffled=True, sym=False)).checkpoint
    parts = tuple(found[f"{Q}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    made = dequantized(Q, parts, 4, "plus-one", 32, DType.F16)
    whole = evaluate(made)
    assert evaluate(made, 128) == evaluate(made, 1000) == whole


def test_the_config_says_no_more_that_the_model_is_quantised(tmp_path: Path) -> None:
    quantised(bloom(), Scheme()).save(tmp_path / "model")
    result = weightops.dequantize(tmp_path / "model", tmp_path / "plain", dtype="bfloat16")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert ("quantization_config" in config, config["torch_dtype"]) == (False, "bfloat16")
    assert not (tmp_path / "plain/quantize_config.json").exists()
    assert result.warnings == ()


@pytest.mark.parametrize("architecture", [llama, bloom])
def test_transformers_computes_with_it_what_the_integers_stand_for(
    tmp_path: Path, architecture: Callable[[], Any]
) -> None:
    found = quantised(architecture(), Scheme(shuffled=True))
    found.save(tmp_path / "model")
    weightops.dequantize(tmp_path / "model", tmp_path / "plain", dtype="float32")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, found.plain()(tokens).logits)


# --- files as they were shipped ---------------------------------------------------------------------------------------


def ship_as_tigerbot(found: Quantised, folder: Path, names: list[str]) -> Path:
    """Torch files without an index, each a part of the state dict, and the config of the plain model beside."""
    folder.mkdir()
    items = list(found.state.items())
    for number, name in enumerate(names):
        torch.save(dict(items[number :: len(names)]), folder / name)
    (folder / "config.json").write_text(json.dumps(found.config))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["tigerbot-4bit-128g-0.pt", "tigerbot-4bit-128g-1.pt"],
        ["tigerbot-4bit-128g-00001-of-00002.pt", "tigerbot-4bit-128g-00002-of-00002.pt"],
        ["tigerbot-4bit-128g-a.pt", "tigerbot-4bit-128g-b.pt", "tigerbot-4bit-128g-c.pt"],
        ["tigerbot-4bit-128g-only.pt"],
    ],
)
def test_shards_as_tigerbot_shipped_them(tmp_path: Path, names: list[str]) -> None:
    found = quantised(bloom(), Scheme(sym=False, shuffled=True))
    folder = ship_as_tigerbot(found, tmp_path / "model", names)
    torch.save({"other": torch.zeros(3)}, folder / "adapter.pt")
    weightops.dequantize(folder / "tigerbot-4bit-128g-*.pt", tmp_path / "plain")
    assert same(weights(tmp_path / "plain"), exact(found, torch.float16))


def test_a_pattern_finds_gaps_and_nothing(tmp_path: Path) -> None:
    names = ["bot-1.pt", "bot-2.pt", "bot-3.pt"]
    folder = ship_as_tigerbot(quantised(bloom(), Scheme()), tmp_path / "model", names)
    (folder / "bot-2.pt").unlink()
    with pytest.raises(CorruptInput, match="incomplete: shards 1, 3 of a numbered set"):
        open_checkpoint(folder / "bot-*.pt")
    with pytest.raises(SourceMissing, match=r"model: no weight file matches cat-\*\.pt"):
        open_checkpoint(folder / "cat-*.pt")


def test_the_config_may_lie_elsewhere(tmp_path: Path) -> None:
    found = quantised(bloom(), Scheme())
    folder = ship_as_tigerbot(found, tmp_path / "model", ["bot.pt"])
    (tmp_path / "base").mkdir()
    shutil.move(folder / "config.json", tmp_path / "base")
    result = weightops.dequantize(folder, tmp_path / "bare")
    assert "has no config.json; name one with --config" in " ".join(result.warnings)
    weightops.dequantize(folder, tmp_path / "plain", config=tmp_path / "base")
    assert json.loads((tmp_path / "plain/config.json").read_text())["model_type"] == "bloom"
    with pytest.raises(SourceMissing, match=r"nowhere: no such file"):
        weightops.dequantize(folder, tmp_path / "other", config=tmp_path / "nowhere")
    shutil.copy(tmp_path / "base/config.json", folder)
    weightops.dequantize(folder / "bot.pt", tmp_path / "single")
    assert digests(tmp_path / "single").keys() == digests(tmp_path / "plain").keys()


def test_old_files_have_no_g_idx(tmp_path: Path) -> None:
    found = without(quantised(llama(), Scheme(group_size=40)), ".g_idx")
    found.save(tmp_path / "model")
    weightops.dequantize(tmp_path / "model", tmp_path / "plain")
    assert same(weights(tmp_path / "plain"), exact(found, torch.float16))


def test_groups_of_unknown_size_are_refused(tmp_path: Path) -> None:
    found = without(quantised(llama(), Scheme(group_size=20)), ".g_idx")
    weightops.save(replace(found.checkpoint, sidecars={}), tmp_path / "bare")
    with pytest.raises(CorruptInput, match="96 inputs are not 5 groups of one size, and there is neither g_idx nor"):
        weightops.dequantize(tmp_path / "bare", tmp_path / "other")


# --- zero points ------------------------------------------------------------------------------------------------------


def relabelled(found: Quantised, **fields: Any) -> Quantised:
    return replace(found, scheme=replace(found.scheme, **fields))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("really", "label"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_a_wrong_format_is_noticed_and_can_be_forced(tmp_path: Path, bits: int, really: Any, label: Any) -> None:
    found = quantised(llama(), Scheme(bits=bits, checkpoint_format=really))
    relabelled(found, checkpoint_format=label).save(tmp_path / "model")
    with pytest.raises(IncompatibleInputs, match=f"the config says {label}, the zero points .* model in {really}"):
        weightops.dequantize(tmp_path / "model", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    weightops.dequantize(tmp_path / "model", tmp_path / "plain", checkpoint_format=really)
    assert same(weights(tmp_path / "plain"), exact(found, torch.float16))


def all_ones(folder: Path, **meta: Any) -> tuple[Path, Quantised]:
    """A v1 file with one zero point of 0, stored as 15."""
    found = quantised(llama(), Scheme(sym=False))
    words = found.state[f"{Q}.qzeros"].numpy().copy()
    words[0, 0] = (int(words[0, 0]) | 0xF0) & 0x7FFFFFFF
    state = {**found.state, f"{Q}.qzeros": torch.from_numpy(words)}
    document = {**found.scheme.config.to_json(), **meta}
    made = replace(found, state=state, config={**found.config, "quantization_config": document})
    made.save(folder)
    for name, value in (("config.json", {**found.config, "quantization_config": document}),):
        (folder / name).write_text(json.dumps(value))
    (folder / "quantize_config.json").unlink()
    return folder, made


@pytest.mark.parametrize(("overflow", "zero", "next_zero"), [("wrap", 0, 0), ("plus-one", 16, 0), ("carry", 0, 1)])
def test_a_zero_point_of_all_ones_is_read_as_is_said(tmp_path: Path, overflow: Any, zero: int, next_zero: int) -> None:
    folder, found = all_ones(tmp_path / "model")
    with pytest.raises(IncompatibleInputs, match=r"stored zero points are all ones, .*q_proj has the first") as error:
        weightops.dequantize(folder, tmp_path / "plain")
    assert "--zero-overflow" in (error.value.hint or "")
    weightops.dequantize(folder, tmp_path / "plain", dtype="float32", zero_overflow=overflow)
    made, plain = weights(tmp_path / "plain")[f"{Q}.weight"].double().numpy(), found.weights[f"{Q}.weight"]
    scales = found.state[f"{Q}.scales"].double().numpy()
    stored = found.state[f"{Q}.qzeros"].numpy().view(np.uint32)[0, 0]
    old = quantised(llama(), Scheme(sym=False)).state[f"{Q}.qzeros"].numpy().view(np.uint32)[0, 0]
    for output, shift in ((1, (int(old) >> 4 & 15) + 1 - zero), (2, -next_zero)):
        expected = plain[output, :32] + scales[0, output] * float(shift)
        assert np.allclose(made[output, :32], expected, rtol=0, atol=1e-12)
    assert stored != old
    assert np.array_equal(made[3:], plain[3:])


def test_gptqmodel_is_known_to_carry(tmp_path: Path) -> None:
    folder, _ = all_ones(tmp_path / "model", meta={"quantizer": ["gptqmodel:7.7.0"]})
    result = weightops.dequantize(folder, tmp_path / "plain")
    assert "1 zero points of 0 in checkpoint_format gptq, read as GPTQModel writes them" in " ".join(result.warnings)


# --- refusals ---------------------------------------------------------------------------------------------------------


def poked(found: Quantised, name: str, value: float) -> Quantised:
    tensor = found.state[name].clone()
    tensor.view(-1)[0] = value
    return replace(found, state={**found.state, name: tensor})


CASES: list[tuple[Callable[[Quantised], Quantised], type[WeightopsError], str]] = [
    (lambda f: without(f, f"{Q}.qzeros"), CorruptInput, "q_proj has no qzeros, expected qweight, qzeros and scales"),
    (lambda f: poked(f, f"{Q}.scales", float("nan")), CorruptInput, r"q_proj\.scales holds NaN or infinity"),
    (lambda f: poked(f, f"{Q}.g_idx", 7), CorruptInput, r"q_proj\.g_idx names group 7, expected 0 to 1"),
    (lambda f: poked(f, f"{Q}.g_idx", -1), CorruptInput, r"q_proj\.g_idx names group -1, expected 0 to 1"),
    (lambda f: poked(f, f"{Q}.scales", 60000), IncompatibleInputs, "a weight is -?[0-9.e+]+, float16 ends at 65504"),
    (lambda f: relabelled(f, bits=3), IncompatibleInputs, "the tensors have 4 bits, the config says 3"),
    (
        lambda f: relabelled(f, group_size=16),
        IncompatibleInputs,
        "the tensors have 3 groups of 96 inputs, the config's",
    ),
    (
        lambda f: replace(f, state={**f.state, f"{Q}.weight": torch.zeros(64, 64).half()}),
        IncompatibleInputs,
        "q_proj.weight is there in two forms",
    ),
]


@pytest.mark.parametrize(("damage", "error", "text"), CASES, ids=[text for *_, text in CASES])
def test_damaged_folders_give_an_error_and_no_file(
    tmp_path: Path, damage: Callable[[Quantised], Quantised], error: type[WeightopsError], text: str
) -> None:
    damage(quantised(llama(), Scheme())).save(tmp_path / "model")
    with pytest.raises(error, match=text):
        weightops.dequantize(tmp_path / "model", tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_no_gptq_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "plain", {"a.weight": torch.zeros(3)})
    with pytest.raises(IncompatibleInputs, match=r"plain: holds no quantised weight"):
        weightops.dequantize(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(UsageError, match="weights are not dequantised to int8"):
        weightops.dequantize(tmp_path / "plain", tmp_path / "out", dtype="int8")
    write_checkpoint(tmp_path / "awq", {"a.qweight": torch.zeros(3)}, {"quantization_config": {"quant_method": "awq"}})
    assert run(["dequantize", str(tmp_path / "awq"), "--out", str(tmp_path / "out")]) == 13
    assert "awq: a.weight has no a.qzeros" in capsys.readouterr().err
