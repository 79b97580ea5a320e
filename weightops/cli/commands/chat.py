"""weightops chat"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.asking import asking_options, check_asked, say_piece
from weightops.cli.colour import say
from weightops.cli.options import progress_options, refuse_unused, run_model_options
from weightops.cli.output import document_of, report_error, running, warn
from weightops.cli.params import READ_CODES, SOURCE, Command, epilog
from weightops.errors import Interrupted, UsageError, WeightopsError

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.chat import Chat
    from weightops.inference.events import Event
    from weightops.inference.packed import Engine

HELP = """\
/clear        begin anew
/regenerate   another answer to the last message (at --temperature 0 it is the same one)
/save FILE    write the conversation as JSON
/help         this
/exit         end; Ctrl-D does so too
Ctrl-C ends an answer. A line that ends in \\ goes on in the next. // at the beginning of a message is one /."""
_PROMPT = "> "


@click.command("chat", cls=Command, epilog=epilog((*READ_CODES[:-1], 16, 130)))
@click.argument("source", type=SOURCE)
@asking_options
@run_model_options
@click.option("--jsonl", is_flag=True, help="Print what happens as JSON, an event in each line.")
@progress_options
def command(
    source: Path | str,
    system: str | None,
    template: str | None,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    jsonl: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Talk to a model: each line from the keyboard, or of stdin, is a message that it answers.

    SOURCE is a model as for `generate`, or BASE+ADAPTER, which merges a LoRA adapter into a model while its weights are
    read. A model that brings no chat template needs --template.

    \b
    Example:
      weightops chat ./model --temperature 0.7 --top-p 0.9
      weightops chat ./llama-7b+./my-lora --template alpaca --system "Answer in one sentence."

    The model is loaded once and stays in memory. A conversation that is longer than the model was made for is refused,
    not cut: /clear begins anew, and /help lists what else there is.
    """
    check_asked(asked)
    if not jsonl:
        refuse_unused("without --jsonl", "logprobs")
    is_person = sys.stdin.isatty()
    with running(quiet) as control:
        with weightops.chat(
            source,
            system=system,
            template=template,
            dtype=dtype,
            device=device,
            engine=engine,
            max_memory=max_memory,
            control=control,
            **asked,
        ) as chat:
            warn(chat.warnings)
            if chat.streams_weights:
                control.progress.note(
                    "there is less memory than the model takes: its layers are read from disk for every token, which "
                    "is slow"
                )
            if is_person and not quiet:
                say("Type a message, or /help.", err=True)
            _Repl(chat, jsonl, is_person).run()


class _Repl:
    """Lines in, answers out."""

    def __init__(self, chat: Chat, jsonl: bool, is_person: bool) -> None:
        self._chat, self._jsonl, self._is_person = chat, jsonl, is_person

    def run(self) -> None:
        for line in _typed() if self._is_person else _piped():
            try:
                if not self._obey(line):
                    return
            except Interrupted:
                raise
            except WeightopsError as error:
                if not self._is_person:
                    raise
                report_error(document_of(error), False)

    def _obey(self, line: str) -> bool:
        """Do what a line says; whether there may be more."""
        name, _, rest = line.strip().partition(" ")
        match name:
            case "/exit":
                return False
            case "/help":
                say(HELP, err=True)
            case "/clear":
                self._chat.clear()
            case "/save":
                self._save(rest.strip())
            case "/regenerate":
                self._show(self._chat.regenerate())
            case _ if line.startswith("/") and not line.startswith("//"):
                raise UsageError(f"there is no command {name}", hint="/help lists those that there are")
            case _ if line.strip():
                self._show(self._chat.say(line.removeprefix("/") if line.startswith("//") else line))
        return True

    def _show(self, events: Iterable[Event]) -> None:
        from weightops.inference.events import Finished, Token

        with _on_interrupt(self._chat.stop):
            for event in events:
                if self._jsonl:
                    import msgspec

                    click.echo(msgspec.json.encode(event).decode())
                elif isinstance(event, Token) and event.text:
                    say_piece(event.text)
                elif isinstance(event, Finished):
                    click.echo()
                    if event.finish in ("cancelled", "length") and self._is_person:
                        why = "stopped" if event.finish == "cancelled" else f"cut after {event.new_tokens} tokens"
                        say(f"({why})", err=True)

    def _save(self, name: str) -> None:
        from weightops.io.atomic import write_new
        from weightops.io.strict_json import dumps

        if not name:
            raise UsageError("/save needs the name of a file")
        write_new(Path(name), dumps(self._chat.document()))
        if self._is_person:
            say(f"written to {name}", err=True)


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """For the length of a `with` block Ctrl-C calls `stop`."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Messages from the keyboard, with a history of them where the system has readline; nothing of it is kept."""
    from weightops.io.platform.optional import module

    module("readline")  # `input` uses it once it is there
    while True:
        try:
            with _raising():
                line = input(_PROMPT)
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + input("  ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            say("Ctrl-D, or /exit, ends.", err=True)
            continue
        yield line


@contextmanager
def _raising() -> Iterator[None]:
    """While somebody types Ctrl-C drops the line, and SIGTERM ends, as nothing looks at the control."""

    def end(number: int, _: object) -> None:
        raise Interrupted(number)

    def drop(*_: object) -> None:
        raise KeyboardInterrupt

    term = getattr(signal, "SIGTERM", None)
    before = signal.signal(signal.SIGINT, drop), term and signal.signal(term, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        if term is not None:
            signal.signal(term, before[1])


def _piped() -> Iterator[str]:
    """Messages from stdin, one in each line that holds something."""
    stream = getattr(sys.stdin, "buffer", None)
    for line in sys.stdin if stream is None else stream:
        try:
            text = line if isinstance(line, str) else line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not text in UTF-8: {error.reason}") from None
        yield text.rstrip("\r\n")
