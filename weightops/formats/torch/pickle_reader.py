"""A pickle interpreter that builds plain data and calls nothing that the pickle names.

Opcodes are those of CPython's Lib/pickletools.py that torch.save produces. A global is looked up in an allow-list of
our own functions, so that a pickle can choose among them and never reach any other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput
from weightops.io.escape import escape

MAX_NBYTES = 64 << 20
"""The largest pickle worth reading: some hundred thousand tensors."""

_MAX_OPCODES = 8_000_000
_MAX_MEMO = 2_000_000
_MAX_STACK = 1_000_000
_MAX_NAME_NBYTES = 1000
_KEYS = (str, int, bool, float, bytes, type(None))


class PickleCut(CorruptInput):
    """The data ends before the pickle does."""


@dataclass(frozen=True, slots=True)
class Call:
    """Stands for a global that a pickle may call. `build` raises `ValueError` or `TypeError` for wrong arguments."""

    build: Callable[..., object]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Stands for a global that is harmless, and of no use to us."""

    reason: str
    hint: str


def read_pickle(
    data: bytes,
    start: int,
    what: str,
    allowed: Mapping[tuple[str, str], object],
    persistent: Callable[[Any], object],
) -> tuple[Any, int]:
    """The object pickled at `start` of `data`, and where its pickle ends.

    `allowed` maps (module, name) to what stands for that global; `persistent` makes objects of persistent ids, and
    raises `ValueError` for wrong ones. The result may be a graph in which containers occur many times or hold
    themselves: walk it only while noting what was seen, and never print, compare or copy it. Raises `CorruptInput`
    that begins with `what`; `PickleCut` if `data` ends too early.
    """
    machine = _Machine(data, start, what, allowed, persistent)
    try:
        return machine.run(), machine.position
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error) if type(error) is ValueError else "malformed"
        raise CorruptInput(f"{what}: the pickle goes wrong at byte {machine.position}: {reason}") from None


def set_item(target: dict[Any, Any], key: object, value: object) -> None:
    """`target[key] = value`, for keys that are cheap to hash and were not set before; else `ValueError`."""
    # Hashing a tuple that holds itself many times takes forever, and so do many large integers of equal hash.
    if type(key) not in _KEYS or (isinstance(key, int) and key.bit_length() > 60):
        raise ValueError(f"a {type(key).__name__} as the key of a dict")
    if key in target:
        raise ValueError(f"the key {escape(key)!r} is set twice" if isinstance(key, str) else "a key is set twice")
    target[key] = value


class _Mark:
    """What the opcode MARK puts on the stack. Never part of a result."""


_MARK = _Mark()


class _Machine:
    """The state of the interpreter; its methods are the opcodes that take more than a line."""

    def __init__(
        self,
        data: bytes,
        start: int,
        what: str,
        allowed: Mapping[tuple[str, str], object],
        persistent: Callable[[Any], object],
    ) -> None:
        self.position = start
        self.stack: list[Any] = []
        self._data = data
        self._what = what
        self._allowed = allowed
        self._persistent = persistent
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(1) != b"\x80" or not 2 <= self.take(1)[0] <= 5:
            raise ValueError("expected protocol 2, 3, 4 or 5")
        stack = self.stack
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            if code == b".":
                if len(stack) != 1:
                    raise ValueError(f"{len(stack)} objects at its end, expected 1")
                return self.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise ValueError(f"opcode {code!r} is none that torch.save writes")
            operation(self)
            if len(stack) > _MAX_STACK:
                raise ValueError(f"more than {_MAX_STACK} objects on its stack")
        raise ValueError(f"more than {_MAX_OPCODES} opcodes")

    def take(self, nbytes: int) -> bytes:
        stop = self.position + nbytes
        if stop > len(self._data):
            raise PickleCut(f"{self._what}: the pickle is cut short, it needs byte {stop} of {len(self._data)}")
        data = self._data[self.position : stop]
        self.position = stop
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, form: str) -> str:
        return self.take(self.number(form)).decode("utf-8")

    def line(self) -> str:
        stop = self._data.find(b"\n", self.position, self.position + _MAX_NAME_NBYTES)
        if stop < 0:
            self.take(_MAX_NAME_NBYTES)
            raise ValueError(f"a name of more than {_MAX_NAME_NBYTES} bytes")
        return self.take(stop + 1 - self.position)[:-1].decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.pop_many(1)[0]

    def pop_many(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("too few objects on its stack")
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark on its stack")

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise ValueError(f"a {type(value).__name__} is used like a {kind.__name__}")
        return value

    def put(self, index: int) -> None:
        value = self.pop()
        if len(self._memo) >= _MAX_MEMO:
            raise ValueError(f"more than {_MAX_MEMO} objects in its memo")
        self._memo[index] = value
        self.push(value)

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"nothing in its memo at {index}")
        self.push(self._memo[index])

    def drop(self, value: object) -> None:
        """For opcodes whose operand does not matter."""

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self.top(dict)
        for i in range(0, len(items), 2):
            set_item(target, items[i], items[i + 1])

    def find_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        shown = escape(f"{module}.{name}")
        if (module, name) not in self._allowed:
            raise CorruptInput(
                f"{self._what}: asks to run `{shown}`; weightops never executes code in a checkpoint",
                hint="if you trust the file, load it where it was made and save its tensors alone",
            )
        value = self._allowed[module, name]
        if isinstance(value, Refuse):
            raise CorruptInput(f"{self._what}: {value.reason} (`{shown}`)", hint=value.hint)
        self.push(value)

    def reduce(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, Call) or type(arguments) is not tuple:
            raise ValueError(f"a {type(function).__name__} is called")
        self.push(function.build(*arguments))

    def build(self) -> None:
        """State of an object; torch gives state dicts `_metadata`, which is about modules and not needed."""
        self.pop()
        self.top(dict)

    def persistent_id(self) -> None:
        self.push(self._persistent(self.pop()))


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    # Constants and numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # Text and bytes; T and U are the strings of Python 2
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("<B")),
    b"\x8d": lambda m: m.push(m.text("<Q")),
    b"T": lambda m: m.push(m.text("<I")),
    b"U": lambda m: m.push(m.text("<B")),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    # Containers
    b"(": lambda m: m.push(_MARK),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_to_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push(tuple(m.pop_many(1))),
    b"\x86": lambda m: m.push(tuple(m.pop_many(2))),
    b"\x87": lambda m: m.push(tuple(m.pop_many(3))),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items(m.pop_many(2)),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    # Stack, memo and frames
    b"0": lambda m: m.drop(m.pop()),
    b"1": lambda m: m.drop(m.pop_to_mark()),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.memoize(),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"\x95": lambda m: m.drop(m.number("<Q")),
    # Globals, calls, state and storages
    b"c": lambda m: m.find_global(m.line(), m.line()),
    b"\x93": lambda m: m.find_global(*m.pop_many(2)),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent_id(),
}
