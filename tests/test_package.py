"""What is installed and what is published: built by hatchling, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from built import build

ROOT = Path(__file__).parent.parent


def files(folder: str) -> set[str]:
    """The files in a folder of the repository, without what Python leaves there."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_packages_published_lists_and_manual_pages_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = files("weightops")
    expected |= {name.removeprefix("kernels/") for name in files("kernels")}
    expected |= {f"weightops/_{name}" for name in files("manifests")}
    assert {"weightops/py.typed", "weightops_kernels/py.typed", "weightops/_manifests/sources.json"} <= expected
    pages = {f"share/man/man1/{Path(name).name}" for name in files("docs/man")}
    shared = {name for name in names if ".data/" in name}
    assert {name.partition(".data/data/")[2] for name in shared} == pages
    assert {name for name in names - shared if ".dist-info/" not in name} == expected
    described = {name.partition(".dist-info/")[2] for name in names - shared - expected}
    assert described == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_works_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    def python(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert python("-m", "weightops", "--version").startswith("weightops ")
    where = "from weightops.formats.proofs.published import published; print(*published().values(), sep='\\n')"
    lists = [Path(line) for line in python("-c", where).splitlines()]
    assert {path.parent for path in lists} == {tmp_path / "weightops/_manifests"}
    assert len(lists) == 5


def test_the_sdist_has_tests_and_docs_and_no_rubbish(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml"} <= names
    for folder in ("weightops", "kernels", "manifests", "tests", "docs", "benchmarks"):
        assert {name for name in names if name.startswith(f"{folder}/")} == files(folder)
    assert {name for name in names if name.startswith(".")} <= {".gitignore"}
