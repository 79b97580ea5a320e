"""A decoder-only transformers model that is filled from a checkpoint part by part, and run part by part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.inference.arguments import BlockArguments, beyond_hidden_states
from weightops.inference.names import Part, match, split_experts
from weightops.inference.packed import Engine, PackedWeight, find_packed
from weightops.inference.skeleton import build, find_blocks
from weightops.inference.weights import read_all
from weightops.io.escape import escape
from weightops.io.platform.machine import release_freed
from weightops.layouts.skeleton import place, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WEIGHT = ".weight"


def pick_device(name: str) -> str:
    """The device that is meant; `auto` is a GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {escape(name)}: {str(error).splitlines()[0]}", hint="give auto or cpu") from None
    return name


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model was made for, in tokens; None if its positions have no end."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


class BlockModel:
    """A decoder-only transformers model without weights, filled from a checkpoint part by part.

    A part is one of `blocks`, any module below one, or "", which is all that is outside the blocks: embeddings, final
    norm and head. Parameters that are not loaded are on meta; buffers that transformers computes (`inv_freq`) are
    real from the start. A GPTQ-quantised checkpoint is dequantised as it is read, or after `keep_packed` its linear
    layers give way to kernels' while they are loaded, which multiply with the integers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        control: Control | None = None,
    ) -> None:
        """Read headers and config.json only.

        Raises `SourceMissing` without config.json, `UsageError` for models that are not run here, such as those with
        code of their own, and `IncompatibleInputs` for tensors that the model has and the checkpoint lacks, or the
        other way round, or whose shapes differ.
        """
        self._control = control or Control()
        self.shown = escape(checkpoint.name)
        plain = _dequantized(checkpoint, self._control)
        self.quantized = frozenset(n.removesuffix(_WEIGHT) for n, t in plain.items() if t is not checkpoint.get(n))
        """Names of modules whose weights are computed from others."""
        checkpoint = plain
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        refuse_adapter(checkpoint, "the model")
        refuse_delta(checkpoint, "the model")
        self.config: PretrainedConfig = read_config(checkpoint)
        self.module: PreTrainedModel = build(self.config, self.shown, dtype)
        self.checkpoint = checkpoint = split_experts(self.module, checkpoint)
        self.blocks: list[str] = find_blocks(self.module, self.shown)
        self._parts, self._left_out = match(self.module, checkpoint, self.shown, self._control)
        self.packable: dict[str, PackedWeight] = find_packed(self.module, self._parts) if self.quantized else {}
        """By the names of their parameters, weights that `keep_packed` keeps as integers."""
        self.is_packed = False
        self._linears: dict[str, nn.Linear] = {}
        """Linears whose places kernels have, by name."""
        for name, buffer in list(self.module.named_buffers()):
            if buffer.device.type != "meta":
                place(self.module, name, buffer.to(device))
        self._returns_tuples = False
        self._given: tuple[torch.Size, BlockArguments | None] = (torch.Size(), None)
        """What blocks were given last, for tokens of which shape."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.module.get_input_embeddings().get_parameter("weight").shape[0])

    @property
    def hidden_size(self) -> int:
        """Elements of the hidden state of a token."""
        return int(self.config.get_text_config(decoder=True).hidden_size)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to say about the checkpoint's files."""
        found = (*self.checkpoint.warnings, *self._left_out)
        rest = len(self.quantized) - len(self.packable)
        if not self.is_packed or rest <= 0:
            return found
        left = f"{rest} of {len(self.quantized)} quantised layers are dequantised, because {type(self.module).__name__}"
        return (*found, f"{self.shown}: {left} has no plain linear layers for them")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None if its positions have no end."""
        return max_positions(self.config)

    def parts_of(self, name: str) -> list[Part]:
        """The parameters and persistent buffers below module `name`, or outside the blocks if it is ""."""
        if name:
            return [part for part in self._parts if any(n.startswith(f"{name}.") for n in part.names)]
        inside = self.blocks[0].rpartition(".")[0] + "."
        return [part for part in self._parts if not part.names[0].startswith(inside)]

    def keep_packed(self, keep: bool = True) -> None:
        """Keep quantised weights as integers, or not, from the next `load` on. Nothing may be loaded then."""
        self.is_packed = keep

    def _packed(self, part: Part) -> PackedWeight | None:
        return self.packable.get(part.names[0]) if self.is_packed else None

    def nbytes(self, name: str) -> int:
        """Memory of a part, loaded."""
        return sum((self._packed(part) or part).nbytes for part in self.parts_of(name))

    @property
    def engine(self) -> Engine | None:
        """How layers multiply that are quantised; None if none is."""
        return ("packed" if self.is_packed else "dequantized") if self.quantized else None

    @property
    def loading_nbytes(self) -> int:
        """Memory that loading takes beside that, at most: packed tensors as they are stored are rearranged."""
        return 2 * max((weight.nbytes for weight in self.packable.values()), default=0) if self.is_packed else 0

    def tensor_names(self, name: str) -> dict[str, str]:
        """Name in the module -> name in the checkpoint, of what lies below module `name` (or outside the blocks).

        Checkpoints may lack the model's first name ("transformer." of BLOOM); a tied head has its embedding's name.
        """
        return {n: part.source for part in self.parts_of(name) for n in part.names}

    def load(self, name: str) -> None:
        """Fill every parameter and persistent buffer below module `name`; "" is what is outside the blocks."""
        parts = [part for part in self.parts_of(name) if self._packed(part) is None]
        tensors = read_all([(part.tensor, part.dtype) for part in parts], self.device, self._control)
        for part, tensor in zip(parts, tensors, strict=True):
            self._place(part, tensor)
        # After their biases.
        for weight in filter(None, map(self._packed, self.parts_of(name))):
            linear = self.module.get_submodule(weight.module)
            assert isinstance(linear, nn.Linear)
            kernel = weight.load(linear, self.dtype, self.device, self._control)
            self._linears[weight.module] = linear
            self.module.set_submodule(weight.module, kernel)
        if self.is_packed:
            release_freed()

    def unload(self, name: str) -> None:
        """Give the memory of `load` back."""
        for weight in filter(None, map(self._packed, self.parts_of(name))):
            linear = self._linears.pop(weight.module, None)
            if linear is not None:
                self.module.set_submodule(weight.module, linear)
        for part in self.parts_of(name):
            self._place(part, torch.empty(part.tensor.spec.shape, dtype=part.dtype, device="meta"))

    def _place(self, part: Part, tensor: torch.Tensor, *, requires_grad: bool = False) -> None:
        placed = tensor if part.is_buffer else nn.Parameter(tensor, requires_grad)
        for name in part.names:
            place(self.module, name, placed)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """These parts are loaded for the length of a `with` block."""
        try:
            for name in names:
                self.load(name)
            yield
        finally:
            for name in names:
                self.unload(name)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """What enters block 0 for `tokens` `[B, T]`: hidden states `[B, T, hidden]`, and the blocks' other arguments.

        These (position embeddings, mask, alibi) are what the model's own forward gives its blocks, whatever the
        architecture; for `run` they serve for other tokens too, if `B` and `T` are the same. Needs `load("")`. Raises
        `UsageError` for a model whose blocks are not run apart, or are given other arguments for other tokens.
        """
        hidden, given = self._entering(tokens.to(self.device))
        shape, before = self._given
        if shape == tokens.shape and before is not None and not before.equals(given):
            raise UsageError(
                f"{self.shown}: {type(self.module).__name__} gives its blocks more of the tokens than their hidden "
                "states, so it is not run block by block"
            )
        self._given = (tokens.shape, given)
        return hidden, given

    def refuse_joined_blocks(self) -> None:
        """Raise `UsageError` for a model whose blocks are not run apart, before weights are read.

        Its forward says so with zeros for weights, which take no memory. Nothing may be loaded yet.
        """
        tokens = torch.zeros((1, 3), dtype=torch.int64, device=self.device)
        for part in self.parts_of(""):
            zeros = torch.zeros((), dtype=part.dtype, device=self.device).expand(part.tensor.spec.shape)
            self._place(part, zeros, requires_grad=zeros.is_floating_point())
        with torch.enable_grad():
            hidden, given = self._entering(tokens)
        self.unload("")
        name = beyond_hidden_states(given.of_blocks, tokens)
        if hidden.ndim != 3 or name is not None:
            what = f"gives its blocks {name}" if name else f"has hidden states of {hidden.ndim - 1} dimensions a token"
            raise UsageError(
                f"{self.shown}: {type(self.module).__name__} {what}, so it is not run block by block",
                hint="`weightops generate` runs it whole",
            )

    def _entering(self, tokens: torch.Tensor) -> tuple[torch.Tensor, BlockArguments]:
        found = self._caught(tokens)
        if found is None:
            # The model took the first of what a block returned, which was a tensor: so it expects a tuple.
            self._returns_tuples = True
            found = self._caught(tokens)
        assert found is not None
        return found

    def _caught(self, tokens: torch.Tensor) -> tuple[torch.Tensor, BlockArguments] | None:
        entered: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def block(i: int, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
            if entered and hidden is not entered[0]:
                raise _OtherHidden
            entered.append(hidden)
            arguments.append(given)
            if i == len(self.blocks) - 1:
                raise _AllCaught
            return hidden

        with self._standing_in(block):
            try:
                self.module(tokens, use_cache=False)
            except _AllCaught:
                return entered[0], BlockArguments(arguments)
            except _OtherHidden:
                return None
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                # Whatever stands between blocks there: not a matter of this checkpoint, and not foreseen.
                reason = escape(str(error).splitlines()[0]) if str(error) else type(error).__name__
                raise UsageError(
                    f"{self.shown}: {type(self.module).__name__} is not run block by block: {reason}"
                ) from error
        raise AssertionError("the model has not run its blocks")

    @torch.no_grad()
    def run(self, i: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Block `i` alone, which must be loaded: hidden states `[B, T, hidden]` to such; `kwargs` are from `embed`."""
        given = kwargs.of_blocks[i] if isinstance(kwargs, BlockArguments) else kwargs
        result = self.module.get_submodule(self.blocks[i])(hidden.to(self.device), **given)
        self._returns_tuples = isinstance(result, tuple | list)  # GPT-1 gives a list
        return result[0] if self._returns_tuples else result  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head: what leaves the last block, `[B, T, hidden]`, to logits `[B, T, vocab]`.

        It is the model's own forward with blocks that let `hidden` pass. Needs `load("")`.
        """
        hidden = hidden.to(self.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)

        def block(i: int, _: torch.Tensor, __: dict[str, Any]) -> torch.Tensor:
            return hidden

        with self._standing_in(block):
            try:
                logits: torch.Tensor = self.module(tokens, use_cache=False).logits
            except IndexError:
                if self._returns_tuples:
                    raise
                self._returns_tuples = True  # as in `embed`: the first of a tensor has a dimension less
                return self.logits(hidden)
        return logits

    @contextmanager
    def _standing_in(self, block: Callable[[int, torch.Tensor, dict[str, Any]], torch.Tensor]) -> Iterator[None]:
        """For the length of a `with` block `block` is called for each of the model's."""
        modules = [self.module.get_submodule(name) for name in self.blocks]

        def forward(i: int, names: list[str]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                result = block(i, given.pop(names[0]), given)
                return (result,) if self._returns_tuples else result

            return call

        try:
            for i, module in enumerate(modules):
                module.forward = forward(i, list(inspect.signature(module.forward).parameters))
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)


def _dequantized(checkpoint: Checkpoint, control: Control) -> Checkpoint:
    """The plain model that a quantised one stands for, each weight in its native type; a plain one itself."""
    # Imported here because most checkpoints are not quantised.
    from weightops.engine.values import values
    from weightops.operations.dequantize import plain_if_quantised

    return plain_if_quantised(checkpoint, lambda tensors: values(tensors, control))


class _AllCaught(Exception):
    """All blocks were called."""


class _OtherHidden(Exception):
    """A block was given something else than the one before it returned."""
