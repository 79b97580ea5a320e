"""What `weightops inspect` prints: trees, statistics and adapters, in terminals of any width and elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import config_of, save_adapter, save_model
from support import write_checkpoint
from terminals import needs_terminals, run_in_terminal

from weightops.cli.inspection import count, shortened
from weightops.cli.main import run

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"

TREE = """\
module                               tensors              parameters      size    share
model                                                         2.75 M    5.5 MB  100.0 %
  embed_tokens.weight                float16 [2048, 256]       524 k    1.0 MB   19.0 %
  layers.[0-3]                                                2.23 M    4.5 MB   81.0 %
    input_layernorm.weight           float16 [256]            1.02 k    2.0 kB    0.0 %
    mlp                                                       1.57 M    3.1 MB   57.1 %
      down_proj.weight               float16 [256, 512]        524 k    1.0 MB   19.0 %
      gate_proj.weight               float16 [512, 256]        524 k    1.0 MB   19.0 %
      up_proj.weight                 float16 [512, 256]        524 k    1.0 MB   19.0 %
    post_attention_layernorm.weight  float16 [256]            1.02 k    2.0 kB    0.0 %
    self_attn                                                  655 k    1.3 MB   23.8 %
      k_proj.weight                  float16 [64, 256]        65.5 k  131.1 kB    2.4 %
      o_proj.weight                  float16 [256, 256]        262 k  524.3 kB    9.5 %
      q_proj.weight                  float16 [256, 256]        262 k  524.3 kB    9.5 %
      v_proj.weight                  float16 [64, 256]        65.5 k  131.1 kB    2.4 %
  norm.weight                        float16 [256]               256     512 B    0.0 %
"""
NARROW = """\
module                            tensors          parameters      size    share
model                                                  2.75 M    5.5 MB  100.0 %
  embed_tokens.weight             F16 [2048, 256]       524 k    1.0 MB   19.0 %
  layers.[0-3]                                         2.23 M    4.5 MB   81.0 %
    input_layernorm.weight        F16 [256]            1.02 k    2.0 kB    0.0 %
    mlp                                                1.57 M    3.1 MB   57.1 %
      down_proj.weight            F16 [256, 512]        524 k    1.0 MB   19.0 %
      gate_proj.weight            F16 [512, 256]        524 k    1.0 MB   19.0 %
      up_proj.weight              F16 [512, 256]        524 k    1.0 MB   19.0 %
    post_atte…n_layernorm.weight  F16 [256]            1.02 k    2.0 kB    0.0 %
"""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(["inspect", *arguments]) == code
    return capsys.readouterr().out


def test_the_tree_of_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert TREE in printed(capsys, str(TINY), "--tree")


def test_levels_below_the_last_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, str(TINY), "--tree", "--depth", "2")
    assert "\n  layers.[0-3]         36 tensors               2.23 M  4.5 MB   81.0 %\n" in shown
    assert "self_attn" not in shown


@needs_terminals
@pytest.mark.parametrize(("columns", "tree"), [(80, NARROW), (160, TREE)])
def test_a_terminal_of_any_width_gets_lines_that_fit(columns: int, tree: str) -> None:
    shown = run_in_terminal(["inspect", str(TINY), "--tree", "--include", "model.*"], columns, 50)
    assert shown.code == 0
    assert tree in shown.text
    assert max(map(len, shown.text.splitlines()[1:])) <= columns


@needs_terminals
@pytest.mark.parametrize("option", ["--stats", "--tensors"])
def test_so_do_the_other_tables(option: str) -> None:
    shown = run_in_terminal(["inspect", str(TINY), option, "--progress", "none"], 80, 50)
    table = shown.text[shown.text.index("\ntensor ") :].split("\n\n")[0].splitlines()[1:]
    assert len(table) == 39
    assert max(map(len, table)) <= 80
    assert "…" in "".join(table) or option == "--tensors"


def test_statistics_stand_beside_names_or_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"l.{i}.w": torch.tensor([float(i), 2.0, 0.0, -1.0]) for i in range(3)}
    tensors["n.b"] = torch.tensor([torch.nan, torch.inf, 4.0])
    write_checkpoint(tmp_path / "m", tensors)
    shown = printed(capsys, str(tmp_path / "m"), "--stats", "--quiet")
    rows = [line.split() for line in shown.splitlines()]
    assert ["l.1.w", "0.5", "1.12", "-1", "2", "25", "%", "0", "0"] in rows
    assert ["n.b", "4", "0", "4", "4", "0", "1", "1"] in rows
    shown = printed(capsys, str(tmp_path / "m"), "--stats", "--tree", "--quiet")
    assert ["l.[0-2].w", "0.5", "1.19", "-1", "2", "33.3", "%", "0", "0"] in [
        line.split() for line in shown.splitlines()
    ]


def test_types_without_statistics_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "m", {"a": torch.zeros(8), "b": torch.zeros(8, dtype=torch.complex64)})
    shown = printed(capsys, str(tmp_path / "m"), "--stats", "--quiet")
    assert "\nwithout statistics, because their numbers share bytes or are complex: 1 tensors of complex64\n" in shown
    assert "without statistics" not in printed(capsys, str(tmp_path / "m"))


def test_a_tensor_of_zeros_is_zero_to_a_hundred_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "m", {"a": torch.zeros(8), "b": torch.tensor([0.0, 1.0, 2.0])})
    rows = [line.split() for line in printed(capsys, str(tmp_path / "m"), "--stats", "--quiet").splitlines()]
    assert ["a", "0", "0", "0", "0", "100", "%", "0", "0"] in rows
    assert ["b", "1", "0.816", "0", "2", "33.3", "%", "0", "0"] in rows


def test_documents_have_the_tree_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, str(TINY), "--tree", "--depth", "2", "--json"))
    (top,) = found["tree"]
    layers = next(child for child in top["children"] if child["name"] == "layers.[0-3]")
    assert layers == {
        **{"name": "layers.[0-3]", "tensors": 36, "parameters": 2_230_272, "nbytes": 4_460_544},
        **{"only": [], "dtype": None, "shape": None, "children": []},
    }
    assert json.loads(printed(capsys, str(TINY), "--json"))["tree"] is None


def test_hostile_names_are_shown_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["model.\x1b[31mred.weight", "model.\u202egnp.weight", "a\r\nb", "[bold]x[/bold]", "", "…" * 300]
    write_checkpoint(tmp_path / "m", {name: torch.ones(2) for name in names})
    for option in ("--tree", "--stats", "--tensors"):
        shown = printed(capsys, str(tmp_path / "m"), option, "--quiet")
        assert not set("\x1b\u202e\r") & set(shown)
        assert "\\x1b[31mred" in shown
        assert "\\u202egnp" in shown
        assert "[bold]x[/bold]" in shown


def test_an_adapter_is_told_and_held_against_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model(tmp_path / "base", config_of("llama"))
    other = save_model(tmp_path / "other", config_of("gpt2"))
    adapter = save_adapter(tmp_path / "adapter", base)
    shown = printed(capsys, str(adapter), "--stats", "--base", str(base), "--quiet")
    assert "LoRA: r 4, lora_alpha 6, scale lora_alpha / r\ntargets down_proj, q_proj\n" in shown
    assert "target                               shape  r  alpha  scale  norm  r99  stable  spectrum\n" in shown
    assert f"fits {base}: each of 4 parts has its place there, by name and shape" in shown
    shown = printed(capsys, str(adapter), "--base", str(other), code=3)
    assert f"does not fit {other}: of 4 parts 4 without a place there" in shown
    assert "norm" not in shown.partition("\n\n")[2].split("file ")[0]


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (67_108_864, "67.1 M"), (999_999, "1e+03 k"), (8 * 10**9, "8 B")],
)
def test_numbers_of_parameters_for_people(number: int, said: str) -> None:
    assert count(number) == said.replace("1e+03 k", "1 M")


@pytest.mark.parametrize(
    ("name", "room", "said"),
    [
        ("model.layers.12.mlp.up_proj.weight", 34, "model.layers.12.mlp.up_proj.weight"),
        ("model.layers.12.mlp.up_proj.weight", 33, "…layers.12.mlp.up_proj.weight"),
        ("model.layers.12.mlp.up_proj.weight", 24, "…12.mlp.up_proj.weight"),
        ("model.layers.12.mlp.up_proj.weight", 20, "…12.ml…p_proj.weight"),
        ("    post_attention_layernorm.weight", 24, "    post_a…ernorm.weight"),
        ("abcdefghi", 4, "a…hi"),
    ],
)
def test_names_keep_the_number_of_their_layer_and_their_end(name: str, room: int, said: str) -> None:
    assert shortened(name, room) == said
    assert len(said) <= room
