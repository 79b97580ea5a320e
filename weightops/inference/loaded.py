"""A model whose weights are loaded, once for as many texts as are wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from weightops.engine.proof import hold
from weightops.errors import Interrupted
from weightops.inference.beams import beam_search
from weightops.inference.events import Candidate, Event, Finish, Finished, Reading, Started, Token
from weightops.inference.finite import check_finite
from weightops.inference.forwards import Forwards, turns_with_length
from weightops.inference.model import BlockModel
from weightops.inference.opened import Opened, Placement
from weightops.inference.pieces import Pieces
from weightops.inference.prompt_cache import PromptCache
from weightops.inference.sampling import Chooser
from weightops.inference.settings import Settings
from weightops.inference.stops import StopStrings


class Loaded:
    """The weights of an opened model in memory, until `close`; or block by block from disk, as its placement says.

    Keys and values of the last `kept_prompts` texts are kept, so that a prompt that begins as one of them is not read
    again from its beginning. It is for one thread. Several texts may come from it in turn, unless it `is_exclusive`.
    """

    def __init__(self, opened: Opened, placement: Placement, *, kept_prompts: int = 1) -> None:
        """Load; raises `CorruptInput` for damaged files, `Differs` for weights whose digest is wrong, `Interrupted`."""
        self.opened, self.placement = opened, placement
        model = opened.model
        model.keep_packed(placement.is_packed)
        self.is_exclusive = placement.streams_weights or turns_with_length(model.module)
        """Whether texts must come one after the other."""
        self.prompts = PromptCache(0 if turns_with_length(model.module) else kept_prompts)
        with ExitStack() as stack:
            if placement.streams_weights:
                stack.enter_context(model.loaded(""))
                for name in model.blocks:
                    _load_on_call(stack, model, name)
            else:
                self._load_all(stack)
            # Weights that are wrong write no word. Those that are read again for each token are proven once.
            hold(opened.checkpoint.values(), opened.control)
            self._held = stack.pop_all()

    def _load_all(self, stack: ExitStack) -> None:
        model, progress = self.opened.model, self.opened.control.progress
        progress.start("loading", self.opened.whole_nbytes(self.placement))
        for name in ("", *model.blocks):
            stack.callback(model.unload, name)
            model.load(name)
            progress.advance(model.nbytes(name))
        progress.stop()

    def close(self) -> None:
        """Give weights and caches back."""
        self.prompts.clear()
        self._held.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Memory that is held while no text comes."""
        return self.placement.nbytes + self.prompts.nbytes

    def generate(
        self,
        prompt: Sequence[int],
        settings: Settings | None = None,
        *,
        ends: frozenset[int] | None = None,
        column: int = 0,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """The events of a text that continues the tokens of a prompt.

        It ends at one of the tokens `ends`, by default those of a text. `is_cancelled` is asked before each piece of
        the prompt and before each token. Raises `PromptTooLong` before the first event; `CorruptInput` or `UsageError`
        for logits that are no numbers.
        """
        settings = settings or Settings()
        count = self.opened.max_new_tokens(prompt, settings.max_new_tokens)
        found = self.opened.ends() if ends is None else ends
        return self._generate(list(prompt), settings, count, found, column, is_cancelled)

    @torch.inference_mode()
    def _generate(
        self,
        prompt: list[int],
        settings: Settings,
        count: int,
        ends: frozenset[int],
        column: int,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[Event]:
        started_s = time.monotonic()
        cache, cached = (None, 0) if settings.num_beams > 1 else self.prompts.take(prompt)
        yield Started(column=column, prompt_tokens=len(prompt), cached_tokens=cached)
        text = _Text(self.opened.tokenizer, prompt, settings.stop)
        finish: Finish | None = None
        first_s: float | None = None
        for each in self._tokens(prompt, settings, count, ends, cache, is_cancelled):
            if isinstance(each, int):
                yield Reading(column=column, tokens=each, prompt_tokens=len(prompt))
                continue
            token, logits = each
            if first_s is None:
                first_s = time.monotonic() - started_s
            finish = "eos" if token in ends else "length" if len(text.tokens) + 1 == count else None
            said = text.push(token, is_last=finish is not None)
            if text.is_stopped:
                finish = "stop"
            logprob, top = self._logprobs(token, logits, settings.logprobs)
            yield Token(column=column, id=token, text=said, logprob=logprob, top=top)
            if finish is not None:
                break
        yield Finished(
            column=column,
            finish=finish or "cancelled",
            text=text.said,
            tokens=tuple(text.tokens),
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            first_token_s=first_s,
            elapsed_s=time.monotonic() - started_s,
        )

    def _tokens(
        self,
        prompt: list[int],
        settings: Settings,
        count: int,
        ends: frozenset[int],
        cache: Any,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[int | tuple[int, Tensor | None]]:
        """How many tokens of the prompt were read, between its pieces; then tokens, each with the logits `[vocab]`."""
        model, check = self.opened.model, self.opened.control.check
        start = torch.tensor(prompt, device=model.device)
        if settings.num_beams > 1:
            check()
            for each in beam_search(model.module, start, settings, count, ends, is_cancelled):
                yield each, None
            return
        chooser = Chooser(settings.sampling, prompt)
        forwards = Forwards(model.module, start, count, cache)
        text = list(prompt)
        token: int | None = None
        is_whole = True
        try:
            while not is_cancelled():
                check()
                is_whole = False  # a cache in which some layers have more tokens than others is of no use
                try:
                    logits = forwards.steps.send(token)
                except Interrupted:  # while a block was read from disk
                    if is_cancelled():
                        return
                    raise
                is_whole = True
                if logits is None:
                    yield forwards.cache.get_seq_length()
                    continue
                check_finite(model, logits[None], f"after {len(text) - len(prompt)} new tokens its logits hold")
                token = chooser.choose(logits)
                text.append(token)
                yield token, logits
        finally:
            forwards.steps.close()
            if is_whole and forwards.cache is not None:
                self.prompts.keep(text, forwards.cache)

    def _logprobs(
        self, token: int, logits: Tensor | None, count: int | None
    ) -> tuple[float | None, tuple[Candidate, ...]]:
        if count is None or logits is None:
            return None, ()
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(count, len(logprobs)))
        top = tuple(
            Candidate(id=each, text=self.opened.text_of(each), logprob=value)
            for each, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return float(logprobs[token]), top


class _Text:
    """The text of tokens so far, and the part of it that may be given out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._pieces, self._stops = Pieces(tokenizer, prompt), StopStrings(stop)
        self.tokens: list[int] = []
        self._given: list[str] = []

    @property
    def said(self) -> str:
        return "".join(self._given)

    @property
    def is_stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int, *, is_last: bool) -> str:
        self.tokens.append(token)
        found = self._stops.push(self._pieces.push(token))
        if is_last and not self.is_stopped:
            found += self._stops.push(self._pieces.end())
            if not self.is_stopped:
                found += self._stops.end()
        self._given.append(found)
        return found


def _load_on_call(stack: ExitStack, model: BlockModel, name: str) -> None:
    """For as long as `stack` is open, block `name` is in memory while it runs, and not longer."""

    def before(*_: object) -> None:
        model.load(name)

    def after(_: nn.Module, __: object, ___: object) -> None:
        model.unload(name)

    block = model.module.get_submodule(name)
    stack.callback(model.unload, name)
    stack.callback(block.register_forward_pre_hook(before).remove)
    stack.callback(block.register_forward_hook(after).remove)
