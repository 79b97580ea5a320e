"""The arithmetic: torch's own kernels, called through libtorch's C interface where that saves importing torch.

`import torch` takes more than a second, longer than adding a billion weights. The kernels are in `libtorch_cpu`,
which has a C interface with a stable ABI (torch/csrc/inductor/aoti_torch/c/shim.h); loading it alone takes a
fifth of that. It is used for floating-point types; without it, or for other types, torch is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightops.spec import DType

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

T = TypeVar("T")

_BY_C = {d for d in DType if d.is_float and not d.is_packed and d not in (DType.F8_E8M0, DType.F6_E2M3, DType.F6_E3M2)}
_OF_MATRICES = {"f": DType.F32, "d": DType.F64}
"""By numpy's characters: the types of matrices that are multiplied."""
_ADDED_BY_C = {DType.F16, DType.BF16, DType.F32, DType.F64}


def as_torch(buffer: memoryview, dtype: DType) -> torch.Tensor:
    """A flat tensor on the memory of `buffer`, without a copy. Imports torch."""
    import torch

    tensor: torch.Tensor = torch.frombuffer(buffer, dtype=getattr(torch, dtype.value))
    return tensor


def accumulate(out: memoryview, other: memoryview, dtype: DType, sign: int) -> None:
    """`out += sign * other`, elementwise in `dtype` with one rounding; `sign` is 1 or -1."""
    library = _library() if dtype in _ADDED_BY_C else None
    if library is not None:
        library.accumulate(out, other, dtype, sign)
    else:
        as_torch(out, dtype).add_(as_torch(other, dtype), alpha=sign)


def convert(out: memoryview, new: DType, source: memoryview, old: DType) -> None:
    """`out = source` in another dtype: nearest even, overflow to infinity where the type has one."""
    library = _library() if {old, new} <= _BY_C else None
    if library is not None:
        library.convert(out, new, source, old)
    else:
        as_torch(out, new).copy_(as_torch(source, old))


def matmul(out: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> None:
    """`out = left @ right`, for matrices `[m, k]` and `[k, n]` of float32 or float64 with any strides."""
    library = _library()
    if library is not None:
        library.matmul(out, left, right)
        return
    import torch

    torch.mm(torch.from_numpy(left), torch.from_numpy(right), out=torch.from_numpy(out))


def computes_here() -> bool:
    """Whether every call computes in the thread that makes it alone, so that several are worth making at once."""
    return _library() is not None


@cache
def _library() -> _Library | None:
    """The C interface, or None where torch is imported already, or has no such library or interface."""
    return None if "torch" in sys.modules else open_library(_Library)


def open_library(functions: Callable[[ctypes.CDLL, ctypes.PyDLL], T]) -> T | None:
    """torch's CPU library by its C interface, or None where it is not there or lacks one of the `functions`.

    The second form keeps Python's lock while it is called: for what takes less time than getting the lock back.
    """
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "lib" / "libtorch_cpu.so"
        if path.exists():
            try:
                return functions(ctypes.CDLL(str(path)), ctypes.PyDLL(str(path)))
            except (OSError, AttributeError):
                return None
    return None


class OneThread:
    """Keeps OpenMP to the calling thread, for blocks are too small to share; it remembers that for each thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._set_threads = getattr(library, "omp_set_num_threads", lambda count: None)
        self._prepared = threading.local()

    def prepare(self) -> None:
        """To be called by every thread before it computes."""
        if not hasattr(self._prepared, "done"):
            self._set_threads(1)
            self._prepared.done = True


class _Library:
    """The few functions of the C interface that are needed. Tensors are handles on memory that others own."""

    def __init__(self, library: ctypes.CDLL, brief: ctypes.PyDLL) -> None:
        handle, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        sizes, result = ctypes.POINTER(size), ctypes.POINTER(handle)
        self._from_blob = brief.aoti_torch_create_tensor_from_blob
        self._from_blob.argtypes = [handle, size, sizes, sizes, size, code, code, code, result]
        self._add = library.aoti_torch_cpu_add_Tensor
        self._add.argtypes = [handle, handle, ctypes.c_double, result]
        self._copy = library.aoti_torch_copy_
        self._copy.argtypes = [handle, handle, code]
        self._mm = library.aoti_torch_cpu_mm_out
        self._mm.argtypes = [handle, handle, handle]
        self._delete = brief.aoti_torch_delete_tensor_object
        self._delete.argtypes = [handle]
        self._dtypes: dict[DType, int] = {d: int(getattr(library, f"aoti_torch_dtype_{d.value}")()) for d in _BY_C}
        self._cpu = int(library.aoti_torch_device_type_cpu())
        self._thread = OneThread(library)

    def accumulate(self, out: memoryview, other: memoryview, dtype: DType, sign: int) -> None:
        left, right, total = self._flat(out, dtype), self._flat(other, dtype), ctypes.c_void_p()
        try:
            check_status(self._add(left, right, float(sign), ctypes.byref(total)))
            check_status(self._copy(left, total, 0))
        finally:
            self._forget(left, right, total)

    def convert(self, out: memoryview, new: DType, source: memoryview, old: DType) -> None:
        target, values = self._flat(out, new), self._flat(source, old)
        try:
            check_status(self._copy(target, values, 0))
        finally:
            self._forget(target, values)

    def matmul(self, out: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> None:
        tensors = [self._matrix(array) for array in (out, left, right)]
        try:
            check_status(self._mm(*tensors))
        finally:
            self._forget(*tensors)

    def _flat(self, buffer: memoryview, dtype: DType) -> ctypes.c_void_p:
        """A flat tensor on the memory of `buffer`, which must be writable."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        return self._view(address, (len(buffer) // dtype.itemsize,), (1,), dtype)

    def _matrix(self, array: NDArray[Any]) -> ctypes.c_void_p:
        """A tensor on the memory of `array`, with its strides."""
        itemsize = array.itemsize
        strides = tuple([n // itemsize for n in array.strides])
        return self._view(array.__array_interface__["data"][0], array.shape, strides, _OF_MATRICES[array.dtype.char])

    def _view(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType) -> ctypes.c_void_p:
        """A tensor on memory of others."""
        self._thread.prepare()
        tensor = ctypes.c_void_p()
        sizes, steps, code = _in_c(shape), _in_c(strides), self._dtypes[dtype]
        check_status(self._from_blob(address, len(shape), sizes, steps, 0, code, self._cpu, 0, ctypes.byref(tensor)))
        return tensor

    def _forget(self, *tensors: ctypes.c_void_p) -> None:
        for tensor in tensors:
            if tensor:
                self._delete(tensor)


@lru_cache(maxsize=1024)
def _in_c(numbers: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Sizes or strides for C, which only reads them."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def check_status(status: int) -> None:
    """Raise `RuntimeError` for what a function of the C interface returned, unless that is success."""
    if status:
        raise RuntimeError(f"libtorch reports error {status}")
