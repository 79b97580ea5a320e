"""Whether a folder holds what a merge makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from weightops.checkpoint import Checkpoint, Written
from weightops.lazy import LazyTensor
from weightops.operations.merge.result import MERGE_FILE
from weightops.spec import TensorSpec

Digest = Callable[[Mapping[str, LazyTensor]], Mapping[str, tuple[TensorSpec, str]]]


class MergeProof(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-merge-proof/1"):
    """What of a folder is as a merge makes it: tensors by bits, and the small files that are made with them.

    Names of tensors that `differ`, that are `missing` from the folder, and `extra` ones; `files` that differ or are
    missing, such as config.json. `plugin` is the SHA-256 of the file that brought a method, if one did.
    """

    folder: str
    is_same: bool
    n_tensors: int
    differ: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    plugin: str | None = None


def prove(expected: Checkpoint, found: Checkpoint, digest: Digest, plugin: str | None = None) -> MergeProof:
    """Compare `found` with what a merge makes; `digest` evaluates tensors."""
    missing = tuple(name for name in expected if name not in found)
    extra = tuple(name for name in found if name not in expected)
    shared = [name for name in expected if name in found]
    odd = [name for name in shared if expected[name].spec != found[name].spec]
    same = [name for name in shared if name not in set(odd)]
    ours = digest({name: expected[name] for name in same})
    theirs = digest({name: found[name] for name in same})
    wrong = {*odd, *(name for name in same if ours[name] != theirs[name])}
    differ = tuple(name for name in shared if name in wrong)
    files = tuple(
        name
        for name, sidecar in expected.sidecars.items()
        if isinstance(sidecar, Written) and name != MERGE_FILE and found.sidecar(name) != sidecar.data
    )
    return MergeProof(
        folder=found.name,
        is_same=not (missing or extra or differ or files),
        n_tensors=len(expected),
        differ=differ,
        missing=missing,
        extra=extra,
        files=files,
        plugin=plugin,
    )
