"""weightops: ship, recover and check large-model weights, streaming and exact.

The functions below are those of the command line. Importing this module imports nothing else: each name is looked up
in `weightops.api` or `weightops.model_api` when it is first used, and torch is loaded only by what computes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "cast",
    "check",
    "convert",
    "dequantize",
    "diff",
    "download",
    "evaluate",
    "extract_lora",
    "generate",
    "inspect",
    "manifest",
    "merge_lora",
    "open_checkpoint",
    "pack",
    "quantize",
    "recover",
    "run",
    "save",
    "save_all",
    "shard",
    "verify",
]

_PLACES = dict.fromkeys(("evaluate", "generate", "quantize"), "weightops.model_api")
_PLACES |= dict.fromkeys(("run", "save", "save_all"), "weightops.outputs")

if TYPE_CHECKING:
    from weightops.api import (
        cast,
        check,
        convert,
        dequantize,
        diff,
        download,
        extract_lora,
        inspect,
        manifest,
        merge_lora,
        pack,
        recover,
        shard,
        verify,
    )
    from weightops.formats.folder import open_checkpoint
    from weightops.model_api import evaluate, generate, quantize
    from weightops.outputs import run, save, save_all


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_PLACES.get(name, "weightops.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
