"""What the stored zero points of a GPTQ checkpoint stand for: what its config says, held against the bytes.

A symmetric model has one zero point everywhere, `2**(bits-1)`, so that its bytes say whether one was subtracted: 4 bits
are words of 0x77777777 in v1 and of 0x88888888 in v2. Files whose config says the other are known
(vllm-project/vllm#38966). In v1 a stored zero point of all ones is 0 minus one, and readers differ in what they make of
it (`ops.gptq_tensors.Zeros`); the packers of GPTQ-for-LLaMa and AutoGPTQ also set every bit above it in the word, which
damages the zero points of the outputs that follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.gptq import CheckpointFormat, Module, QuantizeConfig
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.gptq.tensors import Zeros
from weightops.ops.numbers.bitpack import unpack_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ZeroOverflow = Literal["wrap", "carry", "plus-one"]
"""What a stored zero point of all ones stands for in v1; see `ops.gptq_tensors.Zeros`."""
CARRIES = "gptqmodel"
"""The program that adds and subtracts ones in whole words, by the name that it gives itself in meta."""


@dataclass
class ZeroEvidence:
    """What the stored zero points of some modules are like.

    Modules by what all their zero points are: one below the middle (`v1`), the middle (`v2`), or neither (`mixed`).
    `all_ones` counts the stored zero points that are, `first_all_ones` is the module of the first.
    """

    v1: list[str] = field(default_factory=list)
    v2: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    all_ones: int = 0
    first_all_ones: str = ""

    @property
    def is_symmetric(self) -> bool:
        """Whether each module has the zero point of a symmetric one everywhere, in one convention or the other."""
        return not self.mixed and bool(self.v1 or self.v2)

    def add(self, module: Module, words: Array) -> None:
        """Take the qzeros of a module into account."""
        stored = unpack_columns(words, module.bits)
        middle, largest = 1 << module.bits - 1, (1 << module.bits) - 1
        first = int(stored.flat[0])
        kind = {middle - 1: self.v1, middle: self.v2}.get(first, self.mixed)
        (kind if (stored == first).all() else self.mixed).append(module.prefix)
        ones = int((stored == largest).sum())
        if ones and not self.all_ones:
            self.first_all_ones = module.prefix
        self.all_ones += ones


def examine_zeros(modules: Iterable[Module], evaluate: Evaluate) -> ZeroEvidence:
    """Read the zero points of modules: a few bits for each output of each group."""
    import numpy as np

    evidence = ZeroEvidence()
    for module in modules:
        evidence.add(
            module, np.frombuffer(read_one(module.qzeros, evaluate), np.int32).reshape(module.qzeros.spec.shape)
        )
    return evidence


def read_one(tensor: LazyTensor, evaluate: Evaluate) -> bytes:
    """The bytes of one tensor."""
    return evaluate([tensor])[0]


def mislabelled(evidence: ZeroEvidence, config: QuantizeConfig | None) -> str | None:
    """The checkpoint format that the bytes show where the config says the other; None where nothing is wrong.

    Raises `CorruptInput` where modules of a symmetric model show one and the other.
    """
    is_symmetric = evidence.is_symmetric if config is None else config.sym or evidence.is_symmetric
    if not is_symmetric:
        return None
    if evidence.v1 and evidence.v2:
        raise CorruptInput(
            f"the zero points of {escape(evidence.v1[0])} are stored minus one (gptq), those of "
            f"{escape(evidence.v2[0])} as they are (gptq_v2)",
            hint="the files are of two models; fetch them again from one place",
        )
    shown = "gptq" if evidence.v1 else "gptq_v2" if evidence.v2 else None
    stated = config.checkpoint_format if config is not None else shown
    return shown if shown not in (None, stated) else None


def find_zeros(
    where: str,
    modules: Iterable[Module],
    config: QuantizeConfig | None,
    forced: CheckpointFormat | None,
    overflow: ZeroOverflow | None,
    evaluate: Evaluate,
) -> tuple[Zeros, list[str]]:
    """How to read the zero points of a checkpoint, and what there is to say about that.

    `forced` is what to go by instead of the config; `overflow` what stored zero points of all ones are in v1. Without a
    config the bytes decide, or else it is v1.
    Raises `IncompatibleInputs` where the bytes contradict the config, and for zero points of all ones in v1 unless it
    is known what they are: `overflow` says it, or the config names GPTQModel as the program that wrote them.
    """
    evidence = examine_zeros(modules, evaluate)
    notes = []
    if forced is None:
        shown = mislabelled(evidence, config)
        if shown is not None and config is not None:
            example = (evidence.v1 or evidence.v2)[0]
            raise IncompatibleInputs(
                f"{where}: the config says {config.checkpoint_format}, the zero points of {escape(example)} are those "
                f"of a symmetric model in {shown}",
                hint=f"--checkpoint-format {shown} goes by the bytes, {config.checkpoint_format} by the config",
            )
    version = forced or (config.checkpoint_format if config is not None else None)
    if version is None:
        version = "gptq_v2" if evidence.is_symmetric and evidence.v2 else "gptq"
        notes.append(f"{where}: no config says how zero points are stored: read as {version}")
    if version == "gptq_v2":
        return "as-stored", notes
    if not evidence.all_ones:
        return "plus-one", notes
    if overflow is not None:
        return overflow, notes
    if config is not None and any(CARRIES in program for program in config.quantizers):
        notes.append(
            f"{where}: {evidence.all_ones} zero points of 0 in checkpoint_format gptq, read as GPTQModel writes them; "
            "other readers take them for other numbers"
        )
        return "carry", notes
    raise IncompatibleInputs(
        f"{where}: {evidence.all_ones} stored zero points are all ones, {escape(evidence.first_all_ones)} has the "
        "first: in checkpoint_format gptq that is a zero point of 0, and programs differ in what they make of it",
        hint=f"--zero-overflow says what to read it as: {', '.join(get_args(ZeroOverflow))}; or quantise the model "
        "again, for the packer may have damaged neighbours",
    )
