"""The command line of adapters: numbers with commas, what a dry run lists, and what is said of losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_sums import changes_of, distance, total
from adapters import Made

from weightops.cli.main import run


@pytest.fixture
def here(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [str(made.adapter(seed=seed)) for seed in (1, 2)]


@pytest.mark.parametrize(
    "words", ["--weights 0.75,-0.5", "--weight 0.75 --weight -0.5", "--weights=0.75 --weight=-0.5"]
)
def test_weights_are_given_together_or_one_by_one(here: list[str], words: str) -> None:
    assert run(["adapter", "combine", *here, *words.split(), "--out", "out", "-q"]) == 0
    assert distance(changes_of(Path("out")), total([Path(each) for each in here], (0.75, -0.5))) < 1e-6


def test_what_is_no_number_and_what_is_no_command(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["combine", *here, "--weights", "1,x", "--out", "out"], "--weight 1,x: expected numbers, found 'x'"),
        (["combine", *here, "--weights", "1", "--out", "out"], "there are 1 weights for 2 adapters"),
        (["mix"], "No such command 'mix'"),
        ([], "Missing command"),
    ):
        assert run(["adapter", *words]) == 2
        assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_dry_run_lists_what_is_done(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter", "combine", *here, "--method", "svd", "--rank", "3", "--out", "out", "-n"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.mlp.down_proj", "2", "svd", "of", "rank", "4", "+", "4", "rank", "3"] in lines
    assert run(["adapter", "convert", here[0], "--to", "mlx", "--out", "out", "-n"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.mlp.down_proj.lora_a", "2", "float32", "[200,", "4]"] in lines
    assert run(["adapter", "rank", here[0], "--rank", "2", "--out", "out", "-n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] is False
    assert not Path("out").exists()


def test_what_is_off_is_said_and_recorded(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter", "combine", *here, "--method", "linear", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "4 modules, off by" in out
    manifest = json.loads(Path("out/weightops-manifest.json").read_text())
    assert {"error", "norm", "rank"} == manifest["notes"]["model.layers.0.mlp.down_proj"].keys()
    ((operation, arguments),) = manifest["recipe"]["tensors"]["result"].items()
    assert (operation, arguments["method"]) == ("combine-adapters", "linear")
    assert run(["adapter", "combine", *here, "--out", "cat"]) == 0
    assert "off by" not in capsys.readouterr().out
