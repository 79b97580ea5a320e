"""Options of the commands that ask a model: how its text is chosen, and where it ends."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from typing import Any, TypeVar

import click

from weightops.cli.options import refuse_unused
from weightops.cli.params import SEED, SEVERAL, NameOrFile

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _templates() -> tuple[str, ...]:
    from weightops.inference.templates.template import named_templates

    return ("own", *named_templates())


_OPTIONS = (
    click.option(
        "--max-new-tokens", type=click.IntRange(1), metavar="N", help="Stop after so many tokens; default: 128."
    ),
    click.option(
        "--temperature",
        type=float,
        metavar="T",
        default=0.0,
        show_default=True,
        help="How far to stray from the most probable token; 0 always takes it.",
    ),
    click.option("--top-k", type=int, metavar="K", help="Draw only from the K most probable tokens."),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Draw only from the most probable tokens that have this share of the probability together.",
    ),
    click.option(
        "--min-p",
        type=float,
        metavar="P",
        help="Draw only from tokens that have this share of the probability of the most probable one.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="X",
        default=1.0,
        show_default=True,
        help="Make tokens that have been less likely, above 1; the prompt's count too.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        metavar="X",
        default=0.0,
        show_default=True,
        help="Take this off the logit of each token that is in the new text.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        metavar="X",
        default=0.0,
        show_default=True,
        help="Take this off as often as a token is in the new text.",
    ),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        metavar="N",
        help="Let no N tokens in a row come twice; the prompt counts.",
    ),
    click.option(
        "--num-beams",
        type=int,
        metavar="N",
        default=1,
        show_default=True,
        help="Look for the most probable text with so many beams; it comes when it is complete.",
    ),
    click.option("--seed", type=int, metavar="N", default=0, show_default=True, help=SEED),
    click.option("--stop", multiple=True, metavar="TEXT", help=f"End before this text. {SEVERAL}"),
    click.option(
        "--logprobs",
        type=int,
        metavar="N",
        help="In JSON: the log-probability of each token, and the N most probable tokens in its place; 0 to 20.",
    ),
    click.option("--system", metavar="TEXT", help="What the system message says, before the user's."),
    click.option(
        "--template",
        type=NameOrFile(_templates),
        metavar="NAME|FILE",
        help="Chat template: the tokenizer's own, one of weightops' own by name, such as alpaca or vicuna, or a file.",
    ),
)


def asking_options(command: Decorated) -> Decorated:
    """What `generate` and `chat` take alike."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_asked(asked: dict[str, Any]) -> None:
    """Refuse options without a use."""
    if asked["temperature"] == 0:
        refuse_unused("at --temperature 0, where nothing is drawn", "seed")


def say_piece(piece: str) -> None:
    """Print a part of a text at once; a terminal is given no characters that would command it."""
    is_terminal = sys.stdout.isatty()
    click.echo(_harmless(piece) if is_terminal else piece, nl=False)
    sys.stdout.flush()


def _harmless(text: str) -> str:
    """Text for a terminal, which control characters would command."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
