"""Events as the documents that clients of OpenAI's API read: chunks of a stream, and whole answers."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from weightops.inference.events import Event, Finished, Started, Token

Kind = Literal["chat", "text"]
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
FINGERPRINT = "weightops"
PRESENCE = b": still here\n\n"
"""A comment, which keeps proxies from taking a long silence for an end."""


def sse(document: dict[str, Any] | str) -> bytes:
    """One server-sent event: characters as they are, which are whole."""
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Answer:
    """The documents of one request, of which each text is a choice."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        spell: Callable[[str, int], tuple[str, bytes]],
        *,
        logprobs: bool,
        include_usage: bool = False,
    ) -> None:
        self._kind, self._logprobs, self._include_usage = kind, logprobs, include_usage
        self._spell = partial(spell, model)
        prefix, name = ("chatcmpl", "chat.completion") if kind == "chat" else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._name = name
        self._text_offsets: dict[int, int] = {}
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    def _document(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": name, "system_fingerprint": FINGERPRINT, "choices": choices}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        name = "chat.completion.chunk" if self._kind == "chat" else self._name
        document = self._document(name, [choice])
        return sse({**document, "usage": None} if self._include_usage else document)

    def _choice(self, index: int, text: str | None, finish: str | None, logprobs: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self._kind == "chat":
            return {**choice, "delta": {} if text is None else {"content": text}}
        return {**choice, "text": text or ""}

    def chunks(self, event: Event) -> Iterator[bytes]:
        """What of a stream an event is; `Failed` is none."""
        match event:
            case Started() if self._kind == "chat":
                choice = self._choice(event.column, "", None, None)
                yield self._chunk({**choice, "delta": {"role": "assistant", "content": ""}})
            case Token():
                logprobs = self.logprobs([event])
                if event.text or logprobs is not None:
                    yield self._chunk(self._choice(event.column, event.text, None, logprobs))
            case Finished():
                self.count(event)
                yield self._chunk(self._choice(event.column, None, _FINISH[event.finish], None))

    def end(self) -> Iterator[bytes]:
        """The end of a stream."""
        if self._include_usage:
            name = "chat.completion.chunk" if self._kind == "chat" else self._name
            yield sse({**self._document(name, []), "usage": self.usage})
        yield sse("[DONE]")

    def count(self, event: Finished) -> None:
        """Add up tokens."""
        self.usage["prompt_tokens"] += event.prompt_tokens
        self.usage["completion_tokens"] += event.new_tokens
        self.usage["total_tokens"] += event.prompt_tokens + event.new_tokens

    def whole(self, texts: Sequence[tuple[Finished, Sequence[Token]]]) -> dict[str, Any]:
        """The answer in one document, of each text in order."""
        choices = []
        for finished, tokens in texts:
            self.count(finished)
            choice = {
                "index": finished.column,
                "finish_reason": _FINISH[finished.finish],
                "logprobs": self.logprobs(tokens),
            }
            if self._kind == "chat":
                message = {"role": "assistant", "content": finished.text, "refusal": None}
                choices.append({**choice, "message": message})
            else:
                choices.append({**choice, "text": finished.text})
        return {**self._document(self._name, choices), "usage": self.usage}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Probabilities of tokens, if they were asked for, in the form of either endpoint."""
        if not self._logprobs:
            return None
        if self._kind == "chat":
            found = [
                {**self._told(t.id, t.logprob), "top_logprobs": [self._told(c.id, c.logprob) for c in t.top]}
                for t in tokens
            ]
            return {"content": found, "refusal": None}
        texts, offsets = [self._spell(token.id)[0] for token in tokens], []
        for token, text in zip(tokens, texts, strict=True):
            offset = self._text_offsets.get(token.column, 0)
            offsets.append(offset)
            self._text_offsets[token.column] = offset + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{c.text: c.logprob for c in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self._spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}
