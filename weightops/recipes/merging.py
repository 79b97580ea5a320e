"""Merge files in recipes: the sources that one names, and a step for each of its stages and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import SourceMissing, UsageError
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place
from weightops.recipes.steps import Location, Step
from weightops.recipes.verbs import find_verb

if TYPE_CHECKING:
    from weightops.operations.merge import Reference, Stage

OPTIONS = ("seed", "allow_nonfinite")
"""What may be said of a merge besides its document."""
_SHORT = {"method": "merge_method", "base": "base_model"}


@dataclass
class Expanded:
    """What a merge file comes to: sources and steps by name, the last of which makes the result."""

    sources: dict[str, Location] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)


def expand(
    stages: Sequence[Stage],
    text: str,
    result: str,
    options: Mapping[str, Any],
    *,
    locate: Callable[[str], Location],
    known: Collection[str] = (),
    there: Expanded | None = None,
) -> Expanded:
    """Sources and steps for the stages of a merge file, of which the last becomes the step `result`.

    What it calls a model is one of the names in `known`, or a place, which `locate` makes a source of. Sources are
    named after their folders and repositories, so that the names, which are recorded, do not depend on where those
    lie. `options` go to every stage; `text` is the merge file, which is written beside the result.
    """
    # Imported here, as operations are where they are needed.
    from weightops.ops.merging.methods import find_method

    found = Expanded()
    names = _Names(found, locate, {*known, result}, [stage.name for stage in stages if stage.name], there or Expanded())
    for stage in stages:
        called = {model: names.of(model) for model in stage.references}
        name = result if stage is stages[-1] else names.stage(stage)
        document = stage.plain(called)
        models = tuple(dict.fromkeys(called.values()))
        # The text is no part of what made the result: it says where the models lie.
        given = {"text": text, "file": stage.document.shown, "said": _on_the_hub(stage)}
        own = {"config": document, **options}
        if any(find_method(method).is_random for method in stage.methods):
            own.setdefault("seed", 0)
        found.steps[name] = Step("merge", {"models": models}, own, given)
    return found


def expand_step(
    document: Document,
    place: Place,
    name: str,
    given: Mapping[str, Any],
    known: Collection[str],
    there: Expanded,
    folder: Path,
    locate: Callable[[str], str],
) -> Expanded:
    """Sources and steps for what a recipe has under `merge`; its models are names in the recipe, or places.

    `there` are those of the steps before.

    That is a document in mergekit's language, in which `method` and `base` may stand for merge_method and base_model
    and names for models; or `config`, the path of a merge file. Raises `UsageError` naming line and field.
    """
    from weightops.operations.merge import References, parse_stage, parse_stages

    def exists(path: str) -> bool:
        return path in known or (folder / path).exists()

    fields = dict(given)
    options = {key: _option(document, (*place, key), key, fields.pop(key)) for key in OPTIONS if key in fields}
    if "config" in fields:
        other = next((key for key in fields if key != "config"), None)
        if other is not None:
            document.fail((*place, other), "has no place beside config, which says all", hint="write it into that file")
        path = Path(locate(document.text((*place, "config"), fields["config"])))
        text = read_text(path)
        stages: Sequence[Stage] = parse_stages(text, escape(str(path)), exists)
    else:
        twice = next((key for key, full in _SHORT.items() if key in fields and full in fields), None)
        if twice is not None:
            document.fail((*place, twice), f"is {_SHORT[twice]} once more")
        data = as_document(fields)
        below = {at[len(place) :]: line for at, line in document.lines.items() if at[: len(place)] == place}
        lines = {(*(_SHORT.get(key, key) for key in at[:1]), *at[1:]): line for at, line in below.items()}
        stages = [parse_stage(Document(data, document.shown, lines, inside=place), References(exists))]
        text = ""
    return expand(stages, text, name, options, locate=lambda text: Location(locate(text)), known=known, there=there)


def as_document(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A document in mergekit's language, from one in which models may be plain names, and keys be shorter."""
    data = {_SHORT.get(key, key): value for key, value in fields.items()}
    if isinstance(data.get("models"), list):
        data["models"] = [{"model": each} if isinstance(each, str) else each for each in data["models"]]
    return data


def _option(document: Document, place: Place, name: str, value: Any) -> Any:
    """`value`, once it is known to be one that the operation takes."""
    try:
        return find_verb("merge").option(name, value)
    except UsageError as error:
        raise document.blame(place, error) from None


def read_text(path: Path) -> str:
    """The text of a merge file or recipe; raises `SourceMissing` or `UsageError`."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SourceMissing(f"{escape(str(path))}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read ({escape(str(error))})") from None


def _on_the_hub(stage: Stage) -> tuple[str, ...]:
    """What to say of names that are taken for repositories on a hub, because nothing here is called so."""
    from weightops.operations.merge import HUB

    meant = {place for model in stage.references for place in (model.model, model.adapter) if place is not None}
    written = json.dumps(stage.document.data, default=str)
    names = sorted(place for place in meant if place.startswith(HUB) and place not in written)
    return tuple(f"{escape(name.removeprefix(HUB))} is no folder here: it is read as {escape(name)}" for name in names)


class _Names:
    """Names for models, each the same for the same model."""

    def __init__(
        self,
        found: Expanded,
        locate: Callable[[str], Location],
        known: Collection[str],
        stages: Collection[str],
        there: Expanded,
    ) -> None:
        self._found, self._locate, self._known, self._there = found, locate, set(known), there.sources
        self._taken = {*known, *there.sources, *there.steps}
        self._stages = {name: self._free(name) for name in stages}
        self._sources: dict[str, str] = {}

    def stage(self, stage: Stage) -> str:
        """The name of the step that makes a stage."""
        assert stage.name is not None
        return self._stages[stage.name]

    def of(self, model: Reference) -> str:
        """The name of a source or step; a step that merges the adapter into the model, where there is one."""
        base = self._source(model.model)
        if model.adapter is None:
            return base
        adapter = self._source(model.adapter)
        name = f"{base}+{adapter}"
        self._found.steps[name] = Step("merge-lora", {"base": (base,), "adapter": (adapter,)})
        return name

    def _source(self, place: str) -> str:
        if place in self._stages:
            return self._stages[place]
        if place in self._known:
            return place
        location = self._locate(place)
        same = next((name for name, own in self._there.items() if own == location), None)
        if same is not None:
            return same
        if place not in self._sources:
            last = place.partition("?")[0].rstrip("/").rpartition("/")[2].partition("@")[0]
            name = self._sources[place] = self._free(last or "model")
            self._found.sources[name] = location
        return self._sources[place]

    def _free(self, name: str) -> str:
        free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in self._taken)
        self._taken.add(free)
        return free
