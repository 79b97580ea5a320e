"""The Python API: one function per command, over the same objects, plus the pieces they are made of.

    import weightops
    weightops.recover("./llama-13b", "./zhixi-diff", "./zhixi", format="torch-1.12", max_shard_size="10GB")

Commands that write take the keywords of `Output`; all raise `weightops.errors` and print nothing. They import their
operations when they are called, because starting takes longer than many of them.
"""

from __future__ import annotations

from weightops.api.adapters import combine_adapters, convert_adapter, resize_adapter
from weightops.api.blocks import quantize_blocks
from weightops.api.change import (
    cast,
    convert,
    dequantize,
    diff,
    extract_lora,
    merge_lora,
    pack,
    recover,
    repack,
    shard,
)
from weightops.api.comparison import Comparisons, compare
from weightops.api.importance import imatrix
from weightops.api.jobs import finish, work
from weightops.api.merging import compare_merge, explain_merge, merge, verify_merge
from weightops.api.models import ComputeDType, Quantization, evaluate, generate, quantize
from weightops.api.outputs import Output, run, save, save_all
from weightops.api.prove import check, download, inspect, manifest, sign, verify
from weightops.api.publishing import publish
from weightops.api.surgery import edit, experts, part
from weightops.api.talk import chat, generate_all, open_pool
from weightops.api.vocabulary import vocab
from weightops.formats.folder import open_checkpoint

__all__ = [
    "Comparisons",
    "ComputeDType",
    "Output",
    "Quantization",
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
