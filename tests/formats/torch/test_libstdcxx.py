"""The string hash and the order of libstdc++, against what programs compiled by g++ 12 print."""

from __future__ import annotations

import hashlib

import pytest

from weightops.formats.torch.libstdcxx import iteration_order, string_hash


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 6142509188972423790),
        ("a", 4993892634952068459),
        ("data.pkl", 4941642132189851806),
        ("data/100", 5279430450450180278),
        ("a" * 17, 3588026257191232719),
    ],
)
def test_hash_is_that_of_the_library(text: str, expected: int) -> None:
    assert string_hash(text.encode()) == expected


@pytest.mark.parametrize(
    ("count", "md5"),
    [
        (1, "134076fc8eb31d257e636d1b90a41db6"),
        (13, "f2a3917c79f1b252940589459199d959"),
        (14, "1e19ea28d447bf7527edb253e51fd4e8"),
        (29, "c5262bd6720c824bb1703e97f390e553"),
        (30, "023d254b162f444d31c9d6cf179651e9"),
        (1000, "b5f67bebec7ad324155cf2f2a35a0a4d"),
        (90000, "aadfe9f61fbdf71689cb37edd715f492"),
    ],
)
def test_order_is_that_of_the_library(count: int, md5: str) -> None:
    names = {string_hash(name.encode()): name for name in (f"data/{i}" for i in range(count))}
    order = " ".join(names[value] for value in iteration_order(list(names)))
    assert hashlib.md5(order.encode()).hexdigest() == md5
