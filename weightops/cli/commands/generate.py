"""weightops generate"""

from __future__ import annotations

import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightops import api
from weightops.cli.model_options import run_model_options
from weightops.cli.options import READ_CODES, SOURCE, epilog, refuse_unused, report_options
from weightops.cli.output import print_json, running, warn
from weightops.cli.progress import human
from weightops.errors import UsageError

if TYPE_CHECKING:
    from weightops.inference.generate import Generation
    from weightops.inference.packed import Engine

_SCHEMA = "weightops-generate/1"


@click.command("generate", epilog=epilog((*READ_CODES[:-1], 16, 130)))
@click.argument("folder", metavar="DIR", type=SOURCE)
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Stop after so many; default: 128.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most probable token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most probable tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the fewest tokens with so much of the probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@run_model_options
@report_options
def command(
    folder: Path | str,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    chat: bool,
    dtype: api.ComputeDType,
    device: str,
    engine: Engine,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a text with a model; what is new goes to stdout as it comes.

    DIR is a folder, hf://org/name[@revision] or URL of a decoder-only model that transformers knows: full, sharded,
    GPTQ-quantised, safetensors or torch files, with its tokenizer. The model is loaded layer by layer. One that does
    not fit into memory runs all the same: its layers are read again for every token, which is slow. One that is
    quantised stays packed where that is faster or where it does not fit otherwise (--engine).

    \b
    Example:
      weightops generate ./model --prompt "Once upon a time"
      weightops generate hf://org/name --prompt "Once upon a time"
      weightops generate ./model --prompt "Once" --max-new-tokens 20 --temperature 0.8 --top-p 0.95 --seed 1
    """
    if temperature == 0:
        refuse_unused("at --temperature 0, where nothing is drawn", "seed")
    if prompt == "-":
        prompt = _stdin()
    with running(quiet or as_json) as control:
        found = api.generate(
            folder,
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
        document = {"schema": _SCHEMA, "text": text, "prompt_tokens": len(found.prompt_tokens), "tokens": found.tokens}
        document |= {"warnings": list(found.warnings), "finish": found.finish, "streams_weights": found.streams_weights}
        document |= {"engine": found.engine} if found.engine else {}
        print_json(
            document | {"elapsed_s": round(elapsed_s, 3), "tokens_per_s": round(len(found.tokens) / elapsed_s, 3)}
        )


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
