"""Models of other servers as columns: another server of ours, one that fails, one that leads astray."""

from __future__ import annotations

import http.server
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scripted import Scripted

from weightops.errors import UsageError
from weightops.inference.events import Event, Failed, Finished, Token
from weightops.inference.sampling import Sampling
from weightops.inference.settings import Settings
from weightops.serve.bodies import Ask
from weightops.serve.remote import Joined, Remote, Remotes

Serve = Callable[..., Any]
HI = ({"role": "user", "content": "hi"},)


def texts(engine: Any, asks: list[Ask]) -> list[list[Event]]:
    """The events of each text, up to its last."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(asks, events.put)
    found: list[list[Event]] = [[] for _ in asks]
    while not all(each and isinstance(each[-1], Finished | Failed) for each in found):
        event = events.get(timeout=10)
        found[event.column].append(event)
    return found


def test_a_remote_is_named_with_its_address() -> None:
    assert Remote.parse("a=http://127.0.0.1:1/v1/") == Remote("a", "http://127.0.0.1:1/v1", "a")
    assert Remote.parse("a=https://host/v1#org/name").model == "org/name"
    for text in ("a", "=http://x/v1", "a=ftp://x", "a=x", "a=http:///v1", "a=http://x/v1?key=1"):
        with pytest.raises(UsageError, match="expected NAME=http"):
            Remote.parse(text)


def test_a_text_comes_from_another_server_beside_one_from_here(serve: Serve) -> None:
    there = serve(Scripted({"chat": ["Hel", "lo ", "世界"]}))
    remotes = Remotes([Remote("far", f"{there.url}/v1", "chat")])
    engine = Joined([Scripted({"near": ["x", "y"]}), remotes])
    assert list(engine.cards) == ["near", "far"]
    settings = Settings(2, Sampling(temperature=0.5, seed=3), ("END",))
    far, near = texts(engine, [Ask(model="far", messages=HI, settings=settings), Ask(model="near", messages=HI)])
    assert [event.text for event in far if isinstance(event, Token)] == ["Hel", "lo "]
    end = far[-1]
    assert isinstance(end, Finished)
    assert (end.finish, end.text, end.new_tokens, end.prompt_tokens) == ("length", "Hello ", 2, 3)
    assert "".join(event.text for event in near if isinstance(event, Token)) == "xy"
    asked = there.engine.asked[0].settings
    assert (asked.sampling.temperature, asked.sampling.seed, asked.stop) == (0.5, 3, ("END",))
    engine.close()


def test_two_models_cannot_have_one_name() -> None:
    with pytest.raises(UsageError, match="two models have one name"):
        Joined([Scripted({"a": []}), Scripted({"a": []})])


def test_what_its_server_refuses_is_said(serve: Serve) -> None:
    there = serve(Scripted({"chat": ["x"]}))
    ((*_, end),) = texts(Remotes([Remote("far", f"{there.url}/v1", "other")]), [Ask(model="far", messages=HI)])
    assert isinstance(end, Failed)
    assert "answered 404" in end.message
    assert "no model" in end.message


def test_a_text_that_is_stopped_here_is_stopped_there(serve: Serve) -> None:
    there = serve(Scripted({"chat": ["x"] * 10_000}, delay_s=0.005))
    engine = Remotes([Remote("far", f"{there.url}/v1", "chat")])
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ticket = engine.submit([Ask(model="far", messages=HI, settings=Settings(10_000))], events.put)
    while not isinstance(events.get(timeout=10), Token):
        pass
    ticket.cancel()
    while not isinstance(event := events.get(timeout=10), Finished):
        pass
    assert event.finish == "cancelled"
    for _ in range(500):
        if there.engine.live == 0:
            return
        threading.Event().wait(0.01)
    pytest.fail("it goes on there")


class Astray(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_POST(self) -> None:
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header("location", "http://127.0.0.1:9/")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: [1, 2]\n\n" if "list" in self.path else b'data: {"choices"\n\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("path", "said"), [("redirect", "302"), ("list", "failed"), ("cut", "failed")])
def test_a_server_that_answers_nonsense_ends_its_text_alone(path: str, said: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Astray) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{path}"
        ((*_, end),) = texts(Remotes([Remote("far", url, "m")]), [Ask(model="far", messages=HI)])
        server.shutdown()
    assert isinstance(end, Failed)
    assert said in end.message
