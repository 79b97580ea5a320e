"""A recipe as a value: where checkpoints come from, what is made of them, where results go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightops.errors import UsageError, WeightopsError
from weightops.formats.places import is_remote
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place, read_document
from weightops.plan import parse_size
from weightops.recipes.editing import with_sources
from weightops.recipes.merging import Expanded, expand_step, read_text
from weightops.recipes.names import FILE_FIELDS as FILE_FIELDS
from weightops.recipes.names import OUTPUT, field_of, parameter_of
from weightops.recipes.steps import Location, Step, plain
from weightops.recipes.verbs import Verb, find_verb
from weightops.stores.places import as_out

CAST_FIELDS = ("dtype", "keep", "on_overflow", "scheme", "strategy", "cast_all")
"""What an output may say of its tensors: they are cast last."""


@dataclass(frozen=True)
class Destination:
    """What goes into an output folder: the checkpoint of this name, cast by `cast`, in files as `files` says."""

    name: str
    cast: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Sources and steps by name, destinations by folder. `document` is what it was read from, for messages."""

    sources: Mapping[str, Location]
    steps: Mapping[str, Step]
    outputs: Mapping[str, Destination]
    document: Document

    __repr__ = brief

    def order(self) -> list[str]:
        """The names of the steps, each after those that it builds on."""
        done: dict[str, None] = {}
        for name in self.steps:
            self._visit(name, (), done)
        return list(done)

    def _visit(self, name: str, above: tuple[str, ...], done: dict[str, None]) -> None:
        if name in above:
            circle = " -> ".join(map(escape, (*above[above.index(name) :], name)))
            self.document.fail(("tensors", name), f"is made of itself ({circle})")
        if name in self.steps and name not in done:
            for source in _inputs(self.steps[name]):
                self._visit(source, (*above, name), done)
            done[name] = None

    def absolute(self) -> Recipe:
        """The same, whatever folder a process is in that opens the sources."""
        sources = {
            name: place if is_remote(place.path) else replace(place, path=os.path.abspath(place.path))
            for name, place in self.sources.items()
        }
        return replace(self, sources=sources)

    def roles(self, name: str) -> set[str]:
        """What the steps take this source or step as."""
        return {role for step in self.steps.values() for role, names in step.inputs.items() if name in names}

    def behind(self, name: str) -> set[str]:
        """The name, and those of everything that it is made of."""
        found = {name}
        for source in _inputs(self.steps[name]) if name in self.steps else ():
            found |= self.behind(source)
        return found

    def to_json(self, folder: str) -> dict[str, Any]:
        """What of the recipe made one output: its steps, and what was said of it; names, no paths."""
        destination = self.outputs[folder]
        needed = self.behind(destination.name)
        steps = {
            name: {self.steps[name].verb: {**_named(self.steps[name].inputs), **self.steps[name].said}}
            for name in self.order()
            if name in needed
        }
        cast = {k: plain(v) for k, v in destination.cast.items()}
        return {"tensors": steps, "output": {"from": destination.name, **cast}}


def _inputs(step: Step) -> Iterable[str]:
    return (name for names in step.inputs.values() for name in names)


def _named(inputs: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return {role: names[0] if len(names) == 1 else list(names) for role, names in inputs.items()}


def one_step(
    verb: str,
    sources: Mapping[str, Location | tuple[Location, ...]],
    options: Mapping[str, Any],
    out: str,
    files: Mapping[str, Any],
) -> Recipe:
    """The recipe that a command is: one operation on sources that are named after its roles, one output."""
    names: dict[str, Location] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for role, given in sources.items():
        places = (given,) if isinstance(given, Location) else given
        own = [role if len(places) == 1 else f"{role}-{i}" for i in range(1, len(places) + 1)]
        names |= dict(zip(own, places, strict=True))
        inputs[role] = tuple(own)
    step, destination = Step(verb, inputs, options), Destination("result", {}, files)
    return Recipe(names, {"result": step}, {out: destination}, Document({}, verb))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file; paths in it count from its folder. Raises `SourceMissing`, and as `parse_recipe` does."""
    text = read_text(path)
    return parse_recipe(read_document(text, escape(str(path))), path.parent)


def parse_recipe(document: Document, folder: Path = Path()) -> Recipe:
    """Check a recipe before anything is opened; raises `UsageError` naming line and field.

    Relative paths count from `folder`.
    """
    fields = ("sources", "tensors", "outputs")
    for name in document.data:
        if name not in fields:
            document.fail((name,), "unknown field", hint=f"a recipe has {', '.join(fields)}")
    parts = {name: document.mapping((name,), document.data.get(name, {})) for name in fields}
    if not parts["outputs"]:
        document.fail((), "has no outputs")
    sources = {name: location(document, name, value, folder) for name, value in parts["sources"].items()}
    twice = next((name for name in parts["tensors"] if name in sources), None)
    if twice is not None:
        document.fail(("tensors", twice), "is the name of a source already")
    known = {*sources, *parts["tensors"]}
    steps: dict[str, Step] = {}
    for name, value in parts["tensors"].items():
        made = _step(document, name, value, known, Expanded(sources, steps), folder)
        sources |= made.sources
        steps |= made.steps
    if not sources:
        document.fail((), "has no sources")
    outputs = {}
    for name, value in parts["outputs"].items():
        outputs[place_of(name, folder)] = _destination(document, name, value, known, folder)
    recipe = Recipe(sources, steps, outputs, document)
    recipe.order()
    used = set().union(*(recipe.behind(destination.name) for destination in outputs.values()))
    for part, names in (("sources", sources), ("tensors", steps)):
        for name in names:
            if name not in used:
                document.fail((part, name), "is used by no output", hint="remove it, or name it in an output's `from`")
    return recipe


def location(document: Document, name: str, value: Any, folder: Path) -> Location:
    """Where a source lies: a path, or a mapping with `path` and `weights`; raises `UsageError`."""
    place: Place = ("sources", name)
    if not isinstance(value, Mapping):
        return Location(place_of(document.text(place, value), folder))
    unknown = next((key for key in value if key not in ("path", "weights")), None)
    if unknown is not None:
        document.fail((*place, unknown), "unknown field", hint="a source has path and weights")
    path, weights = document.text((*place, "path"), value.get("path")), value.get("weights")
    return Location(place_of(path, folder), None if weights is None else document.text((*place, "weights"), weights))


def place_of(text: str, folder: Path) -> str:
    """A place as a document says it, a path in it counting from `folder`."""
    # Of a ~NAME that is nobody's home, the path is what it says.
    return text if is_remote(text) else str(folder / os.path.expanduser(text))


def _step(document: Document, name: str, value: Any, known: set[str], there: Expanded, folder: Path) -> Expanded:
    """What a field under `tensors` comes to: one step, or as many as a merge file takes; `there` are those before."""
    place: Place = ("tensors", name)
    fields = document.mapping(place, value)
    if len(fields) != 1:
        document.fail(place, f"expected one operation, found {len(fields)}", hint="for example {cast: {source: base}}")
    ((verb_name, arguments),) = fields.items()
    if verb_name == "merge":
        given = document.mapping((*place, verb_name), arguments)
        place = (*place, verb_name)
        return expand_step(document, place, name, given, known, there, folder, lambda text: place_of(text, folder))
    if verb_name == "edit":
        given, sources = with_sources(
            document, (*place, "edit"), arguments, known, there, lambda text: place_of(text, folder)
        )
        return Expanded(sources, {name: plain_step(document, place, verb_name, given, {*known, *sources})})
    return Expanded(steps={name: plain_step(document, place, verb_name, arguments, known)})


def plain_step(document: Document, place: Place, verb_name: str, arguments: Any, known: Collection[str]) -> Step:
    """One operation as it stands in a document, checked; raises `UsageError` with line and field."""
    try:
        verb = find_verb(verb_name)
    except WeightopsError as error:
        raise document.blame(place, error) from None
    place = (*place, verb_name)
    arguments = document.mapping(place, arguments)
    inputs: dict[str, tuple[str, ...]] = {}
    options: dict[str, Any] = {}
    for key, given in arguments.items():
        own, name = (*place, key), parameter_of(key, verb_name)
        if name.startswith("no_") and name not in verb.options and isinstance(given, bool):
            if not given:
                continue
            name, given = name.removeprefix("no_"), False
        if name in verb.roles:
            inputs[name] = _references(document, own, given, known, several=verb.roles[name])
        elif name in options:
            document.fail(own, f"is {field_of(name)} once more")
        elif name in verb.options:
            options[name] = _checked(document, own, verb, name, given)
        else:
            known_fields = ", ".join(map(field_of, (*verb.roles, *verb.options)))
            document.fail(own, "unknown field", hint=f"{verb_name} takes {known_fields}")
    missing = [n for n in (*verb.roles, *verb.options) if n not in inputs and n not in {*options, *verb.defaults}]
    if missing:
        document.fail(place, f"lacks {field_of(missing[0])}")
    return Step(verb_name, inputs, options)


def _checked(document: Document, place: Place, verb: Verb, name: str, value: Any) -> Any:
    """`value` as it was written, once it is known to be one."""
    try:
        verb.option(name, value)
    except UsageError as error:
        raise document.blame(place, error) from None
    return value


def _references(document: Document, place: Place, given: Any, known: Collection[str], several: bool) -> tuple[str, ...]:
    names = document.names(place, given)
    if not names or (len(names) > 1 and not several):
        document.fail(place, f"expected one name, found {len(names)}")
    for name in names:
        if name not in known:
            document.fail(
                place, f"there is no {escape(name)}", hint=f"there are {', '.join(sorted(map(escape, known)))}"
            )
    return names


def _destination(document: Document, name: str, value: Any, known: set[str], folder: Path) -> Destination:
    place: Place = ("outputs", name)
    fields = {field_of(parameter_of(k, OUTPUT)): given for k, given in document.mapping(place, value).items()}
    try:
        as_out(name)
    except UsageError as error:
        raise document.blame(place, error) from None
    if "from" not in fields:
        document.fail(place, "lacks from", hint="it says which checkpoint goes there")
    (source,) = _references(document, (*place, "from"), fields.pop("from"), known, several=False)
    unknown = next((key for key in fields if key not in (*CAST_FIELDS, *FILE_FIELDS)), None)
    if unknown is not None:
        hint = f"an output has from, {', '.join((*CAST_FIELDS, *FILE_FIELDS))}"
        document.fail((*place, unknown), "unknown field", hint=hint)
    casts = {k: _checked(document, (*place, k), find_verb("cast"), k, fields[k]) for k in CAST_FIELDS if k in fields}
    files = {k: fields[k] for k in FILE_FIELDS if k in fields}
    _check_files(document, place, files)
    beside = folder / str(files.get("expect", ""))
    if "expect" in files and beside.exists():
        files["expect"] = str(beside)
    return Destination(source, casts, files)


def _check_files(document: Document, place: Place, files: Mapping[str, Any]) -> None:
    size = files.get("max_shard_size")
    if isinstance(size, str) and size != "source":
        try:
            parse_size(size)
        except UsageError as error:
            raise document.blame((*place, "max_shard_size"), error) from None
    elif size is not None and (isinstance(size, bool) or not isinstance(size, int | str)):
        document.fail((*place, "max_shard_size"), "expected a size such as 5GB")
    for key in ("format", "expect"):
        if key in files:
            document.text((*place, key), files[key])
    if "digest" in files:
        document.names((*place, "digest"), files["digest"])
    for key in ("card", "reflink"):
        if not isinstance(files.get(key, False), bool):
            document.fail((*place, key), "expected true or false")
