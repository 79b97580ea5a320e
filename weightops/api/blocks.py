"""ggml's block types, in which GGUF files hold weights, for single tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError
from weightops.lazy import LazyTensor
from weightops.ops.ggml.quantize import QUANTIZERS, Quantize
from weightops.ops.rows import Given
from weightops.spec import DType

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike


def quantize_blocks(
    values: LazyTensor | ArrayLike | torch.Tensor,
    dtype: DType | str,
    *,
    importance: LazyTensor | ArrayLike | torch.Tensor | None = None,
) -> LazyTensor:
    """Weights in one of ggml's block types, such as "q4_k", to the bit as ggml does it without fused multiply-add.

    `values` are float32, float16 or bfloat16 `[..., columns]`: a tensor of a checkpoint, or an array, which is copied.
    `importance` says how much errors in each column weigh, `[columns]`, or `[experts, columns]` for values of
    three dimensions: the mean squares of llama-imatrix, for example. What comes back is lazy: `read()` gives its bytes,
    row by row, and a checkpoint that holds it is written as GGUF.

    Raises `UsageError` for a name that is no type, and `IncompatibleInputs` for types that are not written (the hint
    names the nearest), rows that are not whole blocks and importance of another shape. Reading raises `CorruptInput`
    for values that are not finite or too large for the type, and for importance that is negative or not finite.
    """
    target = dtype if isinstance(dtype, DType) else next((d for d in DType if d.value == dtype.lower()), None)
    if target is None:
        raise UsageError(f"there is no type {dtype!r}", hint=f"choose one of {', '.join(d.value for d in QUANTIZERS)}")
    inputs = [_lazy(values)]
    if importance is not None:
        inputs.append(importance if isinstance(importance, LazyTensor) else _lazy(_as_float32(importance)))
    return LazyTensor.make(Quantize(target), *inputs)


def _lazy(values: Any) -> LazyTensor:
    """An array of numpy's, or a tensor of torch's, as a tensor that holds its bytes."""
    import numpy as np

    if isinstance(values, LazyTensor):
        return values
    if _is_torch(values):
        import torch

        tensor = values.detach().cpu().contiguous()
        name, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        array = np.asarray(values)
        name, shape, data = array.dtype.name, array.shape, array.tobytes()
    dtype = next((known for known in DType if known.value == name), None)
    if dtype is None:
        raise UsageError(f"arrays of {name} hold no weights", hint="float32, float16 and bfloat16 are quantised")
    return LazyTensor.make(Given(dtype, shape, data))


def _as_float32(values: Any) -> Any:
    import numpy as np

    return values.float() if _is_torch(values) else np.asarray(values, np.float32)


def _is_torch(values: Any) -> bool:
    return type(values).__module__.partition(".")[0] == "torch"
