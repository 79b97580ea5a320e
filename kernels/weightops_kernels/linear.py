"""A linear layer that holds GPTQ tensors and multiplies with the engine that suits device, type and rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from weightops_kernels import cpu, launch, layout, library, planes, reference
from weightops_kernels.reference import Packed

ENGINES = ("auto", "reference", "cpu", "cpu-int4", "triton")


class QuantLinear(nn.Module):
    """`y = x W^T + bias` with the tensors of the GPTQ format as buffers, under their names in a checkpoint.

    Load the buffers (`load_state_dict`, or assign), move the module to its device, then call `prepare`, which chooses
    the engine and rearranges the layer for it. Without that, the reference multiplies.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        checkpoint_format: str = "gptq",
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer: zeros of the right shapes. Raises ValueError for bits or formats that do not exist."""
        super().__init__()
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.checkpoint_format = checkpoint_format
        self.engine = "reference"
        self.deterministic = False
        self._group_size = group_size
        words_k, words_n = (-(-features * bits // 32) for features in (in_features, out_features))
        g_idx = reference.trivial_g_idx(in_features, group_size).to(device=device)
        self.register_buffer("qweight", torch.zeros(words_k, out_features, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.zeros(groups, words_n, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16, device=device))
        self.register_buffer("g_idx", g_idx)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        reference.check(self.layer)

    @classmethod
    def from_tensors(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor,
        bits: int,
        checkpoint_format: str = "gptq",
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """A layer around these tensors, not copied. Raises ValueError if they are not one layer of the format."""
        return cls.of(Packed(qweight, qzeros, scales, g_idx, bits, checkpoint_format), bias)

    @classmethod
    def of(cls, layer: Packed, bias: Tensor | None = None) -> QuantLinear:
        """As `from_tensors`."""
        reference.check(layer)
        made = cls(0, 0, layer.bits, -1, checkpoint_format=layer.checkpoint_format)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.qweight, made.qzeros, made.scales, made.g_idx, *_ = layer
        made.bias = bias
        return made

    @property
    def layer(self) -> Packed:
        """The tensors of the checkpoint."""
        return Packed(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.checkpoint_format)

    def choose(self, dtype: torch.dtype) -> str:
        """The engine that `auto` stands for, for inputs of `dtype` on the device where the layer lies."""
        if self.qweight.is_cuda:
            suits = dtype in launch.FLOATS and self.scales.dtype in launch.FLOATS and not launch.available()
            return "triton" if suits else "cpu"
        if dtype == torch.bfloat16 and cpu.has_fast_int4():
            return "cpu" if cpu.why_not_int4(self.layer) else "cpu-int4"
        return "cpu"

    def prepare(
        self,
        engine: str = "auto",
        dtype: torch.dtype = torch.float16,
        deterministic: bool = False,
        release: bool = False,
    ) -> QuantLinear:
        """Rearrange the layer for `engine`, for inputs of `dtype`; returns the layer.

        `release` gives back the tensors of the checkpoint where the engine does not need them: the layer can then
        be neither saved nor prepared again, and `cpu-int4` takes its operator for any number of rows. `cpu` needs them
        where groups are of unequal lengths.
        Raises ValueError for an unknown engine, or one that cannot hold the layer; RuntimeError without Triton.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}; found {engine!r}.")
        if not self.qweight.numel() and self.in_features:
            raise ValueError("The layer's tensors were released; load it again to prepare it for another engine.")
        reference.check(self.layer)
        engine = self.choose(dtype) if engine == "auto" else engine
        self.deterministic = deterministic
        is_held = False
        if engine == "cpu":
            is_held = self._hold_planes()
        elif engine == "cpu-int4":
            int4 = cpu.prepare_int4(self.layer)
            self._hold(packed=int4.packed, scales_and_zeros=int4.scales_and_zeros, rows=int4.rows)
            self._group_size = int4.group_size
            is_held = True
        elif engine == "triton":
            if reason := launch.available():
                raise RuntimeError(reason)
            found = layout.repack(self.layer)
            self._hold(words=found.words, steps=found.steps, rows=found.rows, chunk_group=found.chunk_group)
            self._group_size = found.group_size
            is_held = True
        if release and is_held:
            for name in ("qweight", "qzeros", "scales", "g_idx"):
                setattr(self, name, getattr(self, name).new_empty(0))
        self.engine = engine
        return self

    def _hold_planes(self) -> bool:
        """Whether the layer can be held as `planes`; it is then."""
        found = planes.arrange(self.layer)
        if found is None:
            self._hold(planes=None)
            return False
        self._hold(planes=found.planes, zeros=found.zeros, steps=found.scales, rows=found.rows)
        self._group_size = found.group_size
        return True

    def _hold(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move to another device, but keep every type: `model.bfloat16()` must not round the scales."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        # torch has no types here
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., K]` to `[..., N]`, in the type of `x`."""
        flat = x.reshape(-1, self.in_features)
        y = self._multiply(flat)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.engine == "triton":
            y = library.triton_matmul(
                x, self.words, self.steps, self.rows, self.chunk_group,
                self.bits, self._group_size, self.in_features, self.scales.dtype, self.deterministic,
            )  # fmt: skip
        elif self._takes_int4(x):
            y = library.int4_matmul(x, self.packed, self.scales_and_zeros, self.rows, self._group_size)
        elif self.engine == "cpu" and self.planes is not None:
            y = library.planes_matmul(
                x, self.planes, self.zeros, self.steps, self.rows, self.bits, self._group_size, self.in_features
            )
        elif self.engine == "reference":
            y = library.reference_matmul(x, *self.layer)
        else:
            y = library.dequantize_matmul(x, *self.layer)
        return y

    def _takes_int4(self, x: Tensor) -> bool:
        if self.engine != "cpu-int4":
            return False
        is_released = not self.qweight.numel()
        if x.dtype != torch.bfloat16 and is_released:
            raise ValueError(f"The layer is kept for bfloat16 alone; found {str(x.dtype).removeprefix('torch.')}.")
        return x.dtype == torch.bfloat16 and (is_released or x.shape[0] <= cpu.INT4_MAX_ROWS)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, engine={self.engine}"
