"""The forwards of transformers' `generate`: a prompt in pieces, then one for each token."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 512
"""Tokens of a prompt that are read at a time."""
_TURNING = frozenset({"dynamic", "longrope"})
"""Kinds of rotary embedding that turn keys by how long the text is, so that a text is read as a whole."""

Steps = Generator[Tensor | None, int | None, None]
"""Gives None between the pieces of a prompt, then the logits `[vocab]` of what comes next; is sent the token chosen."""


def turns_with_length(module: PreTrainedModel) -> bool:
    """Whether the keys of a text depend on its length, and the model keeps that between forwards."""
    kinds = [getattr(part, "rope_type", None) for part in module.modules()]
    found = [each for kind in kinds for each in (kind.values() if isinstance(kind, dict) else [kind])]
    return not _TURNING.isdisjoint(each for each in found if isinstance(each, str))


class Forwards:
    """A model run over a text `[T]` and what comes after it, as transformers' `generate` does.

    What a forward is given is left to transformers: which cache a model has, what positions, when it is to begin anew
    (Phi-3 with "longrope", whose keys turn otherwise beyond its original context). `cache` holds the keys and values
    of the first tokens already, if it is given. A prompt is read `PIECE` tokens at a time where every layer keeps keys
    and values, in a window or not; as a whole by other models.
    """

    def __init__(self, module: PreTrainedModel, tokens: Tensor, max_new_tokens: int, cache: Any = None) -> None:
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)  # type: ignore[no-untyped-call]
        # Without a mask transformers takes tokens that are the pad token for padding, and bos may be that.
        has_mask = "attention_mask" in inspect.signature(module.forward).parameters
        given = {"attention_mask": torch.ones_like(tokens[None])} if has_mask else {}
        if cache is not None:
            given["past_key_values"] = cache
        self.cache: Any = None
        """transformers' cache, if the model has one that is handed to it."""
        self.steps: Steps = module.generate(  # type: ignore[operator]
            tokens[None], generation_config=settings, custom_generate=self._start, **given
        )

    def _start(self, module: Any, input_ids: Tensor, *, use_cache: bool = True, **kwargs: Any) -> Steps:
        """transformers' `_sample` without what chooses: called by its `generate` with all that a forward needs."""
        for name in ("generation_config", "logits_processor", "stopping_criteria"):
            kwargs.pop(name)
        self.cache = kwargs.get("past_key_values")
        return self._run(module, input_ids, use_cache, kwargs)

    def _run(self, module: Any, input_ids: Tensor, use_cache: bool, kwargs: dict[str, Any]) -> Steps:
        length = input_ids.shape[1]
        done = 0 if self.cache is None else self.cache.get_seq_length()
        ends = [*range(done + PIECE, length, PIECE), length] if self._is_cut(module) else [length]
        for end in ends:
            given = {**kwargs, **{name: kwargs[name][..., :end] for name in _BY_PLACE if kwargs.get(name) is not None}}
            inputs = module.prepare_inputs_for_generation(
                input_ids[:, :end],
                next_sequence_length=end - done if done else None,
                is_first_iteration=True,
                use_cache=use_cache,
                **given,
            )
            outputs = module(**inputs, return_dict=True)
            done = end
            if end < length:
                yield None
        while True:
            kwargs = module._update_model_kwargs_for_generation(outputs, kwargs)
            token = yield outputs.logits[0, -1].float()
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
            inputs = module.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=1 if use_cache else None,
                is_first_iteration=False,
                use_cache=use_cache,
                **kwargs,
            )
            outputs = module(**inputs, return_dict=True)

    def _is_cut(self, module: Any) -> bool:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        kinds = {type(layer) for layer in getattr(self.cache, "layers", ())}
        return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not turns_with_length(module)


_BY_PLACE = ("attention_mask", "position_ids")
"""What has an element for each token."""


def is_croppable(cache: Any) -> bool:
    """Whether a cache can be cut after any of its tokens: every layer keeps the keys and values of all of them."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def cache_nbytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
