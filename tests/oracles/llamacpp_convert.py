"""Run by `.venv-llamacpp/bin/python`: llama.cpp's own convert_hf_to_gguf, from its sources.

Arguments: the folder of the sources, and JSON: a list of `[model folder, type, output, pre-tokenizer]`. The name of the
pre-tokenizer is given to tokenizers that the converter does not know by their digest, as those trained for tests.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(sources: str, wanted: list[tuple[str, str, str, str]]) -> None:
    sys.path.insert(0, sources)
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    for folder, kind, out, pre in wanted:

        def name_of(self: TextModel, tokenizer: object, given: str = pre) -> str:
            try:
                return known(self, tokenizer)
            except NotImplementedError:
                return given

        TextModel.get_vocab_base_pre = name_of
        sys.argv = ["convert", folder, "--outtype", kind, "--outfile", out]
        runpy.run_path(str(Path(sources) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
