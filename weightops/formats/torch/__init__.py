"""Files that torch.save wrote, zip or legacy; read by an allow-list, written to the bit as torch does."""

from __future__ import annotations

from weightops.formats.torch.legacy import read_torch
from weightops.formats.torch.writer import Flavour, torch_layout

__all__ = ["Flavour", "read_torch", "torch_layout"]
