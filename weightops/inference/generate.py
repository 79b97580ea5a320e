"""Text from a model, token by token: the whole model in memory, or layer by layer from disk for every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.proof import hold, unproven
from weightops.errors import NoRoom, UsageError
from weightops.inference.finite import check_finite
from weightops.inference.forwards import forwards
from weightops.inference.model import BlockModel
from weightops.inference.packed import Engine, are_faster, refuse_unquantized
from weightops.inference.pieces import pieces
from weightops.inference.sampling import Sampling
from weightops.inference.tokens import check_tokens, encode_prompt, end_tokens, load_tokenizer
from weightops.io.platform.machine import available_memory
from weightops.io.strict_json import as_json

Finish = Literal["eos", "length"]
DEFAULT_NEW_TOKENS = 128
_WORKING_NBYTES = 64 << 20
"""What a block's activations may take."""


class GenerateDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-generate/1"):
    """What `generate --json` prints: the new text and its tokens, and why it ended: "eos", or "length".

    `prompt_tokens` counts those of the prompt. `engine` is there for a quantised model. See `Generation`.
    """

    text: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    warnings: tuple[str, ...]
    finish: Finish | None
    streams_weights: bool
    engine: Engine | msgspec.UnsetType = msgspec.UNSET
    elapsed_s: float
    tokens_per_s: float


class Generation:
    """A text that is being generated: iterate over it for its pieces, as they come.

    `streams_weights` says that the model does not fit into memory, so that all of its blocks are read for every
    token; `saves_memory` that the weights of a quantised one stay packed because dequantised they would not fit. Once
    the iteration is over `tokens` are the new tokens, and `finish` says why it ended: "eos", or "length".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        chat: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        engine: Engine = "auto",
        max_nbytes: int | None = None,
        control: Control | None = None,
    ) -> None:
        """Check all that can be known from headers, config and tokenizer; no weights are read.

        `max_new_tokens` is 128 by default, or as many as there are positions left. Raises `SourceMissing` without
        config or tokenizer, `UsageError` for prompts that are empty or too long, `NoRoom` where not even one block
        fits into `max_nbytes` more than the process has now (by default what memory there is).
        """
        self._control = control or Control()
        self._checkpoint = checkpoint
        self._model = BlockModel(checkpoint, dtype=dtype, device=device, control=self._control)
        self._tokenizer = load_tokenizer(checkpoint)
        self._sampling = sampling or Sampling()
        self._prompt = encode_prompt(self._tokenizer, prompt, chat=chat, shown=self._model.shown)
        check_tokens(self._prompt, self._tokenizer, self._model.vocab_size, self._model.shown)
        self._max_new_tokens = self._room(max_new_tokens)
        self._end = end_tokens(checkpoint, self._tokenizer, chat=chat)
        refuse_unquantized(engine, [self._model.shown], is_any=bool(self._model.packable))
        room = max_nbytes if max_nbytes is not None else _room_on(device)
        self.dequantized_nbytes = _whole_nbytes(self._model)
        """Bytes of the whole model in memory, if it is dequantised."""
        is_faster = are_faster(list(self._model.packable.values()), dtype, device)
        fits = self.dequantized_nbytes + self._beside_nbytes <= room
        self.saves_memory = engine == "auto" and bool(self._model.packable) and not is_faster and not fits
        if engine == "packed" or (engine == "auto" and is_faster) or self.saves_memory:
            self._model.keep_packed()
        self._whole_nbytes = _whole_nbytes(self._model)
        self.streams_weights = self._check_memory(room)
        self.warnings = (*self._model.warnings, *unproven(checkpoint.values()))
        self.tokens: list[int] = []
        self.finish: Finish | None = None

    @property
    def prompt_tokens(self) -> list[int]:
        """The tokens of the prompt."""
        return [int(token) for token in self._prompt]

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole model in memory."""
        return self._whole_nbytes

    @property
    def engine(self) -> Engine | None:
        """How layers multiply that are quantised; None if none is."""
        return self._model.engine

    def to_json(self, text: str, elapsed_s: float) -> dict[str, Any]:
        """A document of schema `weightops-generate/1` on a text that has come, in so much time."""
        return as_json(
            GenerateDocument(
                text=text,
                prompt_tokens=len(self.prompt_tokens),
                tokens=tuple(self.tokens),
                warnings=tuple(self.warnings),
                finish=self.finish,
                streams_weights=self.streams_weights,
                engine=self.engine or msgspec.UNSET,
                elapsed_s=round(elapsed_s, 3),
                tokens_per_s=round(len(self.tokens) / elapsed_s, 3),
            )
        )

    def _room(self, max_new_tokens: int | None) -> int:
        length, limit = len(self._prompt), self._model.max_positions
        if limit is not None and length + (max_new_tokens or 1) > limit:
            wanted = f" and {max_new_tokens} new ones" if max_new_tokens else ""
            raise UsageError(
                f"{self._model.shown}: was made for {limit} positions, the prompt has {length} tokens{wanted}",
                hint="give a shorter --prompt" + (" or fewer --max-new-tokens" if max_new_tokens else ""),
            )
        if max_new_tokens is not None:
            return max_new_tokens
        return DEFAULT_NEW_TOKENS if limit is None else min(DEFAULT_NEW_TOKENS, limit - length)

    @property
    def _beside_nbytes(self) -> int:
        """Memory beside weights."""
        model = self._model
        cache = _cache_nbytes(model, len(self._prompt) + self._max_new_tokens)
        return cache + _WORKING_NBYTES + model.loading_nbytes

    def _check_memory(self, room: int) -> bool:
        """Whether weights have to be read for every token; raises `NoRoom` where that does not suffice either."""
        model, beside = self._model, self._beside_nbytes
        least = model.nbytes("") + max(map(model.nbytes, model.blocks)) + beside
        if least > room:
            smaller = "--engine packed" if model.packable and not model.is_packed else "--dtype bfloat16"
            raise NoRoom(
                f"{model.shown}: one block with embedding, head and cache takes {least / 1e9:.2f} GB as "
                f"{str(model.dtype).removeprefix('torch.')}, {room / 1e9:.2f} GB may be used beside the program itself",
                hint=f"give a larger --max-memory, {smaller}, or fewer --max-new-tokens",
            )
        return self._whole_nbytes + beside > room

    def __iter__(self) -> Iterator[str]:
        return pieces(self._tokenizer, self.prompt_tokens, self._generate())

    @torch.no_grad()
    def _generate(self) -> Iterator[int]:
        self.tokens, self.finish = [], None
        draw = torch.Generator().manual_seed(self._sampling.seed)
        with ExitStack() as stack:
            stack.enter_context(self._control.stores.connected())
            if self.streams_weights:
                stack.enter_context(self._model.loaded(""))
                for name in self._model.blocks:
                    _load_on_call(stack, self._model, name)
            else:
                self._load_all(stack)
            # Weights that are wrong write no word. Those that are read again for each token are proven once.
            hold(self._checkpoint.values(), self._control)
            text = self._prompt[None].to(self._model.device)  # [1, T]
            steps = forwards(self._model.module, text, self._max_new_tokens)
            token = None
            while len(self.tokens) < self._max_new_tokens:
                self._control.check()
                logits = steps.send(token)
                check_finite(self._model, logits[None], f"after {len(self.tokens)} new tokens its logits hold")
                token = self._sampling.choose(logits, draw)
                self.tokens.append(token)
                yield token
                if token in self._end:
                    self.finish = "eos"
                    return
            self.finish = "length"

    def _load_all(self, stack: ExitStack) -> None:
        progress = self._control.progress
        progress.start("loading", self._whole_nbytes)
        for name in ("", *self._model.blocks):
            stack.callback(self._model.unload, name)
            self._model.load(name)
            progress.advance(self._model.nbytes(name))
        progress.stop()


def _load_on_call(stack: ExitStack, model: BlockModel, name: str) -> None:
    """For as long as `stack` is open, block `name` is in memory while it runs, and not longer."""

    def before(*_: object) -> None:
        model.load(name)

    def after(_: nn.Module, __: object, ___: object) -> None:
        model.unload(name)

    block = model.module.get_submodule(name)
    stack.callback(model.unload, name)
    stack.callback(block.register_forward_pre_hook(before).remove)
    stack.callback(block.register_forward_hook(after).remove)


def _whole_nbytes(model: BlockModel) -> int:
    return sum(model.nbytes(name) for name in ("", *model.blocks))


def _room_on(device: str) -> int:
    if device == "cpu":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def _cache_nbytes(model: BlockModel, tokens: int) -> int:
    """What keys and values of so many tokens take, of a model that keeps those of all tokens in all blocks.

    Layers may differ in their heads (Gemma 4), or have none (Mamba, whose states are small).
    """
    config: Any = model.config.get_text_config(decoder=True)
    layers = getattr(config, "per_layer_config", None) or [config] * len(model.blocks)
    return 2 * sum(map(_cached_width, layers)) * tokens * model.dtype.itemsize


def _cached_width(layer: Any) -> int:
    """Elements of the keys of a token in one layer."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return int(kv_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads))
