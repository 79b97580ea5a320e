"""What is asked of a model beside the prompt, as keywords and as fields of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from weightops.inference.settings import Settings


class Asked(TypedDict, total=False):
    """How a text is made; see `weightops.inference.settings` and `weightops.inference.sampling`."""

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int | None
    seed: int
    stop: str | Sequence[str]
    logprobs: int | None
    num_beams: int


def settings_of(asked: Asked) -> Settings:
    """The same as a value; raises `UsageError` for what cannot be meant, and for keywords that there are not.

    Imports torch, which what only names these keywords does without.
    """
    from dataclasses import fields

    from weightops.errors import UsageError
    from weightops.inference.sampling import Sampling
    from weightops.inference.settings import Settings

    unknown = next((name for name in asked if name not in Asked.__annotations__), None)
    if unknown is not None:
        raise UsageError(f"there is no setting {unknown}", hint=f"choose from {', '.join(Asked.__annotations__)}")
    names = {field.name for field in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in asked.items() if name in names})  # type: ignore[arg-type]
    rest = {name: value for name, value in asked.items() if name not in names and name != "stop"}
    stop = asked.get("stop", ())
    return Settings(sampling=sampling, stop=(stop,) if isinstance(stop, str) else tuple(stop), **rest)  # type: ignore[arg-type]
