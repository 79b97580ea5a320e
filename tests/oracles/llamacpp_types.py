"""Run by `.venv-llamacpp/bin/python`: the types that llama-quantize chooses, or the files that it makes.

Argument: JSON, a list of objects with `path`, `out` (null for none, as its `--dry-run`), `file_type`, `importance` (an
.npz of vectors, or null), `pure`, `output`, `embedding` (numbers of types, or null) and `overrides` (expressions and
numbers). Prints for each the names and types, in the output's order.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any

import llama_cpp
import numpy as np

LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?")


def main(cases: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    said: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    answers = []
    for case in cases:
        said.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = case["file_type"], case["pure"], 1
        params.dry_run = case["out"] is None
        if case["output"] is not None:
            params.output_tensor_type = case["output"]
        if case["embedding"] is not None:
            params.token_embedding_type = case["embedding"]
        vectors = np.load(case["importance"]) if case["importance"] else {}
        kept = {name: vectors[name] for name in vectors}
        entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (name, vector) in zip(entries, kept.items(), strict=False):
            data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), data, vector.size
        if kept:
            params.imatrix = entries
        overrides = (llama_cpp.llama_model_tensor_override * (len(case["overrides"]) + 1))()
        for entry, (pattern, dtype) in zip(overrides, case["overrides"], strict=False):
            entry.pattern, entry.type = pattern.encode(), dtype
        if case["overrides"]:
            params.tt_overrides = overrides
        out = (case["out"] or "none").encode()
        status = llama_cpp.llama_model_quantize(case["path"].encode(), out, ctypes.byref(params))
        text = "".join(said)
        if status:
            raise RuntimeError(f"{case}: {text}")
        answers.append([(name, new or old) for name, old, new in LINE.findall(text)])
    return answers


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
