"""How often each word of up to 16 bits occurs: the histogram from which everything about a 16-bit tensor follows.

Two ways with one result. numpy's `bincount` turns words into 64-bit indexes first and looks for the least and the
greatest one by one; torch's takes 32-bit words and is half as fast again, but its library takes a fifth of a second
to load. It is called through libtorch's C interface (torch/csrc/stable/c/shim.h), so torch is not imported.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from weightops.ops.libtorch import OneThread, check_status, open_library

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE = 1 << 20
"""Words that are counted at once: enough that threads wait little for Python between calls."""
_ABI_VERSION = (2 << 56) | (10 << 48)
"""That of torch 2.10, whose `aten::bincount` is meant; later libraries translate."""


def count_all(words: NDArray[Any], total: NDArray[np.int64], indexes: NDArray[np.int32], *, many: bool) -> None:
    """As `count_words` for unsigned words of 8 or 16 bits, which become indexes as many at a time as there is room."""
    import numpy as np

    for start in range(0, words.size, indexes.size or 1):
        piece = words[start : start + indexes.size]
        np.copyto(indexes[: piece.size], piece)
        count_words(indexes[: piece.size], total, many=many)


def count_words(words: NDArray[np.int32], total: NDArray[np.int64], *, many: bool) -> None:
    """Add to `total[w]` how often each `w` occurs in `words`, contiguous numbers in `[0, len(total))`.

    `many` says that so many more follow that loading torch's library pays.
    """
    library = _library() if many else None
    if library is not None and words.size:
        library.count(words, total)
        return
    import numpy as np

    found = np.bincount(words)
    total[: len(found)] += found


@cache
def _library() -> _Library | None:
    """torch's own `bincount`, or None without a library that has the C interface."""
    return open_library(_Library)


class _Library:
    """`aten::bincount` by the dispatcher; it takes over the handle that it is given, and gives one back."""

    def __init__(self, library: ctypes.CDLL, _: ctypes.PyDLL) -> None:
        handle, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        sizes, result = ctypes.POINTER(size), ctypes.POINTER(handle)
        self._from_blob = library.aoti_torch_create_tensor_from_blob
        self._from_blob.argtypes = [handle, size, sizes, sizes, size, code, code, code, result]
        self._call = library.torch_call_dispatcher
        self._call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64]
        self._data = library.aoti_torch_get_data_ptr
        self._data.argtypes = [handle, result]
        self._numel = library.aoti_torch_get_numel
        self._numel.argtypes = [handle, sizes]
        self._delete = library.aoti_torch_delete_tensor_object
        self._delete.argtypes = [handle]
        self._int32, self._cpu = int(library.aoti_torch_dtype_int32()), int(library.aoti_torch_device_type_cpu())
        self._thread = OneThread(library)

    def count(self, words: NDArray[np.int32], total: NDArray[np.int64]) -> None:
        import numpy as np

        self._thread.prepare()
        tensor, data, numel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int64()
        size, stride = (ctypes.c_int64 * 1)(words.size), (ctypes.c_int64 * 1)(1)
        address, no_weights, at_least = words.ctypes.data, 0, 0
        check_status(self._from_blob(address, 1, size, stride, 0, self._int32, self._cpu, 0, ctypes.byref(tensor)))
        stack = (ctypes.c_uint64 * 3)(tensor.value or 0, no_weights, at_least)
        check_status(self._call(b"aten::bincount", b"", stack, _ABI_VERSION))
        counts = ctypes.c_void_p(stack[0])
        try:
            check_status(self._data(counts, ctypes.byref(data)))
            check_status(self._numel(counts, ctypes.byref(numel)))
            assert data.value is not None
            memory: Any = (ctypes.c_int64 * numel.value).from_address(data.value)
            total[: numel.value] += np.frombuffer(memory, dtype=np.int64)
        finally:
            self._delete(counts)
