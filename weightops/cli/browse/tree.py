"""The tree of modules on the screen: a line is made when the module around it is opened, or a search leads there."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import Tree
from textual.widgets.tree import TreeNode

from weightops.cli.browse.subject import Subject
from weightops.cli.meter import human
from weightops.io.escape import escape
from weightops.operations.inspect import Module, joined, parts_of

_BATCH = 500
"""Children that are added to the tree at once."""


@dataclass(frozen=True, eq=False)
class Item:
    """What a line of the tree stands for: a module, a tensor by its `name`, or the rest of a long list."""

    path: str
    module: Module | None = None
    name: str | None = None
    rest: Iterator[tuple[str, Item]] | None = None


class ModuleTree(Tree[Item]):
    """The modules of a subject. Labels are texts, never markup."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right", "open", "Open", show=False),
        Binding("left", "close", "Close", show=False),
    ]

    def __init__(self, subject: Subject) -> None:
        super().__init__(Text("all tensors"), Item("", subject.modules), id="tree")
        self._subject = subject
        self.guide_depth = 2

    @property
    def item(self) -> Item | None:
        """What is under the cursor."""
        return None if self.cursor_node is None else self.cursor_node.data

    def on_tree_node_expanded(self, event: Tree.NodeExpanded[Item]) -> None:
        """Fill a module when it is opened for the first time."""
        self._fill(event.node)

    def on_tree_node_selected(self, event: Tree.NodeSelected[Item]) -> None:
        """Add more of a long list, where that is asked for."""
        item, parent = event.node.data, event.node.parent
        if item is not None and item.rest is not None and parent is not None:
            event.node.remove()
            self._add(parent, item.rest)

    def _fill(self, node: TreeNode[Item]) -> None:
        item = node.data
        if item is not None and item.module is not None and not node.children:
            self._add(node, _children(item, item.module))

    def _add(self, node: TreeNode[Item], children: Iterator[tuple[str, Item]]) -> None:
        """Add the next children to a line of the tree, and if there may be more, a line for these."""
        for _ in range(_BATCH):
            found = next(children, None)
            if found is None:
                return
            label, item = found
            node.add(self._label(label, item), item, allow_expand=item.module is not None)
        node.add_leaf(Text("… more: Enter adds them", "dim"), Item("", rest=children))

    def _label(self, label: str, item: Item) -> Text:
        """A line: the name, what it is, and a mark where two checkpoints differ in it."""
        text = Text(escape(label) or "''", no_wrap=True)
        names = list(item.module.names()) if item.module is not None else [item.name] if item.name is not None else []
        marks = {self._subject.mark(name) for name in names} - {""} if self._subject.is_pair else set()
        one, two = self._subject.rows[item.name].members if item.name is not None else (None, None)
        member = one or two
        if member is not None:
            text.append(f"  {member.label}", "dim")
            return Text.assemble((f"{marks.pop()} ", "bold yellow"), text) if marks else text
        text.append(f"  {human(self._subject.nbytes(names))}", "dim")
        return text.append("  *", "bold yellow") if marks else text

    def action_open(self) -> None:
        """Open the module under the cursor, or go on to what is in it."""
        node = self.cursor_node
        if node is not None and node.allow_expand and not node.is_expanded:
            node.expand()
        else:
            self.action_cursor_down()

    def action_close(self) -> None:
        """Close the module under the cursor, or go to the one around it."""
        node = self.cursor_node
        if node is not None and node.is_expanded and node.parent is not None:
            node.collapse()
        else:
            self.action_cursor_parent()

    def fold(self) -> None:
        """Close everything but the first level."""
        for child in self.root.children:
            child.collapse_all()
        self.move_cursor(self.root)

    def go(self, name: str) -> None:
        """Open what is around a tensor, and put the cursor on it."""
        around, module = set(), self._subject.modules
        for part in parts_of(name)[:-1]:
            module = module.modules[part]
            around.add(id(module))
        node: TreeNode[Item] | None = self.root
        while node is not None and node.data is not None and node.data.name != name:
            node = self._child(node, around, name)
        if node is not None:
            self.call_after_refresh(self.move_cursor, node)

    def _child(self, node: TreeNode[Item], around: Container[int], name: str) -> TreeNode[Item] | None:
        """The line below `node` for a tensor or a module around it; of a long list more is added until it is there."""
        self._fill(node)
        node.expand()
        seen = 0
        while True:
            for child in node.children[seen:]:
                item = child.data
                if item is not None and (item.name == name or (item.module and id(item.module) in around)):
                    return child
            last = node.children[-1] if node.children else None
            if last is None or last.data is None or last.data.rest is None:
                return None
            seen = len(node.children) - 1
            last.remove()
            self._add(node, last.data.rest)


def _children(item: Item, module: Module) -> Iterator[tuple[str, Item]]:
    """What is in a module, with labels that are parts of names; what holds but one thing is in one line with it."""

    def path(label: str) -> str:
        return joined(item.path, label) if item.path else label

    for label, name in module.tensors.items():
        yield label, Item(path(label), name=name)
    labels = list(module.modules)
    if all(label.isascii() and label.isdecimal() for label in labels):
        labels.sort(key=lambda label: (len(label.lstrip("0")), label.lstrip("0"), label))
    for label in labels:
        inner = module.modules[label]
        while len(inner.modules) == 1 and not inner.tensors:
            ((part, inner),) = inner.modules.items()
            label = joined(label, part)
        if len(inner.tensors) == 1 and not inner.modules:
            ((part, name),) = inner.tensors.items()
            label = joined(label, part)
            yield label, Item(path(label), name=name)
        else:
            yield label, Item(path(label), module=inner)
