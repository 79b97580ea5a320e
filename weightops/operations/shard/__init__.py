"""The same tensors in other files, under other names, or fewer of them."""

from __future__ import annotations

from weightops.operations.shard.held import hold
from weightops.operations.shard.operation import shard

__all__ = ["hold", "shard"]
