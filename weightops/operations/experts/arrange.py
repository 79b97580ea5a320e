"""The experts of a layer in one stack, or each apart: names and slices, no value is decoded but to exchange axes."""

from __future__ import annotations

from collections.abc import Callable

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.experts import DOWN, GATE, UP, Block, Family, Layout, Names, Order, parts_of
from weightops.lazy import LazyTensor
from weightops.ops.arrange import concat, cut, halves_to_pairs, one_of, pairs_to_halves, stacked
from weightops.ops.elementwise import reshaped
from weightops.ops.transpose import transposed

_BIAS = {"weight": "", "bias": "_bias"}
"""How the two tensors of a layer end in a stack, after `experts.gate_up_proj`."""


def arranged(source: Checkpoint, blocks: list[Block], family: Family, layout: Layout) -> dict[str, LazyTensor]:
    """The tensors of `source` with its experts in `layout`, under the names of the family; others are where they were.

    Raises `UsageError` where no program reads the family so, `IncompatibleInputs` for tensors that are quantised and
    for stacks of which shapes do not tell where gate and up lie.
    """
    if layout == "separate" and family.apart is None:
        raise UsageError(
            f"{escape(source.name)}: experts of {family.model_types[0]} are published stacked, and no program reads "
            "them apart",
            hint="leave them stacked",
        )
    names = family.stacked if layout == "stacked" else family.apart
    assert names is not None
    made: dict[str, dict[str, LazyTensor]] = {}
    moved: dict[str, str] = {}
    for block in blocks:
        moved |= _beside(source, block, names)
        if bool(block.stacks) == (layout == "stacked"):
            continue
        if block.apart:
            made[block.prefix] = _stack(source, block, family)
        else:
            made[block.prefix] = _take_apart(source, block, family)
    gone = {name for block in blocks if block.prefix in made for name in _own(block)}
    found: dict[str, LazyTensor] = {}
    owner = {name: block.prefix for block in blocks for name in _own(block)}
    for name, tensor in source.items():
        if name in gone:
            found |= made.pop(owner[name], {})
        else:
            found[moved.get(name, name)] = tensor
    return found


def _own(block: Block) -> list[str]:
    return [*block.stacks.values(), *(name for tensors in block.apart.values() for name in tensors.values())]


def _beside(source: Checkpoint, block: Block, names: Names) -> dict[str, str]:
    """New names of what lies in the mixture beside its experts: the router, and experts that all tokens take."""
    if block.name == names.block and not any(_router_of(block, name) for name in block.routed):
        return {}
    own = set(_own(block))
    moved = {}
    for name in source:
        if name.startswith(block.prefix) and name not in own:
            rest = name.removeprefix(block.prefix)
            router = _router_of(block, name)
            if router is not None:
                rest = f"{names.router}{rest.removeprefix(router)}"
            moved[name] = f"{block.layer}{names.block}.{rest}"
    return moved


def _router_of(block: Block, name: str) -> str | None:
    """The module of the router that a tensor is of, without the block's name."""
    rest = name.removeprefix(block.prefix)
    module = rest.rpartition(".")[0]
    return module if name in block.routed and module in ("gate", "router", "router.layer") else None


def _stack(source: Checkpoint, block: Block, family: Family) -> dict[str, LazyTensor]:
    """The stacks of experts that are apart."""
    assert family.apart is not None
    parts = family.apart.parts
    known = {f"{module}.{leaf}" for module in parts.values() for leaf in _BIAS}
    odd = sorted(block.apart[0].keys() - known)
    if odd:
        raise _packed(source, block.apart[0][odd[0]])
    found: dict[str, LazyTensor] = {}
    leaves = [leaf for leaf in _BIAS if any(rest.endswith(f".{leaf}") for rest in block.apart[0])]
    order = _order(source, family, None)
    for leaf in leaves:
        lists = {part: [block.apart[n].get(f"{parts[part]}.{leaf}") for n in range(block.count)] for part in parts}
        missing = [part for part, names in lists.items() if None in names]
        if missing:
            where = f"{escape(source.name)}: {escape(block.prefix)}experts.0"
            raise IncompatibleInputs(f"{where} has a {leaf} of some of its layers, and not of {listed(missing)}")
        pairs = zip(lists[GATE], lists[UP], strict=True)
        both = [_joined(source, block, [source[str(gate)], source[str(up)]]) for gate, up in pairs]
        down = [source[str(name)] for name in lists[DOWN]]
        for module, matrices in ((family.stacked.parts[GATE], both), (family.stacked.parts[DOWN], down)):
            stack = _as_stack(source, block, matrices)
            if leaf == "weight":
                stack = _ordered(stack, order, is_both=module == family.stacked.parts[GATE])
            name = module if module.endswith(".weight") else f"{module}{_BIAS[leaf]}"
            found[f"{block.layer}{family.stacked.block}.{name}"] = stack
    return found


def _joined(source: Checkpoint, block: Block, matrices: list[LazyTensor]) -> LazyTensor:
    return _of(source, block, lambda: concat(matrices, 0))


def _as_stack(source: Checkpoint, block: Block, matrices: list[LazyTensor]) -> LazyTensor:
    return _of(source, block, lambda: stacked(matrices))


def _of(source: Checkpoint, block: Block, made: Callable[[], LazyTensor]) -> LazyTensor:
    """What is made of a layer's experts; what that raises names them."""
    try:
        return made()
    except IncompatibleInputs as error:
        where = f"{escape(source.name)}: experts of {escape(block.prefix.rstrip('.'))}"
        raise IncompatibleInputs(f"{where}: {error}") from None


def _ordered(stack: LazyTensor, order: Order, *, is_both: bool) -> LazyTensor:
    """A stack `[experts, rows, columns]`, gate before up, as the family has it."""
    if order == "rows":
        return stack
    if order == "interleaved columns" and is_both:
        experts, rows, columns = stack.spec.shape
        stack = reshaped(halves_to_pairs(reshaped(stack, (experts * rows, columns)), experts), (experts, rows, columns))
    return transposed(stack)


def _take_apart(source: Checkpoint, block: Block, family: Family) -> dict[str, LazyTensor]:
    """Each expert of stacks apart."""
    assert family.apart is not None
    stacks: dict[str, dict[str, LazyTensor]] = {}
    for rest, name in block.stacks.items():
        module = next((m for m in {*family.stacked.parts.values()} if rest in (m, f"{m}_bias")), None)
        if module is None:
            raise _packed(source, name)
        stacks.setdefault("bias" if rest.endswith("_bias") else "weight", {})[module] = source[name]
    found: dict[str, LazyTensor] = {}
    parts, target = family.stacked.parts, family.apart
    for leaf, by_module in stacks.items():
        missing = [module for module in {*parts.values()} if module not in by_module]
        if missing:
            raise IncompatibleInputs(f"{escape(source.name)}: {escape(block.prefix)}{missing[0]} is missing")
        both, down = by_module[parts[GATE]], by_module[parts[DOWN]]
        if leaf == "weight":
            order = _order(source, family, both)
            both, down = _canonical(both, order, is_both=True), _canonical(down, order, is_both=False)
        half = both.spec.shape[1] // 2
        pieces = {GATE: cut(both, 1, 0, half), UP: cut(both, 1, half, 2 * half), DOWN: down}
        for number in range(block.count):
            for part, stack in pieces.items():
                name = f"{block.layer}{target.block}.experts.{number}.{target.parts[part]}.{leaf}"
                found[name] = one_of(stack, number)
    return dict(sorted(found.items(), key=lambda item: _place(item[0], block, target)))


def _place(name: str, block: Block, names: Names) -> tuple[int, int]:
    number, module, _ = name.removeprefix(f"{block.layer}{names.block}.experts.").split(".", 2)
    return int(number), list(names.parts.values()).index(module)


def _canonical(stack: LazyTensor, order: Order, *, is_both: bool) -> LazyTensor:
    """The inverse of `_ordered`."""
    if order == "rows":
        return stack
    stack = transposed(stack)
    if order == "interleaved columns" and is_both:
        experts, rows, columns = stack.spec.shape
        stack = reshaped(pairs_to_halves(reshaped(stack, (experts * rows, columns)), experts), (experts, rows, columns))
    return stack


def _order(source: Checkpoint, family: Family, both: LazyTensor | None) -> Order:
    """How gate and up lie; raises `IncompatibleInputs` where a family has both ways and the shape is of neither."""
    if family.order != "by shape":
        return family.order
    if both is None:
        return "rows"
    width = next((part["hidden_size"] for part in reversed(parts_of(source.config())) if "hidden_size" in part), None)
    _, rows, columns = both.spec.shape
    if rows == columns or width not in (rows, columns):
        why = "as many rows as columns" if rows == columns else f"no side of hidden_size ({width})"
        raise IncompatibleInputs(
            f"{escape(source.name)}: a stack of gate and up is {list(both.spec.shape)}, {why}: this family is "
            "published both as rows and as columns, and nothing tells which these are",
            hint="load and save it with the version of transformers that wrote it",
        )
    return "rows" if width == columns else "columns"


def _packed(source: Checkpoint, name: str) -> UsageError:
    return UsageError(
        f"{escape(source.name)}: {escape(name)} is part of a quantised weight, and is not stacked or taken apart",
        hint="weightops dequantize makes plain weights of it",
    )
