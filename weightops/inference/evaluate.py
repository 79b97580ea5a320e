"""Perplexity, and how far a model's predictions are from those of a reference.

The convention is that of the GPTQ paper's tables: the text is encoded whole, with the special tokens that the
tokenizer puts around it; it is cut into windows of `seq_len` tokens that do not overlap, the last partial one is
dropped; in each window tokens 2 to `seq_len` are predicted from those before them, and the perplexity is the
exponential of the mean negative log-likelihood of all of these predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.proof import hold
from weightops.errors import IncompatibleInputs, UsageError
from weightops.inference.agreement import CONTEXT, NOISE, Agreements
from weightops.inference.expert_use import ExpertUses
from weightops.inference.figures import Divergence, EvalDocument, LayerFigures, ScoreDocument
from weightops.inference.finite import check_finite
from weightops.inference.layer_influence import LayerInfluence
from weightops.inference.model import BlockModel
from weightops.inference.module_error import ModuleErrors
from weightops.inference.packed import Engine, refuse_unquantized
from weightops.inference.tokens import check_tokens, encode, load_tokenizer
from weightops.inference.windows import AroundBlock, cut, final_states, together
from weightops.io.brief import brief
from weightops.io.notebook import card
from weightops.io.strict_json import as_json
from weightops.operations.experts import ExpertUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT_SEQ_LEN = 2048
_LOGITS_NBYTES = 64 << 20
"""Logits in memory at a time: of a vocabulary of 250,000 those of a whole window take 2 GB."""


@dataclass(frozen=True)
class Agreement:
    """How far a model's next-token distributions are from the reference's, over all positions of all windows.

    `divergence` has all that is said of them. `modules` has the relative squared output error of each quantised linear
    layer on the same inputs, over the first 4096 tokens.
    """

    divergence: Divergence
    modules: Mapping[str, float] = field(default_factory=dict)

    __repr__ = brief

    @property
    def kl_mean(self) -> float:
        """The mean KL divergence of the model from the reference, in nats."""
        return self.divergence.kl.mean

    @property
    def kl_max(self) -> float:
        """The largest one."""
        return self.divergence.kl.max

    @property
    def top1(self) -> float:
        """The share of positions where both find the same token the most probable."""
        return self.divergence.top1.value


@dataclass(frozen=True)
class Score:
    """What one model makes of a text. `nll` is in nats per predicted token, `nll_error` its standard error."""

    name: str
    nll: float
    nll_error: float
    tokens: int
    windows: int
    elapsed_s: float
    agreement: Agreement | None = None
    engine: Engine | None = None
    """How layers multiplied that are quantised; None if none is."""
    layers: LayerFigures | None = None
    """How much each block changes, if that was asked for."""
    experts: ExpertUse | None = None
    """How experts are used, if that was asked for."""

    __repr__ = brief

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that is more than a float holds."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity."""
        return self.perplexity * self.nll_error

    @property
    def document(self) -> ScoreDocument:
        """The same as it is printed."""
        found = self.agreement
        return ScoreDocument(
            name=self.name,
            perplexity=self.perplexity if math.isfinite(self.perplexity) else None,
            nll=self.nll,
            nll_error=self.nll_error,
            tokens=self.tokens,
            windows=self.windows,
            elapsed_s=round(self.elapsed_s, 3),
            engine=self.engine or msgspec.UNSET,
            kl_mean=found.kl_mean if found else msgspec.UNSET,
            kl_max=found.kl_max if found else msgspec.UNSET,
            top1_agreement=found.top1 if found else msgspec.UNSET,
            module_errors=dict(found.modules) if found else msgspec.UNSET,
            divergence=found.divergence if found else msgspec.UNSET,
            layers=self.layers or msgspec.UNSET,
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of models on a text, by one convention; the reference's comes first if there is one."""

    seq_len: int
    begins_with_bos: bool
    reference: str | None
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()

    __repr__ = brief

    def _repr_html_(self) -> str:
        rows = [(s.name, s.perplexity, s.tokens, s.agreement.kl_mean if s.agreement else "") for s in self.scores]
        return card("perplexity", {"convention": self.convention}, ("model", "perplexity", "tokens", "mean KL"), rows)

    @property
    def convention(self) -> str:
        """What was computed, in one sentence."""
        bos = "the first window alone begins with a bos token" if self.begins_with_bos else "no bos token is added"
        return (
            f"windows of {self.seq_len} tokens that do not overlap, the last partial one dropped; "
            f"{self.seq_len - 1} predictions in each; {bos}"
        )

    @property
    def document(self) -> EvalDocument:
        """The whole of it as it is printed."""
        return EvalDocument(
            seq_len=self.seq_len,
            convention=self.convention,
            reference=self.reference,
            models=tuple(score.document for score in self.scores),
            warnings=self.warnings,
        )

    def to_json(self) -> dict[str, Any]:
        """The whole of it as data for JSON."""
        return as_json(self.document)


@dataclass(frozen=True)
class _Reader:
    """A model with the windows of tokens that its tokenizer makes of the text."""

    model: BlockModel
    windows: torch.Tensor
    begins_with_bos: bool
    tokenizer: PreTrainedTokenizerBase

    def text_of(self, token: int) -> str:
        """The text of a token by itself."""
        return str(self.tokenizer.decode([token]))

    def before(self, index: int) -> tuple[str, str | None]:
        """The text before a token of the text, in its window; and that token, which no window may have."""
        seq_len = self.windows.shape[1]
        window, last = divmod(index - 1, seq_len)
        before = self.windows[window, max(0, last + 1 - CONTEXT) : last + 1].tolist()
        expected = self.text_of(int(self.windows[window, last + 1])) if last + 1 < seq_len else None
        return str(self.tokenizer.decode(before)), expected


@dataclass(frozen=True)
class _Watched:
    """What is measured of a model while it runs."""

    errors: ModuleErrors | None = None
    layers: LayerInfluence | None = None
    experts: ExpertUses | None = None

    @property
    def around(self) -> AroundBlock | None:
        return together([each.around for each in (self.errors, self.layers, self.experts) if each is not None])


def evaluate(
    checkpoints: Sequence[Checkpoint],
    text: str,
    *,
    seq_len: int | None = None,
    reference: Checkpoint | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    engine: Engine = "auto",
    max_nbytes: int | None = None,
    influence: bool = False,
    experts: bool = False,
    control: Control | None = None,
) -> Evaluation:
    """Perplexity of each checkpoint on `text`; with `reference` also how far each is from it.

    `influence` measures how much each block changes (`LayerInfluence`), `experts` how the experts of a mixture are used
    (`ExpertUses`), both in the same walk; of a reference only the first.

    Models are run block by block, so memory holds one block (two of a quantised one beside a reference), the hidden
    states of all windows (in a mapped file if they would take more than `max_nbytes`), and a few windows' logits.
    Quantised models are dequantised, a block at a time, unless `engine` is "packed": kernels then multiply.
    `seq_len` is 2048 by default, or as much less as the model was made for. All that can be known before is checked
    before the first block is read. Raises `SourceMissing` without config or tokenizer, `UsageError` for a text shorter
    than one window and for `experts` of a model without any of a known form, `IncompatibleInputs` where tokens or
    vocabularies do not fit, `CorruptInput` for NaN, `Differs` for weights on servers or in a cache whose digest is
    wrong.
    """
    control = control or Control()
    given = [*([reference] if reference is not None else []), *checkpoints]
    if not given:
        raise UsageError("there is no model to evaluate")
    models = [BlockModel(checkpoint, dtype=dtype, device=device, control=control) for checkpoint in given]
    refuse_unquantized(engine, [model.shown for model in models], is_any=any(model.packable for model in models))
    for model in models:
        # A block is dequantised once, for all windows: nothing is faster, so that is what `auto` means.
        if engine == "packed":
            model.keep_packed()
    for model in models:
        model.refuse_joined_blocks()
    seq_len = _seq_len(models, seq_len)
    readers = [_read(m, c, text, seq_len) for m, c in zip(models, given, strict=True)]
    if reference is not None:
        for reader in readers[1:]:
            _check_comparable(reader, readers[0])
    measured = [_watched(reader, readers[0], reference is not None, influence, experts) for reader in readers]
    control.progress.start("evaluating", sum(m.nbytes(name) for m in models for name in ("", *m.blocks)))
    scores = []
    with ExitStack() as stack:
        kept: torch.Tensor | None = None
        for i, (reader, watched) in enumerate(zip(readers, measured, strict=True)):
            started_s = time.monotonic()
            with ExitStack() as own:
                is_reference = reference is not None and i == 0
                states = (stack if is_reference else own).enter_context(
                    final_states(
                        reader.model,
                        reader.windows,
                        control=control,
                        max_nbytes=None if max_nbytes is None else max_nbytes - (0 if kept is None else kept.nbytes),
                        around=watched.around,
                    )
                )
                own.enter_context(reader.model.loaded(""))
                if kept is not None:
                    own.enter_context(readers[0].model.loaded(""))
                nll, agreement = _score(reader, states, readers[0].model, kept, control)
                if is_reference:
                    kept = states
            if agreement is not None and watched.errors is not None:
                agreement = Agreement(agreement.divergence, watched.errors.errors)
            elapsed_s = time.monotonic() - started_s
            count = reader.windows.numel()
            model = reader.model
            scores.append(
                Score(
                    *(given[i].name, *nll, count, len(reader.windows), elapsed_s, agreement, model.engine),
                    layers=watched.layers.figures() if watched.layers else None,
                    experts=watched.experts.use() if watched.experts else None,
                )
            )
    control.progress.stop()
    left = hold([tensor for checkpoint in given for tensor in checkpoint.values()], control)
    begins = readers[0].begins_with_bos
    warnings = tuple(dict.fromkeys([*(warning for model in models for warning in model.warnings), *left]))
    return Evaluation(seq_len, begins, reference.name if reference is not None else None, tuple(scores), warnings)


def _seq_len(models: Sequence[BlockModel], seq_len: int | None) -> int:
    limits = [(model.max_positions, model) for model in models if model.max_positions]
    least = min((limit for limit, _ in limits), default=_DEFAULT_SEQ_LEN)
    if seq_len is None:
        return min(_DEFAULT_SEQ_LEN, least)
    if seq_len < 2:
        raise UsageError(f"a window of {seq_len} tokens predicts nothing", hint="give --seq-len 2 or more")
    for limit, model in limits:
        if seq_len > limit:
            raise UsageError(
                f"{model.shown}: was made for {limit} positions, a window is to have {seq_len} tokens",
                hint=f"give --seq-len {limit} or less",
            )
    return seq_len


def _read(model: BlockModel, checkpoint: Checkpoint, text: str, seq_len: int) -> _Reader:
    tokenizer = load_tokenizer(checkpoint)
    tokens = encode(tokenizer, text)
    check_tokens(tokens, tokenizer, model.vocab_size, model.shown)
    if len(tokens) < seq_len:
        raise UsageError(
            f"the text has {len(tokens)} tokens for {model.shown}, one window is to have {seq_len}",
            hint="give a longer --text or a smaller --seq-len",
        )
    return _Reader(model, cut(tokens, seq_len), _begins_with_bos(tokens, tokenizer), tokenizer)


def _begins_with_bos(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and int(tokens[0]) == tokenizer.bos_token_id


def _check_comparable(reader: _Reader, reference: _Reader) -> None:
    if reader.model.vocab_size != reference.model.vocab_size:
        raise IncompatibleInputs(
            f"{reader.model.shown}: has a vocabulary of {reader.model.vocab_size} tokens, the reference "
            f"{reference.model.shown} of {reference.model.vocab_size}",
            hint="predictions can only be compared over the same tokens; leave out --reference",
        )
    if not torch.equal(reader.windows, reference.windows):
        raise IncompatibleInputs(
            f"{reader.model.shown}: its tokenizer cuts the text into other tokens than that of the reference "
            f"{reference.model.shown}",
            hint="predictions can only be compared over the same tokens; leave out --reference",
        )


def _watched(reader: _Reader, reference: _Reader, is_given: bool, influence: bool, experts: bool) -> _Watched:
    model, is_reference = reader.model, is_given and reader is reference
    return _Watched(
        ModuleErrors(model, reference.model) if is_given and not is_reference and model.quantized else None,
        LayerInfluence(model, reader.windows) if influence else None,
        ExpertUses(model, reader.windows) if experts and not is_reference else None,
    )


def _chunks(windows: torch.Tensor, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Runs of windows, or of positions of one window, whose logits fit into memory."""
    count, seq_len = windows.shape
    tokens = max(1, _LOGITS_NBYTES // (4 * vocab_size))
    height = max(1, tokens // seq_len)
    for first in range(0, count, height):
        for start in range(0, seq_len, tokens):
            yield slice(first, min(first + height, count)), slice(start, min(start + tokens, seq_len))


def _score(
    reader: _Reader, states: torch.Tensor, other: BlockModel, other_states: torch.Tensor | None, control: Control
) -> tuple[tuple[float, float], Agreement | None]:
    """The mean negative log-likelihood and its error, and with the reference's states how far the model is from it."""
    model, windows, seq_len = reader.model, reader.windows, reader.windows.shape[1]
    losses: list[np.ndarray] = []
    agreements = Agreements(max(NOISE.get(each.dtype, 0.0) for each in (model, other)))
    for chosen, chunk in _chunks(windows, model.vocab_size):
        control.check()
        found = _log_probabilities(model, states[chosen, chunk])
        targets = windows[chosen, chunk.start + 1 : chunk.stop + 1].to(found.device)
        logs = found[:, : targets.shape[1]].gather(2, targets[..., None])
        losses.append(-logs.double().cpu().numpy().reshape(-1))
        if other_states is not None:
            expected = _log_probabilities(other, other_states[chosen, chunk])
            for i in range(len(found)):
                start = (chosen.start + i) * seq_len + chunk.start + 1
                agreements.add(found[i], expected[i], targets[i], start)
    every = np.concatenate(losses)
    nll = float(every.mean()), float(every.std(ddof=1)) / math.sqrt(len(every)) if len(every) > 1 else math.inf
    if other_states is None:
        return nll, None
    return nll, Agreement(agreements.result(reader.text_of, reader.before))


def _log_probabilities(model: BlockModel, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, `[B, T, vocab]` float32, from hidden states `[B, T, hidden]`."""
    logits = model.logits(hidden).float()
    check_finite(model, logits, "its logits hold")
    return logits.log_softmax(-1)
