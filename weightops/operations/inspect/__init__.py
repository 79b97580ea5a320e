"""What a checkpoint holds: its inventory, its modules, the values of its tensors, and what an adapter does."""

from __future__ import annotations

from weightops.operations.inspect.adapter import AdapterReport, Change, Target, Whole
from weightops.operations.inspect.operation import inspect
from weightops.operations.inspect.report import InspectDocument, Inspection
from weightops.operations.inspect.tree import Node, make_tree, ranges

__all__ = [
    "AdapterReport",
    "Change",
    "InspectDocument",
    "Inspection",
    "Node",
    "Target",
    "Whole",
    "inspect",
    "make_tree",
    "ranges",
]
