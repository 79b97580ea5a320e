"""Every option of every command that is a recipe of one line reaches its operation: from argv, from Python, from YAML.

The rows are held against the commands' own options and the operations' own signatures, so that a new option needs one.
Those of `merge`, most of which stand in a document, have a file of their own: test_wiring_merge.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import command_of, line_of
from support import write_checkpoint

import weightops
from weightops import api
from weightops.cli.main import run
from weightops.engine.job.drive import Threads
from weightops.recipes import execute, recipe
from weightops.recipes.verbs import VERBS, find_verb
from weightops.spec import DType


@dataclass(frozen=True)
class Row:
    """An option on the command line and in Python, and how it comes to the operation."""

    argv: str
    keyword: str
    given: Any
    arrives: Mapping[str, Any]


def row(argv: str, keyword: str, given: Any, **arrives: Any) -> Row:
    return Row(argv, keyword, given, arrives or {keyword: given})


F16 = DType.F16
ROWS: dict[str, list[Row]] = {
    "recover": [
        row("--vocab mean", "vocab", "mean"),
        row("--dtype float16", "dtype", "float16", dtype=F16),
        row("--carry x* --carry y", "carry", ("x*", "y")),
        row("--drop z", "drop", ("z",)),
    ],
    "diff": [
        row("--method subtract", "method", "subtract"),
        row("--dtype float16", "dtype", "float16", dtype=F16),
        row("--compress", "compress", True),
    ],
    "convert": [
        row("--to meta", "to", "meta"),
        row("--from tencentpretrain", "from_", "tencentpretrain"),
        row("--model-parallel 3", "model_parallel", 3),
        row("--dtype float16", "dtype", "float16"),
        row("--pure", "pure", True),
        row("--imatrix tokenizer.model", "imatrix", "tokenizer.model"),
        row("--tensor-type a=q4_0 --tensor-type b=f16", "tensor_type", ("a=q4_0", "b=f16")),
        row("--output-tensor-type q8_0", "output_tensor_type", "q8_0"),
        row("--token-embedding-type q8_0", "token_embedding_type", "q8_0"),
        row("--allow-requantize", "allow_requantize", True),
        row("--set context_length=7", "set", {"context_length": "7"}),
        row("--tokenizer tokenizer.model", "tokenizer", "tokenizer.model"),
        row("--no-tokenizer", "tokenizer", False),
        row("--base hf://org/name", "base", "hf://org/name"),
        row("--format torch-1.12", "format", "torch-1.12", as_in_2023=True),
    ],
    "shard": [
        row("--rename a b", "rename", {"a": "b"}),
        row("--drop-prefix p.", "drop_prefix", "p."),
        row("--add-prefix q.", "add_prefix", "q."),
        row("--drop *.x", "drop", ("*.x",)),
        row("--tie", "tie", True),
        row("--untie", "untie", True),
        row("--layers 0-1", "layers", "0-1"),
    ],
    "cast": [
        row("--dtype float16", "dtype", "float16", dtype=F16),
        row("--keep a* --keep b", "keep", ("a*", "b")),
        row("--on-overflow saturate", "on_overflow", "saturate"),
        row("--scheme fp8", "scheme", "fp8"),
        row("--scheme fp8-block", "scheme", "fp8-block"),
        row("--strategy tensor", "strategy", "tensor"),
        row("--cast-all", "cast_all", True),
    ],
    "merge-lora": [
        row("--weight 0.5", "weight", (0.5,)),
        row("--precision float64", "precision", "float64"),
        row("--two-roundings", "two_roundings", True),
    ],
    "extract-lora": [
        row("--rank 3", "rank", 3),
        row("--energy 0.5", "energy", 0.5),
        row("--max-rank 7", "max_rank", 7),
        row("--seed 9", "seed", 9),
        row("--dtype float16", "dtype", "float16", dtype=F16),
        row("--target q_proj", "target", ("q_proj",)),
        row("--rest refuse", "rest", "refuse"),
    ],
    "dequantize": [
        row("--dtype float32", "dtype", "float32", dtype=DType.F32),
        row("--checkpoint-format gptq_v2", "checkpoint_format", "gptq_v2"),
        row("--zero-overflow carry", "zero_overflow", "carry"),
        row("--config other", "config", "other"),
    ],
    "pack": [
        row("--bits 3", "bits", 3),
        row("--group-size 64", "group_size", 64),
        row("--checkpoint-format gptq_v2", "checkpoint_format", "gptq_v2"),
    ],
    "repack": [
        row("--to awq", "to", "awq"),
        row("--checkpoint-format gptq_v2", "checkpoint_format", "gptq_v2"),
        row("--zero-overflow carry", "zero_overflow", "carry"),
    ],
    "combine-adapters": [
        row("--method svd", "method", "svd"),
        row("--weight 0.5", "weight", (0.5,)),
        row("--weights 0.5,-2", "weight", (0.5, -2.0)),
        row("--density 0.5", "density", 0.5),
        row("--rank 3", "rank", 3),
        row("--vote frequency", "vote", "frequency"),
        row("--seed 9", "seed", 9),
        row("--dtype float16", "dtype", "float16", dtype=F16),
    ],
    "resize-adapter": [
        row("--rank 3", "rank", 3),
        row("--keep 0.5", "keep", 0.5),
        row("--by sv_fro", "by", "sv_fro"),
        row("--seed 9", "seed", 9),
        row("--dtype float16", "dtype", "float16", dtype=F16),
    ],
    "convert-adapter": [
        row("--to mlx", "to", "mlx"),
        row("--heads 8", "heads", 8),
        row("--alpha 16", "alpha", 16.0),
    ],
    "vocab": [
        row("--rows 7", "rows", 7),
        row("--multiple 8", "multiple", 8),
        row("--add-token <a> --add-token <b>", "add_token", ("<a>", "<b>")),
        row("--special", "special", True),
        row("--ends-turn", "ends_turn", True),
        row("--chat-template list.md5", "chat_template", "list.md5"),
        row("--init zero", "init", "zero"),
        row("--seed 3", "seed", 3),
        row("--trim list.md5", "trim", "list.md5"),
        row("--method mean", "method", "mean"),
        row("--k 5", "k", 5),
        row("--override a b", "override", {"a": "b"}),
    ],
}
ROWS |= {
    "part": [
        row("--take vision", "take", "vision"),
        row("--drop mtp", "drop", ("mtp",)),
        row("--head classifier", "head", "classifier"),
        row("--labels 3", "labels", 3),
        row("--init normal", "init", "normal"),
        row("--seed 9", "seed", 9),
    ],
    "experts": [
        row("--layout stacked", "layout", "stacked"),
        row("--keep 0,2-3", "keep", [0, 2, 3]),
        row("--per-token 2", "per_token", 2),
        row("--ungroup", "ungroup", True),
        row("--seed 9", "seed", 9),
    ],
    "edit": [
        row("--set a=1 --set b=x", "set", {"a": 1, "b": "x"}),
        row("--unset c --unset d", "unset", ("c", "d")),
        row("--no-architecture", "architecture", False),
    ],
}
FROM_FILES = {"experts": {"from_dense", "count", "by"}, "edit": {"steps", "tokenizer"}}
"""What is read from a file that the command names; the tests of those operations have it."""
REQUIRED = {
    "convert": {"--to": "hf"},
    "pack": {"--bits": "4", "--group-size": "32"},
    "repack": {"--to": "gptq"},
    "convert-adapter": {"--to": "peft"},
}
FILES = [
    row("--format torch", "format", "torch"),
    row("--max-shard-size 7MB", "max_shard_size", "7MB"),
    row("--expect list.md5", "expect", "list.md5"),
    row("--digest md5 --digest sha256", "digest", ("md5", "sha256")),
    row("--card", "card", True),
    row("--reflink", "reflink", True),
]
RUNNING = [
    row("--dry-run", "dry_run", True),
    row("--overwrite", "overwrite", True),
    row("--restart", "restart", True),
    row("--if-exists skip", "if_exists", "skip"),
    row("--workers 3", "workers", 3),
    row("--job jobs", "job", Path("jobs")),
    row("--executor threads", "executor", Threads()),
]
ELSEWHERE = {"--out", "-o", "--json", "--progress", "--verbose", "-v", "--quiet", "-q", "-n", "--check"}
"""Of the output's name, of what is shown, and of what is done before the operation."""


def sources(verb: str) -> dict[str, str]:
    """Those that must be given."""
    return {role: role for role in find_verb(verb).roles if role not in find_verb(verb).defaults}


def argv(verb: str, option: str) -> list[str]:
    given = [
        word for flag, value in REQUIRED.get(verb, {}).items() if flag not in option.split() for word in (flag, value)
    ]
    if verb == "merge":
        return [verb, "raw", "tuned", "--method", "linear", *option.split(), "--out", "out", "--quiet"]
    names = sources(verb)
    plain = {"adapter"} if " " in line_of(verb) else {"source"}
    places = [word for r in names for word in ([r] if r in plain else [f"--{r}", r])]
    return [*line_of(verb).split(), *places, *given, *option.split(), "--out", "out", "--quiet"]


def call(verb: str, option: Row) -> None:
    """The same from Python."""
    if verb == "merge":
        weightops.merge(["raw", "tuned"], "out", method="linear", **{option.keyword: option.given})
        return
    required = {flag[2:].replace("-", "_"): value for flag, value in REQUIRED.get(verb, {}).items()}
    required = {name: int(value) if value.isdigit() else value for name, value in required.items()}
    given = option.given[0] if isinstance(option.given, tuple) and len(option.given) == 1 else option.given
    places = [name for role, name in sources(verb).items() if role not in find_verb(verb).defaults]
    getattr(api, verb.replace("-", "_"))(*places, "out", **{**required, option.keyword: given})


class Reached(Exception):
    """The operation, or the writing, was reached."""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What arrives: of the operation in `verb`, of the files in `files`, of the run in `running`."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "diff", "tuned", "base", "adapter", "source"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(2)})
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "list.md5").touch()
    found: dict[str, Any] = {}

    def stand_in(name: str) -> Any:
        verb = find_verb(name)

        def operation(**given: Any) -> Any:
            found["verb"] = {key: value for key, value in given.items() if key in verb.options}
            first = given[next(iter(verb.roles))]
            return first[0] if isinstance(first, list) else first

        return replace(verb, function=operation)

    def write_all(wanted: Mapping[Path, execute.Wanted], running: execute.Running) -> Any:
        ((out, each),) = wanted.items()
        found.update(out=out, files=each.files, running=running)
        raise Reached

    monkeypatch.setattr(execute, "find_verb", stand_in)
    monkeypatch.setattr(execute, "write_all", write_all)
    return found


def held_in(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        came = found[name]
        assert (tuple(came) if isinstance(value, tuple) else came) == value, name


@pytest.mark.parametrize(
    ("verb", "option"), [(v, o) for v, rows in ROWS.items() for o in rows], ids=lambda x: str(x)[:40]
)
@pytest.mark.parametrize("door", ["argv", "python", "yaml"])
def test_an_option_of_an_operation_reaches_it(seen: dict[str, Any], verb: str, option: Row, door: str) -> None:
    if door == "argv":
        assert run(argv(verb, option.argv)) == 1  # `Reached` is no error of ours
    elif door == "python":
        with pytest.raises(Reached):
            call(verb, option)
    else:
        needed = {"convert": {"to": "hf"}, "pack": {"bits": 4, "group_size": 32}, "repack": {"to": "gptq"}}
        needed["convert-adapter"] = {"to": "peft"}
        required = needed.get(verb, {})
        plain = {
            n: v.value if isinstance(v, DType) else list(v) if isinstance(v, tuple) else v
            for n, v in option.arrives.items()
        }
        if verb == "edit":  # whose language has these two under config
            plain = {"config": plain} if plain.keys() <= {"set", "unset"} else plain
        document = {
            "sources": {name: f"./{name}" for name in sources(verb)},
            "tensors": {"x": {verb: {**sources(verb), **required, **plain}}},
            "outputs": {"./out": {"from": "x"}},
        }
        with pytest.raises(Reached):
            weightops.run(document)
    held_in(seen["verb"], option.arrives)
    assert seen["out"].name == "out"


@pytest.mark.parametrize("option", FILES + RUNNING, ids=lambda option: option.argv)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("door", ["argv", "python"])
def test_an_option_of_writing_reaches_it(seen: dict[str, Any], verb: str, option: Row, door: str) -> None:
    if verb == "diff" and option.keyword == "format":
        option = row("--format safetensors", "format", "safetensors")  # an exact delta has no other
    if door == "argv":
        assert run(argv(verb, option.argv)) == 1
    else:
        with pytest.raises(Reached):
            call(verb, option)
    held_in(seen["files" if option in FILES or option.keyword == "format" else "running"], option.arrives)


@pytest.mark.parametrize("option", FILES, ids=lambda option: option.argv)
def test_an_option_of_files_reaches_them_from_a_recipe(seen: dict[str, Any], option: Row) -> None:
    given = list(option.given) if isinstance(option.given, tuple) else option.given
    document = {"sources": {"x": "./source"}, "outputs": {"./out": {"from": "x", option.keyword: given}}}
    with pytest.raises(Reached):
        weightops.run(document)
    held_in(seen["files"], option.arrives)


@pytest.mark.parametrize("option", RUNNING, ids=lambda option: option.argv)
def test_an_option_of_running_reaches_a_recipe(seen: dict[str, Any], tmp_path: Path, option: Row) -> None:
    (tmp_path / "recipe.yaml").write_text("sources: {x: ./source}\noutputs: {./out: {from: x}}\n")
    assert run(["run", "recipe.yaml", *option.argv.split(), "--quiet"]) == 1
    held_in(seen["running"], option.arrives)


def test_every_operation_has_rows() -> None:
    assert {*ROWS, "merge"} == {*VERBS}


@pytest.mark.parametrize("verb", ROWS)
def test_the_rows_are_all_that_there_is(verb: str) -> None:
    command = command_of(line_of(verb))
    flags = {flag for option in command.params if option.param_type_name == "option" for flag in option.opts}
    rows = {word for r in (*ROWS[verb], *FILES, *RUNNING) for word in r.argv.split() if word.startswith("--")}
    in_files = FROM_FILES.get(verb, set())
    assert flags - ELSEWHERE - {f"--{n.replace('_', '-')}" for n in (*find_verb(verb).roles, *in_files)} == rows
    assert {name for r in ROWS[verb] for name in r.arrives} == find_verb(verb).options.keys() - in_files
    assert {r.keyword for r in FILES} == {*recipe.FILE_FIELDS}
    assert {r.keyword for r in RUNNING} == execute.Running.__annotations__.keys() - {"control"}
