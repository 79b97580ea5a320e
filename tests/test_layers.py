"""The house: imports point one way, inside rooms too, and what a package keeps inside is nobody else's business."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import weightops

PACKAGE = Path(weightops.__file__).parent
ROOTS = (PACKAGE, PACKAGE.parent / "kernels" / "weightops_kernels")
LAYERS = [
    {"errors", "spec", "version"},
    {"io"},
    {"stores"},
    {"lazy"},
    {"ops"},
    {"checkpoint"},
    {"formats"},
    {"plan"},
    {"layouts"},
    {"engine"},
    {"operations"},
    {"inference"},
    {"quantization"},
    {"recipes"},
    {"api"},
    {"serve"},
    {"cli", "__main__"},
]
"""From the ground up; a module imports from its own floor and those below."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FRONTS = ["api", "formats/torch", *(f"operations/{p.parent.name}" for p in PACKAGE.glob("operations/*/__init__.py"))]
"""Packages that are entered by their front alone."""


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax of every module, parsed once for all that is asked of it."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for root in ROOTS for path in root.rglob("*.py")}


@cache
def imports() -> dict[str, set[str]]:
    """By module the modules it imports, those for types too; all without `weightops.`."""
    modules = {dotted(path): tree for path, tree in trees().items() if path.is_relative_to(PACKAGE)}
    found: dict[str, set[str]] = {}
    for module, tree in modules.items():
        found[module] = set()
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("weightops."):
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names if f"{each.name}.".startswith("weightops.")]
            for name in names:
                own = name.removeprefix("weightops").removeprefix(".")
                found[module].add(own if own in modules else own.rpartition(".")[0])
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_imports_only_from_below() -> None:
    wrong = [
        f"{module} imports {other or 'weightops'}"
        for module, others in imports().items()
        for other in others
        if module
        and (not other or LEVEL[room(other)] > LEVEL[room(module)])
        # The command line, like any other program, may go through the front door.
        and not (room(module) == "cli" and not other)
    ]
    assert wrong == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which imports lead back to them."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            each = todo.pop()
            if each in graph and each not in seen:
                seen.add(each)
                todo += graph[each]
        return seen

    return [module for module in graph if module in reached(module)]


def test_no_imports_lead_round_in_a_circle() -> None:
    assert circles({module: others for module, others in imports().items() if module}) == []


def test_nor_do_those_of_the_packages_in_a_room() -> None:
    def package(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if (PACKAGE / Path(*parts[:2])).is_dir() and len(parts) > 1 else module

    graph: dict[str, set[str]] = {}
    for module, others in imports().items():
        graph.setdefault(package(module), set()).update(package(o) for o in others if package(o) != package(module))
    assert circles({name: others for name, others in graph.items() if name}) == []


def test_packages_with_a_front_are_entered_by_it() -> None:
    fronts = [front.replace("/", ".") for front in FRONTS]
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        for front in fronts
        if other.startswith(f"{front}.") and not f"{module}.".startswith(f"{front}.")
    ]
    assert wrong == []


def test_operations_list_what_the_command_line_lists() -> None:
    from weightops.cli.main import COMMANDS

    found = {path.stem.replace("_", "-") for path in (PACKAGE / "operations").iterdir() if path.stem[0] != "_"}
    elsewhere = {"browse", "chat", "eval", "serve", "generate", "quantize", "imatrix", "run", "env", "completion"}
    elsewhere |= {"work", "finish"}
    assert found == COMMANDS.keys() - elsewhere


def test_every_room_says_in_a_line_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert len((ast.get_docstring(trees()[path]) or "").splitlines()[0]) > 20, path


def plain_name(node: ast.AST) -> str:
    """What `name` or `name.attribute` stands here, and nothing for all else."""
    if isinstance(node, ast.Name):
        return node.id
    is_of_a_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return f"{node.value.id}.{node.attr}" if is_of_a_name else ""  # type: ignore[attr-defined]


def test_only_the_command_line_prints_exits_or_reads_the_environment() -> None:
    wrong = []
    for path, tree in trees().items():
        if path.is_relative_to(PACKAGE / "cli") or not path.is_relative_to(PACKAGE):
            continue
        for node in ast.walk(tree):
            name = plain_name(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "exit", "sys.exit", "os.getenv", "logging.basicConfig", "signal.signal"):
                wrong.append(f"{path.name}: {name}")
            if plain_name(node) == "os.environ":
                wrong.append(f"{path.name}: os.environ")
    assert wrong == []


EVERYWHERE = {
    *("PathLike", "W_OK", "X_OK", "access", "close", "cpu_count", "devnull", "dup", "dup2", "environ", "fdopen"),
    *(
        "fsencode",
        "fspath",
        "fstat",
        "ftruncate",
        "getpid",
        "path",
        "readlink",
        "scandir",
        "symlink",
        "walk",
        "DirEntry",
        "strerror",
        "unlink",
        "urandom",
    ),
    *("utime", "write"),
}
"""What every system has of `os`, with one meaning."""
SOMEWHERE = {
    *("ctypes", "fcntl", "filelock", "grp", "mmap", "msvcrt", "multiprocessing", "posix", "psutil", "pty", "pwd"),
    *("resource", "syslog", "termios", "tty", "winreg"),
}
"""Modules that some systems lack, or that are asked for what systems have in different ways."""
EXCEPTIONS = {
    *(("ops/libtorch.py", "ctypes"), ("ops/measures/counting.py", "ctypes")),  # torch's own library
    ("stores/transfer/hub_locks.py", "filelock"),  # huggingface_hub's own kind
    *(("cli/main.py", "os.open"), ("cli/main.py", "os.O_WRONLY")),  # of os.devnull, which is no file
}


def uses_of_systems(tree: ast.AST) -> Iterator[str]:
    """What of a module's text only some systems have."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module in ("os", "signal"):
                yield from (f"{node.module}.{name.name}" for name in node.names)
        yield from (name for name in names if name.partition(".")[0] in SOMEWHERE)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if node.value.id == "os" and node.attr not in EVERYWHERE:
                yield name
            if node.value.id == "signal" and node.attr not in ("signal", "SIG_DFL", "SIGINT"):
                yield name
            if name in ("sys.platform", "platform.system", "platform.release"):
                yield name
        if isinstance(node, ast.Attribute) and node.attr in ("st_blocks", "is_mount", "hardlink_to", "symlink_to"):
            yield f".{node.attr}"
        if isinstance(node, ast.keyword) and node.arg is not None and node.arg.endswith("dir_fd"):
            yield f"{node.arg}="
        if isinstance(node, ast.Constant) and str(node.value).startswith(("/proc", "/sys/", "/dev/")):
            yield str(node.value)


def test_only_one_package_asks_which_calls_a_system_has() -> None:
    wrong = []
    for path, tree in trees().items():
        name = path.relative_to(next(root for root in ROOTS if path.is_relative_to(root))).as_posix()
        if not path.is_relative_to(PACKAGE / "io/platform"):
            wrong += [f"{name}: {use}" for use in set(uses_of_systems(tree)) if (name, use) not in EXCEPTIONS]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import fcntl",
            "from fcntl import flock",
            "import ctypes.util",
            "os.posix_fadvise(0, 0, 0, 0)",
            "os.O_DIRECT",
        ),
        *("os.rename(a, b)", "os.open(a, 0)", "from os import fork", "os.geteuid()", "x = os.stat(a, dir_fd=b)"),
        *("path.stat().st_blocks", "Path('/proc/self')", "signal.SIGHUP", "sys.platform", "os.sysconf('x')"),
    ],
)
def test_which_is_seen(line: str) -> None:
    assert list(uses_of_systems(ast.parse(line)))


def test_no_file_is_over_400_lines() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}
