"""Ranks of adapters: lower ones are the best there are, higher ones change nothing, and shares choose as sd-scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_sums import changes_in, changes_of, distance, loaded
from adapters import Made, edit_tensors, state

import weightops

MEASURES = ("squares", "sv_fro", "sv_cumulative", "sv_ratio")


def kept_by_kohya(values: torch.Tensor, by: str, target: float) -> int:
    """The rank that `rank_resize` of sd-scripts chooses, for float64."""
    if by == "sv_ratio":
        index = int(torch.sum(values > values[0] / target)) - 1
    elif by == "sv_cumulative":
        index = int(torch.searchsorted(torch.cumsum(values, 0) / values.sum(), target))
    else:
        wanted = target**2 if by == "sv_fro" else target
        squares = values.square()
        index = int(torch.searchsorted(torch.cumsum(squares, 0) / squares.sum(), wanted))
    return max(0, min(index, len(values) - 1)) + 1


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_best_one(made: Made, tmp_path: Path, rank: int) -> None:
    source = made.adapter(seed=1, use_rslora=True)
    result = weightops.resize_adapter(source, tmp_path / "out", rank=rank)
    exact, found = changes_of(source), changes_of(tmp_path / "out")
    assert result.manifest is not None
    for name, change in exact.items():
        values = torch.linalg.svdvals(change)
        best = float(values[rank:].norm() / values.norm())
        assert float((found[name] - change).norm() / change.norm()) == pytest.approx(best, rel=1e-5)
        assert result.manifest.notes[name]["error"] == pytest.approx(best, rel=1e-5)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (rank, rank, False, {})
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert distance(changes_in(loaded(made.base(), [source, tmp_path / "out"]), "a1"), found) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "k_proj"]}])
def test_a_higher_rank_changes_nothing_and_keeps_the_factors(
    made: Made, tmp_path: Path, settings: dict[str, Any]
) -> None:
    source = made.adapter(seed=1, **settings)
    weightops.resize_adapter(source, tmp_path / "out", rank=9, seed=3)
    old, new = state(source), state(tmp_path / "out")
    for name, tensor in old.items():
        if "base_layer" in name:
            assert torch.equal(new[name], tensor)
            continue
        part = new[name][:4] if "_A" in name else new[name][:, :4]
        rest = new[name][4:] if "_A" in name else new[name][:, 4:]
        assert torch.equal(part, tensor)
        if "_A" in name:
            assert 0 < rest.abs().max() <= 1 / math.sqrt(tensor.shape[1])
            assert abs(float(rest.mean())) < 0.3 / math.sqrt(tensor.shape[1])
        else:
            assert not rest.any()
    assert distance(changes_of(tmp_path / "out"), changes_of(source)) < 1e-12
    loaded(made.base(), [source, tmp_path / "out"])


def test_the_same_rank_is_the_same_adapter(made: Made, tmp_path: Path) -> None:
    source = made.adapter(seed=1)
    weightops.resize_adapter(source, tmp_path / "out", rank=4)
    assert {n: t.tolist() for n, t in state(source).items()} == {
        n: t.tolist() for n, t in state(tmp_path / "out").items()
    }


@pytest.mark.parametrize(("by", "keep"), [("squares", 0.8), ("sv_fro", 0.8), ("sv_cumulative", 0.6), ("sv_ratio", 1.6)])
@pytest.mark.parametrize("limit", [None, 5])
def test_a_share_gives_every_module_the_rank_that_it_needs(
    made: Made, tmp_path: Path, by: Any, keep: float, limit: int | None
) -> None:
    source = made.adapter(seed=1, r=12)
    weightops.resize_adapter(source, tmp_path / "out", keep=keep, by=by, rank=limit)
    exact = changes_of(source)
    wanted = {name: kept_by_kohya(torch.linalg.svdvals(change)[:12], by, keep) for name, change in exact.items()}
    found = {name: tensor.shape[0] for name, tensor in state(tmp_path / "out").items() if "lora_A" in name}
    assert [*found.values()] == [min(rank, limit or 12) for rank in wanted.values()]
    assert limit or len({*found.values()}) > 1 or by != "squares"
    changes_of(tmp_path / "out")  # which holds ranks to the config


def test_a_change_of_zeros_has_a_rank_of_one(made: Made, tmp_path: Path) -> None:
    source = made.adapter(seed=1, init_lora_weights=True)
    edit_tensors(source, lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    weightops.resize_adapter(source, tmp_path / "out", keep=0.9)
    assert {t.shape[0] for n, t in state(tmp_path / "out").items() if "lora_A" in n} == {1}
    assert not any(change.any() for change in changes_of(tmp_path / "out").values())


def test_experts_have_one_rank(made: Made, tmp_path: Path) -> None:
    target = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    source = made.adapter("mixtral", seed=1, lora_alpha=4, **target)
    base = state(made.base("mixtral"))
    for name, options in {"less": {"rank": 3}, "more": {"rank": 6}, "enough": {"keep": 0.9}}.items():
        weightops.resize_adapter(source, tmp_path / name, **options)
        for folder, adapter in ((tmp_path / f"{name}-merged", tmp_path / name), (tmp_path / f"{name}-source", source)):
            weightops.merge_lora(made.base("mixtral"), adapter, folder)
        one, two = state(tmp_path / f"{name}-merged"), state(tmp_path / f"{name}-source")
        weights = [n for n in base if "w2" in n or "down_proj" in n]
        assert weights
        for weight in weights:
            change = (two[weight] - base[weight]).double().reshape(-1, *base[weight].shape[-2:])
            found = (one[weight] - base[weight]).double().reshape(change.shape)
            left, values, right = torch.linalg.svd(change, full_matrices=False)
            rank = {"less": 3, "more": 4}.get(
                name, json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
            )
            values[..., rank:] = 0
            torch.testing.assert_close(found, left * values[..., None, :] @ right, rtol=1e-3, atol=2e-5)
