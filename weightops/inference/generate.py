"""Text from a model, token by token: the whole model in memory, or layer by layer from disk for every token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.inference.answers import Scored
from weightops.inference.events import Event, Finish, Finished, Token
from weightops.inference.loaded import Loaded
from weightops.inference.opened import Opened, room_on
from weightops.inference.packed import Engine
from weightops.inference.prompts import Prompt, Prompted, prompted
from weightops.inference.settings import Settings
from weightops.io.strict_json import as_json


class GenerateDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-generate/1"):
    """What `generate --json` prints: the new text and its tokens, and why it ended: "eos", "stop" or "length".

    `prompt_tokens` counts those of the prompt. `engine` is there for a quantised model, `logprobs`, one for each token,
    if they were asked for. See `Generation`.
    """

    text: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    warnings: tuple[str, ...]
    finish: Finish | None
    streams_weights: bool
    engine: Engine | msgspec.UnsetType = msgspec.UNSET
    elapsed_s: float
    tokens_per_s: float
    logprobs: tuple[Scored, ...] | msgspec.UnsetType = msgspec.UNSET


class Generation:
    """A text that is being generated: iterate over it for its pieces, as they come.

    `streams_weights` says that the model does not fit into memory, so that all of its blocks are read for every
    token; `saves_memory` that the weights of a quantised one stay packed because dequantised they would not fit. Once
    the iteration is over `tokens` are the new tokens, and `finish` says why it ended: "eos", "stop" or "length".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: Prompt,
        *,
        settings: Settings | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        engine: Engine = "auto",
        max_nbytes: int | None = None,
        control: Control | None = None,
    ) -> None:
        """Check all that can be known from headers, config and tokenizer; no weights are read.

        Raises `SourceMissing` without config or tokenizer, `UsageError` for prompts that are empty or too long,
        `NoRoom` where not even one block fits into `max_nbytes` more than the process has now (by default what memory
        there is).
        """
        self._control = control or Control()
        self._settings = settings or Settings()
        opened = Opened(checkpoint, dtype=dtype, device=device, engine=engine, control=self._control)
        self._opened = opened
        self._prompted: Prompted = prompted(opened, prompt)
        length = len(self._prompted.tokens)
        self._count = opened.max_new_tokens(self._prompted.tokens, self._settings.max_new_tokens)
        room = max_nbytes if max_nbytes is not None else room_on(device)
        self._placement = opened.placement(room, length + self._count, self._settings.num_beams)
        opened.model.keep_packed(self._placement.is_packed)
        self.warnings = opened.warnings
        self.tokens: list[int] = []
        self.logprobs: list[Scored] = []
        """Of each token, if the settings ask for them."""
        self.finish: Finish | None = None

    @property
    def prompt_tokens(self) -> list[int]:
        """The tokens of the prompt."""
        return self._prompted.tokens

    @property
    def streams_weights(self) -> bool:
        """Whether blocks are read from disk for every token."""
        return self._placement.streams_weights

    @property
    def saves_memory(self) -> bool:
        """Whether weights stay packed because dequantised they would not fit."""
        return self._placement.saves_memory

    @property
    def dequantized_nbytes(self) -> int:
        """Bytes of the whole model in memory, if it is dequantised."""
        return self._opened.dequantized_nbytes

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole model in memory."""
        return self._opened.whole_nbytes(self._placement)

    @property
    def engine(self) -> Engine | None:
        """How layers multiply that are quantised; None if none is."""
        return self._opened.model.engine

    def to_json(self, text: str, elapsed_s: float) -> dict[str, Any]:
        """A document of schema `weightops-generate/1` on a text that has come, in so much time."""
        return as_json(
            GenerateDocument(
                text=text,
                prompt_tokens=len(self.prompt_tokens),
                tokens=tuple(self.tokens),
                warnings=tuple(self.warnings),
                finish=self.finish,
                streams_weights=self.streams_weights,
                engine=self.engine or msgspec.UNSET,
                elapsed_s=round(elapsed_s, 3),
                tokens_per_s=round(len(self.tokens) / elapsed_s, 3),
                logprobs=tuple(self.logprobs) if self.logprobs else msgspec.UNSET,
            )
        )

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if isinstance(event, Token) and event.text:
                yield event.text

    def events(self) -> Iterator[Event]:
        """The same as events; weights are loaded for as long as they come."""
        self.tokens, self.logprobs, self.finish = [], [], None
        opened, prompt = self._opened, self._prompted
        with self._control.stores.connected(), Loaded(opened, self._placement, kept_prompts=0) as loaded:
            for event in loaded.generate(prompt.tokens, prompt.settings(self._settings), ends=prompt.ends):
                if isinstance(event, Token):
                    self.tokens.append(event.id)
                    if event.logprob is not None:
                        text = loaded.opened.text_of(event.id)
                        self.logprobs.append(Scored(id=event.id, text=text, logprob=event.logprob, top=event.top))
                elif isinstance(event, Finished):
                    self.finish = event.finish
                yield event
