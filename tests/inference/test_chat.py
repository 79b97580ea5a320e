"""Conversations, in Python, from a pipe and at a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapters import save_adapter
from systems import needs_itself
from tiny_models import save_tiny, save_tokenizer, tiny

import weightops
from weightops.cli.main import run
from weightops.errors import PromptTooLong, UsageError
from weightops.inference.events import Event, Finished, Started, Token

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_tiny(folder, "llama", max_position_embeddings=400)
    save_tokenizer(folder, chat_template=TEMPLATE)
    return folder


def answer(events: Iterator[Event]) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


def test_each_turn_is_what_the_model_says_to_the_whole_conversation(model: Path) -> None:
    with weightops.chat(model, system="Be brief.", max_new_tokens=12) as chat:
        first = answer(chat.say("Hello"))
        second = list(chat.say("Why?"))
        messages = [dict(each) for each in chat.messages]
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == first.text
    started = next(event for event in second if isinstance(event, Started))
    assert started.cached_tokens > 20
    with weightops.chat(model, system="Be brief.", max_new_tokens=12) as again:
        assert answer(again.say("Hello")).tokens == first.tokens
        assert answer(again.say("Why?")).tokens == answer(iter(second)).tokens


def test_a_second_answer_takes_the_place_of_the_first(model: Path) -> None:
    with weightops.chat(model, max_new_tokens=12, temperature=1.5, seed=4) as chat:
        with pytest.raises(UsageError, match="there is no answer yet"):
            chat.regenerate()
        one = answer(chat.say("Hello")).tokens
        two = answer(chat.regenerate()).tokens
        assert len(chat.messages) == 2
    assert one != two
    with weightops.chat(model, max_new_tokens=12, temperature=1.5, seed=5) as chat:
        assert answer(chat.say("Hello")).tokens == two


def test_an_answer_that_is_stopped_is_kept_and_one_that_is_refused_is_not(model: Path) -> None:
    with weightops.chat(model, max_new_tokens=60) as chat:
        said = ""
        for event in chat.say("Hello"):
            if isinstance(event, Token):
                said += event.text
                if len(said) > 3:
                    chat.stop()
        assert chat.messages[-1] == {"role": "assistant", "content": said}
        before = [dict(each) for each in chat.messages]
        with pytest.raises(
            PromptTooLong, match=r"made for 400 positions, the prompt has \d+ tokens and 60 new"
        ) as caught:
            list(chat.say("x" * 400))
        assert caught.value.hint == "begin anew, or ask for fewer new tokens"
        assert chat.messages == before
        events = chat.say("And now?")
        while not isinstance(next(events), Token):
            pass
        events.close()  # type: ignore[attr-defined]
        assert [each["role"] for each in chat.messages] == ["user", "assistant"] * 2


def test_an_adapter_is_merged_as_weights_are_read(tmp_path: Path, model: Path) -> None:
    save_adapter(tmp_path / "lora", model, 0)
    weightops.merge_lora(model, tmp_path / "lora", tmp_path / "merged")
    said = []
    for source in (f"{model}+{tmp_path / 'lora'}", tmp_path / "merged", model):
        with weightops.chat(source, max_new_tokens=12) as chat:
            said.append(answer(chat.say("Hello")).tokens)
    assert said[0] == said[1] != said[2]


def piped(model: Path, text: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "ascii"))
    return run(["chat", str(model), "--max-new-tokens", "12", *options])


def test_lines_of_a_pipe_are_messages_and_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "Hello\n/save one.json\n\n/regenerate\n/clear\n//世界\n/save two.json\n/help\n/exit\nnever\n"
    assert piped(model, lines, monkeypatch) == 0
    shown = capsys.readouterr()
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert [each["role"] for each in one["messages"]] == ["user", "assistant"]
    assert two["messages"][0]["content"] == "/世界"
    texts = [one["messages"][1]["content"], one["messages"][1]["content"], two["messages"][1]["content"]]
    assert shown.out == "".join(f"{text}\n" for text in texts)
    assert "/regenerate" in shown.err


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("/nothing\n", 2, "there is no command /nothing"),
        ("/save\n", 2, "/save needs the name of a file"),
        ("x" * 500 + "\n", 2, "was made for 400 positions, the prompt has"),
        ("Hello\n/save model.json\n/save model.json\n", 11, "model.json"),
    ],
)
def test_what_goes_wrong_in_a_pipe_ends_it(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert piped(model, line + "never\n", monkeypatch) == code
    assert said in capsys.readouterr().err


def test_events_as_lines(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert piped(model, "Hello\n", monkeypatch, "--jsonl", "--logprobs", "2", "-q") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines][:3] == ["waiting", "started", "token"]
    assert lines[-1]["event"] == "finished"
    tokens = [line for line in lines if line["event"] == "token"]
    assert "".join(line["text"] for line in tokens) == lines[-1]["text"]
    assert all(len(line["top"]) == 2 for line in tokens)


class Terminal:
    """`weightops chat` at a terminal of its own."""

    def __init__(self, *words: str) -> None:
        import pty

        self.said = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "weightops", "chat", *words])

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def see(self, pattern: str, seconds: float = 60) -> str:
        """What was said up to this pattern."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said, re.DOTALL)):
            assert time.monotonic() < end, self.said
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:
                    break
        assert found, self.said
        seen, self.said = self.said[: found.end()], self.said[found.end() :]
        return seen

    def end(self) -> int:
        for _ in range(200):
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


@needs_itself("fork")
def test_at_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C drops a line, and ends an answer; what is refused does not end the conversation; Ctrl-D does."""
    model = tiny("llama", max_position_embeddings=100_000)
    model.lm_head.weight.data[1] = 0  # it never ends by itself
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, chat_template=TEMPLATE)
    terminal = Terminal(str(tmp_path), "--max-new-tokens", "50000")
    terminal.see("Type a message, or /help.*> ")
    terminal.type("half a line")
    terminal.see("half a line")
    time.sleep(0.3)  # readline may be about to wait for what is typed, where a signal does not wake it
    terminal.type("\x03")
    terminal.see("Ctrl-D, or /exit, ends.*> ")
    terminal.type("/wrong\n")
    terminal.see("there is no command /wrong.*> ")
    terminal.type("Hello\n")
    terminal.see("Hello\r\n.*[a-z]")
    os.kill(terminal.pid, signal.SIGINT)
    terminal.see(r"\(stopped\).*> ")
    terminal.type(f"/save {tmp_path}/s.json\n")
    terminal.see(r"written to .*s\.json.*> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.fixture(autouse=True)
def _one_thread(one_thread: Iterator[None]) -> None:
    """As in test_generate.py."""
