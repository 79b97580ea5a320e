"""Real models behind the server: texts as `generate` has them, in the memory that there is, whatever clients do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted
from speakers import speaker_of_chinese

import weightops
from weightops.formats.folder import open_checkpoint
from weightops.inference.opened import Opened
from weightops.inference.pool import Pool, Stoppable
from weightops.serve.engine import Engine
from weightops.serve.local import Local

MODEL = Path(__file__).parents[1] / "data/tiny-llama"
PROMPTS = ["In the beginning", "And the lion", "The word of", "Blessed are"]
JSON = {"content-type": "application/json"}
Serve = Callable[..., Any]


def pool_of(count: int, models: float) -> Pool:
    """So many models in memory for some of them, and what a text needs beside."""
    opened = {f"m{i}": Opened(open_checkpoint(MODEL), control=Stoppable()) for i in range(count)}
    first = opened["m0"]
    room = int(models * first.placement(1 << 40, 64).nbytes) + first.beside_nbytes(64)
    return Pool(opened, room)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with pool_of(4, 1.2) as found:
        yield found


def expected(prompt: str, count: int) -> str:
    return "".join(weightops.generate(MODEL, prompt, max_new_tokens=count))


def complete(port: int, model: str, prompt: str, count: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": model, "prompt": prompt, "max_tokens": count}
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    answer = connection.getresponse()
    document = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, document
    return str(document["choices"][0]["text"])


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_four_models_in_memory_for_one_answer_rightly_within_it(serve: Serve, pool: Pool) -> None:
    running = serve(Local(pool))
    wanted = [expected(prompt, 12) for prompt in PROMPTS]
    found: dict[int, str] = {}
    most = [0]

    def ask(i: int) -> None:
        found[i] = complete(running.port, f"m{i}", PROMPTS[i], 12)

    def watch() -> None:
        while len(found) < len(PROMPTS):
            most[0] = max(most[0], pool.nbytes)
            time.sleep(0.001)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(4)] == wanted
    assert 0 < most[0] <= pool.max_nbytes


@pytest.mark.parametrize("runs", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_clients_that_are_killed_at_every_tenth_token_leave_nothing(serve: Serve, pool: Pool, runs: int) -> None:
    running = serve(Local(pool))
    wanted = expected(PROMPTS[0], 12)
    held: list[int] = []
    for run in range(runs):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        body = {"model": f"m{run % 4}", "prompt": PROMPTS[run % 4], "max_tokens": 200, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        for _ in range(2 * (run % 4 + 1)):
            answer.readline()
        with contextlib.suppress(OSError):
            connection.sock.close()
        answer.close()
        wait_for(lambda: pool.live == 0 and pool.waiting == 0)
        held.append(_anonymous())
    assert complete(running.port, "m0", PROMPTS[0], 12) == wanted
    assert max(held[runs // 2 :]) < max(held[: runs // 2]) + (32 << 20)


def _anonymous() -> int:
    """Bytes of memory that this process holds by itself."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def test_characters_that_are_spelt_in_bytes_come_whole(serve: Serve, tmp_path: Path) -> None:
    speaker_of_chinese(tmp_path / "model")
    with weightops.open_pool({"m": tmp_path / "model"}) as pool:
        running = serve(Local(pool))
        assert complete(running.port, "m", "一", 40) == "偂惄煆t"
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        body = {"model": "m", "prompt": "一", "max_tokens": 40, "stream": True, "logprobs": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        lines = connection.getresponse().read().decode().split("\n\n")
        connection.close()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    pieces = [choice["text"] for choice in choices if choice["text"]]
    assert "".join(pieces) == "偂惄煆t"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(choices) > len(pieces) + 1  # a token is told also where it gives out no character yet


def test_a_request_names_a_template_and_never_a_file(serve: Serve, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    port = serve(Local(pool)).port
    for template, status in (("alpaca", 200), (str(tmp_path / "own.jinja"), 400), ("nothing", 400)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "m0", "messages": messages, "max_tokens": 1, "template": template}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        assert (answer.status, "no template" in answer.read().decode()) == (status, status == 400)
        connection.close()


def test_tokens_that_a_model_does_not_have_are_the_client_s_fault(serve: Serve, pool: Pool) -> None:
    port = serve(Local(pool)).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"model": "m0", "prompt": [10**6]}), JSON)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["type"]) == (400, "invalid_request_error")
    connection.close()


def test_too_long_a_history_is_refused_with_both_numbers(serve: Serve, pool: Pool) -> None:
    port = serve(Local(pool)).port
    for stream in (False, True):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "m0", "prompt": "lion " * 3000, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        assert (answer.status, error["code"]) == (400, "context_length_exceeded")
        assert "512 positions, the prompt has" in error["message"]
        connection.close()


def test_more_than_may_wait_is_told_to_come_again(serve: Serve) -> None:
    class Full(Scripted):
        waiting = 64

    engine: Engine = Local.__new__(Local)
    engine._pool, engine._template, engine.cards = Full({"m": []}), None, Scripted({"m": []}).cards  # type: ignore[attr-defined,misc]
    running = serve(engine)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "x"}), JSON)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["retry-after"]) == (429, "5")
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "weightops", "serve", f"lion={MODEL}", "--port", "0"]
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            wait_for(lambda: "serving lion at http://127.0.0.1:" in (tmp_path / "log").read_text())
            port = int((tmp_path / "log").read_text().split(":")[2].split("/")[0])
            assert complete(port, "lion", PROMPTS[0], 4) == expected(PROMPTS[0], 4)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = {"model": "lion", "prompt": PROMPTS[0], "max_tokens": 400, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), JSON)
            connection.getresponse().readline()
            process.send_signal(number)
            assert process.wait(30) == 0
            connection.close()
        finally:
            process.kill()
            process.wait()
    assert "Error" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0", str(MODEL)], "there is no key"),
        ([], "there is nothing to serve"),
        ([str(MODEL), str(MODEL)], "two models are called tiny-llama"),
        ([str(MODEL), "--remote", "x"], "expected NAME=http://host:port/v1"),
        (["a=/nowhere", "--port", "0"], "/nowhere"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    from weightops.cli.main import run

    assert run(["serve", *arguments]) in (2, 10)
    assert said in capsys.readouterr().err
