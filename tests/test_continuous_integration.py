"""What continuous integration takes from the repository: the GitHub Action, the workflow, the container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from built import build
from support import write_checkpoint
from torch import ones

import weightops

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/release-engineer.md"
MODULES = {"pyyaml": "yaml"}
"""By distribution the module that it is imported as, where the two differ."""


def load(path: str) -> dict[str, Any]:
    # YAML reads a workflow's `on` as True.
    loaded = yaml.safe_load((ROOT / path).read_text())
    return {"on" if key is True else key: value for key, value in loaded.items()}


def script(step: str) -> str:
    found: str = next(each["run"] for each in load("action.yml")["runs"]["steps"] if each.get("id") == step)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_checkpoint(folder, {"a": ones(4, 4).half(), "b": ones(3)}, shards=2)
    (folder / "weightops-manifest.json").write_bytes(weightops.manifest(folder, digest="sha256").to_bytes())
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="the action's steps are for bash")
@pytest.mark.parametrize(
    ("inputs", "code", "verdict"),
    [
        ({}, 0, "equal"),
        ({"MANIFEST": "model/weightops-manifest.json", "MORE": "--content --quiet", "JUNIT": "a b.xml"}, 0, "equal"),
        ({"MODEL": "other"}, 3, "differs"),
        ({"MODEL": "-nowhere"}, 10, "error"),
    ],
)
def test_the_action_gives_its_outputs(
    inputs: dict[str, str], code: int, verdict: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other/config.json").write_text("{ }")
    (tmp_path / "click.py").write_text("raise SystemExit('a module of the workspace was imported')")
    shutil.copytree(ROOT / "weightops", tmp_path / "runner/weightops/weightops")
    given = {"MODEL": "model", "MANIFEST": "", "MORE": "", "JUNIT": ""} | inputs
    runner = {"PYTHON": sys.executable, "RUNNER_TEMP": "runner", "GITHUB_OUTPUT": "outputs"}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script("verify")], cwd=tmp_path, env=os.environ | runner | given, check=False
    )
    outputs = dict(line.split("=", 1) for line in (tmp_path / "outputs").read_text().splitlines())
    assert (done.returncode, outputs["verdict"]) == (code, verdict)
    assert outputs["report"] == (given["JUNIT"] or "runner/weightops-verify.xml")
    assert "<testsuite" in (tmp_path / outputs["report"]).read_text()


@pytest.mark.parametrize("option", ["--extra=warn", "--content", "--quick"])
def test_verify_needs_no_more_than_the_action_installs(option: str, model: Path) -> None:
    installed = script("install").partition("constraints.txt")[2].splitlines()[0].split()[1:]
    assert "click" in installed
    assert "torch" not in installed
    modules = {MODULES.get(name, name) for name in installed} | {"weightops"}
    program = f"""
import sys
class Nothing:
    def find_spec(name, path, target=None):
        if name.partition(".")[0] not in {modules | sys.stdlib_module_names!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Nothing)
from weightops.cli.main import main
main(["verify", {str(model)!r}, {option!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_action_s_inputs_reach_its_script_by_the_environment_alone() -> None:
    """What a workflow puts into an input is data: it must not become a part of a script."""
    action = load("action.yml")
    assert all("${{" not in step.get("run", "") for step in action["runs"]["steps"])
    verify = next(step for step in action["runs"]["steps"] if step.get("id") == "verify")
    used = re.findall(r"inputs\.([\w-]+)", " ".join(verify["env"].values()))
    assert sorted(used) == sorted(action["inputs"])


def test_the_page_names_the_action_s_inputs_and_outputs_and_no_others() -> None:
    action, page = load("action.yml"), PAGE.read_text()
    described = page.partition("| input |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", described, re.MULTILINE) == list(action["inputs"])
    (example,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    steps = [step for job in example["jobs"].values() for step in job["steps"]]
    (used,) = (step for step in steps if step.get("uses", "").startswith("weightops/weightops@"))
    assert used["with"].keys() <= action["inputs"].keys()
    outputs = re.findall(rf"steps\.{used['id']}\.outputs\.(\w+)", page)
    assert set(outputs) == action["outputs"].keys()


def test_the_workflow_runs_every_tool_on_every_system() -> None:
    suite = load(".github/workflows/tests.yml")["jobs"]["suite"]
    assert [name.partition("-")[0] for name in suite["strategy"]["matrix"]["os"]] == ["ubuntu", "macos", "windows"]
    assert suite["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    lines = [step.get("run", "") for step in suite["steps"]]
    makefile = (ROOT / "Makefile").read_text()
    lint = re.findall(r"^\t\$\(BIN\)/(.*)", makefile.partition("\nlint:")[2].partition("\n\n")[0], re.MULTILINE)
    assert len(lint) == 3
    assert all(command in lines for command in lint)
    assert any(line.startswith("python -m pytest") for line in lines)


def test_the_action_is_used_with_inputs_that_it_has() -> None:
    steps = load(".github/workflows/tests.yml")["jobs"]["verify"]["steps"]
    (used,) = (step for step in steps if step.get("uses") == "./")
    assert used["with"].keys() <= load("action.yml")["inputs"].keys()
    assert (ROOT / used["with"]["path"]).is_dir()
    assert (ROOT / used["with"]["manifest"]).is_file()


def test_the_container_is_built_of_what_is_copied_into_it(tmp_path: Path) -> None:
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert names == set(kept)
    for name in names:
        here = ROOT / name
        (shutil.copytree if here.is_dir() else shutil.copy)(here, tmp_path / name)
    assert build("wheel", tmp_path / "dist", tmp_path).name.startswith("weightops-")
