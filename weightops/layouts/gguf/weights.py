"""Where the matrices of a model lie in its GGUF file, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.gguf.families import BY_TYPE
from weightops.layouts.gguf.links import find_links
from weightops.layouts.gguf.parameters import settings_of
from weightops.layouts.gguf.transforms import Rotary, Same, Stacked


class Matrix(NamedTuple):
    """A tensor of a GGUF file; where it stacks matrices, the one of this `number`, `of` so many."""

    name: str
    number: int = 0
    of: int = 1


def find_matrices(config: Mapping[str, Any], names: Iterable[str], where: str) -> dict[str, Matrix]:
    """By transformers' name each matrix whose columns are, in their order, those of one in the GGUF file.

    `config` is the content of config.json. Raises `UsageError` for a family that is not known here, and as `find_links`
    does.
    """
    family = BY_TYPE.get(str(config.get("model_type")))
    if family is None:
        raise UsageError(
            f"{where}: model_type {escape(str(config.get('model_type')))[:80]} is not converted to GGUF, so its "
            "tensors have no names there",
            hint=f"these are: {', '.join(BY_TYPE)}",
        )
    found = dict[str, Matrix]()
    for link in find_links(family, settings_of(config, family, where), names, where).links:
        if isinstance(link.transform, Stacked):
            count = len(link.saved)
            found |= {name: Matrix(link.packed[0], i, count) for i, name in enumerate(link.saved)}
        elif isinstance(link.transform, Same | Rotary):  # of rows
            found[link.saved[0]] = Matrix(link.packed[0])
    return {name: matrix for name, matrix in found.items() if matrix.name.endswith(".weight")}
