"""What commands are made of: kinds of values, words that several of them use, and help in sections."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from weightops.formats.places import is_remote
from weightops.io.escape import escape
from weightops.recipes.names import spelled
from weightops.recipes.recipe import FILE_FIELDS

WRITE_CODES = (0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 130)
READ_CODES = (0, 1, 2, 10, 13, 130)

SEVERAL = "Can be given several times."
GLOB = f"* is any text. {SEVERAL}"
WEIGHT_BITS = "Bits for each weight."
GROUP_SIZE = "Number of inputs of a layer that share a scale; -1 for all of them."
CHECKPOINT_FORMAT = (
    "How zero points are stored: gptq, which every program reads, stores them minus one; gptq_v2 stores them as they "
    "are."
)
SEED = "Seed of the random numbers: the same seed gives the same result."
DEVICE = "Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."
SEQ_LEN = "2048, or as many as the model has positions"

_HOW = "How to run"
_RUNNING = ("dry_run", "overwrite", "restart", "workers", "as_json", "progress", "quiet")
_SECTIONS = {**dict.fromkeys(FILE_FIELDS, "Files of the result"), **dict.fromkeys(_RUNNING, _HOW)}
"""Under which title options are shown, by name; the others come first."""


class Place(click.Path):
    """A path; where `remote` allows it also a repository on a hub or a URL, which stays the text that it is."""

    def __init__(self, *, remote: bool) -> None:
        super().__init__(path_type=Path)
        self._remote = remote
        self.name = "path|url" if remote else "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_remote(value):
            return super().convert(value, param, ctx)
        if not self._remote:
            self.fail(f"{escape(value)} is not on this machine; `weightops download` fetches it.", param, ctx)
        return value


class OneOf(click.Choice[str]):
    """One of several names, shown as files and Python have them; dashes and underscores are alike."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(spelled(value, self.choices), param, ctx)


FOLDER = Place(remote=False)
SOURCE = Place(remote=True)
FILE = click.Path(path_type=Path, dir_okay=False)


class Command(click.Command):
    """A command that shows its options in sections: its own, those of files, and those that say how to run."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                own = "Options" if "--help" not in parameter.opts else _HOW
                sections.setdefault(_SECTIONS.get(parameter.name or "", own), []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def epilog(codes: Iterable[int]) -> str:
    """The last paragraph of a command's help."""
    from weightops.cli.main import EXIT_CODES

    return "Exit codes: " + "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes) + "."
