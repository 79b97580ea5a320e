"""How a model is quantised, and what is told of each layer afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from weightops.errors import UsageError
from weightops.formats.modules import NUMBERED
from weightops.formats.quantized.containers import AWQ_BITS, Container
from weightops.formats.quantized.gptq import CheckpointFormat
from weightops.ops.gptq.grid import Settings

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class Options:
    """What is done to which layers. `skip`: globs of modules that stay as they are.

    Raises `UsageError` for what the container `checkpoint_format` cannot hold.
    """

    settings: Settings
    method: Method = "gptq"
    skip: tuple[str, ...] = ()
    checkpoint_format: Container = "gptq"

    def __post_init__(self) -> None:
        settings, container = self.settings, self.checkpoint_format
        if container == "awq" and settings.bits != AWQ_BITS:
            raise UsageError(
                f"awq holds {AWQ_BITS} bits, not {settings.bits}",
                hint="choose another --checkpoint-format: compressed-tensors and gptq hold 2, 3, 4 and 8 bits",
            )
        is_reordered = settings.desc_act and not settings.static_groups and settings.group_size != -1
        if is_reordered and container in ("awq", "compressed-tensors"):
            raise UsageError(
                f"{container} has its inputs grouped in the order in which they stand, which --act-order changes",
                hint="add --static-groups, which keeps it, or choose --checkpoint-format gptq",
            )

    @property
    def kept_as(self) -> CheckpointFormat:
        """How the blocks that are done are kept: other containers are made of them when all is written."""
        return "gptq" if self.checkpoint_format == "gptq" else "gptq_v2"


class ModuleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a linear layer.

    `error` and `error_rtn` are the squared error of its output over the calibration data, over the square of the
    output itself: of this layer as written, and of one rounded to nearest. `tokens` that were seen; `damp`, what share
    of the Hessian's mean diagonal was added to it; `floored_scales` that were too small for float16; `fallback`, why
    the layer was rounded to nearest after all.
    """

    module: str
    in_features: int
    out_features: int
    tokens: int = 0
    error: float | None = None
    error_rtn: float | None = None
    damp: float = 0.0
    dead_columns: int = 0
    floored_scales: int = 0
    fallback: str | None = None

    @property
    def block(self) -> int:
        """The number of its block."""
        matched = NUMBERED.fullmatch(self.module)
        return int(matched[2]) if matched else 0

    @property
    def kind(self) -> str:
        """What it is called in its block."""
        matched = NUMBERED.fullmatch(self.module)
        return matched[3] if matched else self.module

    @property
    def error_ratio(self) -> float | None:
        """The error over that of rounding to nearest."""
        return self.error / self.error_rtn if self.error is not None and self.error_rtn else None
