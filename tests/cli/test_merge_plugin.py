"""Methods of one's own: a Python file that is named on the command line, recorded, and never named by a merge file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from merge_command import Say, state, written
from support import same_bits

from weightops.ops.merging.methods import METHODS

TWO = [{"model": "./a"}, {"model": "./b"}]
PLUGIN = """\
from weightops.ops.merging.method import Method

def {name}(inputs, *, share: float = 0.5, weight: "Sequence[float]" = (1.0,)):
    return lambda blocks, first: blocks[0] + share * (blocks[1] - blocks[0])

from collections.abc import Sequence
METHODS = [Method({name}, "mine", "input", (2, 2))]
"""


@pytest.fixture
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin adds is gone afterwards."""
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])
    for name in ("halfway", "other"):
        monkeypatch.setitem(METHODS, name, METHODS["linear"])
        monkeypatch.delitem(METHODS, name)


@pytest.mark.usefixtures("_methods")
def test_a_plugin_brings_a_method_and_its_digest_is_recorded(say: Say) -> None:
    Path("mine.py").write_text(PLUGIN.format(name="halfway"))
    document = {
        "merge_method": "halfway",
        "models": [{"model": "./a"}, {"model": "./b"}],
        "parameters": {"share": 0.25},
    }
    line = f"merge {written('m.yml', document)}"
    code, _, err = say(f"{line} --out out")
    assert (code, "there is no method halfway" in err) == (2, True)
    assert say(f"{line} --plugin mine.py --out out --json")[0] == 0
    a, b = state("a"), state("b")
    assert same_bits(state("out"), {name: a[name] + 0.25 * (b[name] - a[name]) for name in a})
    digest = hashlib.sha256(Path("mine.py").read_bytes()).hexdigest()
    manifest = json.loads(Path("out/weightops-manifest.json").read_text())
    assert manifest["recipe"]["tensors"]["result"]["merge"]["plugin"] == digest
    proof = json.loads(say(f"{line} --plugin mine.py --verify out --json")[1])
    assert (proof["is_same"], proof["plugin"]) == (True, digest)


@pytest.mark.usefixtures("_methods")
def test_another_text_of_a_plugin_is_another_plan(say: Say) -> None:
    fingerprints = []
    for text in (PLUGIN, f"{PLUGIN}# a comment\n"):
        METHODS.pop("halfway", None)
        Path("mine.py").write_text(text.format(name="halfway"))
        line = "merge ./a ./b --plugin mine.py --out out --dry-run --json"
        document = {"merge_method": "halfway", "models": TWO}
        code, out, err = say(line.replace("./a ./b", written("m.yml", document)))
        assert code == 0, err
        fingerprints.append(json.loads(out)["fingerprint"])
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.usefixtures("_methods")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (PLUGIN.format(name="ties"), "mine.py: there is a method ties already"),
        ("METHODS = []", "mine.py: has no METHODS, a list"),
        ("METHODS = [3]", "mine.py: has no METHODS, a list"),
        ("x = 1", "mine.py: has no METHODS, a list"),
        ("1 / 0", "mine.py: ZeroDivisionError"),
        ("def", "mine.py: SyntaxError"),
        (None, "mine.py: no such file"),
    ],
)
def test_plugins_that_are_none_are_refused(say: Say, text: str | None, problem: str) -> None:
    if text is not None:
        Path("mine.py").write_text(text)
    code, _, err = say("merge ./a ./b --method linear --weight 1 --plugin mine.py --out out")
    assert code == (10 if text is None else 2)
    assert problem in err
    assert not Path("out").exists()


@pytest.mark.parametrize("document", [{"plugin": "mine.py"}, {"parameters": {"weight": 1, "plugin": "mine.py"}}])
def test_a_merge_file_runs_no_code(say: Say, document: dict[str, Any]) -> None:
    document = {"merge_method": "linear", "models": TWO, "parameters": {"weight": 1}, **document}
    Path("mine.py").write_text("open('was-run', 'w')")
    code, _, err = say(f"merge {written('m.yml', document)} --out out")
    assert (code, "plugin: unknown" in err, Path("was-run").exists()) == (2, True, False)
