"""How transformers calls what files hold: the renamings that its model of a config.json does when it loads them.

Adapters name modules as the model does, of the version of transformers that they were trained with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weightops.checkpoint import Checkpoint
from weightops.layouts.counts import beyond_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

STACKED = (".gate_up_proj", ".down_proj")
"""Parameters that hold a matrix for each expert; the first those of two layers, one below the other."""


class LoadedNames:
    """The names that transformers' model of a base has for the tensors of files, and for the paths of adapters.

    Where transformers knows no model of its own for config.json, every name is its own, and `parameters` is empty. No
    code of others is run. `modules` are all modules of the model, `linears` those that are Linear layers or Conv1D,
    `quantisable` those that are Linear to compressed-tensors. With `quantised` it is the model that transformers makes
    for files that hold such layers: it takes stacked experts apart that it could not quantise otherwise.
    """

    def __init__(self, base: Checkpoint, *, quantised: bool = False) -> None:
        self.parameters: frozenset[str] = frozenset()
        self.modules: tuple[str, ...] = ()
        self.linears: frozenset[str] = frozenset()
        self.quantisable: frozenset[str] = frozenset()
        self._in_float32: dict[bool, tuple[str, ...]] = {}
        self._float32: frozenset[str] = frozenset()
        self._known: frozenset[str] = frozenset()
        self._renamed: Callable[[str], str] = str
        self._converters: list[WeightConverter] = []
        self._prefix = ""
        model = _skeleton(base)
        if model is not None:
            if quantised:
                _take_experts_apart(model)
            self._read(model)

    def _read(self, model: PreTrainedModel) -> None:
        from torch import float32
        from torch.nn import Linear
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
        from transformers.pytorch_utils import Conv1D

        # Tied ones are parameters of their own in a model without weights.
        self.parameters = frozenset(name for name, _ in model.named_parameters()) - model.all_tied_weights_keys.keys()
        self.modules = tuple(name for name, _ in model.named_modules() if name)
        self.linears = frozenset(name for name, part in model.named_modules() if isinstance(part, Linear | Conv1D))
        self.quantisable = frozenset(name for name, part in model.named_modules() if isinstance(part, Linear))
        strict = tuple(model._keep_in_fp32_modules_strict or ())
        self._in_float32 = {True: strict, False: (*strict, *(model._keep_in_fp32_modules or ()))}
        self._float32 = frozenset(name for name, tensor in model.state_dict().items() if tensor.dtype is float32)
        self._known, self._prefix = frozenset(model.state_dict()), f"{model.base_model_prefix}."
        self._renamed = renaming(model)
        self._converters = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]

    def of_file(self, name: str) -> str:
        """What the model calls a tensor of a file."""
        return self._placed(self._renamed(name))

    def of_adapter(self, path: str) -> str:
        """What the model calls a tensor that an adapter has under this path, which may be that of older versions."""
        return path if path in self._known else self.of_file(path)

    def has(self, name: str) -> bool:
        """Whether the model has a parameter or a persistent buffer of this name."""
        return name in self._known

    def is_converted(self, name: str) -> bool:
        """Whether a parameter of the model may be made of tensors of files that have other shapes."""
        targets = (target for converter in self._converters for target in converter.target_patterns)
        return any(target.replace("\\", "") in name for target in targets)

    def stacked(self, name: str) -> str | None:
        """The parameter into which the model stacks a tensor of a file, with those of other experts, in peft's way.

        Source: `build_peft_weight_mapping` of peft 0.21.
        """
        found = self.merged(name)
        return found if found is not None and found.endswith(STACKED) else None

    def merged(self, name: str) -> str | None:
        """The parameter into which the model stacks a tensor of a file, with those of other experts."""
        found, operations = self._converted(name)
        is_stack = operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        return found if is_stack and found in self.parameters else None

    def is_float32(self, name: str, *, in_bfloat16: bool) -> bool:
        """Whether transformers has a tensor of a file in float32, although it loads the model in bfloat16 or float16.

        Source: `_get_dtype_plan` and `convert_and_load_state_dict_in_model` of transformers 5.
        """
        found, _ = self._converted(name)
        patterns = self._in_float32.get(in_bfloat16, ())
        return found in self._float32 or any(re.search(p.replace("*", ".*"), found) for p in patterns)

    def _converted(self, name: str) -> tuple[str, list[str]]:
        """What the model makes of a tensor of a file, and by which operations."""
        loaded = self.of_file(name)
        for converter in self._converters:
            found, pattern = converter.rename_source_key(loaded)
            if pattern is not None:
                return self._placed(found), [type(operation).__name__ for operation in converter.operations]
        return loaded, []

    def _placed(self, name: str) -> str:
        """With the first part that models with a head have before the others, or without."""
        spellings = (name, f"{self._prefix}{name}", name.removeprefix(self._prefix))
        return next((spelling for spelling in spellings if spelling in self._known), name)


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """From names in files, also older ones, to those that transformers has for them when it loads `model`.

    Names are to be asked for in their order: some renamings depend on what they have seen before.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]

    def renamed(name: str) -> str:
        for each in renamings:
            name, _ = each.rename_source_key(name)
        return name

    return renamed


def _take_experts_apart(model: PreTrainedModel) -> None:
    """Replace stacked experts by the Linear layers that transformers has instead of them where files are quantised.

    Source: `_convert_model_for_quantization` of transformers 5.
    """
    from torch import device
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    for name, module in list(model.named_modules()):
        found: dict[str, Any] | None = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__)
        if found is not None and "compressed-tensors" in found["quantization_methods"]:
            with device("meta"):
                model.set_submodule(name, found["module_name"](model.config.get_text_config()))


def _skeleton(base: Checkpoint) -> PreTrainedModel | None:
    """The model on meta, by its class in config.json; None where there is none, or it cannot be that of the files."""
    from weightops.layouts.skeleton import build_for_names, parse_config

    config = {key: value for key, value in base.config().items() if key != "auto_map"}
    if not config or beyond_files(config, base):
        return None
    try:
        return build_for_names(parse_config(config, ""), config.get("architectures"), len(base))
    except Exception:  # transformers and its validators raise what they like: then nothing is known of this model
        return None
