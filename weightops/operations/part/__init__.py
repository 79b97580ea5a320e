"""Parts of a model: cut out, put back, left out or added."""

from __future__ import annotations

from weightops.operations.part.ends import Head, Init
from weightops.operations.part.operation import Droppable, part

__all__ = ["Droppable", "Head", "Init", "part"]
