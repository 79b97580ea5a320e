"""A text as windows of tokens, and a model run over all of them, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from weightops.engine.control import Control
from weightops.inference.finite import check_finite
from weightops.inference.model import BlockModel
from weightops.inference.states import hidden_states
from weightops.io.platform.machine import available_memory

_BATCH_TOKENS = 2048
"""Short windows are run together up to so many tokens: below that, a block's matrices cost more than its arithmetic."""

AroundBlock = Callable[[int], AbstractContextManager[Callable[[int], None] | None]]
"""Called with a block's number, when it is loaded: a `with` block around it, which may give a function to be called
with the number of tokens that are about to be run."""


def together(around: Sequence[AroundBlock]) -> AroundBlock | None:
    """Several of these as one, the first outermost; None if there are none."""

    @contextmanager
    def all_of(i: int) -> Iterator[Callable[[int], None] | None]:
        with ExitStack() as stack:
            watches = [stack.enter_context(each(i)) for each in around]

            def watch(tokens: int) -> None:
                for each in watches:
                    if each is not None:
                        each(tokens)

            yield watch

    return all_of if around else None


def cut(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Non-overlapping windows `[windows, seq_len]` of tokens `[n]`; what is left at the end is dropped."""
    windows = len(tokens) // seq_len
    return tokens[: windows * seq_len].view(windows, seq_len)


@contextmanager
def final_states(
    model: BlockModel,
    windows: torch.Tensor,
    *,
    control: Control,
    max_nbytes: int | None = None,
    around: AroundBlock | None = None,
) -> Iterator[torch.Tensor]:
    """What leaves the last block for all windows, `[windows, tokens, hidden]`, for the length of a `with` block.

    Each block is loaded once, and runs over all windows, in place. Progress is counted in bytes of weights: those of a
    block are done when it has seen all windows. Raises `CorruptInput` naming the first block that gives NaN or
    infinity.
    """
    shape = (*windows.shape, model.hidden_size)
    parts = max(model.nbytes(name) for name in ("", *model.blocks)) + model.loading_nbytes
    states_nbytes = windows.numel() * model.hidden_size * model.dtype.itemsize
    in_memory = states_nbytes + parts <= (available_memory() if max_nbytes is None else max_nbytes)
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    starts = range(0, len(windows), batch)
    with hidden_states(shape, model.dtype, in_memory=in_memory) as states:
        arguments: dict[int, dict[str, Any]] = {}
        with model.loaded(""):
            for start in starts:
                control.check()
                chosen = windows[start : start + batch]
                hidden, given = model.embed(chosen)
                arguments.setdefault(len(chosen), given)
                states[start : start + batch].copy_(hidden)
        check_finite(model, states, "the embedding gives")
        control.progress.advance(model.nbytes(""))
        for i, name in enumerate(model.blocks):
            left = nbytes = model.nbytes(name)
            with model.loaded(name), around(i) if around else nullcontext() as watch:
                for start in starts:
                    control.check()
                    chosen_states = states[start : start + batch]
                    if watch is not None:
                        watch(chosen_states.shape[0] * chosen_states.shape[1])
                    chosen_states.copy_(model.run(i, chosen_states, arguments[len(chosen_states)]))
                    done = nbytes * len(chosen_states) // len(windows)
                    control.progress.advance(done)
                    left -= done
                    check_finite(model, chosen_states, f"{name} gives")
            control.progress.advance(left)
        yield states
