"""Run by `.venv-llamacpp/bin/python`: llama.cpp's own convert_lora_to_gguf, from its sources.

Arguments: the folder of the sources, and JSON: a list of `[adapter folder, base folder, type, output]`.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(sources: str, wanted: list[tuple[str, str, str, str]]) -> None:
    sys.path.insert(0, sources)
    for folder, base, kind, out in wanted:
        sys.argv = ["convert", folder, "--base", base, "--outtype", kind, "--outfile", out]
        runpy.run_path(str(Path(sources) / "convert_lora_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
