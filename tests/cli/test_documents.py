"""What is printed with --json, and what is written as JSON, is what docs/schemas says; and the page shows each."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_page
import json_schemas
import jsonschema
import msgspec
import pytest
import torch
from signing_keys import save_key
from support import write_checkpoint
from tiny_models import quantize_tiny, save_tiny, text
from writable_hub import WritableHub

import weightops
from weightops.cli.main import run
from weightops.errors import WeightopsError
from weightops.io.strict_json import as_json

ROOT = Path(__file__).parent.parent.parent
SCHEMAS = {path: json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").iterdir()}
BY_ID = {schema["title"]: schema for schema in SCHEMAS.values()}


def hold(document: Any) -> str:
    """Hold a document against the schema that it names; returns the name."""
    name = document["schema"]
    jsonschema.validate(document, BY_ID[name], jsonschema.Draft202012Validator)
    return str(name)


def test_the_schemas_are_those_of_the_types() -> None:
    assert {path: path.read_text() for path in SCHEMAS} == json_schemas.render(), "run `python docs/generate.py`"
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_schema_id_in_the_code_has_one() -> None:
    sources = [path.read_text() for path in Path(weightops.__file__).parent.rglob("*.py")]
    assert {name for source in sources for name in re.findall(r'"(weightops-[a-z-]+/\d+)"', source)} == BY_ID.keys()


def test_the_page_has_an_example_of_each() -> None:
    page = json_page.TARGET.read_text()
    found = []
    for kind, block in re.findall(r"```(jsonl?)\n(.*?)```", page, re.DOTALL):
        (name,) = {hold(json.loads(part)) for part in (block.splitlines() if kind == "jsonl" else [block])}
        found.append(name)
    assert found == re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert {*found} == BY_ID.keys()
    assert all(f"[`{name}`](schemas/{json_schemas.file_name(name)})" in page for name in BY_ID)


def test_shapes_are_strict() -> None:
    """A schema that would take anything could not fail above."""
    document = {"schema": "weightops-error/2", "error": "x", "exit_code": "1", "message": "x", "hint": None}
    with pytest.raises(jsonschema.ValidationError, match="'1' is not of type 'integer'"):
        hold(document)
    with pytest.raises(jsonschema.ValidationError, match="'exit_code' is a required property"):
        hold({key: value for key, value in document.items() if key != "exit_code"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small models to run every command on, and a hub with one of them."""
    folder = tmp_path_factory.mktemp("documents")
    for seed, name in enumerate(("raw", "tuned", "odd")):
        torch.manual_seed(seed)
        tensors = {"a": torch.randn(16, 8), "b": torch.randn(8)} | (
            {"n": torch.ones(2, dtype=torch.int8)} if seed else {}
        )
        write_checkpoint(folder / name, tensors)
    write_checkpoint(folder / "wrong", {"a": torch.tensor([math.nan, math.inf]), "e\u202e": torch.ones(0)})
    save_tiny(folder / "tiny", "llama", num_hidden_layers=1)
    quantize_tiny(folder / "tiny", folder / "tiny-gptq")
    (folder / "text.txt").write_text(text(60))
    for name in ("signer", "other"):
        save_key(folder, name)
    (folder / "MD5SUMS").write_text(f"{'0' * 32}  model.safetensors\n")
    recipe = {"sources": {"raw": "./raw"}, "outputs": {"./run-1": {"from": "raw"}, "./run-2": {"from": "raw"}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    with WritableHub(token="hf_abc") as hub, pytest.MonkeyPatch.context() as patch:
        hub.add("org/name", {path.name: path.read_bytes() for path in (folder / "raw").iterdir()})
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_TOKEN", "hf_abc")
        yield folder


RUNS = [
    ("diff --raw raw --tuned tuned --out delta", "write/2", 0),
    ("recover --raw raw --diff delta --out again --dry-run", "write/2", 0),
    ("recover --raw raw --diff delta --out again", "write/2", 0),
    ("cast raw --dtype float16 --out f16 --card", "write/2", 0),
    ("extract-lora --base tiny --tuned tiny-2 --rank 2 --out lora", "write/2", 0),
    ("adapter combine lora lora --method svd --out lora-2", "write/2", 0),
    ("adapter rank lora --rank 1 --out lora-1 --dry-run", "write/2", 0),
    ("run recipe.yaml --dry-run", "run/2", 0),
    ("run recipe.yaml", "run/2", 0),
    ("shard raw --out jobbed --job job", "write/2", 0),
    ("work job --group 0", "work/1", 0),
    ("finish job", "finish/1", 0),
    ("finish job --abandon", "finish/1", 0),
    ("quantize tiny --method rtn --group-size 32 --out q --dry-run", "quantize/1", 0),
    ("quantize tiny --group-size 32 --calibration text.txt --samples 2 --seq-len 32 --out q", "quantize/1", 0),
    ("publish delta hf://org/delta --create --dry-run", "publish/1", 0),
    ("publish delta hf://org/delta --create", "publish/1", 0),
    ("download org/name --out name --dry-run", "download/1", 0),
    ("download org/name --out name", "download/1", 0),
    ("download org/name --out name --offline", "download/1", 0),
    ("check raw", "check/1", 0),
    ("check raw --no-values", "check/1", 0),
    ("check wrong --strict --ignore config", "check/1", 3),
    ("check tiny-gptq", "check/1", 0),
    ("verify delta", "verify/1", 0),
    ("verify delta --quick", "verify/1", 0),
    ("verify delta --content", "verify/1", 0),
    ("verify raw --manifest MD5SUMS", "verify/1", 3),
    ("sign raw --key signer.key", "sign/1", 0),
    ("verify raw --signature raw/model.sig --key signer.pub", "verify/1", 0),
    ("verify raw --signature raw/model.sig --key other.pub", "error/2", 3),
    ("inspect delta", "inspect/2", 0),
    ("inspect wrong --stats --tree", "inspect/2", 0),
    ("inspect lora --stats --base tiny", "inspect/2", 0),
    ("inspect lora --base raw", "inspect/2", 3),
    ("inspect hf://org/name", "inspect/2", 0),
    ("manifest odd", "manifest/1", 0),
    ("compare raw tuned", "compare/1", 0),
    ("compare wrong raw tuned --tolerance 0 --strict", "compare/1", 3),
    ("compare tiny tiny-gptq --text text.txt --seq-len 32", "compare/1", 0),
    ("compare tiny tiny-2 --prompts text.txt --max-new-tokens 2", "compare/1", 0),
    ("merge raw delta --method linear --weight 1", "error/2", 2),
    ("merge raw tuned --method linear --weight 1 --explain", "error/2", 1),
    ("merge tiny tiny-2 --method slerp --base tiny --t 0,0.5,1 --explain", "merge-plan/1", 0),
    ("merge tiny tiny-2 --method slerp --base tiny --t 0.5 --out merged", "write/2", 0),
    ("merge tiny tiny-2 --method slerp --base tiny --t 0.5 --verify merged", "merge-proof/1", 0),
    ("merge tiny tiny-2 --method slerp --base tiny --t 0.5 --verify tiny", "merge-proof/1", 3),
    ("eval tiny --text text.txt --seq-len 32", "eval/1", 0),
    ("eval tiny-gptq --reference tiny --text text.txt --seq-len 32", "eval/1", 0),
    ("eval tiny --text text.txt --seq-len 32 --influence", "eval/1", 0),
    ("eval moe --text text.txt --seq-len 32 --experts use.json", "eval/1", 0),
    ("generate tiny --prompt once --max-new-tokens 2", "generate/1", 0),
    ("generate tiny-gptq --prompt once --max-new-tokens 2", "generate/1", 0),
    ("env", "env/2", 0),
    ("inspect nowhere", "error/2", 10),
    ("cast raw --dtype float17 --out x", "error/2", 2),
    ("cast raw --nonsense", "error/2", 2),
    ("recover --raw odd --diff delta --out x", "error/2", 1),
    ("shard raw --out delta", "error/2", 11),
    ("eval tiny --text nowhere.txt", "error/2", 10),
]


def test_every_command_prints_what_its_schema_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    save_tiny(folder / "tiny-2", "llama", seed=1, num_hidden_layers=1)
    save_tiny(folder / "moe", "mixtral")
    for line, name, code in RUNS:
        assert run([*shlex.split(line), "--json"]) == code, line
        shown = capsys.readouterr()
        assert shown.out.isascii()
        document = json.loads(shown.out, parse_constant=pytest.fail)
        assert hold(document) == f"weightops-{name}", line
        if name == "error/2":
            assert document["exit_code"] == code
            assert document["message"] in shown.err
    for path in (
        "use.json",
        "delta/weightops-delta.json",
        "q/quantize_report.json",
        *map(str, folder.rglob("*manifest.json")),
    ):
        hold(json.loads((folder / path).read_text()))


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_what_its_schema_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = "import os, sys; from {0} import {1}; {1}.{2} = lambda *_: os._exit(9); from weightops.cli.main import run; "
    code += "run(sys.argv[1:])"
    for place, line, name in (
        (("weightops.engine.staging", "Staging", "commit"), "cast raw --dtype float16 --out killed", "partial"),
        (("weightops.engine.staging", "Staging", "publish"), "cast raw --dtype float16 --out killed", "partial"),
        (
            ("weightops.quantization.work", "Work", "commit"),
            "quantize tiny --method rtn --group-size 32 --out killed",
            "blocks",
        ),
    ):
        done = subprocess.run([sys.executable, "-c", code.format(*place), *shlex.split(line)], check=False)
        assert done.returncode == 9
        found = json.loads((folder / f"killed.{name}" / "run.json").read_text())
        assert hold(found) == f"weightops-{name}/1"
        assert ("finished" in found) == (place[2] == "publish")


class Numbers(msgspec.Struct):
    """A document with numbers that JSON does not have."""

    values: tuple[float, ...]
    names: dict[str, float]


def test_numbers_that_json_does_not_have_are_null() -> None:
    found = as_json(Numbers((1.5, math.nan), {"a": -math.inf, "b": 2.0}))
    assert found == {"values": [1.5, None], "names": {"a": None, "b": 2.0}}


@pytest.mark.parametrize(
    ("error", "name", "code"),
    [
        (KeyboardInterrupt(), "Interrupted", 130),
        (MemoryError(), "MemoryError", 16),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "NoRoom", 16),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "PermissionError", 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "FileNotFoundError", 10),
        (ZeroDivisionError("division"), "ZeroDivisionError", 1),
        (WeightopsError("said", hint="do this"), "WeightopsError", 1),
    ],
)
def test_errors_of_every_kind_are_documents(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    name: str,
    code: int,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("weightops.api.inspect", fail)
    assert run(["inspect", os.devnull, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert hold(document) == "weightops-error/2"
    assert (document["error"], document["exit_code"]) == (name, code)
