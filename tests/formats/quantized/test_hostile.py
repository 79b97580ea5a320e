"""What files say of quantised weights, replaced by anything: an error of ours, or numbers, and soon."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from number_formats import given, golden, looked_up
from support import evaluate, evaluate_all

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import WeightopsError
from weightops.formats.quantized.groups import group_of
from weightops.operations.dequantize import dequantize
from weightops.spec import DType

LAYER = "model.layers.0.mlp.down_proj"
MANY = settings(max_examples=50, deadline=None)
STATED = (
    *("awq-gemv-g64", "bnb-int8", "ct-fp8-block", "ct-mixed", "ct-mxfp4", "ct-nvfp4", "ct-old-pack-w4-gidx"),
    *("ct-old-sparse-24-bitmask", "ct-pack-w3-g32", "fp8-block-128", "hqq-4bit-g32", "mlx-mixed-2-8", "mlx-nvfp4"),
    *("modelopt-nvfp4", "mxfp4-gpt-oss", "torchao-int8"),
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, 2, 7, 16, 1 << 64])
words = st.text(max_size=8) | st.sampled_from(
    ["group", "float", "int", "re:", "re:.*", "re:(", "re:(?P<a>)(?P<a>)", "Linear", "0.12", "gptq", "torch.float16"]
)
documents = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A document with one or two of its values replaced, or taken out, or new ones beside them."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        at = made
        while isinstance(at, dict) and at:
            key = draw(st.sampled_from(sorted(at)))
            inner = at[key]
            if not (isinstance(inner, dict) and inner) or draw(st.integers(0, 3)) == 0:
                match draw(st.sampled_from(["put", "put", "remove", "add"])):
                    case "put":
                        at[key] = draw(documents)
                    case "remove":
                        del at[key]
                    case _:
                        at[draw(words)] = draw(documents)
                break
            at = inner
    return made


def survives(source: Checkpoint) -> None:
    """Either an error of ours, or numbers for every tensor."""
    with looked_up(), suppress(WeightopsError):
        found = dequantize(source, dtype=DType.F32, evaluate=evaluate_all)
        for name in found:
            if found[name] is not source.get(name) and found[name].nbytes < 1 << 24:
                evaluate(found[name])


@MANY
@drawn(st.data())
def test_configurations(data: st.DataObject) -> None:
    source = golden(data.draw(st.sampled_from(STATED)))
    document = source.config()
    keys = [key for key in ("quantization", "quantization_config") if key in document]
    made = data.draw(changed(document[keys[0]]))
    survives(replace(source, sidecars={"config.json": written_json({**document, **dict.fromkeys(keys, made)})}))


@MANY
@drawn(st.data())
def test_states_of_bitsandbytes(data: st.DataObject) -> None:
    source = golden(data.draw(st.sampled_from(["bnb-nf4", "bnb-nf4-double", "bnb-fp4"])))
    name = next(name for name in source if LAYER in name and "quant_state" in name)
    state = data.draw(changed(json.loads(evaluate(source[name]))))
    text = data.draw(st.sampled_from([json.dumps(state).encode()] * 4 + [b"", b"\xff", b"[]", b"{" * 5000]))
    survives(replace(source, tensors={**source, name: given(DType.U8, (len(text),), text)}))


@MANY
@drawn(st.data())
def test_metadata_of_torchao_and_the_map_of_quanto(data: st.DataObject) -> None:
    source = golden("torchao-int8")
    about = data.draw(changed(json.loads(source.metadata[f"{LAYER}.weight"])))
    survives(replace(source, metadata={**source.metadata, f"{LAYER}.weight": json.dumps(about)}))
    source = golden("quanto-qint4")
    qmap = json.loads(source.sidecar("quanto_qmap.json") or b"")
    few = {LAYER: qmap[LAYER]}
    survives(replace(source, sidecars={**source.sidecars, "quanto_qmap.json": written_json(data.draw(changed(few)))}))


@MANY
@drawn(st.sampled_from(["bnb-nf4-double", "hqq-4bit-g32", "ct-pack-w4-g32-asym", "ct-old-sparse-bitmask"]), st.data())
def test_bytes_of_parts(name: str, data: st.DataObject) -> None:
    """Small parts that say how others are to be read: shapes, offsets, indices, flags."""
    source = golden(name)
    part = data.draw(st.sampled_from([n for n in source if LAYER in n and source[n].nbytes <= 512]))
    spec = source[part].spec
    size = spec.nbytes
    made = data.draw(st.binary(min_size=size, max_size=size))
    survives(replace(source, tensors={**source, part: given(spec.dtype, spec.shape, made)}))


@pytest.mark.parametrize("pattern", ["re:(a|a)*" * 20 + "b", "re:(.*)*\\1!", "re:" + "(" * 5000, "re:(?:.?){60}.{60}!"])
def test_patterns_that_would_be_matched_for_years_end(pattern: str) -> None:
    settings = {"config_groups": {"group_0": {"targets": [pattern, "Linear"], "weights": {"num_bits": 4}}}}
    with suppress(WeightopsError):
        assert group_of(settings, f"{LAYER}.{'a' * 60}")
