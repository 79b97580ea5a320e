"""What a checkpoint holds: its inventory, its modules, the values of its tensors, and what an adapter does."""

from __future__ import annotations

from weightops.operations.inspect.adapter import AdapterReport, Change, Target, Whole
from weightops.operations.inspect.operation import inspect
from weightops.operations.inspect.report import InspectDocument, Inspection
from weightops.operations.inspect.tree import Module, Node, joined, make_tree, modules_of, parts_of

__all__ = [
    "AdapterReport",
    "Change",
    "InspectDocument",
    "Inspection",
    "Module",
    "Node",
    "Target",
    "Whole",
    "inspect",
    "joined",
    "make_tree",
    "modules_of",
    "parts_of",
]
