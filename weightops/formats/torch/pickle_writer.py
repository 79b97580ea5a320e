"""The `data.pkl` of a state dict: what CPython's pickler, protocol 2, writes for a plain dict of torch tensors.

CPython's C pickler memoises by object identity, and so do we: `storage`, `cpu`, classes and dtypes are each one
object throughout, a storage's key is one object for all tensors that share it, and tensor names equal to any of
these are still objects of their own, as they are when they were read from a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightops.spec import DType, TensorSpec

STORAGE_CLASSES = {
    DType.BOOL: "BoolStorage",
    DType.U8: "ByteStorage",
    DType.I8: "CharStorage",
    DType.I16: "ShortStorage",
    DType.F16: "HalfStorage",
    DType.BF16: "BFloat16Storage",
    DType.I32: "IntStorage",
    DType.F32: "FloatStorage",
    DType.C64: "ComplexFloatStorage",
    DType.F64: "DoubleStorage",
    DType.I64: "LongStorage",
    DType.C128: "ComplexDoubleStorage",
}
"""torch's storage classes. Other dtypes came later; their tensors name an untyped storage and the dtype."""

_BATCH = 1000
"""Items between a MARK and a SETITEMS."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A contiguous tensor in the state dict; `key` names its storage, which it fills."""

    name: str
    spec: TensorSpec
    key: str


def pickle_state_dict(tensors: Sequence[PickledTensor]) -> bytes:
    """The bytes of `data.pkl`, for tensors in state-dict order."""
    pickler = _Pickler()
    pickler.write(b"\x80\x02}")
    pickler.memoize()
    if len(tensors) == 1:
        pickler.item(tensors[0])
        pickler.write(b"s")
    elif tensors:
        # CPython starts another batch whenever one is full, even when nothing is left for it.
        for start in range(0, len(tensors) + 1, _BATCH):
            pickler.write(b"(")
            for tensor in tensors[start : start + _BATCH]:
                pickler.item(tensor)
            pickler.write(b"u")
    pickler.write(b".")
    return bytes(pickler.out)


class _Pickler:
    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[tuple[str, str], int] = {}
        self._count = 0

    def write(self, data: bytes) -> None:
        self.out += data

    def memoize(self) -> None:
        """Give the object just written the next memo number."""
        index, self._count = self._count, self._count + 1
        self.write(b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def item(self, tensor: PickledTensor) -> None:
        """A name and its tensor: a call of a rebuild function on a tuple of arguments."""
        storage_class = STORAGE_CLASSES.get(tensor.spec.dtype)
        shape = tensor.spec.shape
        self._text(tensor.name)
        self._global(f"torch._utils\n_rebuild_tensor_v{2 if storage_class else 3}\n")
        self.write(b"(")
        self._storage(tensor, storage_class)
        self.write(b"K\x00")
        self._ints(shape)
        self._ints(_strides(shape))
        self.write(b"\x89")
        self._global("collections\nOrderedDict\n")
        self.write(b")R")
        self.memoize()
        if storage_class is None:
            self._global(f"torch\n{tensor.spec.dtype.value}\n")
        self.write(b"t")
        self.memoize()
        self.write(b"R")
        self.memoize()

    def _storage(self, tensor: PickledTensor, storage_class: str | None) -> None:
        """The persistent id: ("storage", class, key, device, elements; bytes if the class is untyped)."""
        self.write(b"(")
        self._text("storage", shared=True)
        self._global(f"torch\n{storage_class}\n" if storage_class else "torch.storage\nUntypedStorage\n")
        self._text(tensor.key, shared=True)
        self._text("cpu", shared=True)
        self.write(_int(tensor.spec.numel if storage_class else tensor.spec.nbytes))
        self.write(b"t")
        self.memoize()
        self.write(b"Q")

    def _text(self, text: str, shared: bool = False) -> None:
        data = text.encode("utf-8", "surrogatepass")
        data = b"X" + struct.pack("<I", len(data)) + data
        if shared:
            self._once(("text", text), data)
        else:
            self.write(data)
            self.memoize()

    def _global(self, name: str) -> None:
        self._once(("global", name), b"c" + name.encode())

    def _once(self, identity: tuple[str, str], data: bytes) -> None:
        """An object that may have been written before."""
        index = self._memo.get(identity)
        if index is None:
            self._memo[identity] = self._count
            self.write(data)
            self.memoize()
        else:
            self.write(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))

    def _ints(self, values: Iterable[int]) -> None:
        """A tuple of integers."""
        items = [_int(value) for value in values]
        data = b"".join(items)
        if len(items) > 3:
            self.write(b"(" + data + b"t")
        else:
            self.write(data + (b")", b"\x85", b"\x86", b"\x87")[len(items)])
        if items:
            self.memoize()


def _int(value: int) -> bytes:
    """A count in the shortest of pickle's forms."""
    if value < 1 << 8:
        return b"K" + bytes([value])
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    nbytes = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little")


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides, in elements, that torch gives a new tensor: dimensions of size 0 count as 1."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
