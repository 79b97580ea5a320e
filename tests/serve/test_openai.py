"""OpenAI's API, read by a client that nobody here wrote, and asked for what it does not have."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from scripted import Scripted

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

TEXT = ["Hel", "lo, ", "世", "界", " 🙂"]
HI = [{"role": "user", "content": "hi"}]
Serve = Callable[..., Any]


@pytest.fixture
def engine() -> Scripted:
    return Scripted({"chat": TEXT, "other": ["x"] * 1000})


@pytest.fixture
def running(serve: Serve, engine: Scripted) -> Any:
    return serve(engine)


@pytest.fixture
def client(running: Any) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "other"]
    assert client.models.retrieve("chat").id == "chat"
    with pytest.raises(openai.NotFoundError, match="no model 'nothing' here; there are: chat, other"):
        client.models.retrieve("nothing")


def test_a_whole_answer(client: Any, engine: Scripted) -> None:
    found = client.chat.completions.create(
        model="chat",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["END"],
        max_completion_tokens=50,
        frequency_penalty=0.25,
        user="somebody",
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    assert found.choices[0].message.content == "Hello, 世界 🙂"
    assert (found.choices[0].finish_reason, found.usage.total_tokens) == ("stop", 8)
    (asked,) = engine.asked
    assert asked.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    sampling = asked.settings.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        7,
        5,
        0.1,
    )
    assert (asked.settings.stop, asked.settings.max_new_tokens, sampling.frequency_penalty) == (("END",), 50, 0.25)


def test_a_stream_comes_in_pieces_and_usage_only_if_it_is_asked_for(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="chat", messages=HI, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == TEXT
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].delta.content) == ("stop", None)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    chunks = list(
        client.chat.completions.create(
            model="chat", messages=HI, stream=True, stream_options={"include_usage": True}, max_tokens=2
        )
    )
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 2)
    assert chunks[-2].choices[0].finish_reason == "length"


def test_completions_of_several_prompts_with_probabilities(client: Any, engine: Scripted) -> None:
    found = client.completions.create(model="chat", prompt=["a", "b"], logprobs=2, max_tokens=3)
    assert [(c.index, c.text, c.finish_reason) for c in found.choices] == [(i, "Hello, 世", "length") for i in range(2)]
    assert found.choices[0].logprobs.token_logprobs == [-0.5] * 3
    assert found.choices[0].logprobs.text_offset == [0, 3, 7]
    client.completions.create(model="chat", prompt=[1, 2, 3])
    assert engine.asked[-1].prompt == (1, 2, 3)
    streamed = client.completions.create(model="chat", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "".join(TEXT)


def test_probabilities_of_a_chat_have_the_bytes_of_tokens(client: Any) -> None:
    found = client.chat.completions.create(model="chat", messages=HI, logprobs=True, top_logprobs=1, max_tokens=3)
    tokens = found.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == "Hello, 世"


BAD: list[tuple[dict[str, Any] | bytes, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"[]", 400, "a JSON object"),
    (b'{"model": NaN}', 400, "not JSON"),
    ({}, 400, "model"),
    ({"model": "nothing", "messages": HI}, 404, "no model 'nothing'"),
    ({"model": "../../etc/passwd", "messages": HI}, 404, "no model"),
    ({"model": "http://evil.example/v1", "messages": HI}, 404, "no model"),
    ({"model": 3, "messages": HI}, 400, "model: Expected str, got int"),
    ({"model": "chat", "messages": "x"}, 400, "messages: Expected array"),
    ({"model": "chat", "messages": []}, 400, "messages: one to"),
    ({"model": "chat", "messages": HI * 1001}, 400, "messages: one to"),
    ({"model": "chat", "messages": [{"role": "user"}]}, 400, r"messages\[0\]"),
    ({"model": "chat", "messages": [{"role": "tool", "content": "x"}]}, 400, r"messages\[0\].role"),
    ({"model": "chat", "messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "last message"),
    (
        {"model": "chat", "messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        400,
        "only text",
    ),
    ({"model": "chat", "messages": HI, "n": 2}, 400, "'n' is not supported"),
    ({"model": "chat", "messages": HI, "tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
    ({"model": "chat", "messages": HI, "logit_bias": {"5": 100}}, 400, "'logit_bias' is not supported"),
    ({"model": "chat", "messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"model": "chat", "messages": HI, "temprature": 1}, 400, "'temprature' is not supported"),
    ({"model": "chat", "messages": HI, "temperature": -1}, 400, "temperature of -1"),
    ({"model": "chat", "messages": HI, "temperature": "hot"}, 400, "temperature: Expected"),
    ({"model": "chat", "messages": HI, "max_tokens": 0}, 400, "new tokens"),
    ({"model": "chat", "messages": HI, "top_logprobs": 2}, 400, "needs logprobs"),
    ({"model": "chat", "messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "0 to 20"),
    ({"model": "chat", "messages": HI, "stop": ["a", "b", "c", "d", "e"]}, 400, "stop: up to 4"),
    ({"model": "chat", "messages": HI, "stop": [""]}, 400, "stop string is empty"),
    (
        {"model": "chat", "messages": [{"role": "user", "content": "x" * 30_000}]},
        400,
        r"30\d\d\d tokens.* 512 positions",
    ),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_a_wrong_request_is_refused_by_its_field(running: Any, body: Any, status: int, message: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == status
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/chat/completions", 405), ("GET", "/nothing", 404)])
def test_paths_and_methods_that_are_not_there(running: Any, method: str, path: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    assert (answer.status, "message" in json.loads(answer.read())["error"]) == (status, True)
    connection.close()


def test_while_models_are_opened_everything_says_so(serve: Serve) -> None:
    running = serve(None)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    for path in ("/health", "/v1/models", "/page"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"]
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_text(serve: Serve, stream: bool) -> None:
    engine = Scripted({"chat": ["x"] * 100_000}, delay_s=0.005)
    running = serve(engine)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    body = json.dumps({"model": "chat", "messages": HI, "stream": stream, "max_tokens": 100_000})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    if stream:
        connection.getresponse().read(100)
    wait_for(lambda: engine.live == 1)
    connection.sock.close()
    connection.close()
    wait_for(lambda: engine.live == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def post(running: Any, path: str, body: Any) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_the_old_programs_are_answered(running: Any, engine: Scripted) -> None:
    assert post(running, "/chat", {"question": "who?"})["answer"] == ["Hello, 世界 🙂"]
    assert post(running, "/chat", {"question": ["who?", "why?"]})["answer"] == ["Hello, 世界 🙂"] * 2
    found = post(running, "/generate", {"instruction": "say hello", "input": "now", "parameters": {"max_tokens": 2}})
    assert found == {"generated_text": "Hello, ", "num_output_tokens_cf": 2, "error": None}
    assert (engine.asked[-1].template, engine.asked[-1].settings.max_new_tokens) == ("knowlm", 2)
    assert "error" in post(running, "/chat", {"question": 3})


def test_events_for_pages_come_in_slices_and_are_gone_when_they_are_fetched(serve: Serve) -> None:
    engine = Scripted({"raw": ["a", "b"], "tuned": ["c"]})
    running = serve(engine)
    columns = [{"id": model, "model": model, "messages": HI} for model in ("raw", "tuned")]
    stream = post(running, "/compare", {"columns": columns})["stream"]
    found: list[dict[str, Any]] = []
    while not found or found[-1]["event"] != "closed":
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        body = {"stream": stream, "after": found[-1]["number"] if found else 0}
        connection.request("POST", "/events", json.dumps(body), {"content-type": "application/json"})
        data = connection.getresponse().read().decode()
        connection.close()
        found += [json.loads(line[6:]) for line in data.split("\n\n") if line.startswith("data: ")]
    assert [event["number"] for event in found] == list(range(1, len(found) + 1))
    texts = {event["column"]: event["text"] for event in found if event["event"] == "finished"}
    assert texts == {"raw": "ab", "tuned": "c"}
    wait_for(lambda: post(running, "/stop", {"stream": stream}).get("error", {}).get("code") == "not_found")
    assert post(running, "/events", {"stream": "guess"})["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "one to 16"),
        ([{"id": "a", "model": "raw", "messages": HI}] * 2, "each with its own id"),
        ([{"id": "a", "model": "none", "messages": HI}], "no model"),
        ([{"id": "a", "model": "raw", "messages": []}], "messages: one to"),
        ([{"id": "a", "model": "raw", "messages": HI, "url": "http://evil.example"}], "unknown field"),
    ],
)
def test_what_pages_ask_wrongly_is_refused(serve: Serve, columns: Any, message: str) -> None:
    found = post(serve(Scripted({"raw": ["a"]})), "/compare", {"columns": columns})
    assert message in found["error"]["message"]


def test_a_page_that_is_missed_has_its_texts_stopped(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.serve.kept.MISSED_S", 0.3)
    engine = Scripted({"raw": ["x"] * 100_000}, delay_s=0.01)
    running = serve(engine)
    post(running, "/compare", {"columns": [{"id": "a", "model": "raw", "messages": HI, "max_tokens": 100_000}]})
    wait_for(lambda: engine.live == 1)
    wait_for(lambda: engine.live == 0)
