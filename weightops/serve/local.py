"""Models of this machine, in one memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightops.inference.events import Event
from weightops.inference.pool import Pool, Request, Texts
from weightops.inference.prompts import Conversation, Prompt
from weightops.inference.templates.template import named_templates
from weightops.serve.bodies import Ask
from weightops.serve.engine import ModelCard
from weightops.serve.errors import ApiError

MAX_WAITING = 64
"""Texts that may wait for their turn, of all models."""


class Local:
    """An engine over a pool. `template` is what conversations are put into unless a request names another."""

    def __init__(self, pool: Pool, template: str | Path | None = None) -> None:
        self._pool, self._template, created = pool, template, int(time.time())
        self.cards: Mapping[str, ModelCard] = {name: self._card(name, created) for name in pool.names}

    def _card(self, name: str, created: int) -> ModelCard:
        opened = self._pool.model(name)
        return ModelCard(
            name=name,
            created=created,
            max_positions=opened.model.max_positions,
            has_template=self._template is not None or bool(getattr(opened.tokenizer, "chat_template", None)),
            note="; ".join(opened.warnings),
        )

    def submit(self, asks: Sequence[Ask], put: Callable[[Event], None]) -> Texts:
        """Ask the pool; raises `ApiError` where too much waits already, or for a template that there is not."""
        requests = [Request(ask.model, self._prompt(ask), ask.settings) for ask in asks]
        if self._pool.waiting + len(requests) > MAX_WAITING:
            text = f"{self._pool.waiting} texts wait already, and {MAX_WAITING} may"
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after_s=5)
        return self._pool.submit(requests, put)

    def spell(self, model: str, token: int) -> tuple[str, bytes]:
        """A token's own text and bytes."""
        data = self._pool.model(model).bytes_of(token)
        return data.decode("utf-8", "replace"), data

    def _prompt(self, ask: Ask) -> Prompt:
        if ask.messages is None:
            return ask.prompt
        # A request names a template, and never a file.
        if ask.template not in (None, "own", *named_templates()):
            names = ", ".join(["own", *named_templates()])
            raise ApiError(
                400, f"there is no template {(ask.template or '')[:80]!a}; there are: {names}", param="template"
            )
        return Conversation(ask.messages, ask.template or self._template or "own")

    def stop(self) -> None:
        """Stop all texts; safe in a signal handler."""
        self._pool.cancel()

    def close(self) -> None:
        """Stop all texts, and give all memory back."""
        self._pool.close()
