"""Where mixtures of experts lie: what families call experts and routers, apart and stacked.

Names tell which tensors are whose; the table says what else a family calls them, and how it stacks. Sources:
transformers 5.23 (conversion_mapping and the models' `Experts` classes), and what the models are published as.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.layer_config import TEXT_CONFIGS

Layout = Literal["stacked", "separate"]
Order = Literal["rows", "columns", "interleaved columns", "by shape"]
"""How gate and up lie in a stack `gate_up`: as rows `[experts, 2 * inner, hidden]`, gate before up; as columns
`[experts, hidden, 2 * inner]`, gate before up or in turn; or in either of the first two, which shapes tell."""

GATE, UP, DOWN = "gate", "up", "down"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""What config.json calls the number of experts. There may be several: transformers writes its own."""
OF = "of"
"""In lists of experts by layer, the key of the number of experts that they are chosen from."""
GROUPS, GROUPS_USED = "n_group", "topk_group"
"""How many groups of experts a router chooses among, and how many of them it takes."""
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What lies in a layer: the module of the mixture, and in it the parts of an expert (or the stacks) and the router.

    Of experts apart `gate`, `up` and `down` are the modules in `experts.N`; of stacks `gate` and `up` are both `both`.
    """

    block: str
    router: str
    parts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of mixture. `apart` is None where no program reads it so; `order` is that of its stacks."""

    model_types: tuple[str, ...]
    apart: Names | None
    stacked: Names
    order: Order = "rows"
    published: Layout = "separate"


def _apart(block: str, gate: str, up: str, down: str, router: str) -> Names:
    return Names(block=block, router=router, parts={GATE: gate, UP: up, DOWN: down})


def _stacked(block: str, router: str, both: str = "experts.gate_up_proj", down: str = "experts.down_proj") -> Names:
    return Names(block=block, router=router, parts={GATE: both, UP: both, DOWN: down})


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QWEN = """
    qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text olmoe flex_olmo deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe
    glm4_moe_lite glm4v_moe_text ernie4_5_moe dots1 hunyuan_v1_moe solar_open longcat_flash afmoe exaone_moe kimi_k2
"""
FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("mixtral", "minimax", "minimax_m2"),
        apart=_apart("block_sparse_moe", "w1", "w3", "w2", "gate"),
        stacked=_stacked("mlp", "gate"),
    ),
    Family(
        model_types=("phimoe",),
        apart=_apart("block_sparse_moe", "w1", "w3", "w2", "gate"),
        stacked=_stacked("mlp", "router"),
    ),
    Family(
        model_types=tuple(_QWEN.split()),
        apart=_apart("mlp", *_PROJECTIONS, "gate"),
        stacked=_stacked("mlp", "gate"),
    ),
    Family(
        model_types=("qwen3_vl_moe_text", "qwen3_vl_moe", "qwen3_5_moe"),
        apart=_apart("mlp", *_PROJECTIONS, "gate"),
        stacked=_stacked("mlp", "gate"),
        order="by shape",
        published="stacked",
    ),
    Family(
        model_types=("jamba",),
        apart=_apart("feed_forward", *_PROJECTIONS, "router"),
        stacked=_stacked("feed_forward", "router"),
    ),
    Family(
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        apart=None,
        stacked=_stacked("block_sparse_moe", "router.layer", "input_linear.weight", "output_linear.weight"),
        published="stacked",
    ),
    Family(
        model_types=("llama4_text", "llama4"),
        apart=None,
        stacked=_stacked("feed_forward", "router"),
        order="columns",
        published="stacked",
    ),
    Family(
        model_types=("gpt_oss",),
        apart=None,
        stacked=_stacked("mlp", "router"),
        order="interleaved columns",
        published="stacked",
    ),
)

_APART = re.compile(
    r"(?P<layer>(?:.*\.)?(?:layers|h|blocks|block)\.\d+\.)(?P<block>[a-z_]+)\.experts\.(?P<number>0|[1-9]\d*)\.(?P<rest>.+)"
)
_STACK = re.compile(
    r"(?P<layer>(?:.*\.)?(?:layers|h|blocks|block)\.\d+\.)(?P<block>[a-z_]+)\."
    r"(?P<part>experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)|input_linear|output_linear)(?P<leaf>[._].+)?"
)
_ROUTED = re.compile(r"(?:gate|gate\.wg|router|router\.layer|moe_statics|experts)\.[^.]+|e_score_correction_bias")
"""Of a mixture, what has an entry for each expert beside the experts: weights, biases and corrections of routers."""


@dataclass
class Block:
    """The mixture of a layer: names of tensors in full.

    `apart[n]` are those of expert n by what follows its number, `stacks` those that hold all experts along their first
    dimension by what follows the block's name, `routed` those of the router with the dimension that counts experts.
    """

    layer: str
    name: str
    apart: dict[int, dict[str, str]] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    count: int = 0

    @property
    def prefix(self) -> str:
        return f"{self.layer}{self.name}."

    @property
    def number(self) -> int:
        """That of its layer."""
        return int(self.layer.rstrip(".").rpartition(".")[2])


def find_blocks(source: Checkpoint) -> list[Block]:
    """The mixtures of all layers, in the order of the file.

    Raises `UsageError` if there are none; `CorruptInput` for numbers with a gap, experts that differ in what they
    have, stacks of different heights, and for experts apart and stacked in one layer.
    """
    where = escape(source.name)
    blocks: dict[str, Block] = {}
    for name in source:
        apart, stack = _APART.fullmatch(name), _STACK.fullmatch(name)
        found = apart or stack
        if found is None:
            continue
        prefix = f"{found['layer']}{found['block']}."
        block = blocks.setdefault(prefix, Block(found["layer"], found["block"]))
        if apart is not None:
            block.apart.setdefault(int(apart["number"]), {})[apart["rest"]] = name
        elif source[name].spec.shape:
            block.stacks[name.removeprefix(prefix)] = name
    blocks = {prefix: block for prefix, block in blocks.items() if block.apart or _is_stack(source, block)}
    if not blocks:
        raise UsageError(
            f"{where}: has no experts that are known by their names",
            hint="known are names like layers.0.mlp.experts.0.gate_proj and layers.0.mlp.experts.gate_up_proj",
        )
    for block in blocks.values():
        _check(source, block, where)
    _check_layers(blocks.values(), where)
    for name in source:
        owner = next((b for p in _owners(name) if (b := blocks.get(p)) is not None), None)
        if owner is not None and name not in owner.stacks.values():
            _note_router(source, owner, name)
    return list(blocks.values())


def _owners(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) + "." for n in range(len(parts) - 1, 1, -1))


def _is_stack(source: Checkpoint, block: Block) -> bool:
    """Whether tensors of a block's names hold several matrices, as those of layers named alike need not."""
    return any(len(source[name].spec.shape) >= 3 for name in block.stacks.values())


def _check(source: Checkpoint, block: Block, where: str) -> None:
    shown = escape(block.prefix.rstrip("."))
    if block.apart and block.stacks:
        raise CorruptInput(
            f"{where}: {shown} has experts apart ({escape(next(iter(block.apart[min(block.apart)].values())))}) and "
            f"stacked ({escape(next(iter(block.stacks.values())))})",
            hint="of which model is which? leave one of them out with weightops shard --drop",
        )
    if block.apart:
        block.count = len(block.apart)
        missing = sorted(set(range(max(block.apart) + 1)) - block.apart.keys())
        if missing:
            raise CorruptInput(
                f"{where}: {shown} has experts up to number {max(block.apart)}, and no number {missing[0]}",
                hint="is a file of the model missing?",
            )
        usual = block.apart[0].keys()
        for number, tensors in block.apart.items():
            odd = sorted(usual ^ tensors.keys())
            if odd:
                raise CorruptInput(
                    f"{where}: experts 0 and {number} of {shown} differ in what they have: {listed(odd)}",
                    hint="is a file of the model missing?",
                )
        return
    heights = {source[name].spec.shape[0] for name in block.stacks.values()}
    if len(heights) != 1:
        sizes = {name: list(source[name].spec.shape) for name in block.stacks.values()}
        shown_sizes = ", ".join(f"{escape(name)} is {size}" for name, size in sizes.items())
        raise CorruptInput(f"{where}: stacks of {shown} hold different numbers of experts: {shown_sizes}")
    block.count = heights.pop()


def _check_layers(blocks: Iterable[Block], where: str) -> None:
    """Raise `CorruptInput` for a layer with experts apart in one module and stacked in another."""
    by_layer: dict[str, Block] = {}
    for block in blocks:
        other = by_layer.setdefault(block.layer, block)
        if bool(other.apart) != bool(block.apart):
            apart, stacks = sorted((other, block), key=lambda each: bool(each.stacks))
            raise CorruptInput(
                f"{where}: {escape(block.layer.rstrip('.'))} has experts apart in {escape(apart.name)} and stacked in "
                f"{escape(stacks.name)}",
                hint="of which model is which? leave one of them out with weightops shard --drop",
            )


def _note_router(source: Checkpoint, block: Block, name: str) -> None:
    rest, shape = name.removeprefix(block.prefix), source[name].spec.shape
    if rest in _numbers_of(block) or not _ROUTED.fullmatch(rest):
        return
    axis = next((axis for axis, size in enumerate(shape) if size == block.count), None)
    if axis is None:
        raise CorruptInput(
            f"{escape(source.name)}: {escape(name)} is {list(shape)}: no entry for each of {block.count} experts",
            hint="are the router and the experts of one model?",
        )
    block.routed[name] = axis


def _numbers_of(block: Block) -> set[str]:
    return {f"experts.{number}.{rest}" for number, tensors in block.apart.items() for rest in tensors}


def find_family(source: Checkpoint, blocks: Iterable[Block]) -> Family:
    """The family by config.json's model_type, or by names where those are one family's alone; raises `UsageError`."""
    types = [str(part.get("model_type")) for part in parts_of(source.config())]
    known = next((family for kind in reversed(types) for family in FAMILIES if kind in family.model_types), None)
    if known is not None:
        return known
    block = next(iter(blocks))
    fitting = [family for family in FAMILIES if _fits(family, block)]
    if len(fitting) != 1:
        raise UsageError(
            f"{escape(source.name)}: cannot tell how model_type {escape(types[0])[:80]} stacks its experts",
            hint="known are " + ", ".join(kind for family in FAMILIES for kind in family.model_types),
        )
    return fitting[0]


def _fits(family: Family, block: Block) -> bool:
    if not block.apart or family.apart is None:
        return False
    parts = {f"{part}.weight" for part in family.apart.parts.values()}
    return block.name == family.apart.block and parts == block.apart[0].keys() and family.published == "separate"


def parts_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """config.json, and the parts of it that describe a language model."""
    return [config, *(config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict))]


def with_numbers(config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    """config.json in which every spelling that is there says the new number, at every level."""
    edited = {
        key: numbers[key] if key in numbers and isinstance(value, int) else value for key, value in config.items()
    }
    return {
        key: with_numbers(value, numbers) if key in TEXT_CONFIGS and isinstance(value, dict) else value
        for key, value in edited.items()
    }


def stated(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, int]:
    """The numbers that config.json gives under these names, the innermost level last."""
    return {key: part[key] for part in parts_of(config) for key in keys if type(part.get(key)) is int}


def group_count(config: Mapping[str, Any]) -> int:
    """How many groups of experts routers choose among by config.json, 1 where it says nothing of groups."""
    return stated(config, (GROUPS,)).get(GROUPS, 1)


def refuse_odd_counts(source: Checkpoint) -> None:
    """Raise `UsageError` where config.json says the number of experts, and says it as no number.

    Some say several, of experts for text and for images: what becomes of those is not known.
    """
    for part in parts_of(source.config()):
        for key in COUNTS:
            if part.get(key) is not None and type(part[key]) is not int:
                raise UsageError(
                    f"{escape(source.name)}/config.json: {key} is {escape(repr(part[key]))[:80]}, expected one number",
                    hint=f"weightops edit --set {key}=8 writes a number",
                )


def same_count(blocks: Iterable[Block], where: str) -> int:
    """The number of experts of all layers; raises `IncompatibleInputs` if they differ."""
    counts = {block.prefix: block.count for block in blocks}
    found = set(counts.values())
    if len(found) > 1:
        shown = listed([f"{escape(prefix.rstrip('.'))} has {count}" for prefix, count in counts.items()])
        raise IncompatibleInputs(
            f"{where}: layers have different numbers of experts, which no config.json says: {shown}"
        )
    return found.pop()
