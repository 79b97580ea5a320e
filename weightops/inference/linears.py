"""Every matrix of a model as an `nn.Linear` of its own, under the name that checkpoints have for it.

transformers 5 keeps the experts of a mixture as two stacked parameters, and GPT-2's layers as `Conv1D`. Quantising,
loading and measuring are about linear layers, so a model that was just made gets them: with the results of
transformers' own modules, and without weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from weightops.io.escape import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layers = dict[str, tuple[str, ...]]
_GATED: Layers = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PLAIN: Layers = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""The stacked parameters of experts -> the layers of one expert, whose rows stand one after another in them."""
_ODD = {"has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
"""What transformers' experts say of themselves -> what it has to be for them to be taken apart."""
_ROUTER = re.compile(r"(^|[._])(gate|router)(\.|$)")
_LEAST = 32
"""Fewer rows or columns are not quantised: the format packs 32 of either."""


class Linear(nn.Linear):
    """A Linear on meta, without a bias or with one, whose weights nobody has drawn."""

    def __init__(self, columns: int, rows: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(columns, rows, bias=bias, device="meta", dtype=dtype)
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """There is nothing to draw: a mixture has tens of thousands of these."""


class TransposedLinear(Linear):
    """A Linear whose weight checkpoints keep as `[in, out]`: transformers' `Conv1D`."""


class Experts(nn.ModuleList):
    """The experts of a mixture, each with Linears named `gate_proj`, `up_proj` and `down_proj`.

    Takes the place of transformers' modules of stacked parameters (`integrations/moe.py`) and computes what they do,
    in the order of `grouped_mm_experts_forward`: all experts' gates and ups, then all downs, then the weighted sum of
    each token's. An expert that no token came to is not called. `stacked` names the parameters that it stands for,
    with the layers that each holds of an expert.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.stacked = _layers_of(module)
        self._inner = next(iter(self.stacked.values()))
        # The module's own, which may clamp; it keeps no parameter.
        self._activate = module._apply_gate if "gate_up_proj" in self.stacked else lambda inner: module.act_fn(inner)
        for parameter, layers in self.stacked.items():
            weight = module.get_parameter(parameter)
            count, rows, columns = weight.shape
            self.extend(nn.ModuleDict() for _ in range(count - len(self)))
            for i in range(count):
                for layer in layers:
                    self._of(i)[layer] = Linear(columns, rows // len(layers), bias=False, dtype=weight.dtype)
        for parameter in self.stacked:
            del module._parameters[parameter]

    def _of(self, i: int) -> nn.ModuleDict:
        expert = self[i]
        assert isinstance(expert, nn.ModuleDict)
        return expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states `[T, H]`, and of each token the experts and what they count `[T, k]`, to such states.

        An index beyond the experts stands for none.
        """
        tokens, chosen = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=len(self))[: len(self)].tolist()
        order = order[: sum(counts)]
        called = [(self._of(i), count) for i, count in enumerate(counts) if count]
        if not called:
            return torch.zeros_like(hidden_states)
        sizes = [count for _, count in called]
        inputs = torch.split(hidden_states[order // chosen], sizes)
        inner = [_joined(expert, self._inner, states) for (expert, _), states in zip(called, inputs, strict=True)]
        activated = torch.split(self._activate(torch.cat(inner)), sizes)
        outputs = [expert["down_proj"](states) for (expert, _), states in zip(called, activated, strict=True)]
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1, 1)[order]
        result = weighted.new_zeros((tokens * chosen, weighted.shape[-1]))
        result[order] = weighted
        return result.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def _joined(expert: nn.ModuleDict, layers: Sequence[str], states: Tensor) -> Tensor:
    """What several layers give of the same tensor, side by side: as they are given one, they have one Hessian."""
    return torch.cat([expert[layer](states) for layer in layers], -1)


def make_linears(model: nn.Module) -> None:
    """Put `Experts` and `TransposedLinear`s in the places of the modules of a model that hold their like."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            like, (columns, rows) = module.weight.dtype, module.weight.shape
            _replace(model, name, TransposedLinear(columns, rows, bias=True, dtype=like))
        elif _layers_of(module):
            _replace(model, name, Experts(module))


def routers(model: nn.Module) -> frozenset[str]:
    """The names of the modules that choose among experts, or say what a shared one counts.

    They are small, and what they choose is not mended by later layers, so nobody quantises them.
    """
    found = set()
    for name, count in mixtures(model).items():
        owner = name.rpartition(".")[0]
        found |= {
            f"{owner}.{inner}" if owner else inner
            for inner, other in model.get_submodule(owner).named_modules()
            if _ROUTER.search(inner) and any(p.shape[0] in (1, count) for p in _matrices(other).values())
        }
    return frozenset(found)


def mixtures(model: nn.Module) -> dict[str, int]:
    """The names of the modules that hold experts, with the number of these."""
    counts = {name: _count(name, module) for name, module in model.named_modules()}
    return {name: count for name, count in counts.items() if count}


def left_as_they_are(model: PreTrainedModel, blocks: Sequence[str], shown: str) -> tuple[str, ...]:
    """A warning if blocks hold matrices that are no linear layers, nor known to stand for some, nor routers.

    These are not quantised: experts of a form that is not known here, and whatever else is multiplied with.
    """
    known, left, total = routers(model), dict[str, Tensor](), 0
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            total += sum(p.numel() for p in module.parameters(recurse=False))
            if name not in known and not isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
                large = {n: p for n, p in _matrices(module).items() if "bias" not in n and min(p.shape[-2:]) >= _LEAST}
                left |= {f"{name}.{leaf}": p for leaf, p in large.items()}
    if not left:
        return ()
    first, parameter = next(iter(left.items()))
    share = sum(p.numel() for p in left.values()) / total
    owner = type(model.get_submodule(first.rpartition(".")[0])).__name__
    return (
        f"{shown}: {len(left)} tensors, {share:.0%} of the weights of its blocks, stay as they are, because they are "
        f"no linear layers in transformers; the first is {escape(first)} {list(parameter.shape)} of {owner}",
    )


def expert_weights(model: nn.Module) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Name of a stacked parameter that files may hold -> its shape, and the weights that stand in it, in their order.

    These are names of the model, also of what is no parameter of it any more.
    """
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    for name, experts in model.named_modules():
        if isinstance(experts, Experts):
            for parameter, layers in experts.stacked.items():
                first = experts.get_parameter(f"0.{layers[0]}.weight")
                shape = (len(experts), first.shape[0] * len(layers), first.shape[1])
                weights = [f"{name}.{i}.{layer}.weight" for i in range(len(experts)) for layer in layers]
                found[f"{name}.{parameter}"] = (shape, weights)
    return found


def _layers_of(module: nn.Module) -> Layers:
    """The stacked parameters of experts that can be taken apart, with the layers in each; none of anything else."""
    own = dict(module.named_parameters())
    has_gate = bool(getattr(module, "has_gate", True))
    known = _GATED if has_gate else _PLAIN
    if (
        own.keys() != known.keys()
        or not hasattr(module, "_apply_gate" if has_gate else "act_fn")
        or any(getattr(module, name, value) is not value for name, value in _ODD.items())
        or any(True for _ in module.buffers())
    ):
        return {}
    # [experts, inner, hidden], or with gates twice as many rows; and [experts, hidden, inner].
    up, down = (tuple(own[name].shape) for name in known)
    fits = len(down) == 3 and up == (down[0], down[2] * len(known[next(iter(known))]), down[1])
    return known if fits else {}


def _count(name: str, module: nn.Module) -> int:
    """How many experts a module holds, 0 if it is of another kind."""
    if isinstance(module, nn.ModuleList):
        return len(module) if isinstance(module, Experts) or name.rpartition(".")[2] == "experts" else 0
    if isinstance(module, _ConvNd):
        return 0
    return next((p.shape[0] for p in _matrices(module).values() if p.ndim == 3), 0)


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.ndim >= 2}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    module.train(False)
    setattr(model.get_submodule(owner), leaf, module)
