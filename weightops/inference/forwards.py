"""The forwards of transformers' `generate`, one for each token."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forwards = Generator[Tensor, int | None, None]
"""Gives the logits `[vocab]` of what comes next, and is sent the token that was chosen."""


def forwards(module: PreTrainedModel, tokens: Tensor, max_new_tokens: int) -> Forwards:
    """Run a model over a text `[1, T]` and what comes after it, as transformers' `generate` does.

    What a forward is given is left to transformers: which cache a model has, what positions, when it is to begin anew
    (Phi-3 with "longrope", whose keys turn otherwise beyond its original context).
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)  # type: ignore[no-untyped-call]
    # Without a mask transformers takes tokens that are the pad token for padding, and bos may be that.
    has_mask = "attention_mask" in inspect.signature(module.forward).parameters
    mask = {"attention_mask": torch.ones_like(tokens)} if has_mask else {}
    started: Any = module.generate(  # type: ignore[operator]
        tokens, generation_config=settings, custom_generate=_forwards, **mask
    )
    return cast(Forwards, started)


def _forwards(module: Any, input_ids: Tensor, *, use_cache: bool = True, **kwargs: Any) -> Forwards:
    """transformers' `_sample` without what chooses: called by its `generate` with all that a forward needs."""
    for name in ("generation_config", "logits_processor", "stopping_criteria"):
        kwargs.pop(name)
    is_first = True
    while True:
        inputs = module.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=1 if use_cache and not is_first else None,
            is_first_iteration=is_first,
            use_cache=use_cache,
            **kwargs,
        )
        outputs = module(**inputs, return_dict=True)
        kwargs = module._update_model_kwargs_for_generation(outputs, kwargs)
        token = yield outputs.logits[0, -1].float()
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
        is_first = False
