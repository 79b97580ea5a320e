"""Beam search, which is transformers' own: several texts are carried along, and the most probable one is the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightops.inference.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def beam_search(
    module: PreTrainedModel,
    prompt: Tensor,
    settings: Settings,
    max_new_tokens: int,
    ends: frozenset[int],
    is_cancelled: Callable[[], bool],
) -> list[int]:
    """The tokens that follow a prompt `[T]`; all come together, at the end.

    Once `is_cancelled` they are the best so far.
    """
    from transformers import GenerationConfig
    from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

    class Cancelled(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), is_cancelled(), dtype=torch.bool, device=input_ids.device)

    sampling = settings.sampling
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=settings.num_beams,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size or 0,
    )
    text: Tensor = module.generate(  # type: ignore[operator]
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([Cancelled()]),
    )
    tokens = [int(token) for token in text[0, len(prompt) :]]
    # A text that ended before the longest of the beams is padded.
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]
