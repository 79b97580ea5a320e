"""Run by `.venv-llamacpp/bin/python`: what ggml's library makes of float32 rows.

Arguments: an .npz with arrays `rows.N` and, for some, `importance.N`; JSON with numbers of types
by name; and the .npz to write, of `TYPE.N`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(path: str, types: dict[str, int], out: str) -> None:
    library = min((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    given, found = np.load(path), {}
    for key in given.files:
        kind, _, case = key.partition(".")
        if kind != "rows":
            continue
        rows = given[key]
        importance = given[f"importance.{case}"] if f"importance.{case}" in given.files else None
        for name, code in types.items():
            data = np.zeros(4 * rows.size, np.uint8)
            weights = None if importance is None else importance.ctypes.data
            nbytes = quantize(code, rows.ctypes.data, data.ctypes.data, 0, *rows.shape, weights)
            found[f"{name}.{case}"] = data[:nbytes]
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
