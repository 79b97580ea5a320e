"""Convert a folder of Meta's files with the converter that transformers 4.47.1, last of all, still had in its wheel.

Run by an interpreter of its own: `python reference_converter.py INPUT OUTPUT [--llama-version 2]`. It leaves
`model.safetensors` (bfloat16 whatever the input is), `config.json` and `generation_config.json`; no tokenizer. It
cannot convert more parts than heads of k and v, and its config has the right context only for the right version.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from transformers.models.llama.convert_llama_weights_to_hf import write_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--llama-version", default="2", choices=["1", "2", "3", "3.1", "3.2", "Guard-3"])
    arguments = parser.parse_args()

    first, *others = sorted(arguments.input.glob("consolidated.*.pth"))
    shards = [torch.load(shard, mmap=True, weights_only=True) for shard in (first, *others)]
    vocab_size = sum(len(shard["output.weight"]) for shard in shards)  # LLaMA 1 and 2 say -1 in params.json
    del shards
    start = time.perf_counter()
    write_model(
        model_path=str(arguments.output),
        input_base_path=str(arguments.input),
        safe_serialization=True,
        llama_version=arguments.llama_version,
        vocab_size=vocab_size,
        num_shards=1 + len(others),
    )
    elapsed_s = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the process that started this one
    peak_nbytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    print(json.dumps({"elapsed_s": round(elapsed_s, 2), "peak_nbytes": peak_nbytes}))


if __name__ == "__main__":
    main()
