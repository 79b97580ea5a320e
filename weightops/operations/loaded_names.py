"""How transformers calls what files hold: the renamings that its model of a config.json does when it loads them.

Adapters name modules as the model does, of the version of transformers that they were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from weightops.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COUNTS = ("layer", "depth", "expert", "block", "stage")
"""Parts of the settings that say how many modules there are."""


class LoadedNames:
    """The names that transformers' model of a base has for the tensors of files, and for the paths of adapters.

    Where transformers knows no model of its own for config.json, every name is its own. No code of others is run.
    """

    def __init__(self, base: Checkpoint) -> None:
        model = _skeleton(base.config(), len(base))
        self._rename, self._known = (
            _renaming(model),
            frozenset(model.state_dict()) if model is not None else frozenset(),
        )
        self._prefix = f"{model.base_model_prefix}." if model is not None else ""

    def of_file(self, name: str) -> str:
        """What the model calls a tensor of a file."""
        return self._placed(self._rename(name))

    def of_adapter(self, path: str) -> str:
        """What the model calls a tensor that an adapter has under this path, which may be that of older versions."""
        return path if path in self._known else self._placed(self._rename(path))

    def _placed(self, name: str) -> str:
        """With the first part that models with a head have before the others, or without."""
        spellings = (name, f"{self._prefix}{name}", name.removeprefix(self._prefix))
        return next((spelling for spelling in spellings if spelling in self._known), name)


def _renaming(model: PreTrainedModel | None) -> Callable[[str], str]:
    if model is None:
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return renamed


def _skeleton(config: Mapping[str, Any], n_tensors: int) -> PreTrainedModel | None:
    """The model on meta, by its class in config.json; None where there is none, or it cannot be that of the files."""
    if not config or any(count > max(n_tensors, 1) for count in _counts(config)):
        return None
    import torch
    import transformers

    model_type = str(config.get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        made = transformers.CONFIG_MAPPING[model_type].from_dict(plain)
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                return kind(made)
            return transformers.AutoModelForCausalLM.from_config(made)  # type: ignore[no-any-return, no-untyped-call]
    except Exception:  # transformers and its validators raise what they like: then nothing is known of this model
        return None


def _counts(config: Mapping[str, Any]) -> Iterable[int]:
    """What a config says of how many modules there are, that of its parts included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif type(value) is int and any(part in key for part in _COUNTS) and not key.endswith("_size"):
            yield value
