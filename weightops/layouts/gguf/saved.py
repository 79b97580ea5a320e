"""A model as transformers saves it: the one form from which GGUF files are written, and into which they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.checkpoint import Sidecar
from weightops.layouts.tokenizers.files import TokenizerFiles
from weightops.lazy import LazyTensor


@dataclass(frozen=True, kw_only=True)
class Saved:
    """`name` is that of its folder, `config` the content of config.json, `files` are those of its tokenizer.

    Tensors are under transformers' names, in the order of their files.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: TokenizerFiles = field(default_factory=TokenizerFiles)
    card: bytes | None = None
    """README.md, whose front matter says of whom the model is, and under which licence."""
    sidecars: Mapping[str, Sidecar] = field(default_factory=dict)
    """Files that go along as they are."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
