"""What is said of NaN and infinity: whether weights hold them, or float16 is too small for what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.inference.model import BlockModel


def check_finite(model: BlockModel, values: torch.Tensor, what: str) -> None:
    """Raise an error that begins with `what` ("block 3 gives") for NaN or infinity in what a model computed.

    It is a `CorruptInput` if the weights that are loaded hold some, or nothing explains it; else a `UsageError` in
    float16, which ends at 65504.
    """
    if all(bool(torch.isfinite(part).all()) for part in values):
        return
    text, hint = f"{model.shown}: {what} NaN or infinity", f"`weightops check {model.shown}` finds them in weights"
    loaded = ((n, p) for n, p in model.module.named_parameters() if p.device.type != "meta")
    weight = next((name for name, parameter in loaded if not bool(torch.isfinite(parameter).all())), None)
    if weight is not None:
        in_half = f" in {str(model.dtype).removeprefix('torch.')}" if model.dtype is torch.float16 else ""
        raise CorruptInput(f"{text}, as {escape(weight)} does{in_half}", hint=hint)
    if model.dtype is not torch.float16:
        raise CorruptInput(text, hint=hint)
    raise UsageError(
        f"{text} in float16, which ends at 65504: what passes between its layers is larger",
        hint="give --dtype bfloat16 or float32 (`quantize`: --device cpu); the weights need not be changed",
    )
