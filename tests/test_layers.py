"""Imports point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import weightops

PACKAGE = Path(weightops.__file__).parent
LAYERS = [
    {"errors", "spec"},
    {"__init__", "io", "remote", "versions", "manifests"},
    {"lazy"},
    {"ops"},
    {"checkpoint"},
    {"formats"},
    {"layouts"},
    {"plan"},
    {"engine"},
    {"operations"},
    {"inference"},
    {"quantization"},
    {"recipes"},
    {"outputs"},
    {"api", "model_api"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, outside of type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "weightops":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name if a.name in LEVEL else "__init__" for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("weightops.")}
    return found


def test_every_module_imports_only_from_below() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        wrong += [f"{relative} imports {other}" for other in imports(path) if LEVEL[other] > LEVEL[own]]
    assert wrong == []


def test_only_the_command_line_prints_exits_or_reads_the_environment() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "exit", "sys.exit", "os.getenv", "logging.basicConfig", "signal.signal"):
                wrong.append(f"{path.name}: {name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
                wrong.append(f"{path.name}: os.environ")
    assert wrong == []


def test_no_file_is_over_400_lines() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
