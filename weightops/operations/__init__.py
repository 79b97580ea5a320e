"""One module per verb: pure functions from checkpoints and options to a checkpoint or a report."""

from weightops.operations.diff import diff
from weightops.operations.inspect import inspect
from weightops.operations.manifest import make_manifest
from weightops.operations.recover import recover
from weightops.operations.verify import verify

__all__ = ["diff", "inspect", "make_manifest", "recover", "verify"]
