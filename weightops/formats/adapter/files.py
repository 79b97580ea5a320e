"""Which files of a folder are a LoRA adapter, which are a model beside it, and which are trained weights of the two."""

from __future__ import annotations

import re
from collections.abc import Iterable

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.gguf.metadata import is_typed, kind_of
from weightops.io.escape import escape

CONFIG_NAME = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""What peft reads, the first that there is, whatever lies beside it; source: its `load_peft_weights`."""
_OF_MODELS = re.compile(
    r"((pytorch|hf|ft|tf|flax)[-_])?model([-_.]\d.*|_fsdp.*|\.\w+)|consolidated\..*|.+-\d+-of-\d+\.\w+"
)
_OF_ADAPTERS = re.compile(r"adapter(_model)?([-_.]?\d.*|\.\w+)")


def find_adapter(weights: Iterable[str]) -> str | None:
    """The adapter among the weight files of a folder, by peft's rule."""
    names = set(weights)
    return next((name for name in _ADAPTERS if name in names), None)


def model_files(weights: list[str]) -> list[str]:
    """The weight files of which the model in a folder consists: with an adapter there, those named as models are.

    Where there are none, the adapter is all there is.
    """
    adapter = find_adapter(weights)
    if adapter is None:
        return weights
    return [name for name in weights if _OF_MODELS.fullmatch(name)] or [adapter]


def trained_beside(weights: Iterable[str]) -> list[str]:
    """Weight files beside an adapter that are neither that nor a model.

    Trainers put there what was trained and is no LoRA: `non_lora_trainables.bin` and `mm_projector.bin` of LLaVA,
    `non_lora_state_dict.bin`, value heads, new embeddings.
    """
    none = (_OF_MODELS, _OF_ADAPTERS)
    return [n for n in weights if not n.endswith(".gguf") and not any(pattern.fullmatch(n) for pattern in none)]


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter and not a model, not even one that lies in a folder with an adapter."""
    if CONFIG_NAME not in checkpoint.sidecars:
        return False
    files = set(checkpoint.shards.values())
    is_model = "config.json" in checkpoint.sidecars or any(map(_OF_MODELS.fullmatch, files))
    return not is_model or find_adapter(files) is not None or any(".lora_" in name for name in checkpoint)


def looks_like_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter, or a weight file of one that was opened by itself."""
    if checkpoint.sidecars or checkpoint.folder is None:
        return is_adapter(checkpoint)
    return any(".lora_" in name for name in checkpoint) and checkpoint.folder.has(CONFIG_NAME)


def is_gguf_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was read from a GGUF file that holds an adapter."""
    return any(map(is_typed, checkpoint.metadata.values())) and kind_of(checkpoint.metadata) == "adapter"


def refuse_adapter(checkpoint: Checkpoint, role: str) -> None:
    """An adapter is a part of a model; raises `IncompatibleInputs`."""
    if is_adapter(checkpoint) or is_gguf_adapter(checkpoint):
        raise IncompatibleInputs(
            f"{role} {escape(checkpoint.name)} is a LoRA adapter, not a model",
            hint="`weightops merge-lora` makes a model of it and the base that it was trained on",
        )
