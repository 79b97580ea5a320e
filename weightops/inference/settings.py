"""What is asked of a model beside the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from weightops.errors import UsageError
from weightops.inference.sampling import Sampling

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    """How a text is made. `max_new_tokens` is 128 by default, or as many as there are positions left.

    It ends before the first of the strings `stop`. With `logprobs` each token comes with its log-probability and those
    of so many of the most probable tokens. With `num_beams` above 1 it is the best of a beam search.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(f"{self.max_new_tokens} new tokens are none", hint="give --max-new-tokens 1 or more")
        if not all(self.stop):
            raise UsageError("a stop string is empty", hint="leave out that --stop")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise UsageError(f"log-probabilities of {self.logprobs} tokens", hint="give --logprobs 0 to 20")
        if self.num_beams < 1:
            raise UsageError(f"{self.num_beams} beams are none", hint="give --num-beams 1 or more")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        sampling = self.sampling
        odd = {
            "--temperature": sampling.temperature != 0,
            "--logprobs": self.logprobs is not None,
            "--presence-penalty": sampling.presence_penalty != 0,
            "--frequency-penalty": sampling.frequency_penalty != 0,
        }
        for name, is_given in odd.items():
            if is_given:
                raise UsageError(f"{name} has no use with several beams", hint=f"leave out {name} or --num-beams")
