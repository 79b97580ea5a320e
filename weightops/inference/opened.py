"""A model that is opened: its headers, config and tokenizer are read and checked, its weights are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.proof import unproven
from weightops.errors import NoRoom, PromptTooLong, UsageError
from weightops.inference.model import BlockModel
from weightops.inference.packed import Engine, are_faster, refuse_unquantized
from weightops.inference.settings import DEFAULT_NEW_TOKENS
from weightops.inference.tokens import check_tokens, encode_prompt, end_tokens, load_tokenizer, token_bytes
from weightops.io.platform.machine import available_memory

_WORKING_NBYTES = 64 << 20
"""What a block's activations may take."""


@dataclass(frozen=True)
class Placement:
    """How the weights of a model are held: `nbytes` of them in memory at a time.

    `is_packed` says that those of a quantised model stay integers, `saves_memory` that they do because dequantised they
    would not fit; `streams_weights` that blocks are read from disk whenever they are needed.
    """

    is_packed: bool
    saves_memory: bool
    streams_weights: bool
    nbytes: int


class Opened:
    """A decoder-only model with its tokenizer, checked as far as it can be without reading weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        engine: Engine = "auto",
        control: Control | None = None,
    ) -> None:
        """Raises `SourceMissing` without config or tokenizer, and what `BlockModel` raises."""
        self.control = control or Control()
        self.checkpoint = checkpoint
        self.model = BlockModel(checkpoint, dtype=dtype, device=device, control=self.control)
        self.shown = self.model.shown
        self.tokenizer = load_tokenizer(checkpoint)
        refuse_unquantized(engine, [self.shown], is_any=bool(self.model.packable))
        self.engine = engine
        """What was asked for; see `Engine`."""
        self._is_faster = are_faster(list(self.model.packable.values()), dtype, device)
        self.dequantized_nbytes = self._sizes(is_packed=False)[0]
        """Bytes of the whole model in memory, if it is dequantised."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to say about the checkpoint's files."""
        return (*self.model.warnings, *unproven(self.checkpoint.values()))

    def ends(self, *, chat: bool = False) -> frozenset[int]:
        """Tokens that end a text, or a turn of a chat."""
        return end_tokens(self.checkpoint, self.tokenizer, chat=chat)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a text; raises `UsageError` for one that is no text, and what `checked` raises."""
        return self.checked(encode_prompt(self.tokenizer, prompt))

    def checked(self, tokens: Sequence[int] | torch.Tensor) -> list[int]:
        """Tokens as a list; raises `UsageError` for none, `IncompatibleInputs` for one without a row to embed it."""
        found = torch.as_tensor(tokens, dtype=torch.int64)
        if not len(found):
            raise UsageError(
                "the prompt is empty, and the tokenizer begins with no special token", hint="give --prompt"
            )
        if int(found.min()) < 0:
            raise UsageError(f"{int(found.min())} is the number of no token")
        check_tokens(found, self.tokenizer, self.model.vocab_size, self.shown)
        return [int(token) for token in found]

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text as bytes, which may be a part of a character; see `tokens.token_bytes`."""
        return token_bytes(self.tokenizer, token)

    def max_new_tokens(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens may follow a prompt; raises `PromptTooLong`, with both numbers."""
        length, limit = len(prompt), self.model.max_positions
        if limit is not None and length + (wanted or 1) > limit:
            new = f" and {wanted} new ones" if wanted else ""
            raise PromptTooLong(
                f"{self.shown}: was made for {limit} positions, the prompt has {length} tokens{new}",
                hint="give a shorter --prompt" + (" or fewer --max-new-tokens" if wanted else ""),
            )
        if wanted is not None:
            return wanted
        return DEFAULT_NEW_TOKENS if limit is None else min(DEFAULT_NEW_TOKENS, limit - length)

    def text_of(self, token: int) -> str:
        """What one token is by itself; a part of a character is a replacement character."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def beside_nbytes(self, tokens: int, beams: int = 1) -> int:
        """Memory that a text of so many tokens takes beside weights: keys, values and activations."""
        return _cache_nbytes(self.model, tokens) * beams + _WORKING_NBYTES

    def placement(self, room: int, tokens: int, beams: int = 1) -> Placement:
        """How weights are held where `room` bytes may be taken for them and a text of so many tokens.

        Raises `NoRoom` where not even one block at a time fits.
        """
        model, beside = self.model, self.beside_nbytes(tokens, beams)
        fits = self.dequantized_nbytes + beside <= room
        saves_memory = self.engine == "auto" and bool(model.packable) and not self._is_faster and not fits
        is_packed = self.engine == "packed" or (self.engine == "auto" and self._is_faster) or saves_memory
        whole, block, loading = self._sizes(is_packed)
        if block + beside + loading > room:
            smaller = "--engine packed" if model.packable and not is_packed else "--dtype bfloat16"
            raise NoRoom(
                f"{self.shown}: one block with embedding, head and cache takes {(block + beside + loading) / 1e9:.2f} "
                f"GB as {str(model.dtype).removeprefix('torch.')}, {room / 1e9:.2f} GB may be used beside the program "
                "itself",
                hint=f"give a larger --max-memory, {smaller}, or fewer --max-new-tokens",
            )
        streams = whole + beside + loading > room
        return Placement(is_packed, saves_memory, streams, (block if streams else whole) + loading)

    def whole_nbytes(self, placement: Placement) -> int:
        """Bytes of the whole model in memory, with weights that are packed or not."""
        return self._sizes(placement.is_packed)[0]

    def _sizes(self, is_packed: bool) -> tuple[int, int, int]:
        """Bytes of all weights, of what is outside blocks with the largest block, and of what loading takes beside."""
        model, before = self.model, self.model.is_packed
        model.keep_packed(is_packed)
        outside, blocks = model.nbytes(""), [model.nbytes(name) for name in model.blocks]
        loading = model.loading_nbytes
        model.keep_packed(before)
        return outside + sum(blocks), outside + max(blocks), loading


def room_on(device: str) -> int:
    """Bytes that may still be taken of a device's memory."""
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
