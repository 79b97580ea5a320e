"""What the writer writes byte by byte is what Python's pickle writes."""

from __future__ import annotations

import pickle

from hypothesis import example, given
from hypothesis import strategies as st

from weightops.formats.torch.pickle_writer import _int


@given(st.integers(0, 1 << 70))
@example((1 << 8) - 1)
@example(1 << 8)
@example((1 << 16) - 1)
@example(1 << 16)
@example((1 << 31) - 1)
@example(1 << 31)
@example((1 << 32) - 1)
@example(1 << 63)
def test_a_count_is_written_as_pickle_writes_it(value: int) -> None:
    assert b"\x80\x02" + _int(value) + b"." == pickle.dumps(value, 2)
