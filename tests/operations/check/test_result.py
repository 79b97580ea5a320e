"""What an operation made is held against transformers' class before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save_tiny

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.folder import open_checkpoint
from weightops.operations.check import held_to_class


@pytest.fixture(params=["llama", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_tiny(request.param, tmp_path / "model"))


def without(source: Checkpoint, name: str) -> Checkpoint:
    return replace(source, tensors={n: t for n, t in source.items() if n != name})


def test_what_loads_passes(model: Checkpoint) -> None:
    assert held_to_class(model) is model


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_key_is_refused_by_name(model: Checkpoint, name: str) -> None:
    with pytest.raises(IncompatibleInputs, match=name):
        held_to_class(without(model, name))


def test_a_key_too_many_is_refused_by_name(model: Checkpoint) -> None:
    more = replace(model, tensors={**model.tensors, "model.extra.weight": model["model.norm.weight"]})
    with pytest.raises(IncompatibleInputs, match=r"model\.extra\.weight"):
        held_to_class(more)


def test_another_shape_is_refused_by_name(model: Checkpoint) -> None:
    wide = replace(model, tensors={**model.tensors, "model.norm.weight": model["model.embed_tokens.weight"]})
    with pytest.raises(IncompatibleInputs, match=r"model\.norm\.weight"):
        held_to_class(wide)


def test_what_was_so_before_is_nobodys_fault_now(model: Checkpoint) -> None:
    odd = replace(model, tensors={**model.tensors, "model.extra.weight": model["model.norm.weight"]})
    assert held_to_class(odd, odd) is odd


def test_where_nothing_is_known_that_is_said(model: Checkpoint) -> None:
    unknown = model.with_config(lambda config: {**config, "model_type": "of_my_own"})
    (said,) = held_to_class(unknown).warnings
    assert "held against no model" in said and "of_my_own" in said
