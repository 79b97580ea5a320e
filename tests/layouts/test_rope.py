"""Rotary settings that cannot be, by what transformers makes of them; check names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny

import weightops
from weightops.layouts.rope import rope_problems, with_rope

BASE = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("settings", "severity", "message"),
    [
        ({"rope_type": "yarn"}, "error", "yarn lacks factor"),
        ({"rope_type": "yarn", "factor": 4.0}, "warning", "takes max_position_embeddings, 512"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
            "warning",
            "stretches 128 by 2 to 256, and max_position_embeddings is 512",
        ),
        ({"type": "linaer", "factor": 2.0}, "error", "rope_type linaer is not known"),
        ({"rope_type": "llama3", "factor": 8.0}, "error", "llama3 lacks original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": "2"}, "error", "factor is '2'"),
        (
            {"rope_type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            "error",
            "long_factor has 7 numbers",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.2}, "error", "3 of a head's 16 numbers are turned"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("inside", ["", "text_config"])
def test_what_is_wrong_is_said(settings: dict[str, Any], severity: str, message: str, key: str, inside: str) -> None:
    own = {**BASE, key: settings}
    found = list(rope_problems({inside: own} if inside else own))
    assert [p.severity for p in found if message in p.message] == [severity]
    assert all((f"{inside}." if inside else "config.json: ") in p.message for p in found)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": None, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding")}},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
    ],
)
def test_what_is_right_is_passed_over(settings: dict[str, Any]) -> None:
    assert list(rope_problems({**BASE, **settings})) == []


def test_dialects_that_contradict_each_other() -> None:
    config = {**BASE, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    (found,) = rope_problems(config)
    assert "rope_theta is 10000.0, in rope_parameters 1000000.0" in found.message
    config = {**BASE, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}
    (found,) = rope_problems(config)
    assert "rope_scaling is linear, rope_parameters is default" in found.message


def test_another_type_begins_anew() -> None:
    yarn = with_rope({**BASE, "rope_theta": 1e6}, {"type": "yarn", "factor": 4.0})
    assert yarn["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    plain = with_rope(yarn, {"type": "default"})
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert plain["rope_scaling"] is None


def test_check_finds_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_scaling"] = {"type": "yarn"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    report = weightops.check(tmp_path / "model", values=False)
    assert any("yarn lacks factor" in finding.message for finding in report.findings)
