"""What B is to A, in a sentence; and what a person should see first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from weightops.formats.modules import NUMBERED
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.operations.compare.report import ROUNDED, ConfigChange, Finding, Lone, TensorChange, TokenizerChange

_UNRELATED = 0.5
"""From this 1 - cosine on, weights are others; those of a model and its fine-tunes differ by thousandths."""
_SHOWN = 6
_MOST = 0.5


def relation(tensors: Sequence[TensorChange], lone: Sequence[Lone], relative: float | None, angle: float | None) -> str:
    """The sentence."""
    own = [tensor for tensor in tensors if not tensor.is_tied]
    without = [each for each in lone if not each.is_derived]
    if not own:
        return "A and B have no tensor in common."
    body, *others = _body(own, relative, angle)
    added = {(t.added_a, t.added_b) for t in own if t.added_a or t.added_b}
    if added:
        more_a, more_b = max(added)
        body += (
            f", with {more_b} rows more in the vocabulary"
            if more_b
            else f", with {more_a} rows fewer in the vocabulary"
        )
    if without:
        others.append(f"{_tensors(len(without))} {'has' if len(without) == 1 else 'have'} no partner")
    return f"{'; '.join([body, *others])}."


def _body(own: Sequence[TensorChange], relative: float | None, angle: float | None) -> list[str]:
    """What B is, and what there is to say of the tensors that did not change."""
    changed = [tensor for tensor in own if not tensor.is_equal]
    kinds = {tensor.kind for tensor in changed}
    if not changed:
        if all(tensor.kind == "identical" for tensor in own):
            forms = {side: _usual_form(own, side) for side in "AB"}
            sides = [side for side, form in forms.items() if form]
            if len(sides) == 1:
                other = "B" if sides == ["A"] else "A"
                return [f"{other} is {sides[0]} ({forms[sides[0]]}) dequantised, byte for byte"]
            return ["B holds the same weights as A, byte for byte"]
        return [f"B holds the same numbers as A{_stored(own)}"]
    rest = len(own) - len(changed)
    others = [f"the other {_tensors(rest)} {'is' if rest == 1 else 'are'} equal"] if rest else []
    if kinds in ({"cast"}, {"cast-of-b"}):
        one, other = ("B", "A") if kinds == {"cast"} else ("A", "B")
        form = _usual_form(changed, other)
        what = f"{other} ({form}), dequantised and" if form else other
        return [f"{one} is {what} rounded to {_dtypes(changed, one)}, exactly", *others]
    if "quantised" in kinds and kinds <= set(ROUNDED):
        packed = [tensor for tensor in changed if tensor.kind == "quantised"]
        form_a, form_b = (_usual_form(packed, side) for side in "AB")
        if form_a and form_b:
            how = f"({form_a} and {form_b}) in {_tensors(len(packed))}"
            return [f"A and B are quantised forms of the same weights, to within a step {how}", *others]
        one, other = ("B", "A") if form_b else ("A", "B")
        return [f"{one} is {other} quantised ({form_b or form_a}) in {_tensors(len(packed))}", *others]
    if angle is not None and angle > _UNRELATED and len(changed) > _MOST * len(own):
        return ["B's weights are not made from A's: names and shapes agree, and the numbers have nothing in common"]
    if kinds == {"not-finite"}:
        return [f"B is A but for NaN or infinities in {_tensors(len(changed))}", *others]
    by = "" if relative is None else f", by {_percent(relative)} on the whole (‖B-A‖/‖A‖)"
    if kinds <= {"low-rank"}:
        most = max(tensor.rank or 0 for tensor in changed)
        how = f"as a merged LoRA makes it (at most {most} directions hold 99 %)"
        return [f"B is A with a change of low rank, {how}, in {len(changed)} of {_tensors(len(own))}{by}", *others]
    if len(changed) <= _MOST * len(own):
        return [f"B is A but for {len(changed)} of {_tensors(len(own))}{by}", *others]
    return [f"B differs from A in {len(changed)} of {_tensors(len(own))}{by}", *others]


def findings(
    tensors: Sequence[TensorChange],
    lone: Sequence[Lone],
    config: Sequence[ConfigChange],
    tokenizer: Sequence[TokenizerChange],
) -> Iterator[Finding]:
    """What to see first, gravest first."""
    own = [tensor for tensor in tensors if not tensor.is_tied]
    for tensor in own:
        yield from _not_finite(tensor)
    yield from _lone_findings(lone)
    moved = [tensor for tensor in own if tensor.kind == "moved"]
    for tensor in moved[:_SHOWN]:
        text = f"{escape(tensor.name)} holds in B what is {escape(tensor.moved_from or '')} in A"
        yield Finding(code="moved", text=text)
    if len(moved) > _SHOWN:
        yield Finding(code="moved", text=f"so it is with {len(moved) - _SHOWN} more tensors")
    for tensor in (tensor for tensor in own if tensor.added_a or tensor.added_b):
        yield _added(tensor)
    for tensor in (tensor for tensor in own if tensor.kind == "heads"):
        yield _heads(tensor)
    for tensor in (tensor for tensor in own if tensor.kind == "rows"):
        yield _rows(tensor)
    for tensor in [tensor for tensor in own if tensor.kind == "scaled"][:_SHOWN]:
        yield Finding(code="scaled", text=f"{escape(tensor.name)} is {tensor.scale:.6g} times what it is in A")
    yield from _groups([tensor for tensor in own if tensor.kind in ("low-rank", "broad", "quantised", *ROUNDED)])
    decisive = [change for change in config if change.changes_results]
    if decisive:
        shown = "; ".join(
            f"{change.pointer} {change.a or 'absent'} → {change.b or 'absent'}" for change in decisive[:4]
        )
        more = f"; and {len(decisive) - 4} more" if len(decisive) > 4 else ""
        yield Finding(code="config", text=f"configuration that changes results: {escape(shown)}{more}")
    for part in tokenizer[:_SHOWN]:
        yield Finding(code="tokenizer", text=f"{part.part}: {part.text}")


def _not_finite(tensor: TensorChange) -> Iterator[Finding]:
    for what, a, b in (("NaN", tensor.a.nan, tensor.b.nan), ("infinite", tensor.a.infinite, tensor.b.infinite)):
        if a != b or (a and tensor.kind == "not-finite"):
            at = f", the first at {list(tensor.first_odd)}" if tensor.first_odd is not None and b > a else ""
            text = f"{escape(tensor.name)}: {b} of {tensor.elements} elements are {what} in B, {a} in A{at}"
            yield Finding(code="not-finite", text=text)


def _lone_findings(lone: Sequence[Lone]) -> Iterator[Finding]:
    for where, text in (("a", "in A alone"), ("b", "in B alone")):
        names = [each.name for each in lone if each.where == where and not each.is_derived]
        if names:
            yield Finding(code="no-partner", text=f"{_tensors(len(names))} {text}: {listed(names)}")
    for each in [each for each in lone if each.where == "both"][:_SHOWN]:
        yield Finding(code="shape", text=f"{escape(each.name)}: {each.reason}")


def _added(tensor: TensorChange) -> Finding:
    count, side = (tensor.added_b, "B") if tensor.added_b else (tensor.added_a, "A")
    common = min(tensor.a.shape[0], tensor.b.shape[0])
    rows = f"rows {common} to {common + count - 1}" if count > 1 else f"row {common}"
    of_common = "the others are equal" if tensor.is_equal else f"of the others {tensor.changed_rows} changed"
    return Finding(code="added-rows", text=f"{escape(tensor.name)}: {rows} are in {side} alone; {of_common}")


def _heads(tensor: TensorChange) -> Finding:
    shown = ", ".join(
        f"{head.head} (times {head.scale:.6g})"
        if head.scale is not None
        else f"{head.head} (by {_percent(head.change)})"
        for head in tensor.heads[:_SHOWN]
    )
    more = f" and {len(tensor.heads) - _SHOWN} more" if len(tensor.heads) > _SHOWN else ""
    what = "head" if len(tensor.heads) == 1 else "heads"
    text = f"{escape(tensor.name)}: of its {tensor.n_heads} heads, {what} {shown}{more} changed"
    return Finding(code="heads", text=text)


def _rows(tensor: TensorChange) -> Finding:
    shown = ", ".join(
        f"{row.row}" + (f" ({escape(row.token)[:40]!r})" if row.token is not None else "")
        for row in tensor.rows[:_SHOWN]
    )
    more = f" and {tensor.changed_rows - _SHOWN} more" if tensor.changed_rows > _SHOWN else ""
    text = f"{escape(tensor.name)}: {tensor.changed_rows} of {tensor.n_rows} rows changed: {shown}{more}"
    return Finding(code="rows", text=text)


def _groups(tensors: Sequence[TensorChange]) -> Iterator[Finding]:
    """Tensors that changed in one way, by what they are in their layer."""
    groups: dict[tuple[str, str], list[TensorChange]] = defaultdict(list)
    for tensor in tensors:
        matched = NUMBERED.fullmatch(tensor.name)
        groups[tensor.kind, matched[3] if matched else tensor.name].append(tensor)
    by_kind: dict[str, list[tuple[str, list[TensorChange]]]] = defaultdict(list)
    for (kind, module), found in groups.items():
        by_kind[kind].append((module, found))
    for kind, modules in by_kind.items():
        if kind in ("cast", "cast-of-b"):
            found = [tensor for _, group in modules for tensor in group]
            yield Finding(code=kind, text=f"{_tensors(len(found))} {_PHRASES[kind]} ({_figures(kind, found)})")
            continue
        modules.sort(key=lambda item: -max(t.relative or 0.0 for t in item[1]))
        shown = ", ".join(
            f"{escape(name)}{_times(found)} ({_figures(kind, found)})" for name, found in modules[:_SHOWN]
        )
        more = f" and {len(modules) - _SHOWN} more modules" if len(modules) > _SHOWN else ""
        yield Finding(code=kind, text=f"{_PHRASES[kind]}: {shown}{more}")


_PHRASES = {
    "low-rank": "changed in a few directions, as a merged LoRA does",
    "broad": "changed everywhere",
    "quantised": "within quantisation steps",
    "cast": "rounded to B's number type, exactly",
    "cast-of-b": "rounded in A from what B has, exactly",
}


def _times(found: Sequence[TensorChange]) -> str:
    return f" in {len(found)} layers" if len(found) > 1 else ""


def _figures(kind: str, found: Sequence[TensorChange]) -> str:
    most = max(tensor.relative or 0.0 for tensor in found)
    if kind == "low-rank":
        return f"r99 at most {max(tensor.rank or 0 for tensor in found)}, up to {_percent(most)}"
    if kind == "quantised":
        within = sum((t.within_half_step or 0.0) * t.elements for t in found) / sum(t.elements for t in found)
        return f"{100 * within:.3g} % within half a step, up to {_percent(most)}"
    return f"up to {_percent(most)}"


def _stored(own: Sequence[TensorChange]) -> str:
    forms = {(t.a.form or t.a.dtype.value, t.b.form or t.b.dtype.value) for t in own if t.kind == "equal"}
    differing = sorted(f"{b} in the place of {a}" for a, b in forms if a != b)
    return f" ({', '.join(differing[:2])})" if differing else ", in another form"


def _usual_form(tensors: Sequence[TensorChange], side: str) -> str | None:
    """How most of the tensors that are quantised in A or in B are."""
    forms = Counter(form for tensor in tensors if (form := _form(tensor, side)))
    if not forms:
        return None
    ((usual, _),) = forms.most_common(1)
    return usual if len(forms) == 1 else f"mostly {usual}"


def _form(tensor: TensorChange, side: str) -> str | None:
    """How a tensor is quantised in A or in B, if it is."""
    return (tensor.a if side == "A" else tensor.b).form


def _dtypes(tensors: Sequence[TensorChange], side: str) -> str:
    names = sorted({(tensor.a if side == "A" else tensor.b).dtype.value for tensor in tensors})
    return " and ".join(names)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _tensors(count: int) -> str:
    return f"{count} tensor" + "s" * (count != 1)
