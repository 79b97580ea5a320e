"""The methods by name. A new one is a function and a line here."""

from __future__ import annotations

import difflib

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.ops.merging.elementwise import cancels, linear, nearswap, passthrough, ram, ramplus_tl
from weightops.ops.merging.means import karcher, multislerp
from weightops.ops.merging.method import Method
from weightops.ops.merging.selective import arcee_fusion, sce
from weightops.ops.merging.spherical import model_stock, nuslerp, slerp
from weightops.ops.merging.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
    unfit,
)

_ALL = (
    Method(linear, "arXiv 2203.05482", "input", check=cancels),
    Method(slerp, "Shoemake 1985", "needed", (1, 1)),
    Method(nuslerp, "mergekit", "optional", (2, 2), by_rows=True),
    Method(multislerp, "mergekit", "optional", check=cancels),
    Method(karcher, "arXiv 2603.04972", "input"),
    Method(task_arithmetic, "arXiv 2212.04089", "needed", (0, None)),
    Method(ties, "arXiv 2306.01708", "needed", (0, None), check=unfit),
    Method(dare_linear, "arXiv 2311.03099", "needed", (0, None), is_random=True, check=unfit),
    Method(dare_ties, "arXiv 2311.03099", "needed", (0, None), is_random=True, check=unfit),
    Method(della, "arXiv 2406.11617", "needed", (0, None), by_rows=True, is_random=True, check=unfit),
    Method(della_linear, "arXiv 2406.11617", "needed", (0, None), by_rows=True, is_random=True, check=unfit),
    Method(breadcrumbs, "arXiv 2312.06795", "needed", (0, None), check=unfit),
    Method(breadcrumbs_ties, "arXiv 2312.06795", "needed", (0, None), check=unfit),
    Method(sce, "arXiv 2408.07990", "needed"),
    Method(model_stock, "arXiv 2403.19522", "needed", (2, None), by_rows=True),
    Method(nearswap, "mergekit", "needed", (1, 1)),
    Method(arcee_fusion, "mergekit", "needed", (1, 1), by_rows=True, is_wide=True),
    Method(ram, "arXiv 2601.13572", "needed"),
    Method(ramplus_tl, "arXiv 2601.13572", "needed", is_wide=True),
    Method(passthrough, "mergekit", "input", (1, 1)),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of that name; raises `UsageError` with the nearest one there is."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), METHODS, 1, 0.4)
    also = f"is {near[0]} meant? " if near else ""
    raise UsageError(f"there is no method {escape(name)}", hint=f"{also}there are {', '.join(METHODS)}")
