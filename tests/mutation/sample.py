"""A fixed sample of mutants: the same small changes to the code every time, as long as the changed lines stay.

Each candidate is known by its function, its line's text and the change; those whose digests with the seed are the
least are the sample. So neither an edit elsewhere nor a move to another file changes it, and a new line enters it by
chance like any other.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from operators import OPERATORS

SEED = 20270114
PLACES = ("api", "engine", "io", "stores", "formats", "ops", "operations", "recipes", "quantization", "cli")


@dataclass(frozen=True)
class Mutant:
    """`occurrence` of an operator in a file; `first` to `last` are the lines of its statement.

    `is_imported`: the statement runs when the file is imported, not when somebody calls.
    """

    key: str
    path: str
    line: int
    text: str
    operator: str
    occurrence: int
    first: int
    last: int
    is_imported: bool

    def mutated(self, root: Path) -> str:
        code = mutate_code((root / self.path).read_text(), OPERATORS[self.operator], self.occurrence)
        assert code is not None
        return code

    def __str__(self) -> str:
        return f"{self.key} {self.path}:{self.line} {self.operator}: {self.text}"


def choose(root: Path, count: int) -> list[Mutant]:
    """The sample of `count`, of the tree at `root`."""
    files = [root / "weightops" / place for place in PLACES]
    files = sorted(f for place in files for f in place.rglob("*.py"))
    seen: Counter[str] = Counter()
    found = sorted((mutant for file in files for mutant in _candidates(root, file, seen)), key=lambda each: each.key)
    chosen: list[Mutant] = []
    for mutant in found:
        if len(chosen) < count and _is_change(root, mutant):
            chosen.append(mutant)
    return chosen


def _candidates(root: Path, file: Path, seen: Counter[str]) -> Iterator[Mutant]:
    code = file.read_text()
    lines, path = code.splitlines(), file.relative_to(root).as_posix()
    tree, spans = parso.parse(code), _statements(code)
    nodes = list(ast_nodes(tree))
    for name, operator in OPERATORS.items():
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, _) in enumerate(places):
            text = lines[line - 1].strip()
            *span, scope = spans[line]
            identity = f"{SEED} {scope} {name} {text}"
            seen[identity] += 1
            key = hashlib.sha256(f"{identity} {seen[identity]}".encode()).hexdigest()[:10]
            yield Mutant(key, path, line, text, name, occurrence, *span)


def _statements(code: str) -> dict[int, tuple[int, int, bool, str]]:
    """For each line the lines of the innermost statement, whether it runs at import, and the function it is in."""
    found: dict[int, tuple[int, int, bool, str]] = {}

    def enter(node: ast.AST, is_imported: bool, scope: str) -> None:
        if isinstance(node, ast.stmt):
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            found.update(dict.fromkeys(range(first, (node.end_lineno or last) + 1), (first, last, is_imported, scope)))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}"
        for child in ast.iter_child_nodes(node):
            enter(child, is_imported and not isinstance(node, ast.FunctionDef | ast.Lambda), scope)

    enter(ast.parse(code), True, "")
    return found


def _is_change(root: Path, mutant: Mutant) -> bool:
    """Whether what runs is another program: not only an annotation, nor what is under TYPE_CHECKING or no Python."""
    try:
        return _bare(mutant.mutated(root)) != _bare((root / mutant.path).read_text())
    except SyntaxError:
        return False


def _bare(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.test, node.body = ast.Constant(None), [ast.Pass()]
    return ast.dump(tree)
