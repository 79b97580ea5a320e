"""llama.cpp's layout: one GGUF file with tensors, parameters and tokenizer, to and from what transformers saves.

Names, keys, values and their order are those of llama.cpp's convert_hf_to_gguf; what it says in code for each family is
a table here (`families`), which is read in both directions.
"""

from weightops.layouts.gguf.llama import from_model
from weightops.layouts.gguf.read import read
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.write import write

__all__ = ["Saved", "from_model", "read", "write"]
