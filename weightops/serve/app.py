"""The application: paths, and what is done at each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from weightops.errors import WeightopsError
from weightops.inference.events import Failed, Finished, Token
from weightops.inference.sampling import Sampling
from weightops.serve.answers import PRESENCE, Answer, Kind, sse
from weightops.serve.bodies import (
    MAX_COLUMNS,
    Ask,
    ChatBody,
    CompareBody,
    CompletionBody,
    InstructionBody,
    Making,
    QuestionBody,
    parse,
)
from weightops.serve.engine import Engine
from weightops.serve.errors import ApiError, unknown_path
from weightops.serve.guard import App, Guard, Rules
from weightops.serve.kept import Keeper
from weightops.serve.render import render
from weightops.serve.stream import KEEP_ALIVE_S, Texts, gone, texts_of
from weightops.version import __version__

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@dataclass
class Server:
    """What requests share: the engine, once it is there, and the texts that pages have asked for."""

    templates: Sequence[str] = ()
    engine: Engine | None = None
    keeper: Keeper = field(default_factory=Keeper)
    rendering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @property
    def ready(self) -> Engine:
        """The engine; raises `ApiError` while models are being opened."""
        if self.engine is None:
            raise ApiError(503, "models are being opened", code="loading", retry_after_s=2)
        return self.engine

    def check(self, asks: Sequence[Ask]) -> Engine:
        """The engine, if it has all models that are asked for."""
        engine = self.ready
        for ask in asks:
            if ask.model not in engine.cards:
                names = ", ".join(engine.cards)
                text = f"there is no model {ask.model[:200]!a} here; there are: {names}"
                raise ApiError(404, text, param="model", code="model_not_found")
        return engine


def make_app(server: Server, rules: Rules) -> App:
    """The whole of it: a guard, and what it lets through."""
    handlers: list[tuple[str, str, Callable[[Server, Request], Awaitable[Response]]]] = [
        ("GET", "/health", _health),
        ("GET", "/is_ready", _health),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:path}", _model),
        ("POST", "/v1/chat/completions", _chat),
        ("POST", "/v1/completions", _completions),
        ("POST", "/chat", _question),
        ("POST", "/generate", _instruction),
        ("GET", "/page", _page_data),
        ("POST", "/compare", _compare),
        ("POST", "/events", _events),
        ("POST", "/stop", _stop),
        ("POST", "/render", _render),
        *[("GET", path, _file) for path in _PAGE],
    ]

    def endpoint(handler: Callable[[Server, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def call(request: Request) -> Response:
            try:
                return await handler(server, request)
            except ApiError as error:
                return _refused(error)
            except WeightopsError as error:
                return _refused(ApiError.of(error))

        return call

    known: dict[str, set[str]] = {}
    for method, path, _ in handlers:
        known.setdefault(path, set()).add(method)

    async def unknown(request: Request, error: Exception) -> Response:
        path = request.url.path
        return _refused(unknown_path(path[:200], request.method, is_known=path in known))

    async def broken(request: Request, error: Exception) -> Response:
        return _refused(ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error"))

    routes = [Route(path, endpoint(handler), methods=[method]) for method, path, handler in handlers]
    application = Starlette(
        routes=routes, exception_handlers={404: unknown, 405: unknown, HTTPException: unknown, Exception: broken}
    )
    return Guard(application, rules)


def _refused(error: ApiError) -> Response:
    return JSONResponse(error.document(), error.status, error.headers)


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ApiError(400, "the body never came") from None


# --- OpenAI's API -----------------------------------------------------------------------------------------------------


async def _health(server: Server, request: Request) -> Response:
    return JSONResponse({"status": "ok", "models": list(server.ready.cards)})


def _card(server: Server, name: str) -> dict[str, Any]:
    card = server.ready.cards[name]
    return {"id": name, "object": "model", "created": card.created, "owned_by": "weightops"}


async def _models(server: Server, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(server, name) for name in server.ready.cards]})


async def _model(server: Server, request: Request) -> Response:
    name = request.path_params["name"]
    server.check([Ask(model=name)])
    return JSONResponse(_card(server, name))


async def _chat(server: Server, request: Request) -> Response:
    body = parse(await _body(request), ChatBody)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return await _answer(server, request, "chat", body.asks(), bool(body.logprobs), bool(body.stream), usage)


async def _completions(server: Server, request: Request) -> Response:
    body = parse(await _body(request), CompletionBody)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return await _answer(server, request, "text", body.asks(), body.logprobs is not None, bool(body.stream), usage)


async def _answer(
    server: Server, request: Request, kind: Kind, asks: Sequence[Ask], logprobs: bool, stream: bool, usage: bool
) -> Response:
    engine = server.check(asks)
    answer = Answer(kind, asks[0].model, engine.spell, logprobs=logprobs, include_usage=usage)
    if not stream:
        return JSONResponse(answer.whole(await _whole(engine, request, asks)))
    return await _streamed(engine, asks, answer)


async def _whole(engine: Engine, request: Request, asks: Sequence[Ask]) -> list[tuple[Finished, list[Token]]]:
    """All texts to their ends; stopped when the client goes, or at the first that fails."""
    tokens: list[list[Token]] = [[] for _ in asks]
    done: dict[int, Finished] = {}

    async def collect(texts: Texts) -> None:
        async for event in texts.events():
            match event:
                case Token():
                    tokens[event.column].append(event)
                case Finished():
                    done[event.column] = event
                case Failed():
                    raise ApiError.of(event)

    async with texts_of(engine, asks) as texts:
        work, leaving = asyncio.ensure_future(collect(texts)), asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(499, "the client has gone")
            await work
        finally:
            work.cancel()
            leaving.cancel()
    return [(done[i], tokens[i]) for i in range(len(asks))]


async def _streamed(engine: Engine, asks: Sequence[Ask], answer: Answer) -> Response:
    """Events as they come. What fails before the first of them is an answer with its own status."""

    async def parts() -> AsyncGenerator[bytes, None]:
        async with texts_of(engine, asks) as texts, aclosing(texts.events(KEEP_ALIVE_S)) as events:
            async for event in events:
                if event is None:
                    yield PRESENCE
                elif isinstance(event, Failed):
                    raise ApiError.of(event)
                else:
                    for part in answer.chunks(event):
                        yield part
            for part in answer.end():
                yield part

    stream = parts()
    # The first part decides: up to it, nothing has been said yet.
    first = await anext(stream)

    async def body() -> AsyncGenerator[bytes, None]:
        async with aclosing(stream):
            try:
                yield first
                async for part in stream:
                    yield part
            except ApiError as error:
                yield sse(error.document())
            except WeightopsError as error:
                yield sse(ApiError.of(error).document())

    return _Stream(body(), stream)


class _Stream(StreamingResponse):
    """A stream whose texts are stopped even if the client was gone before the first byte."""

    def __init__(self, body: AsyncGenerator[bytes, None], source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(body, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


# --- what older programs ask ------------------------------------------------------------------------------------------


def _first(server: Server) -> str:
    return next(iter(server.ready.cards))


async def _question(server: Server, request: Request) -> Response:
    """Chinese-ChatLLaMA's: one question or several, of the first model, each a prompt as it is."""
    question = parse(await _body(request), QuestionBody).question
    prompts = [question] if isinstance(question, str) else question
    if not 1 <= len(prompts) <= MAX_COLUMNS:
        raise ApiError(400, f"question: one to {MAX_COLUMNS} of them", param="question")
    asks = [Ask(model=_first(server), prompt=prompt) for prompt in prompts]
    found = await _whole(server.check(asks), request, asks)
    return JSONResponse({"answer": [finished.text for finished, _ in found], "status": "success"})


async def _instruction(server: Server, request: Request) -> Response:
    """KnowLM's: an instruction and perhaps an input, of the first model, in KnowLM's form."""
    body = parse(await _body(request), InstructionBody)
    making = msgspec.convert(msgspec.to_builtins(body.parameters), Making)
    content = f"{body.instruction}\n\n{body.input}" if body.input else body.instruction
    ask = Ask(
        model=_first(server),
        messages=({"role": "user", "content": content},),
        template="knowlm",
        settings=making.settings(),
    )
    ((finished, _),) = await _whole(server.check([ask]), request, [ask])
    return JSONResponse({"generated_text": finished.text, "num_output_tokens_cf": finished.new_tokens, "error": None})


# --- the page ---------------------------------------------------------------------------------------------------------


async def _file(server: Server, request: Request) -> Response:
    name, kind = _PAGE[request.url.path]
    data = resources.files("weightops.serve").joinpath("page", name).read_bytes()
    return Response(data, media_type=kind, headers={"cache-control": "no-cache"})


async def _page_data(server: Server, request: Request) -> Response:
    """What the page is made of: the models, templates by name, and the defaults of settings."""
    cards = [msgspec.to_builtins(card) for card in server.ready.cards.values()]
    defaults = msgspec.to_builtins(Sampling())
    return JSONResponse(
        {"models": cards, "templates": list(server.templates), "defaults": defaults, "version": __version__},
        headers={"cache-control": "no-store"},
    )


async def _compare(server: Server, request: Request) -> Response:
    """One prompt to several models; the events of all columns are fetched together."""
    columns = parse(await _body(request), CompareBody).columns
    names = [column.id for column in columns]
    if not 1 <= len(columns) <= MAX_COLUMNS or len(set(names)) < len(names):
        raise ApiError(400, f"columns: one to {MAX_COLUMNS} of them, each with its own id", param="columns")
    asks = [column.ask() for column in columns]
    kept = await server.keeper.begin(server.check(asks), asks, names)
    return JSONResponse({"stream": kept.name}, headers={"cache-control": "no-store"})


class _EventsBody(msgspec.Struct, forbid_unknown_fields=True):
    stream: str
    after: int = 0


async def _events(server: Server, request: Request) -> Response:
    """The next second of a stream's events."""
    body = parse(await _body(request), _EventsBody)
    source = server.keeper.find(body.stream).slice(body.after)
    return _Stream(source, source)


class _StopBody(msgspec.Struct, forbid_unknown_fields=True):
    stream: str
    column: str | None = None


async def _stop(server: Server, request: Request) -> Response:
    """Stop one column of a stream, or all: whoever knows its name, which only its page does."""
    body = parse(await _body(request), _StopBody)
    server.keeper.find(body.stream).cancel(body.column)
    return JSONResponse({"stopped": True})


class _RenderBody(msgspec.Struct, forbid_unknown_fields=True):
    text: str


async def _render(server: Server, request: Request) -> Response:
    """Markdown as nodes, one text at a time: the worst of those that are short enough take seconds."""
    text = parse(await _body(request), _RenderBody).text
    async with server.rendering:
        nodes = await asyncio.to_thread(render, text)
    return Response(json.dumps({"nodes": nodes}, ensure_ascii=False), media_type="application/json")
