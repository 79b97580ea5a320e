"""The vocabulary of a model: the function of `weightops vocab`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

from weightops.api.outputs import Output, one
from weightops.recipes.execute import Result
from weightops.recipes.planning import StrPath, several


def vocab(
    source: StrPath,
    out: StrPath,
    *,
    tokenizer: StrPath | None = None,
    method: Literal["subword", "mean", "zero", "omp", "draft"] | None = None,
    k: int | None = None,
    override: Mapping[str, str] | None = None,
    trim: StrPath | None = None,
    add_token: str | Sequence[str] = (),
    special: bool = True,
    ends_turn: bool = False,
    chat_template: StrPath | None = None,
    rows: int | None = None,
    multiple: int | None = None,
    init: str = "mean",
    seed: int = 0,
    **output: Unpack[Output],
) -> Result:
    """Give a model another vocabulary: rows, tokens, tokenizer, ids and template; see `weightops.operations.vocab`.

    `tokenizer` is the model whose tokenizer it gets, `trim` a file of text, `chat_template` a file of Jinja.
    """
    options: dict[str, Any] = {
        "method": method,
        "k": k,
        "override": dict(override or {}),
        "trim": os.fspath(trim) if trim is not None else None,
        "add_token": several(add_token),
        "special": special,
        "ends_turn": ends_turn,
        "chat_template": os.fspath(chat_template) if chat_template is not None else None,
        "rows": rows,
        "multiple": multiple,
        "init": init,
        "seed": seed,
    }
    sources = {"source": source} if tokenizer is None else {"source": source, "tokenizer": tokenizer}
    return one("vocab", sources, out, output, options)
