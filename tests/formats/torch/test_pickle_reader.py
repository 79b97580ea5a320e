"""The pickle interpreter: plain data comes through, nothing is called, and no pickle grows beyond its bounds."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.errors import CorruptInput
from weightops.formats.torch.objects import ALLOWED
from weightops.formats.torch.pickle_reader import Call, PickleCut, read_pickle

keys = st.text(max_size=4) | st.integers(-9, 9).filter(lambda n: n not in (0, 1)) | st.booleans() | st.none()
leaves = keys | st.floats(allow_nan=False) | st.integers(-(1 << 200), 1 << 200) | st.binary(max_size=300)
data = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5) | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=30,
)


def no_storage(pid: object) -> object:
    raise ValueError(f"a persistent id: {pid}")


def read(pickled: bytes, allowed: Any = ALLOWED, persistent: Callable[[Any], object] = no_storage) -> Any:
    value, end = read_pickle(pickled, 0, "x.bin", allowed, persistent)
    assert end == len(pickled)
    return value


@given(data, st.integers(3, 5))
def test_plain_data_comes_through(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bytes_sizes_and_ordered_dicts_come_through(protocol: int) -> None:
    state = OrderedDict([("a", b"\x00\xff"), ("b", OrderedDict())])
    state._metadata = {"": {"version": 1}}
    assert read(pickle.dumps(state, protocol)) == state


def test_strings_and_dicts_of_python_2_come_through() -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](T\x01\0\0\0bK\x02ee\x85R."
    assert read(pickled) == {"a": 1, "b": 2}


def test_a_list_that_holds_itself_is_read() -> None:
    value: list[Any] = []
    value.append(value)
    found = read(pickle.dumps(value, 2))
    assert found[0] is found


def test_several_pickles_follow_each_other() -> None:
    pickled = pickle.dumps(1, 2) + pickle.dumps("b", 4)
    value, end = read_pickle(pickled, 0, "x", ALLOWED, no_storage)
    assert (value, read_pickle(pickled, end, "x", ALLOWED, no_storage)) == (1, ("b", len(pickled)))


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, pickle.loads])
def test_functions_are_refused_by_name(tmp_path: Path, function: Any, protocol: int) -> None:
    canary = tmp_path / "canary"
    pickled = pickle.dumps({"w": Runs(function, f"touch {canary}")}, protocol)
    with pytest.raises(CorruptInput, match=r"^x.bin: asks to run `\w+\.\w+`; weightops never executes code") as caught:
        read(pickled)
    assert function.__name__ in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "pip\nmain",
        "pkgutil\nresolve_name",
        "operator\nmethodcaller",
        "_interpreters\nrun_string",
        "builtins\neval",
        "torch\nload",
        "torch.hub\nload",
        "torch._utils\n_import_dotted_name",
        "weightops.formats.torch.pickle_reader\nCall",
        "collections\nOrderedDict.fromkeys",
        "numpy.core.multiarray\n_reconstruct",
        "numpy\nndarray",
    ],
)
def test_other_globals_are_refused_by_name(name: str) -> None:
    shown = name.replace("\n", ".")
    with pytest.raises(CorruptInput, match="asks to run") as caught:
        read(b"\x80\x02c" + name.encode() + b"\n)R.")
    assert f"`{shown}`" in str(caught.value)


def test_names_from_a_pickle_are_harmless_on_a_terminal() -> None:
    with pytest.raises(CorruptInput, match="asks to run") as caught:
        read(b"\x80\x02cos\x1b[2J\nsystem\n)R.")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
        b")\x81.",  # NEWOBJ
        b"\x82\x01.",  # EXT1
        b"\x8b\x00\x00\x00\x01.",  # LONG4
        b"I1\n.",  # INT
        b"P1\n.",  # PERSID
        b"\x8f.",  # EMPTY_SET
        b"\x97.",  # NEXT_BUFFER
        b"\xff.",
    ],
)
def test_other_opcodes_are_refused(body: bytes) -> None:
    with pytest.raises(CorruptInput, match=r"is none that torch.save writes|never executes code"):
        read(b"\x80\x02" + body)


@pytest.mark.parametrize(
    "body",
    [
        b".",  # nothing to return
        b"NN.",  # two objects
        b"(.",  # a mark
        b"0.",
        b"t.",
        b"\x86.",
        b"(\x85.",
        b"h\x00.",  # empty memo
        b"q\x00.",
        b"Na.",  # append to None
        b"(NNNu.",
        b"}(Nu.",  # a key without a value
        b"}]Ns.",  # an unhashable key
        b"})Ns.",  # a tuple as key: hashing it may take forever
        b"}\x8a\x09\0\0\0\0\0\0\0\0\x01Ns.",  # a large integer as key: many may have the same hash
        b"}K\x01NsK\x01Ns.",  # the same key twice
        b"NNR.",  # calls None
        b"ctorch\nSize\nK\x01R.",  # arguments that are no tuple
        b"ctorch\nSize\nK\x01\x85R.",
        b"ccollections\nOrderedDict\n]K\x01a\x85R.",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0rot\x86R.",
        b"Nb.",
        b"N}b.",  # state for None
        b"NNb.",
        b"NQ.",  # persistent id of no storage
        b"X\x01\x00\x00\x00\xff.",  # not UTF-8
        b"X\x03\x00\x00\x00\xed\xa0\x80.",  # half of a surrogate pair
        b"N\x93.",
        b"NN\x93.",
        b"c" + b"a" * 5000 + b"\nb\n.",
    ],
)
def test_malformed_pickles_are_refused(body: bytes) -> None:
    with pytest.raises(CorruptInput, match=r"^x\.bin: "):
        read(b"\x80\x02" + body)


@pytest.mark.parametrize("start", [b"", b"\x80", b"\x80\x01N.", b"\x80\x06N.", b"N.", b"(lp0\n."])
def test_other_protocols_are_refused(start: bytes) -> None:
    with pytest.raises(CorruptInput, match=r"is cut short|expected protocol 2, 3, 4 or 5"):
        read(start)


@pytest.mark.parametrize("code", [b"X", b"\x8d", b"B", b"\x8e", b"T"])
def test_lengths_beyond_the_end_allocate_nothing(code: bytes) -> None:
    length = struct.pack("<Q", 1 << 40) if code in b"\x8d\x8e" else b"\xff\xff\xff\xff"
    with pytest.raises(PickleCut):
        read(b"\x80\x04" + code + length + b"abc.")


def test_a_memo_bomb_is_read_and_not_expanded() -> None:
    """Lists of twice the list before: 2**60 elements for whoever walks it without noting what was seen."""
    doubled = b"".join(b"(h%ch%clq%c0" % (i, i, i + 1) for i in range(60))
    value = read(b"\x80\x02]q\x000" + doubled + b"h\x3c.")
    assert len(value) == 2
    assert value[0] is value[1]


@pytest.mark.parametrize(
    ("name", "body"), [("STACK", b"N" * 101), ("MEMO", b"N" + b"\x94" * 101), ("OPCODES", b"N0" * 51)]
)
def test_stack_memo_and_opcodes_are_bounded(name: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"weightops.formats.torch.pickle_reader._MAX_{name}", 100)
    with pytest.raises(CorruptInput, match="more than"):
        read(b"\x80\x04" + body + b".")


def test_only_given_functions_are_called() -> None:
    called: list[object] = []
    allowed = {("a", "b"): Call(lambda *arguments: called.append(arguments))}
    read(b"\x80\x02ca\nb\nK\x01K\x02\x86R.", allowed)
    assert called == [(1, 2)]


@settings(max_examples=300)
@given(data, st.integers(2, 5), st.randoms(use_true_random=False))
def test_any_damage_is_harmless(value: object, protocol: int, random: Any) -> None:
    pickled = bytearray(pickle.dumps(value, protocol))
    for _ in range(random.randint(1, 4)):
        pickled[random.randrange(len(pickled))] = random.randrange(256)
    with contextlib.suppress(CorruptInput):
        read_pickle(bytes(pickled), 0, "x", ALLOWED, no_storage)


@given(st.binary(max_size=60))
def test_any_bytes_are_harmless(body: bytes) -> None:
    with contextlib.suppress(CorruptInput):
        read_pickle(b"\x80\x02" + body, 0, "x", ALLOWED, no_storage)
