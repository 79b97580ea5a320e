"""What commands are made of: kinds of values, words that several of them use, and help in sections."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from weightops.recipes.names import FILE_FIELDS, spelled

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
CONTAINER = (
    "What holds the integers: gptq, which most programs read, stores zero points minus one, gptq_v2 as they are; awq "
    "holds 4 bits; compressed-tensors is what transformers reads with the package of that name. vLLM reads all of them."
)
NO_ARCHITECTURE = "Do not ask transformers which tensors the model should have, which takes some seconds."
SEED = "Seed of the random numbers: the same seed gives the same result."
DEVICE = "Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."
SEQ_LEN = "2048, or as many as the model has positions"

DIGESTS = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake2b", "b3", "xxh64", "xxh3_64", "xxh3_128")
FLOATS = ("float32", "float16", "bfloat16")

_HOW = "How to run"
_RUNNING = (
    "dry_run",
    "overwrite",
    "if_exists",
    "restart",
    "workers",
    "job",
    "executor",
    "as_json",
    "progress",
    "verbose",
    "quiet",
)
_SECTIONS = {**dict.fromkeys(FILE_FIELDS, "Files of the result"), **dict.fromkeys(_RUNNING, _HOW)}
"""Under which title options are shown, by name; the others come first."""


class Place(click.Path):
    """A path; where `remote` allows it also a repository on a hub, a URL or a place in a bucket, which stays text.

    One `to_write` to may be a bucket and prefix.
    """

    def __init__(self, *, remote: bool, to_write: bool = False) -> None:
        super().__init__(path_type=Path)
        self._remote, self._to_write = remote, to_write
        self.name = "path|url" if remote or to_write else "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from weightops.formats.places import is_remote
        from weightops.io.escape import escape
        from weightops.stores.s3.places import is_bucket, parse_place

        if self._to_write:
            from weightops.stores.places import as_out, is_url

            if is_url(value):
                return as_out(value)
        if not is_remote(value):
            return super().convert(value, param, ctx)
        if is_bucket(value):
            parse_place(value)  # which refuses what holds a password, before it is shown or written anywhere
        if not self._remote:
            self.fail(f"{escape(value)} is not on this machine; `weightops download` fetches it.", param, ctx)
        return value


class OneOf(click.Choice[str]):
    """One of several names, shown as files and Python have them; dashes and underscores are alike.

    Names that are found by a function are looked for only when they are needed: what knows them takes long to import.
    """

    def __init__(self, names: Iterable[str] | Callable[[], Iterable[str]]) -> None:
        self._names = names
        self.case_sensitive = True

    @cached_property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names."""
        return tuple(self._names() if callable(self._names) else self._names)

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if ctx is not None and ctx.resilient_parsing:
            return str(value)  # while another word is completed
        return super().convert(spelled(value, self.choices), param, ctx)


class NameOf(OneOf):
    """One of several names, or one that is known only when more has been read, as those in plugins are."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return spelled(str(value), self.choices)


class NumberType(OneOf):
    """A number type: the usual ones are shown, and others that torch has a name for are taken."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


class NameOrFile(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A text, which may be one of some names, or a file's."""

    name = "text"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files, and the names."""
        found = [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *found]


def published() -> Iterable[str]:
    """The names of the checksum lists that ship with weightops."""
    from weightops.formats.proofs.published import published

    return published()


def some(*values: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Completes a text that often is one of these."""
    return lambda _context, _parameter, incomplete: [value for value in values if value.startswith(incomplete)]


def named(module: str, name: str) -> Callable[[], tuple[str, ...]]:
    """Finds the names that something in a module of weightops lists: a Literal, the keys of a table, or a sequence."""

    def find() -> tuple[str, ...]:
        found = getattr(import_module(f"weightops.{module}"), name)
        listed: Iterable[Any] = get_args(found) or found
        return tuple(str(getattr(each, "value", each)) for each in listed)

    return find


FOLDER = Place(remote=False)
SOURCE = Place(remote=True)
OUT = Place(remote=False, to_write=True)
FILE = click.Path(path_type=Path, dir_okay=False)


class Command(click.Command):
    """A command that shows its options in sections: its own, those of files, and those that say how to run."""

    def sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """The options and what is said of them, by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                own = "Options" if "--help" not in parameter.opts else _HOW
                title = getattr(parameter, "section", None) or _SECTIONS.get(parameter.name or "", own)
                sections.setdefault(title, []).append(record)
        return sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in self.sections(ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows)


def epilog(codes: Iterable[int]) -> str:
    """The last paragraph of a command's help."""
    from weightops.cli.main import EXIT_CODES

    return "Exit codes: " + "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes) + "."
