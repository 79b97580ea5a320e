"""LLaMA models of any layout, on their way to GGUF."""

from __future__ import annotations

from weightops.io import strict_json
from weightops.layouts import hf
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.model import Model
from weightops.layouts.tokenizers.files import CONFIG
from weightops.layouts.tokenizers.hf import files_of


def from_model(model: Model) -> Saved:
    """The model as transformers would have it; what is reordered for that, and back again, is as it was."""
    made = hf.write(model)
    config = strict_json.load_object(made.sidecar(CONFIG) or b"", CONFIG)
    files = files_of(model.tokenizer, model.files)
    return Saved(name=model.name, config=config, tensors=made.tensors, files=files, sidecars=model.sidecars)
