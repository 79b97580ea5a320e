"""weightops generate"""

from __future__ import annotations

import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import click

import weightops
from weightops.cli.meter import human
from weightops.cli.options import refuse_unused, report_options, run_model_options
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import READ_CODES, SEED, SOURCE, Command, epilog
from weightops.errors import UsageError

if TYPE_CHECKING:
    from weightops.api import ComputeDType
    from weightops.inference.generate import Generation
    from weightops.inference.packed import Engine


@click.command("generate", cls=Command, epilog=epilog((*READ_CODES[:-1], 16, 130)))
@click.argument("source", type=SOURCE)
@click.option("--prompt", required=True, metavar="TEXT", help="The text to continue; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Stop after so many tokens; default: 128.")
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    default=0.0,
    show_default=True,
    help="How far to stray from the most probable token; 0 always takes it.",
)
@click.option("--top-k", type=int, metavar="K", help="Draw only from the K most probable tokens.")
@click.option(
    "--top-p",
    type=float,
    metavar="P",
    help="Draw only from the most probable tokens that have this share of the probability together.",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help=SEED)
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template of the tokenizer.")
@run_model_options
@report_options
def command(
    source: Path | str,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    chat: bool,
    dtype: ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a text with a model; what is new is printed as it comes.

    SOURCE is a model that transformers knows, with its tokenizer: a folder, hf://org/name[@revision] or a URL; in
    safetensors or torch files, quantised with GPTQ or not.

    \b
    Example:
      weightops generate ./model --prompt "Once upon a time"
      weightops generate ./model --prompt "Once" --max-new-tokens 20 --temperature 0.8 --top-p 0.95 --seed 1

    It is there to look at a model, not to serve it. A model that does not fit into memory runs all the same: its layers
    are then read again for every token, which is slow.
    """
    if temperature == 0:
        refuse_unused("at --temperature 0, where nothing is drawn", "seed")
    if prompt == "-":
        prompt = _stdin()
    with running(quiet) as control:
        found = weightops.generate(
            source,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            chat=chat,
            dtype=dtype,
            device=device,
            engine=engine,
            max_memory=max_memory,
            control=control,
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
