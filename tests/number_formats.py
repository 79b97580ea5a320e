"""The golden number formats in memory, for tests that change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from weightops.checkpoint import Checkpoint, written_json
from weightops.formats.folder import open_checkpoint
from weightops.lazy import LazyTensor
from weightops.operations import dequantize as operation
from weightops.ops.rows import Given
from weightops.spec import DType

GOLDEN = Path(__file__).parent / "golden" / "number_formats"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
_STATING = ("config.json", "quanto_qmap.json")


def given(dtype: DType, shape: tuple[int, ...], data: bytes) -> LazyTensor:
    return LazyTensor.make(Given(dtype, shape, data))


@cache
def golden(name: str) -> Checkpoint:
    """A golden with its tensors and what it says of itself in memory."""
    source = open_checkpoint(GOLDEN / name)
    tensors = {n: given(t.spec.dtype, t.spec.shape, bytes(t.read())) for n, t in source.items()}
    files = {n: written_json(json.loads(source.sidecar(n) or b"")) for n in source.sidecars if n in _STATING}
    return replace(source, tensors=tensors, sidecars=files, folder=None)


@cache
def shapes(name: str) -> Callable[[str], tuple[int, ...] | None]:
    """What the model's architecture says of shapes, without asking it."""
    known = json.loads((GOLDEN / name / "expected.json").read_text())["tensors"]
    return lambda weight: tuple(known[weight]["shape"]) if weight in known else None


@contextmanager
def looked_up() -> Iterator[None]:
    """`dequantize` asks `shapes`, whatever was done to a golden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operation, "shapes_of", lambda source: shapes(Path(source.name).name))
        yield
