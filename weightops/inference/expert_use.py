"""How the experts of a mixture are used on a text: how often each is chosen, and REAP's score of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightops.errors import UsageError
from weightops.inference.linears import Experts, mixtures
from weightops.inference.model import BlockModel
from weightops.layouts.experts import group_count
from weightops.operations.experts import ExpertUse, LayerUse

_ARGUMENTS = 3
"""What experts are given: hidden states `[T, H]`, and of each token the experts and what they count `[T, k]`."""


class ExpertUses:
    """Frequency and REAP's score (arXiv 2510.13999) of all experts, while a model is run.

    All families of transformers call their experts with the states, the experts of each token and the router's weights
    as they count, so that is where it is measured. What an expert gives is seen as it is computed where experts are
    linear layers (`Experts`), which costs only its length. Others are asked once more, one expert at a time, which
    doubles the arithmetic of experts.
    """

    def __init__(self, model: BlockModel, windows: Tensor) -> None:
        """`windows` `[n, seq_len]` are the tokens that the model will be run on.

        Raises `UsageError` for a model without experts, and for experts that are not given what each token takes.
        """
        self._model, self._windows = model, windows
        found = {i: _mixture(model, name) for i, name in enumerate(model.blocks)}
        self._sums = {i: _Sums(*mixture) for i, mixture in found.items() if mixture is not None}
        if not self._sums:
            raise UsageError(
                f"{model.shown}: {type(model.module).__name__} has no experts of a form that is known here",
                hint="leave out --experts",
            )

    @contextmanager
    def around(self, i: int) -> Iterator[None]:
        """Measure block `i`, which is loaded, for the length of a `with` block."""
        with ExitStack() as stack:
            sums = self._sums.get(i)
            if sums is not None:
                stack.enter_context(_watched(self._model.module.get_submodule(sums.name), sums))
            yield

    def use(self) -> ExpertUse:
        """What was measured, when all blocks have been run over all windows."""
        tokens = self._windows.numel()
        layers = {
            self._model.blocks[i].rpartition(".")[2]: LayerUse(
                frequency=tuple((sums.counts.double() / tokens).tolist()),
                reap=tuple((sums.weighted / sums.counts.clamp(min=1)).tolist()),
            )
            for i, sums in self._sums.items()
        }
        return ExpertUse(
            model=self._model.checkpoint.name,
            tokens=tokens,
            seq_len=self._windows.shape[1],
            groups=group_count(self._model.checkpoint.config()),
            layers=layers,
        )


@dataclass
class _Sums:
    """Of the mixture of that name: tokens that came to each of `count` experts, and the sums of g(x) * ||f(x)||."""

    name: str
    count: int

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.count, dtype=torch.int64)
        self.weighted = torch.zeros(self.count, dtype=torch.float64)

    def routed(self, chosen: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each expert the tokens that come to it, in their order, and what it counts for them."""
        flat = chosen.reshape(-1)
        counts = torch.bincount(flat, minlength=self.count)[: self.count]
        self.counts += counts.cpu()
        # An index beyond the experts stands for none.
        order = flat.argsort(stable=True)[: int(counts.sum())]
        sizes = counts.tolist()
        tokens = torch.split(order // chosen.shape[1], sizes)
        return list(zip(tokens, torch.split(weights.reshape(-1)[order].float(), sizes), strict=True))

    def add(self, expert: int, weights: Tensor, output: Tensor) -> None:
        """What an expert gives `[n, H]` to tokens for which it counts `weights` `[n]`."""
        lengths = output.float().norm(dim=-1)
        self.weighted[expert] += float((weights * lengths).sum(dtype=torch.float64))


def _mixture(model: BlockModel, block: str) -> tuple[str, int] | None:
    """Name and number of the experts of a block, if it has any."""
    found = mixtures(model.module.get_submodule(block))
    known = {f"{block}.{name}": n for name, n in found.items() if name.rpartition(".")[2] == "experts"}
    if not known:
        return None
    ((name, count), *others) = known.items()
    module = model.module.get_submodule(name)
    shown = f"{model.shown}: {type(model.module).__name__}"
    if others:
        raise UsageError(f"{shown} has two mixtures in a block, whose use is not measured", hint="leave out --experts")
    if len(inspect.signature(module.forward).parameters) != _ARGUMENTS:
        raise UsageError(
            f"{shown} does not tell its experts ({type(module).__name__}) which tokens take them, so their use is not "
            "measured",
            hint="leave out --experts",
        )
    return name, count


@contextmanager
def _watched(module: nn.Module, sums: _Sums) -> Iterator[None]:
    """For the length of a `with` block the use of a mixture's experts is added up."""
    signature = inspect.signature(module.forward)
    routed: list[tuple[Tensor, Tensor]] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = signature.bind(*args, **kwargs).arguments.values()
        routed[:] = sums.routed(chosen, weights)
        if not isinstance(module, Experts):
            for i, (tokens, counting) in enumerate(routed):
                if len(tokens):
                    alone = torch.full((len(tokens), 1), i, device=chosen.device, dtype=chosen.dtype)
                    # Not called as a module, so that no hook sees it.
                    sums.add(i, counting, module.forward(hidden[tokens], alone, weights.new_ones(alone.shape)))

    def output_of(i: int) -> Any:
        return lambda _, __, output: sums.add(i, routed[i][1], output)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        if isinstance(module, Experts):
            for i in range(len(module)):
                down = module.get_submodule(f"{i}.down_proj")
                stack.callback(down.register_forward_hook(output_of(i)).remove)
        yield
