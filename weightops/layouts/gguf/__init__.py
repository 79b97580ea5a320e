"""llama.cpp's layout: one GGUF file with tensors, parameters and tokenizer, to and from what transformers saves.

Names, keys, values and their order are those of llama.cpp's convert_hf_to_gguf; what it says in code for each family is
a table here (`families`), which is read in both directions.
"""

from weightops.layouts.gguf.adapter_base import Base
from weightops.layouts.gguf.adapter_read import read as read_adapter
from weightops.layouts.gguf.adapter_write import write as write_adapter
from weightops.layouts.gguf.llama import from_model
from weightops.layouts.gguf.options import DTYPES, parse_types
from weightops.layouts.gguf.quantised import Mix, quantised
from weightops.layouts.gguf.read import config_in, read
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.write import FILE_TYPES, write

__all__ = [
    "DTYPES",
    "FILE_TYPES",
    "Base",
    "Mix",
    "Saved",
    "config_in",
    "from_model",
    "parse_types",
    "quantised",
    "read",
    "read_adapter",
    "write",
    "write_adapter",
]
