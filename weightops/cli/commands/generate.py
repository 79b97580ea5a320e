"""weightops generate"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.asking import asking_options, check_asked, say_piece
from weightops.cli.colour import say
from weightops.cli.meter import human
from weightops.cli.options import refuse_unused, report_options, run_model_options
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import FILE, READ_CODES, SOURCE, Command, epilog
from weightops.errors import UsageError
from weightops.io import strict_json
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.batch import BatchDocument
    from weightops.inference.generate import Generation
    from weightops.inference.packed import Engine


@click.command("generate", cls=Command, epilog=epilog((*READ_CODES[:-2], 11, 12, 13, 15, 16, 130)))
@click.argument("source", type=SOURCE)
@click.option("--prompt", metavar="TEXT", help="The text to continue; - reads it from stdin.")
@click.option(
    "--prompts",
    type=FILE,
    metavar="FILE",
    help="Many texts in the place of one: a line each, or JSON lines with settings of their own. Needs --out.",
)
@click.option("-o", "--out", type=FILE, metavar="FILE", help="With --prompts: the file for the answers, as JSON lines.")
@asking_options
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template of the tokenizer.")
@run_model_options
@report_options
def command(
    source: Path | str,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    chat: bool,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> int:
    """Continue a text with a model; what is new is printed as it comes.

    SOURCE is a model that transformers knows, with its tokenizer: a folder, hf://org/name[@revision] or a URL; in
    safetensors or torch files, quantised with GPTQ or not. BASE+ADAPTER merges a LoRA adapter into a model while its
    weights are read.

    \b
    Example:
      weightops generate ./model --prompt "Once upon a time"
      weightops generate ./model --prompt "Once" --max-new-tokens 20 --temperature 0.8 --top-p 0.95 --seed 1
      weightops generate ./model --prompt "Why is the sky blue?" --chat --system "Be brief."
      weightops generate ./model --prompts prompts.txt --out answers.jsonl

    With --prompts the answers are written as they come, a line of JSON for each, and the same command goes on after a
    kill. A prompt that cannot be answered says why in its line, and the exit code is then 1.

    It is there to look at a model, not to serve it. A model that does not fit into memory runs all the same: its layers
    are then read again for every token, which is slow.
    """
    check_asked(asked)
    if not as_json and prompts is None:
        refuse_unused("without --json", "logprobs")
    if (prompt is None) == (prompts is None) or (prompts is None) != (out is None):
        raise UsageError("a text or a file of them is to be continued", hint="give --prompt, or --prompts with --out")
    model: dict[str, Any] = {"dtype": dtype, "device": device, "engine": engine, "max_memory": max_memory}
    if prompts is not None and out is not None:
        with running(quiet) as control:
            done = weightops.generate_all(source, prompts, out, chat=chat, control=control, **model, **asked)
        return _show_batch(done, as_json, quiet)
    assert prompt is not None
    if prompt == "-":
        prompt = _stdin()
    with running(quiet) as control:
        found = weightops.generate(
            source,
            prompt,
            chat=chat,
            control=control,
            **model,
            **asked,
        )
        warn(found.warnings)
        if found.streams_weights:
            control.progress.note(_slow(found, dtype))
        elif found.saves_memory:
            control.progress.note(_packed(found, dtype))
        started_s = time.monotonic()
        text = _show(found, as_json)
        elapsed_s = time.monotonic() - started_s
    if as_json:
        print_json(found.to_json(text, elapsed_s))
    return 0


def _show_batch(done: BatchDocument, as_json: bool, quiet: bool) -> int:
    """Say how the prompts ended; the exit code."""
    warn(done.warnings)
    ends = ", ".join(f"{count} {finish}" for finish, count in sorted(done.finishes.items()))
    if as_json:
        print_json(strict_json.as_json(done))
    elif not quiet:
        resumed = f", {done.resumed} of them by an earlier run" if done.resumed else ""
        say(f"{done.prompts} prompts: {ends}{resumed}; written to {escape(done.out)}", err=True)
    return 1 if done.failed else 0


def _stdin() -> str:
    data = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if data is None else str(data.read(), "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not text in UTF-8: {error.reason}") from None


def _slow(found: Generation, dtype: str) -> str:
    form = "packed" if found.engine == "packed" else f"as {dtype}"
    half = "; --dtype bfloat16 takes half of that" if form == "as float32" else ""
    return (
        f"the model takes {human(found.whole_nbytes)} {form}, more than there is memory for: its layers are read from "
        f"disk for every token, which is slow{half}"
    )


def _packed(found: Generation, dtype: str) -> str:
    return (
        f"dequantised to {dtype} the model would take {human(found.dequantized_nbytes)}, more than there is memory "
        f"for: its weights stay packed, {human(found.whole_nbytes)}, so that a token takes longer"
    )


def _show(found: Generation, as_json: bool) -> str:
    """The whole text; unless it goes into a document, each piece is on stdout as soon as it is there."""
    pieces = []
    for piece in found:
        pieces.append(piece)
        if not as_json:
            say_piece(piece)
    if not as_json:
        click.echo()
    return "".join(pieces)
