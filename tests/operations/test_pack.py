"""pack: the same files that the quantiser's own writer gives, from integers in any type; and nothing that readers
would take for something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_models import Scheme, rounded
from safetensors.torch import load_file
from support import write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import IncompatibleInputs, UsageError, WeightopsError
from weightops.formats.quantized.gptq import write_module
from weightops.ops.numbers.bitpack import BITS

State = dict[str, torch.Tensor]


def layer(scheme: Scheme, inputs: int = 96, outputs: int = 64) -> tuple[State, State]:
    """A layer `m` as it is given, and as it is stored."""
    weight = np.random.default_rng(1).normal(0, 0.1, (outputs, inputs))
    made = rounded(weight, scheme)
    given = {"m.q": made.q, "m.zeros": made.zeros, "m.scales": made.scales, "m.g_idx": made.g_idx}
    bias = np.arange(outputs).astype(np.float16)
    arguments = (made.q, made.zeros, made.scales, made.g_idx, bias, scheme.bits, scheme.checkpoint_format)
    stored = write_module("m", *arguments)
    tensors = {name: torch.from_numpy(array) for name, array in given.items()} | {"m.bias": torch.from_numpy(bias)}
    return tensors, {name: torch.from_numpy(array) for name, array in stored.items()}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_packed_tensors_are_those_of_the_writer(
    tmp_path: Path, bits: int, checkpoint_format: Any, kind: torch.dtype
) -> None:
    scheme = Scheme(bits=bits, sym=False, shuffled=True, checkpoint_format=checkpoint_format)
    given, stored = layer(scheme)
    given = {n: t.to(kind) if n in ("m.q", "m.zeros") else t for n, t in given.items()}
    write_checkpoint(tmp_path / "given", {"norm.weight": torch.ones(8).half(), **given})
    weightops.pack(tmp_path / "given", tmp_path / "out", bits=bits, group_size=32, checkpoint_format=checkpoint_format)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == {"norm.weight", *stored}
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in stored.items())
    document = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert document == json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    expected = {"bits": bits, "group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": checkpoint_format}
    assert {key: document[key] for key in expected} == expected


@pytest.mark.parametrize("container", ["awq", "compressed-tensors"])
def test_other_containers_hold_what_is_given(tmp_path: Path, container: Any) -> None:
    scheme = Scheme(sym=False, ends=True, checkpoint_format="gptq_v2")
    given, _ = layer(scheme)
    write_checkpoint(tmp_path / "given", given, {"model_type": "llama"})
    for name in ("gptq_v2", container):
        weightops.pack(tmp_path / "given", tmp_path / name, bits=4, group_size=32, checkpoint_format=name)
        weightops.dequantize(tmp_path / name, tmp_path / f"{name}-plain")
    expected, found = (load_file(tmp_path / f"{n}-plain/model.safetensors") for n in ("gptq_v2", container))
    assert torch.equal(found["m.weight"], expected["m.weight"])
    assert torch.equal(found["m.bias"], given["m.bias"])
    given["m.g_idx"] = given["m.g_idx"].flip(0)
    write_checkpoint(tmp_path / "other", given, {"model_type": "llama"})
    with pytest.raises(IncompatibleInputs, match="act-order"):
        weightops.pack(tmp_path / "other", tmp_path / "out", bits=4, group_size=32, checkpoint_format=container)


def test_what_is_not_given_is_symmetric_and_in_order(tmp_path: Path) -> None:
    given, stored = layer(Scheme(group_size=40, checkpoint_format="gptq_v2"))
    del given["m.zeros"], given["m.g_idx"]
    write_checkpoint(tmp_path / "given", given)
    arguments = ["--bits", "4", "--group-size", "40", "--checkpoint-format", "gptq_v2", "--quiet"]
    assert run(["pack", str(tmp_path / "given"), *arguments, "--out", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    document = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (document["sym"], document["desc_act"], document["checkpoint_format"]) == (True, False, "gptq_v2")


def test_what_is_packed_dequantizes_to_scale_times_integer_less_zero(tmp_path: Path) -> None:
    scheme = Scheme(bits=3, sym=False, shuffled=True, group_size=-1)
    given, _ = layer(scheme)
    write_checkpoint(tmp_path / "given", given)
    weightops.pack(tmp_path / "given", tmp_path / "packed", bits=3, group_size=-1)
    weightops.dequantize(tmp_path / "packed", tmp_path / "plain", dtype="float32")
    scales, zeros = given["m.scales"].double(), given["m.zeros"].double()
    expected = (scales * (given["m.q"].double() - zeros)).T.float()
    assert torch.equal(load_file(tmp_path / "plain/model.safetensors")["m.weight"], expected)


def test_shards_of_the_source_do_not_matter_and_a_module_is_not_torn(tmp_path: Path) -> None:
    given, stored = layer(Scheme())
    write_checkpoint(tmp_path / "one", given)
    write_checkpoint(tmp_path / "three", given, shards=3)
    for name in ("one", "three"):
        weightops.pack(tmp_path / name, tmp_path / f"{name}-out", bits=4, group_size=32, max_shard_size=100)
    one, three = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("one", "three"))
    assert one.keys() == three.keys() == stored.keys()
    assert all(torch.equal(one[name], three[name]) for name in stored)


# --- refusals ---------------------------------------------------------------------------------------------------------


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: edit(state[name])}


def put(name: str, value: float) -> Callable[[State], State]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change(name, edit)


CASES: list[tuple[Callable[[State], State], type[WeightopsError], str]] = [
    (put("m.q", 16), IncompatibleInputs, r"m\.q holds 16, expected 0 to 15 for 4 bits"),
    (change("m.q", lambda q: q.to(torch.int8) - 8), IncompatibleInputs, r"m\.q holds -8, expected 0 to 15"),
    (put("m.zeros", 0), IncompatibleInputs, r"m\.zeros holds a zero point of 0, which checkpoint_format gptq cannot"),
    (put("m.zeros", 16), IncompatibleInputs, r"m\.zeros holds 16, expected 0 to 15"),
    (put("m.scales", 0), IncompatibleInputs, r"m\.scales holds 0\.0 for group 0 of output 3, and 0 more"),
    (put("m.scales", float("nan")), IncompatibleInputs, r"m\.scales holds nan"),
    (put("m.scales", 1e-7), IncompatibleInputs, r"m\.scales holds 1\.19\d*e-07 for group 0"),
    (change("m.scales", lambda s: s.float() * 1e9), IncompatibleInputs, r"m\.scales: .* too large for float16"),
    (put("m.g_idx", 3), IncompatibleInputs, r"m\.g_idx names group 3, expected 0 to 2"),
    (put("m.g_idx", 2), IncompatibleInputs, r"m\.g_idx: a group has 33 columns, expected at most 32"),
    (change("m.g_idx", lambda g: g[1:]), IncompatibleInputs, r"m\.g_idx is \[95\], expected \[96\]"),
    (change("m.scales", lambda s: s[1:]), IncompatibleInputs, r"m\.scales is \[2, 64\], expected \[3, 64\]"),
    (change("m.q", lambda q: q[:-1]), IncompatibleInputs, "has 95 inputs and 64 outputs, expected multiples of 32"),
    (change("m.q", lambda q: q.half()), IncompatibleInputs, r"m\.q is float16 \[96, 64\], expected integers \[K, N\]"),
    (change("m.scales", lambda s: s.to(torch.int32)), IncompatibleInputs, r"m\.scales is int32 .*, expected floats"),
    (change("m.zeros", lambda z: z.float()), IncompatibleInputs, r"m\.zeros is float32 .*, expected integers"),
    (change("m.zeros", lambda z: z[1:]), IncompatibleInputs, r"m\.zeros is \[2, 64\], expected \[3, 64\]"),
    (change("m.g_idx", lambda g: g.long()), IncompatibleInputs, r"m\.g_idx is int64 \[96\], expected int32"),
    (lambda s: {n: t for n, t in s.items() if n != "m.scales"}, IncompatibleInputs, "m has q and no scales"),
    (lambda s: {"m.bias": s["m.bias"]}, UsageError, "holds no integers to pack"),
    (lambda s: {**s, "n.qweight": s["m.q"].int()}, IncompatibleInputs, r"is packed already: it holds n\.qweight"),
]


@pytest.mark.parametrize(("edit", "error", "text"), CASES, ids=[text for *_, text in CASES])
def test_what_cannot_be_stored_is_refused(
    tmp_path: Path, edit: Callable[[State], State], error: type[WeightopsError], text: str
) -> None:
    given, _ = layer(replace(Scheme(), group_size=32))
    write_checkpoint(tmp_path / "given", edit({n: t.clone() for n, t in given.items()}))
    with pytest.raises(error, match=text):
        weightops.pack(tmp_path / "given", tmp_path / "out", bits=4, group_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]


@pytest.mark.parametrize(("bits", "group_size", "text"), [(5, 32, "5 bits are not packed"), (4, 0, "holds nothing")])
def test_options_that_the_format_does_not_have(tmp_path: Path, bits: int, group_size: int, text: str) -> None:
    given, _ = layer(Scheme())
    write_checkpoint(tmp_path / "given", given)
    with pytest.raises(UsageError, match=text):
        weightops.pack(tmp_path / "given", tmp_path / "out", bits=bits, group_size=group_size)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [False, True])
def test_what_some_readers_refuse_is_said(tmp_path: Path, checkpoint_format: Any, sym: bool) -> None:
    given, _ = layer(Scheme(sym=sym, group_size=32))
    write_checkpoint(tmp_path / "given", given, {"model_type": "llama"})
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "checkpoint_format": checkpoint_format, "dry_run": True}
    said = weightops.pack(tmp_path / "given", tmp_path / "out", **options).warnings
    expected = ["asymmetric in checkpoint_format gptq"] if not sym and checkpoint_format == "gptq" else []
    assert [text.partition(":")[0] for text in said] == expected
