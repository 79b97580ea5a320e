"""Run by `.venv-llamacpp/bin/python`: the types that llama-quantize chooses, without quantising (its `--dry-run`).

Argument: JSON, a list of objects with `path`, `file_type`, `importance`, `pure`, `output`, `embedding` (numbers of
types, or null) and `overrides` (expressions and numbers). Prints for each the names and types, in the output's order.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any

import llama_cpp

LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?")


def main(cases: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    said: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    answers = []
    for case in cases:
        said.clear()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.dry_run, params.pure, params.nthread = case["file_type"], True, case["pure"], 1
        if case["output"] is not None:
            params.output_tensor_type = case["output"]
        if case["embedding"] is not None:
            params.token_embedding_type = case["embedding"]
        value = ctypes.c_float(1)
        entries = (llama_cpp.llama_model_imatrix_data * 2)()
        entries[0].name, entries[0].data, entries[0].size = b"none", ctypes.pointer(value), 1
        if case["importance"]:
            params.imatrix = entries
        overrides = (llama_cpp.llama_model_tensor_override * (len(case["overrides"]) + 1))()
        for entry, (pattern, dtype) in zip(overrides, case["overrides"], strict=False):
            entry.pattern, entry.type = pattern.encode(), dtype
        if case["overrides"]:
            params.tt_overrides = overrides
        status = llama_cpp.llama_model_quantize(case["path"].encode(), b"none", ctypes.byref(params))
        text = "".join(said)
        if status:
            raise RuntimeError(f"{case}: {text}")
        answers.append([(name, new or old) for name, old, new in LINE.findall(text)])
    return answers


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
