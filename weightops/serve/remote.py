"""Models of other servers as columns: named on the command line, asked by this server and not by the browser.

They speak OpenAI's /v1/chat/completions, as vLLM, llama.cpp and weightops do. No redirect is followed, and no request
says where to go.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import urllib3

from weightops.errors import UsageError, WeightopsError
from weightops.inference.events import Event, Failed, Finish, Finished, Started, Token
from weightops.io.escape import escape
from weightops.serve.bodies import Ask
from weightops.serve.engine import Engine, ModelCard, Ticket

_MAX_LINE_NBYTES = 1 << 20
_CONNECT_S, _READ_S = 10.0, 300.0
_FINISH: Mapping[str, Finish] = {"stop": "eos", "length": "length"}


@dataclass(frozen=True)
class Remote:
    """Another server's model: `url` ends before `/chat/completions`, `model` is its name there."""

    name: str
    url: str
    model: str

    @classmethod
    def parse(cls, text: str) -> Remote:
        """`NAME=http://host:port/v1`, or with `#MODEL` behind where its name there is another."""
        name, equals, url = text.partition("=")
        url, _, model = url.partition("#")
        parts = urlsplit(url)
        if not equals or not name or parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise UsageError(
                f"--remote {escape(text)}: expected NAME=http://host:port/v1", hint="or NAME=http://host:port/v1#MODEL"
            )
        return cls(name, url.rstrip("/"), model or name)

    @property
    def card(self) -> ModelCard:
        """How it is listed."""
        return ModelCard(
            name=self.name, created=int(time.time()), has_template=True, kind="remote", note=f"at {self.url}"
        )


@dataclass
class Stops:
    """A ticket: which texts are to stop."""

    count: int
    events: list[threading.Event] = field(init=False)

    def __post_init__(self) -> None:
        self.events = [threading.Event() for _ in range(self.count)]

    def cancel(self, column: int | None = None) -> None:
        """Stop one, or all."""
        for event in self.events if column is None else self.events[column : column + 1]:
            event.set()


class Remotes:
    """An engine whose texts other servers make."""

    def __init__(self, remotes: Sequence[Remote]) -> None:
        self._remotes = {remote.name: remote for remote in remotes}
        self.cards: Mapping[str, ModelCard] = {remote.name: remote.card for remote in remotes}
        self._http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S))
        self._live: set[int] = set()
        self._tickets: dict[int, Stops] = {}

    def submit(self, asks: Sequence[Ask], put: Callable[[Event], None]) -> Stops:
        """Ask, each in a thread of its own."""
        ticket = Stops(len(asks))
        self._tickets[id(ticket)] = ticket
        for i, ask in enumerate(asks):
            threading.Thread(target=self._run, args=(i, ask, ticket, put), daemon=True).start()
        return ticket

    def spell(self, model: str, token: int) -> tuple[str, bytes]:
        """Nothing: other servers' tokens are not known here."""
        return "", b""

    def stop(self) -> None:
        """Stop all."""
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def close(self) -> None:
        """Stop all, and close connections."""
        self.stop()
        self._http.clear()

    def _run(self, column: int, ask: Ask, ticket: Stops, put: Callable[[Event], None]) -> None:
        try:
            self._speak(column, ask, ticket.events[column], put)
        except (WeightopsError, urllib3.exceptions.HTTPError, AttributeError, ValueError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, WeightopsError) else f"{ask.model}: its server failed ({error})"
            put(Failed(column=column, error=type(error).__name__, message=escape(said), hint=None, code=1))
        finally:
            if all(event.is_set() for event in ticket.events):
                self._tickets.pop(id(ticket), None)

    def _speak(self, column: int, ask: Ask, stop: threading.Event, put: Callable[[Event], None]) -> None:
        remote, start = self._remotes[ask.model], time.monotonic()
        answer = self._http.request(
            "POST",
            f"{remote.url}/chat/completions",
            json=_body(remote, ask),
            preload_content=False,
            redirect=False,
        )
        try:
            if answer.status != 200:
                said = answer.read(2000).decode("utf-8", "replace")
                raise UsageError(f"{ask.model}: its server answered {answer.status}: {said}")
            put(Started(column=column, prompt_tokens=0, cached_tokens=0))
            pieces: list[str] = []
            first_s: float | None = None
            finish: Finish = "eos"
            usage: Mapping[str, Any] = {}
            for document in _documents(answer):
                if stop.is_set():
                    finish = "cancelled"
                    break
                usage = document.get("usage") or usage
                for choice in document.get("choices", [])[:1]:
                    text = (choice.get("delta") or {}).get("content") or ""
                    if text:
                        first_s = first_s if first_s is not None else time.monotonic() - start
                        pieces.append(text)
                        put(Token(column=column, id=-1, text=text))
                    finish = _FINISH.get(choice.get("finish_reason") or "", finish)
        finally:
            answer.close()
        stop.set()
        put(
            Finished(
                column=column,
                finish=finish,
                text="".join(pieces),
                tokens=(-1,) * int(usage.get("completion_tokens") or len(pieces)),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                cached_tokens=0,
                first_token_s=first_s,
                elapsed_s=time.monotonic() - start,
            )
        )


def _body(remote: Remote, ask: Ask) -> dict[str, Any]:
    sampling, prompt = ask.settings.sampling, ask.prompt if isinstance(ask.prompt, str) else ""
    messages = [dict(message) for message in ask.messages or ({"role": "user", "content": prompt},)]
    found: dict[str, Any] = {
        "model": remote.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    more = {
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": ask.settings.max_new_tokens,
        "stop": list(ask.settings.stop) or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
    }
    return found | {name: value for name, value in more.items() if value is not None}


def _documents(answer: urllib3.BaseHTTPResponse) -> Iterator[dict[str, Any]]:
    """The documents of a stream of server-sent events, up to its end; raises `ValueError` for what is none."""
    rest = b""
    for chunk in answer.stream(4096, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_NBYTES:
            raise ValueError("a line of its stream has no end")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            document = json.loads(data)
            if not isinstance(document, dict):
                raise ValueError("its stream holds what is no document")
            if isinstance(document.get("error"), dict):
                raise ValueError(str(document["error"].get("message", "an error")))
            yield document


class Joined:
    """Several engines as one: each text is made by the one that has its model."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self.cards: Mapping[str, ModelCard] = {n: card for engine in engines for n, card in engine.cards.items()}
        if len(self.cards) < sum(len(engine.cards) for engine in engines):
            raise UsageError("two models have one name", hint="give one of them another: NAME=...")

    def submit(self, asks: Sequence[Ask], put: Callable[[Event], None]) -> _Tickets:
        """Begin texts; their numbers are those of `asks`."""
        parts: list[tuple[Ticket, list[int]]] = []
        tickets = _Tickets(parts)
        for engine in self._engines:
            numbers = [i for i, ask in enumerate(asks) if ask.model in engine.cards]
            if not numbers:
                continue

            def renumbered(event: Event, numbers: list[int] = numbers) -> None:
                put(msgspec.structs.replace(event, column=numbers[event.column]))

            try:
                parts.append((engine.submit([asks[i] for i in numbers], renumbered), numbers))
            except BaseException:
                tickets.cancel()
                raise
        return tickets

    def spell(self, model: str, token: int) -> tuple[str, bytes]:
        """A token's own text and its bytes."""
        return next(engine for engine in self._engines if model in engine.cards).spell(model, token)

    def stop(self) -> None:
        """Stop all texts."""
        for engine in self._engines:
            engine.stop()

    def close(self) -> None:
        """Stop all texts, and give all memory back."""
        for engine in self._engines:
            engine.close()


class _Tickets:
    def __init__(self, parts: list[tuple[Ticket, list[int]]]) -> None:
        self._parts = parts

    def cancel(self, column: int | None = None) -> None:
        for ticket, numbers in self._parts:
            if column is None:
                ticket.cancel()
            elif column in numbers:
                ticket.cancel(numbers.index(column))
