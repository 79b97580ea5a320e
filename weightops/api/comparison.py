"""Compare models: their weights, their files, what they make of a text, and what they answer to prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from weightops.api.models import ComputeDType, described, evaluate
from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.inference.asked import Asked
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.strict_json import as_json
from weightops.recipes.planning import StrPath

if TYPE_CHECKING:
    from weightops.inference.answers import AnswersReport
    from weightops.inference.evaluate import Evaluation
    from weightops.inference.packed import Engine
    from weightops.operations.compare import Comparison


@dataclass(frozen=True)
class Comparisons:
    """Models against the first of them: their weights and files.

    `outputs` is what they make of a text, and `answers` what they answer to prompts.
    """

    comparisons: tuple[Comparison, ...]
    outputs: Evaluation | None = None
    tolerance: float | None = None
    strict: bool = False
    answers: AnswersReport | None = None

    __repr__ = brief

    def _repr_html_(self) -> str:
        shown = [*self.comparisons, self.outputs, self.answers]
        return "".join(each._repr_html_() for each in shown if each is not None)

    @property
    def differs(self) -> bool | None:
        """Whether any of them differs beyond the tolerance; None without one."""
        return None if self.tolerance is None else any(each.differs for each in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-compare/1`."""
        from weightops.api.comparison_report import CompareDocument

        document = CompareDocument(
            tolerance=self.tolerance,
            strict=self.strict,
            differs=self.differs,
            comparisons=self.comparisons,
            outputs=None if self.outputs is None else self.outputs.document,
            answers=self.answers,
        )
        return as_json(document)


def compare(
    a: StrPath | Checkpoint,
    b: StrPath | Checkpoint | Sequence[StrPath | Checkpoint],
    *,
    tolerance: float | None = None,
    strict: bool = False,
    text: StrPath | Sequence[StrPath] | None = None,
    seq_len: int | None = None,
    prompts: StrPath | None = None,
    system: str | None = None,
    template: StrPath | None = None,
    dtype: ComputeDType = "float32",
    device: str = "auto",
    engine: Engine = "auto",
    max_memory: str | int | None = None,
    workers: int | None = None,
    control: Control | None = None,
    **settings: Unpack[Asked],
) -> Comparisons:
    """What `b`, or each of several, is to `a`: which tensors changed, how much, and in what way.

    A source may also be a checkpoint that an operation has derived and nobody has written. With `text`, files as for
    `evaluate`, it is also measured how far their predictions are from those of `a`; `seq_len` is
    for that. With `prompts`, a file as for `generate_all`, all models answer them, and it is said where the answers
    part from those of `a`; `system`, `template` and `settings` are for that, and the options from `dtype` to
    `max_memory` for both. See `weightops.operations.compare` for `tolerance` and `strict`.
    """
    from weightops.operations.compare import compare as operation

    control = control or Control()
    given = [b] if isinstance(b, str | os.PathLike | Checkpoint) else list(b)
    if not given:
        raise UsageError("there is nothing to compare it with", hint="name a second model")
    if prompts is None:
        _refuse_unused(system=system, template=template, **settings)
        wanted = None
    else:
        from weightops.inference.prompt_file import read_prompts

        by_template = None if template is None else os.fspath(template)
        wanted = read_prompts(Path(prompts), settings, system=system, template=by_template)
    with control.stores.connected() as stores:
        opened = [each if isinstance(each, Checkpoint) else open_checkpoint(each, stores) for each in (a, *given)]
        first, *others = models = [
            each if isinstance(each, Checkpoint) else described(found)
            for each, found in zip((a, *given), opened, strict=True)
        ]
        outputs = None
        if text is not None:
            try:
                outputs = evaluate(
                    others,
                    text,
                    seq_len=seq_len,
                    reference=first,
                    dtype=dtype,
                    device=device,
                    engine=engine,
                    max_memory=max_memory,
                    control=control,
                )
            except IncompatibleInputs as error:
                hint = (error.hint or "").replace("--reference", "--text")
                raise IncompatibleInputs(str(error), hint=hint or None) from error
        answers = None
        if wanted is not None:
            from weightops.api.talk import open_pool
            from weightops.inference.side_by_side import answer_side_by_side

            sources = {str(number): each for number, each in enumerate(models)}
            with open_pool(
                sources, dtype=dtype, device=device, engine=engine, max_memory=max_memory, control=control
            ) as pool:
                if template is not None:  # one that there is not is refused at once, not prompt by prompt
                    for name in pool.names:
                        pool.find_template(name, os.fspath(template))
                answers = answer_side_by_side(pool, wanted, control=control)
        comparisons = tuple(
            operation(opened[0], each, tolerance=tolerance, strict=strict, workers=workers, control=control)
            for each in opened[1:]
        )
    return Comparisons(comparisons, outputs, tolerance, strict, answers)


def _refuse_unused(**given: object) -> None:
    """Refuse what says how prompts are answered where there are none, and keywords that there are not."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise UsageError(f"{escape(name)} has no use without prompts", hint="leave it out, or give prompts")
