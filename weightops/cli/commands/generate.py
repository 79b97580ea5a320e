"""weightops generate"""

from __future__ import annotations

import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import weightops
from weightops.cli.asking import asking_options, check_asked
from weightops.cli.meter import human
from weightops.cli.options import refuse_unused, report_options, run_model_options
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import READ_CODES, SOURCE, Command, epilog
from weightops.errors import UsageError

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.generate import Generation
    from weightops.inference.packed import Engine


@click.command("generate", cls=Command, epilog=epilog((*READ_CODES[:-1], 16, 130)))
@click.argument("source", type=SOURCE)
@click.option("--prompt", required=True, metavar="TEXT", help="The text to continue; - reads it from stdin.")
@asking_options
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template of the tokenizer.")
@click.option(
    "--logprobs",
    type=int,
    metavar="N",
    help="With --json: the log-probability of each token, and the N most probable tokens in its place; 0 to 20.",
)
@run_model_options
@report_options
def command(
    source: Path | str,
    prompt: str,
    chat: bool,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Continue a text with a model; what is new is printed as it comes.

    SOURCE is a model that transformers knows, with its tokenizer: a folder, hf://org/name[@revision] or a URL; in
    safetensors or torch files, quantised with GPTQ or not.

    \b
    Example:
      weightops generate ./model --prompt "Once upon a time"
      weightops generate ./model --prompt "Once" --max-new-tokens 20 --temperature 0.8 --top-p 0.95 --seed 1
      weightops generate ./model --prompt "Why is the sky blue?" --chat --system "Be brief."

    It is there to look at a model, not to serve it. A model that does not fit into memory runs all the same: its layers
    are then read again for every token, which is slow.
    """
    check_asked(asked)
    if not as_json:
        refuse_unused("without --json", "logprobs")
    if prompt == "-":
        prompt = _stdin()
    with running(quiet) as control:
        found = weightops.generate(
            source,
            prompt,
            chat=chat,
            dtype=dtype,
            device=device,
            engine=engine,
            max_memory=max_memory,
            control=control,
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
            click.echo(_harmless(piece) if sys.stdout.isatty() else piece, nl=False)
            sys.stdout.flush()
    if not as_json:
        click.echo()
    return "".join(pieces)


def _harmless(text: str) -> str:
    """Text for a terminal, which control characters would command."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
