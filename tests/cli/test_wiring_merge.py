"""Every option of `merge` reaches the operation: from argv, from Python, and from a recipe what may stand in one.

What its document says is one option of the operation, `config`; see test_wiring.py for the other operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.cli.commands.merge import PARAMETERS, command
from weightops.cli.main import run
from weightops.errors import UsageError
from weightops.ops.merging.methods import METHODS
from weightops.recipes import execute
from weightops.recipes.verbs import find_verb

PLUGIN = """
from weightops.ops.merging.method import Method
def first_of_wiring(inputs): return lambda blocks, first: blocks[0]
METHODS = [Method(first_of_wiring, "tests", "input")]
"""


class Row(NamedTuple):
    """An option on the command line and in Python, and what it is in the document, or beside it in a recipe."""

    argv: str
    python: Mapping[str, Any]
    document: Mapping[str, Any]
    beside: Mapping[str, Any] = {}


def parameter(argv: str, **values: Any) -> Row:
    named = {name.rstrip("_"): value for name, value in values.items()}
    return Row(argv, {"parameters": named}, {"parameters": named})


ROWS = [
    parameter("--weight 0.25", weight=0.25),
    parameter("--t 0,0.5,1", t=[0.0, 0.5, 1.0]),
    parameter("--density 0.5", density=0.5),
    parameter("--lambda 2", lambda_=2.0),
    parameter("--normalize false", normalize=False),
    parameter("--rescale true", rescale=True),
    parameter("--gamma 0.1", gamma=0.1),
    parameter("--epsilon 0.1", epsilon=0.1),
    parameter("--select-topk 0.5", select_topk=0.5),
    parameter("--filter-wise true", filter_wise=True),
    parameter("--nuslerp-flatten false", nuslerp_flatten=False),
    parameter("--nuslerp-row-wise true", nuslerp_row_wise=True),
    parameter("--normalize-weights false", normalize_weights=False),
    parameter("--eps 1e-3", eps=0.001),
    parameter("--max-iter 3", max_iter=3.0),
    parameter("--tol 0.1", tol=0.1),
    parameter("--r 0.5", r=0.5),
    parameter("--alpha 0.5", alpha=0.5),
    parameter("--scale 0.5", scale=0.5),
    Row("--method slerp", {"method": "slerp"}, {"merge_method": "slerp"}),
    Row("--base ./raw", {"base": "./raw"}, {"base_model": "raw"}),
    Row("--dtype float32", {"dtype": "float32"}, {"dtype": "float32"}),
    Row("--out-dtype bfloat16", {"out_dtype": "bfloat16"}, {"out_dtype": "bfloat16"}),
    Row("--tokenizer-source union", {"tokenizer_source": "union"}, {"tokenizer_source": "union"}),
    Row("--chat-template chatml", {"chat_template": "chatml"}, {"chat_template": "chatml"}),
    Row("--seed 7", {"seed": 7}, {}, {"seed": 7}),
    Row("--allow-nonfinite", {"allow_nonfinite": True}, {}, {"allow_nonfinite": True}),
    Row("--plugin p.py", {"plugin": "p.py"}, {}, {"plugin": hashlib.sha256(PLUGIN.encode()).hexdigest()}),
]
ELSEWHERE = {"--out", "--html", "--explain", "--verify", "--json", "--quiet", "--progress", "--verbose", "--dry-run"}
WRITING = {"--format", "--max-shard-size", "--expect", "--digest", "--card", "--reflink"}
RUNNING = {"--overwrite", "--if-exists", "--restart", "--workers", "--job", "--executor"}
"""Of the files and of the run: test_wiring.py has these for all operations."""


class Reached(Exception):
    """The operation was reached."""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The options with which the operation was called."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "tuned"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(2)})
    (tmp_path / "p.py").write_text(PLUGIN)
    verb, found = find_verb("merge"), {}

    def operation(**given: Any) -> Any:
        found.update({name: value for name, value in given.items() if name in verb.options})
        raise Reached

    monkeypatch.setattr(execute, "find_verb", lambda name: replace(verb, function=operation))
    yield found
    METHODS.pop("first_of_wiring", None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.argv)
@pytest.mark.parametrize("door", ["argv", "python", "yaml"])
def test_an_option_reaches_the_operation(seen: dict[str, Any], row: Row, door: str) -> None:
    document = {"merge_method": "linear", "models": [{"model": "raw"}, {"model": "tuned"}], **row.document}
    if door == "argv":
        method = [] if "--method" in row.argv else ["--method", "linear"]
        base = ["--base", "raw"] if "slerp" in row.argv.split() else []
        assert run(["merge", "./raw", "./tuned", *method, *base, *row.argv.split(), "--out", "out", "--quiet"]) == 1
        document |= {"base_model": "raw"} if base else {}
    elif door == "python":
        with pytest.raises(Reached):
            weightops.merge(["./raw", "./tuned"], "out", **{"method": "linear", "base": "./raw", **row.python})
        document |= {"base_model": "raw"}
    else:
        document |= {"base_model": "raw"}
        recipe = {
            "sources": {"raw": "./raw", "tuned": "./tuned"},
            "tensors": {"x": {"merge": {**document, **row.beside}}},
            "outputs": {"./out": {"from": "x"}},
        }
        if "plugin" in row.beside:
            with pytest.raises(UsageError, match=r"tensors\.x\.merge\.plugin") as raised:
                weightops.run(recipe)
            assert "on the command line alone" in str(raised.value.hint)
            return
        with pytest.raises(Reached):
            weightops.run(recipe)
    assert seen["config"] == document
    assert {name: seen[name] for name in row.beside} == row.beside


def test_a_value_for_each_model_stands_with_it(seen: dict[str, Any]) -> None:
    words = "--method linear --weight 0.25 --weight 0.75 --density 0.5"
    assert run(["merge", "./raw", "./tuned", *words.split(), "--out", "out", "--quiet"]) == 1
    assert seen["config"] == {
        "merge_method": "linear",
        "models": [
            {"model": "raw", "parameters": {"weight": 0.25}},
            {"model": "tuned", "parameters": {"weight": 0.75}},
        ],
        "parameters": {"density": 0.5},
    }


def test_the_rows_are_all_that_there_is() -> None:
    flags = {option.opts[0 if len(option.opts) == 1 else -1] for option in command.params if option.name != "models"}
    rows = {word for row in ROWS for word in row.argv.split() if word.startswith("--")}
    assert flags - ELSEWHERE - WRITING - RUNNING == rows
    assert {name for row in ROWS for name in row.document.get("parameters", {})} == PARAMETERS.keys()
    assert {name for row in ROWS for name in row.beside} | {"config"} == find_verb("merge").options.keys()
