"""One name for one thing: operations' parameters, options, Python's keywords, recipes' fields and docs/python.md agree.

See `weightops.recipes.names` for the rule.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from command_lines import command_of, function_name, line_of
from support import write_checkpoint

import weightops
from weightops.api import Output
from weightops.api.merging import MergeOptions
from weightops.api.outputs import OutputHere
from weightops.cli.commands.merge import PARAMETERS
from weightops.cli.main import LINES, cli, run
from weightops.errors import UsageError
from weightops.inference.asked import Asked
from weightops.io.yaml_document import Document
from weightops.operations.check import CheckOptions
from weightops.ops.merging.methods import METHODS
from weightops.recipes.execute import Running, RunningHere
from weightops.recipes.names import OLD_NAMES, OUTPUT
from weightops.recipes.recipe import FILE_FIELDS, Recipe, parse_recipe
from weightops.recipes.verbs import VERBS, find_verb

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"
OF_THE_COMMAND = {
    "check": {"strict", "html"},
    "verify": {"junit"},
    "manifest": {"out", "lists", "dry_run", "overwrite"},
    "inspect": {"tensors", "tree", "depth"},
    "quantize": {"html"},
    "generate": {"prompts", "out"},
    "chat": {"jsonl"},
    "compare": {"html"},
    "merge": {"html", "explain", "verify"},
    "work": {"time_limit"},
    "publish": {"endpoint"},
    "download": {"endpoint", "limit_rate", "timeout", "deadline", "cache"},
}
"""What only the command line has: reports in files, exit codes, what Python gives to a `Web`, and what other functions
of Python do (`explain_merge`, `verify_merge`). A cache is a flag there, and a folder for Python."""
MAPPINGS = {"merge": {"parameters": set(PARAMETERS)}}
"""What is a mapping for Python, and options by its keys on the command line."""
OF_A_FILE = {"edit": {"steps", "tokenizer"}}
"""What the command line has in a file, and Python as keywords too."""
DOCUMENTS = {
    "merge": {"config": {*("method", "base", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template")}}
}
"""Parameters that are documents in a language of their own, and the keywords of Python that stand in them."""
WITHOUT = {"env", "completion", "browse", "serve"}
"""Commands that have no function."""
OF_PYTHON = {"control", "web", "cache"}
OPEN = {
    f"Unpack[{kind.__name__}]": {*kind.__annotations__}
    for kind in (Output, OutputHere, Running, RunningHere, CheckOptions, Asked, MergeOptions)
}
SHOWN = {"as_json", "quiet", "verbose", "progress"}
DERIVED = {"convert": {"as_in_2023"}}
"""What follows from an option of another name: from `--format torch-1.12`."""


def function_of(name: str) -> Callable[..., Any]:
    return getattr(weightops, function_name(name))


def keywords(name: str) -> set[str]:
    """All that the function of a command takes, what stands for several keywords taken apart."""
    found = set()
    for parameter in inspect.signature(function_of(name)).parameters.values():
        is_open = parameter.kind is parameter.VAR_KEYWORD
        found |= OPEN[str(parameter.annotation)] if is_open else {parameter.name}
    return found - OF_PYTHON


@pytest.mark.parametrize("name", sorted({*LINES} - WITHOUT))
def test_options_are_called_as_keywords_of_python(name: str) -> None:
    names, known = {p.name for p in command_of(name).params if p.name}, keywords(name)
    for mapping, keys in MAPPINGS.get(name, {}).items():
        assert keys <= names
        names = names - keys | {mapping}
    options = {each if each in known else each.removeprefix("no_") for each in names}
    assert options - SHOWN - OF_THE_COMMAND.get(name, set()) == known - OF_A_FILE.get(name, set())


@pytest.mark.parametrize("name", LINES)
def test_an_option_is_spelled_as_its_name(name: str) -> None:
    for option in command_of(name).params:
        if isinstance(option, click.Option) and option.name not in {*SHOWN, "lists"}:
            assert option.name is not None
            assert f"--{option.name.removesuffix('_').replace('_', '-')}" in option.opts


@pytest.mark.parametrize("name", VERBS)
def test_parameters_of_an_operation_are_keywords_of_python(name: str) -> None:
    verb = find_verb(name)
    writing = {*FILE_FIELDS, *Running.__annotations__, "out", "check"}
    parameters = {*verb.roles, *verb.options} - DERIVED.get(name, set())
    for document, keys in DOCUMENTS.get(name, {}).items():
        assert document in parameters
        parameters = parameters - {document} | keys
    assert parameters == keywords(line_of(name)) - writing


def test_every_parameter_of_a_method_of_merging_is_an_option() -> None:
    assert {*PARAMETERS} == {name for method in METHODS.values() if not method.plugin for name in method.parameters}


def test_every_method_of_merging_is_in_the_help() -> None:
    (said,) = (option.help for option in command_of("merge").params if option.name == "method")
    assert re.findall(r"\b[a-z_]+\b", said.partition(": ")[2].replace(" or ", " ")) == [
        name for name, method in METHODS.items() if not method.plugin
    ]


def documented() -> dict[str, tuple[str, str]]:
    """The table of docs/python.md: command line and signature by command."""
    rows = re.findall(r"^\| `(\S+[^`]*)` \| `(\w+\(.*?\))`", PAGE.read_text(), re.MULTILINE)
    return {
        next(line for line in LINES if words == line or words.startswith(f"{line} ")): (words, signature)
        for words, signature in rows
    }


def test_the_page_about_python_has_the_signatures() -> None:
    found = documented()
    assert found.keys() == {*LINES} - WITHOUT
    for name, (words, said) in found.items():
        function = function_of(name)
        parts = []
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.KEYWORD_ONLY and "*" not in parts:
                parts.append("*")
            parts.append(f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name)
        assert said == f"{function.__name__}({', '.join(parts)})"
        params = command_of(name).params
        arguments = [p.make_metavar(click.Context(cli)) for p in params if isinstance(p, click.Argument)]
        options = [p.opts[-1] for p in params if isinstance(p, click.Option) and p.required]
        assert [word for word in words.split() if word.isupper() or "..." in word] == arguments
        assert {word for word in words.split() if word.startswith("--")} == set(options)


def recipe(verb: str, fields: Mapping[str, Any], **output: Any) -> Recipe:
    roles = {role: role for role in find_verb(verb).roles if role not in find_verb(verb).defaults}
    sources = {role: f"./{role}" for role in roles}
    document = {"sources": sources, "tensors": {"x": {verb: {**roles, **fields}}}}
    return parse_recipe(Document({**document, "outputs": {"./out": {"from": "x", **output}}}, "recipe"))


@pytest.mark.parametrize(
    ("verb", "fields", "options"),
    [
        ("convert", {"to": "hf", "layout": "meta"}, {"to": "hf", "from_": "meta"}),
        ("convert", {"to": "hf", "from": "meta"}, {"to": "hf", "from_": "meta"}),
        ("convert", {"to": "hf", "settings": {"n_heads": "2"}}, {"to": "hf", "set": {"n_heads": "2"}}),
        ("convert", {"to": "hf", "no_tokenizer": True}, {"to": "hf", "tokenizer": False}),
        ("convert", {"to": "hf", "no-tokenizer": True}, {"to": "hf", "tokenizer": False}),
        ("convert", {"to": "hf", "no_tokenizer": False}, {"to": "hf"}),
        ("merge-lora", {"weights": [0.5]}, {"weight": [0.5]}),
        ("extract-lora", {"rank": 2, "targets": "q_proj"}, {"rank": 2, "target": "q_proj"}),
        ("pack", {"bits": 4, "group-size": 32}, {"bits": 4, "group_size": 32}),
    ],
)
def test_recipes_read_names_of_before_and_dashes(verb: str, fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert recipe(verb, fields).steps["x"].options == options


def test_recipes_read_what_outputs_were_called_before() -> None:
    assert recipe("shard", {}, digests=["md5"]).outputs["out"].files == {"digest": ["md5"]}
    old = {(verb, name) for verb, names in OLD_NAMES.items() for name in names}
    assert old == {
        ("convert", "layout"),
        ("convert", "settings"),
        ("merge-lora", "weights"),
        ("extract-lora", "targets"),
        (OUTPUT, "digests"),
    }


def test_a_thing_is_said_once_whatever_it_is_called() -> None:
    with pytest.raises(UsageError, match=r"tensors\.x\.merge-lora\.weights: is weight once more"):
        recipe("merge-lora", {"weight": [1], "weights": [2]})


def test_a_recipe_names_what_python_reserves_without_the_underscore() -> None:
    made = recipe("convert", {"to": "hf", "from": "meta"})
    assert made.to_json("out")["tensors"]["x"]["convert"] == {"source": "source", "to": "hf", "from": "meta"}
    with pytest.raises(UsageError, match="unknown field") as raised:
        recipe("convert", {"to": "hf", "form": "meta"})
    assert "takes source, to, from, model_parallel" in str(raised.value.hint)


@pytest.mark.parametrize("spelling", ["gptq_v2", "gptq-v2"])
def test_dashes_and_underscores_of_choices_are_alike(spelling: str) -> None:
    assert find_verb("dequantize").option("checkpoint_format", spelling) == "gptq_v2"
    choice = next(p for p in command_of("dequantize").params if p.name == "checkpoint_format")
    assert choice.type.convert(spelling, choice, None) == "gptq_v2"


def test_help_shows_choices_as_files_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dequantize", "--help"]) == 0
    assert "[gptq|gptq_v2]" in capsys.readouterr().out


def test_the_command_line_reads_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(2)})
    words = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--out", str(tmp_path / "out")]
    assert run(["extract-lora", *words, "--rank", "1", "--targets", "x"]) == 2
    assert "the target 'x' matches no Linear layer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights", "digests", "nonsense"])
def test_python_refuses_keywords_that_are_none(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "source", {"a": torch.ones(2)})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        weightops.shard(tmp_path / "source", tmp_path / "out", **{name: "x"})
