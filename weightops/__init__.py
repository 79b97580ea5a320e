"""weightops: ship, recover and check large-model weights, streaming and exact.

The functions below are those of the command line. Importing this module imports nothing else: each name is looked up
in `weightops.api` when it is first used, and torch is loaded only by what computes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.version import __version__ as __version__

__all__ = [
    "cast",
    "chat",
    "check",
    "combine_adapters",
    "compare",
    "compare_merge",
    "convert",
    "convert_adapter",
    "dequantize",
    "diff",
    "download",
    "edit",
    "evaluate",
    "experts",
    "explain_merge",
    "extract_lora",
    "finish",
    "generate",
    "generate_all",
    "imatrix",
    "inspect",
    "manifest",
    "merge",
    "merge_lora",
    "open_checkpoint",
    "open_pool",
    "pack",
    "part",
    "publish",
    "quantize",
    "quantize_blocks",
    "recover",
    "repack",
    "resize_adapter",
    "run",
    "save",
    "save_all",
    "shard",
    "sign",
    "verify",
    "verify_merge",
    "vocab",
    "work",
]

if TYPE_CHECKING:
    from weightops.api import (
        cast,
        chat,
        check,
        combine_adapters,
        compare,
        compare_merge,
        convert,
        convert_adapter,
        dequantize,
        diff,
        download,
        edit,
        evaluate,
        experts,
        explain_merge,
        extract_lora,
        finish,
        generate,
        generate_all,
        imatrix,
        inspect,
        manifest,
        merge,
        merge_lora,
        open_checkpoint,
        open_pool,
        pack,
        part,
        publish,
        quantize,
        quantize_blocks,
        recover,
        repack,
        resize_adapter,
        run,
        save,
        save_all,
        shard,
        sign,
        verify,
        verify_merge,
        vocab,
        work,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("weightops.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
