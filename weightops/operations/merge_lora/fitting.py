"""Whether an adapter fits a base: every part of it by itself, where merging stops at the first that does not."""

from __future__ import annotations

from dataclasses import dataclass

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.adapter.lora import Adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.operations.merge_lora.names import Names, find_embeddings, find_tensor
from weightops.operations.merge_lora.parts import Placing


@dataclass(frozen=True)
class Fit:
    """The tensors of a base that a part of an adapter is for, or why there are none, in a sentence."""

    tensors: tuple[str, ...] = ()
    problem: str | None = None


def fit(adapter: Adapter, base: Checkpoint) -> tuple[dict[tuple[str, int], Fit], dict[str, Fit]]:
    """How each module's factors fit `base`, by path and depth; and each tensor that is held whole, or in rows, by path.

    Headers alone are looked at. Raises `IncompatibleInputs` for a base that is a delta or an adapter, `UsageError` for
    files that hold parts of tensors.
    """
    refuse_delta(base, "the base")
    refuse_adapter(base, "the base")
    refuse_parts(base)
    whole = {**adapter.base, **adapter.whole}
    rows = {f"{path}.weight": tensor for path, tensor in adapter.rows.items()}
    names = Names(base, [*(f"{path}.weight" for path, _ in adapter.factors), *whole, *rows])
    embeddings = find_embeddings(base)

    def find(path: str) -> str | None:
        name = find_tensor(names, embeddings, path)
        return name if name is None or name in base else embeddings.embedding

    model_type = base.config().get("model_type")
    model = model_type if isinstance(model_type, str) else None
    placing = Placing(adapter, base, find, model, "float32", False)

    def placed(path: str, depth: int) -> Fit:
        try:
            found = [each.name for each in placing.place_one(path, depth, adapter.factors[path, depth])]
        except (IncompatibleInputs, CorruptInput) as error:
            return Fit(problem=str(error))
        return Fit(tuple(found))

    def whole_or_rows(path: str, tensor: LazyTensor, *, in_rows: bool) -> Fit:
        try:
            name = find(path)
        except IncompatibleInputs as error:
            return Fit(problem=str(error))
        if name is None:
            return Fit(problem=f"{escape(adapter.name)}: {escape(path)}: the base has no such tensor")
        shape, own = base[name].spec.shape, tensor.spec.shape
        may_grow = in_rows or name in embeddings.names
        if own == shape or (may_grow and own[1:] == shape[1:]):
            return Fit((name,))
        problem = (
            f"{escape(adapter.name)}: {escape(path)} is {tensor.spec}, the base's {escape(name)} is {base[name].spec}"
        )
        return Fit(problem=problem)

    modules = {key: placed(*key) for key in adapter.factors}
    tensors = {path: whole_or_rows(path, tensor, in_rows=False) for path, tensor in whole.items()}
    return modules, tensors | {path: whole_or_rows(path, tensor, in_rows=True) for path, tensor in rows.items()}
