"""Whatever stands in a merge file: it is merged, or refused in a sentence that names the file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from merging import PUBLISHED, evaluated, model

from weightops.errors import IncompatibleInputs, UsageError
from weightops.operations.merge import merge, parse_stages

ODD = st.one_of(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-1e300, 1e300) | st.text(max_size=3),
    st.sampled_from([float("nan"), float("inf"), 10**400, "a/b", "a+b", "1e-3", "true", "union", "*", [], {}, [[]]]),
    st.lists(st.integers(-1, 5) | st.booleans(), max_size=3),
    st.dictionaries(st.sampled_from(["filter", "value", "model", "path", "kind", "x"]), st.integers(0, 3), max_size=3),
)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*above, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    result = copy.deepcopy(data)
    part = result
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return result


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"stages"}))
@given(data=st.data())
def test_any_value_anywhere_is_meant_or_refused(name: str, data: st.DataObject) -> None:
    document = yaml.safe_load(PUBLISHED[name].read_text())
    place = data.draw(st.sampled_from(sorted(places(document), key=str)))
    text = yaml.safe_dump(changed(document, place, data.draw(ODD)), sort_keys=False)
    said = refused(lambda: merged(text))
    assert said is None or said


def merged(text: str) -> None:
    """Merge small models as the text says; what it is refused for before that names the file."""
    said = refused(lambda: parse_stages(text, "m.yml", lambda path: False))
    if said is not None:
        assert said.startswith("m.yml"), said
        return
    (stage,) = parse_stages(text, "m.yml", lambda path: False)
    names = {found: f"model-{i}" for i, found in enumerate(stage.references)}
    models = [model(name) for name in names.values()]
    made = merge(models, config=stage.plain(names), names=list(names.values()), evaluate=evaluated)
    assert made.config()["model_type"] == "llama"


def refused(read: Callable[[], object]) -> str | None:
    """What something is refused for, in one sentence, if it is."""
    try:
        read()
    except (UsageError, IncompatibleInputs) as error:
        return str(error)
    return None
