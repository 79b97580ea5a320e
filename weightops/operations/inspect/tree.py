"""The modules of a checkpoint as a tree, from names and specs alone; repeated layers once, with what differs in them.

Names are cut at dots. Modules that are numbered and alike, such as the layers of a model or the experts of a layer,
become one, `[0-21]`: they are alike if at least half of what any two have, by name and spec, is in both. What only some
of them have, or have with another dtype or shape, is there once for each kind, with the numbers that have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from weightops.spec import TensorSpec

_MAX_DEPTH = 16
"""Dots beyond it are part of the last label: deeper than any model, and no deeper than Python can walk."""
_NUMBERED = re.compile(r"((?:.*\.)?)(\d{1,9})(/?)", re.DOTALL)
_ALIKE = 0.5
_SEVERAL = 4
_MAX_KINDS = 8
"""Kinds of modules to compare others with; what is like none of them stays by itself."""


@dataclass(frozen=True)
class Node:
    """A module, a run of modules that are alike, or with `spec` a tensor.

    `label` are the parts of its name from its parent's on: several where a module holds but one thing. `only` are the
    numbers of the modules around it, innermost last, that have it, where not all have. `members` are the tensors that
    it stands for, by their names, and `parameters` and `nbytes` those of all of them.
    """

    label: str
    members: tuple[str, ...]
    parameters: int
    nbytes: int
    children: tuple[Node, ...] = ()
    spec: TensorSpec | None = None
    only: tuple[str, ...] = ()

    def walk(self, depth: int | None = None, level: int = 0) -> Iterator[tuple[int, Node]]:
        """This node and those below it with their levels, `depth` levels of them; from the top down."""
        yield level, self
        if depth is None or level + 1 < depth:
            for child in self.children:
                yield from child.walk(depth, level + 1)


@dataclass(slots=True)
class Module:
    """A module as names tell it: those in it by the next part of their names, and its tensors by the last."""

    modules: dict[str, Module] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """All tensors in it, by their whole names."""
        yield from self.tensors.values()
        for module in self.modules.values():
            yield from module.names()


def modules_of(names: Iterable[str]) -> Module:
    """The module that holds all tensors of these names, in their order."""
    top = Module()
    for name in names:
        *path, last = parts_of(name)
        module = top
        for part in path:
            found = module.modules.get(part)
            if found is None:
                found = module.modules[part] = Module()
            module = found
        module.tensors[last] = name
    return top


def make_tree(tensors: Mapping[str, TensorSpec], parameters: Mapping[str, int]) -> tuple[Node, ...]:
    """The top of the tree, in the order of the tensors; `parameters` are the weights that each tensor stands for."""
    return tuple(map(_in_one_line, _Folding(tensors, parameters).children(modules_of(tensors))))


def parts_of(name: str) -> list[str]:
    """A name in parts; that of a file, which tensors of Meta's parts begin with, is one, with its slash."""
    file, slash, rest = name.rpartition("/")
    return [*([f"{file}/"] if slash else []), *rest.split(".", _MAX_DEPTH)]


def joined(first: str, second: str) -> str:
    """Two parts of a name that follow each other."""
    return f"{first}{second}" if first.endswith("/") else f"{first}.{second}"


class _Folding:
    """Makes nodes of modules."""

    def __init__(self, specs: Mapping[str, TensorSpec], parameters: Mapping[str, int]) -> None:
        self._specs, self._parameters = specs, parameters

    def children(self, module: Module) -> tuple[Node, ...]:
        """What a module holds: tensors, modules, and modules that are alike as one."""
        leaves = [self._leaf(label, name) for label, name in module.tensors.items()]
        whole = {label: self.children(each) for label, each in module.modules.items()}
        return (*leaves, *_folded(whole))

    def _leaf(self, label: str, name: str) -> Node:
        spec = self._specs[name]
        return Node(label, (name,), self._parameters[name], spec.nbytes, spec=spec)


_Key = tuple[str, TensorSpec | None, tuple[str, ...]]


def _key(node: Node) -> _Key:
    """What tells apart the kinds of things under one name."""
    return node.label, node.spec, node.only


def _folded(modules: Mapping[str, tuple[Node, ...]]) -> Iterator[Node]:
    """Nodes of modules, the numbered ones that are alike as one, each in the place of its first."""
    families: dict[tuple[str, str], dict[str, str]] = {}
    for label in modules:
        found = _NUMBERED.fullmatch(label)
        if found is not None:
            families.setdefault((found[1], found[3]), {})[label] = found[2]
    runs: dict[str, Node] = {}
    done: set[str] = set()
    for (before, after), numbers in families.items():
        if not 1 < len({int(number) for number in numbers.values()}) == len(numbers):
            continue  # one alone, or both 1 and 01
        for own in _alike({label: modules[label] for label in numbers}):
            if len(own) > 1:
                merged = _merged([(numbers[label], modules[label]) for label in own])
                runs[own[0]] = _module(f"{before}[{ranges(numbers[label] for label in own)}]{after}", merged)
                done.update(own)
    for label, children in modules.items():
        if label in runs:
            yield runs[label]
        elif label not in done:
            yield _module(label, children)


def _module(label: str, children: tuple[Node, ...]) -> Node:
    return Node(
        label,
        tuple(name for child in children for name in child.members),
        sum(child.parameters for child in children),
        sum(child.nbytes for child in children),
        children,
    )


def _in_one_line(node: Node) -> Node:
    """The same tree; modules that hold but one thing are in one line with it, unless only some of a run have that."""
    children = tuple(map(_in_one_line, node.children))
    if len(children) == 1 and not children[0].only:
        return replace(children[0], label=joined(node.label, children[0].label), only=node.only)
    return replace(node, children=children)


def _contents(children: Iterable[Node], before: str = "") -> Iterator[tuple[object, ...]]:
    """What a module holds, by name and spec."""
    for child in children:
        label = f"{before}.{child.label}"
        if child.spec is not None:
            yield label, child.spec, child.only
        yield from _contents(child.children, label)


def _alike(modules: Mapping[str, tuple[Node, ...]]) -> list[list[str]]:
    """Numbered modules in groups of those that are alike, in order."""
    kinds: dict[frozenset[tuple[object, ...]], list[str]] = {}
    for label, children in modules.items():
        kinds.setdefault(frozenset(_contents(children)), []).append(label)
    groups: list[tuple[frozenset[tuple[object, ...]], list[str]]] = []
    for contents, labels in sorted(kinds.items(), key=lambda item: -len(item[1])):
        near = (own for first, own in groups[:_MAX_KINDS] if len(first & contents) >= _ALIKE * len(first | contents))
        own = next(near, None)
        if own is None:
            groups.append((contents, list(labels)))
        else:
            own += labels
    order = {label: i for i, label in enumerate(modules)}
    return [sorted(own, key=order.__getitem__) for _, own in groups]


def _merged(members: Sequence[tuple[str, tuple[Node, ...]]]) -> tuple[Node, ...]:
    """The children of numbered modules that are alike: each once, or once for each kind that there is of it.

    The order is that of the first module, and what others have besides comes after what it follows there.
    """
    found: dict[_Key, list[tuple[str, Node]]] = {}
    for number, children in members:
        for child in children:
            found.setdefault(_key(child), []).append((number, child))
    order = _order([list(map(_key, children)) for _, children in members])
    return tuple(_joined(found[key], len(members)) for key in order)


def _order(lists: Iterable[Sequence[_Key]]) -> list[_Key]:
    """All keys: those of later lists after another of their label, or else after what they follow there."""
    after: dict[_Key | None, _Key | None] = {None: None}
    last: dict[str, _Key] = {}
    end: _Key | None = None
    for keys in lists:
        place = None if any(key in after for key in keys) else end
        for key in keys:
            if key not in after:
                place = last.get(key[0], place)
                after[place], after[key] = key, after[place]
                end = key if after[key] is None else end
                last[key[0]] = key
            place = key
    order, at = [], after[None]
    while at is not None:
        order.append(at)
        at = after[at]
    return order


def _joined(own: Sequence[tuple[str, Node]], count: int) -> Node:
    """One node of those that several modules of a run have, of which there are `count`."""
    numbers, nodes = [number for number, _ in own], [node for _, node in own]
    first = nodes[0]
    children = first.children
    if children:
        children = _merged([(number, node.children) for number, node in own])
    only = (ranges(numbers), *first.only) if len(own) < count else first.only
    return Node(
        first.label,
        tuple(name for node in nodes for name in node.members),
        sum(node.parameters for node in nodes),
        sum(node.nbytes for node in nodes),
        children,
        first.spec,
        only,
    )


def ranges(numbers: Iterable[str]) -> str:
    """Numbers, shortened: `0-3, 5`, and `1, 3, … 21` where four or more are equally far apart."""
    texts = {int(number): number for number in numbers}
    left, shown = sorted(texts), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = next((i for i, number in enumerate(left) if number != left[0] + i * step), len(left))
        if step > 1 and count < _SEVERAL:
            count = 1
        first, last = texts[left[0]], texts[left[count - 1]]
        shown.append(
            first if count == 1 else f"{first}-{last}" if step == 1 else f"{first}, {texts[left[1]]}, … {last}"
        )
        left = left[count:]
    return ", ".join(shown)
