"""What the pickles in torch files may hold, and how tensors in them are described.

Source: torch/_utils.py (`_rebuild_*`) and torch/serialization.py (`persistent_id`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput
from weightops.formats.torch.pickle_reader import Call, Refuse, set_item
from weightops.formats.torch.pickle_writer import STORAGE_CLASSES
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.spec import DType, TensorSpec

_MAX_RANK = 64
_MAX_COUNT = 1 << 48
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Where training checkpoints keep the model: Lightning, PyTorch's own tutorials, DeepSpeed, and many scripts."""
_MAX_WRAPPERS = 3
_TRAINING = re.compile(r"optim|sched|scaler|rng|random|loss|callbacks|loops|metric|step|epoch|best", re.IGNORECASE)
"""Names of what is beside the model there, tensors or not."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """One file: its tensors in state-dict order, the names of entries that are no weights and were left out, and the
    folder in the archive."""

    file: SourceFile
    tensors: dict[str, LazyTensor]
    extras: tuple[str, ...]
    root: str = ""


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A class of storages; `dtype` is None if it is untyped."""

    dtype: DType | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of `numel` elements, or the part of it that `length` elements from `start` on make up.

    Elements of an untyped storage are bytes.
    """

    key: str
    dtype: DType
    numel: int
    start: int
    length: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class TensorCall:
    """The arguments of a `torch._utils._rebuild_tensor*`, not checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any = None
    metadata: Any = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor that lies inside its storage: `offset` in bytes from the storage's beginning, `strides` in elements."""

    storage: Storage
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Storages:
    """The storages that a pickle mentions, by key; made from persistent ids."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def __call__(self, pid: object) -> Storage:
        """The storage of a persistent id `("storage", class, key, device, numel[, view])`, else `ValueError`."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or not _is(pid[0], "storage"):
            raise ValueError("a persistent id that is no storage")
        _, kind, key, _, numel, view = pid if len(pid) == 6 else (*pid, None)
        if not isinstance(kind, StorageClass) or type(key) is not str or not _is_count(numel):
            raise ValueError("a storage of unknown type, key or size")
        start, length = 0, numel
        if view is not None:
            if type(view) is not tuple or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
                raise ValueError("a malformed view of a storage")
            _, start, length = view
            if start + length > numel:
                raise ValueError(f"elements {start} to {start + length} of a storage that has {numel}")
        dtype = kind.dtype or DType.U8
        first = self.by_key.setdefault(key, Storage(key, dtype, numel, 0, numel))
        if (first.dtype, first.numel) != (dtype, numel):
            raise ValueError(f"storage {escape(key)} has {numel} {dtype.value} and {first.numel} {first.dtype.value}")
        return Storage(key, dtype, numel, start, length)


def _ordered_dict(items: object = ()) -> dict[Any, Any]:
    """`OrderedDict(items)`; with items as Python 2 pickled it."""
    result: dict[Any, Any] = {}
    if not isinstance(items, (list, tuple)):
        raise ValueError("an OrderedDict of no list")
    for item in items:
        key, value = item
        set_item(result, key, value)
    return result


def _size(items: object = ()) -> tuple[Any, ...]:
    """`torch.Size(items)`."""
    if not isinstance(items, (list, tuple)):
        raise ValueError("a torch.Size of no list")
    return tuple(items)


def _encode(text: str, encoding: str) -> bytes:
    """`codecs.encode`, which is how protocol 2 writes bytes."""
    if type(text) is not str or not _is(encoding, "latin1"):
        raise ValueError("bytes that are not in Latin-1")
    return text.encode("latin1")


def _unsupported(what: str) -> Refuse:
    return Refuse(f"holds {what}, which weightops does not read", "save plain dense tensors on the CPU")


_OPAQUE = object()
"""Stands for values that do not matter."""

_PLAIN = object()
"""Stands for the classes of plain tensors."""


def _with_attributes(rebuild: object, kind: object, arguments: object, state: object) -> Any:
    """A tensor with Python attributes, which are about how it was trained; `torch._tensor._rebuild_from_type_v2`."""
    if not isinstance(rebuild, Call) or kind is not _PLAIN or type(arguments) is not tuple:
        raise ValueError("a tensor of a class that is not torch's own")
    return rebuild.build(*arguments)


_OTHER_TENSORS = {
    "qtensor": "a quantised tensor",
    "sparse_tensor": "a sparse tensor",
    "sparse_csr_tensor": "a sparse tensor",
    "nested_tensor": "a nested tensor",
    "meta_tensor_no_storage": "a tensor without values",
    "device_tensor_from_numpy": "a tensor of another device",
    "device_tensor_from_cpu_tensor": "a tensor of another device",
    "wrapper_subclass": "a tensor subclass",
}
_OTHER_DTYPES = (
    *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "float4_e2m1fn_x2"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"),
)

ALLOWED: Mapping[tuple[str, str], object] = {
    ("_codecs", "encode"): Call(_encode),
    ("collections", "OrderedDict"): Call(_ordered_dict),
    ("torch", "Size"): Call(_size),
    ("torch", "device"): Call(lambda *_: _OPAQUE),
    ("torch._utils", "_rebuild_tensor"): Call(lambda s, o, size, stride: TensorCall(s, o, size, stride)),
    ("torch._utils", "_rebuild_tensor_v2"): Call(
        lambda s, o, size, stride, grad, hooks, metadata=None: TensorCall(s, o, size, stride, None, metadata)
    ),
    ("torch._utils", "_rebuild_tensor_v3"): Call(
        lambda s, o, size, stride, grad, hooks, dtype, metadata=None: TensorCall(s, o, size, stride, dtype, metadata)
    ),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_with_attributes),
    **dict.fromkeys([("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn", "Parameter")], _PLAIN),
    ("torch._utils", "_rebuild_parameter"): Call(lambda data, grad, hooks: data),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(lambda data, grad, hooks, state: data),
    **{("torch", d.value): d for d in DType if not d.is_packed},
    **{(m, name): StorageClass(d) for d, name in STORAGE_CLASSES.items() for m in ("torch", "torch.cuda")},
    **{(m, n): StorageClass(None) for n in ("UntypedStorage", "_UntypedStorage") for m in ("torch", "torch.storage")},
    ("torch.storage", "TypedStorage"): _OPAQUE,
    **{("torch._utils", f"_rebuild_{name}"): _unsupported(what) for name, what in _OTHER_TENSORS.items()},
    **{("torch", name): _unsupported("an unusual dtype") for name in _OTHER_DTYPES},
}
"""What a pickle in a torch file may name. Everything else is refused, by name."""


def find_tensors(root: Any, what: str) -> tuple[dict[str, TensorCall], tuple[str, ...]]:
    """The tensors of a state dict, and the names of its other entries.

    A state dict under one of the usual names is taken out of that wrapper, if what is beside it is plainly the state of
    a training run. Raises `CorruptInput`, beginning with `what`, if there are tensors in any other place.
    """
    if type(root) is not dict:
        kind = "a single tensor" if isinstance(root, TensorCall) else f"a {type(root).__name__}"
        raise CorruptInput(f"{what}: holds {kind}, expected a state dict")
    barren: set[int] = set()
    beside: tuple[str, ...] = ()
    for _ in range(_MAX_WRAPPERS):
        if _is_flat(root):
            break
        models = [k for k in _WRAPPERS if type(root.get(k)) is dict and _holds_tensors(root[k], barren)]
        if len(models) > 1:
            raise CorruptInput(
                f"{what}: holds several models: {' and '.join(models)}", hint="save the one that you want by itself"
            )
        if not models:
            break
        others = {key: value for key, value in root.items() if key != models[0]}
        _split({key: value for key, value in others.items() if not _is_training(key)}, barren, what)
        beside += tuple(others)
        root = root[models[0]]
    tensors, inside = _split(root, barren, what)
    return tensors, beside + inside


def _is_flat(root: dict[Any, Any]) -> bool:
    """Whether a dict is a state dict itself: it has tensors, more than the loss of a training run."""
    return any(isinstance(value, TensorCall) and not _is_training(key) for key, value in root.items())


def _is_training(key: object) -> bool:
    return type(key) is str and _TRAINING.search(key) is not None and key not in _WRAPPERS


def _split(entries: dict[Any, Any], barren: set[int], what: str) -> tuple[dict[str, TensorCall], tuple[str, ...]]:
    """The tensors among the entries, and the names of the others, which must hold none."""
    tensors = {}
    others = []
    for key, value in entries.items():
        if type(key) is not str:
            raise CorruptInput(f"{what}: a {type(key).__name__} is a key of the state dict, expected text")
        if isinstance(value, TensorCall):
            tensors[key] = value
        elif _holds_tensors(value, barren):
            raise CorruptInput(
                f"{what}: tensors are nested under {escape(key)!r}, expected a flat state dict",
                hint="save the state dict that you want by itself",
            )
        else:
            others.append(key)
    return tensors, tuple(others)


def _holds_tensors(value: object, barren: set[int]) -> bool:
    """Whether tensors or storages are anywhere below `value`.

    The graph may repeat and hold itself, so each container is entered once; `barren` are the ids of those that are
    known to lead to none.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (TensorCall, Storage)):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen and id(item) not in barren:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
    barren |= seen
    return False


def place(call: TensorCall, where: str) -> Placed:
    """Check a tensor's description, so that every element lies inside the storage; `where` begins errors."""
    storage, shape, strides = call.storage, call.size, call.stride
    if not isinstance(storage, Storage):
        raise CorruptInput(f"{where}: has no storage")
    dtype = storage.dtype if call.dtype is None else call.dtype
    if not isinstance(dtype, DType):
        raise CorruptInput(f"{where}: has an unknown dtype")
    if call.metadata is not None and (type(call.metadata) is not dict or any(call.metadata.values())):
        raise CorruptInput(f"{where}: is a lazy conjugate or negative", hint="save `.resolve_conj().resolve_neg()`")
    if not _is_counts(shape) or not _is_counts(strides) or len(shape) != len(strides) or not _is_count(call.offset):
        raise CorruptInput(f"{where}: offset, sizes and strides must be counts below 2**48, at most {_MAX_RANK} each")
    spec = TensorSpec(dtype, shape)
    room = storage.length * storage.dtype.itemsize
    begin = storage.start * storage.dtype.itemsize
    if 0 in shape:
        return Placed(storage, begin, dtype, shape, strides)
    end = (call.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1) * dtype.itemsize
    if end > room:
        raise CorruptInput(f"{where}: reaches up to byte {end} of storage {escape(storage.key)}, which has {room}")
    if spec.nbytes > room:
        raise CorruptInput(
            f"{where}: {spec} is {spec.nbytes} bytes expanded from a storage of {room}",
            hint="save a contiguous copy of the tensor",
        )
    return Placed(storage, begin + call.offset * dtype.itemsize, dtype, shape, strides)


def _is(value: object, text: str) -> bool:
    return type(value) is str and value == text


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_counts(value: object) -> bool:
    return type(value) is tuple and len(value) <= _MAX_RANK and all(_is_count(n) for n in value)
