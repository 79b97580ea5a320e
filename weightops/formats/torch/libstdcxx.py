"""The iteration order of a C++ `std::unordered_set<std::string>` of GNU libstdc++, and its string hash.

torch.save ends an archive with an id that folds together the hashes of the member names *in the order in which
an unordered_set happens to yield them*. A byte-identical writer therefore has to know that order. It follows from
three things that libstdc++'s ABI has fixed: the hash (`libsupc++/hash_bytes.cc`, MurmurHash64A), the numbers of
buckets (`src/c++11/hashtable_c++0x.cc`) and where `bits/hashtable.h` links a new node in. torch's Linux wheels use
that library; those for other systems do not, and write other ids.
"""

from __future__ import annotations

from collections.abc import Sequence

_MASK = (1 << 64) - 1
_MULTIPLIER = 0xC6A4A7935BD1E995
_SEED = 0xC70F6907
_BUCKET_COUNTS = (
    *(13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229),
    *(172933, 351061, 712697, 1447153, 2938679, 5967347, 12117689),
)
"""The numbers of buckets of a set that grows one by one; it takes the next when it holds as many elements."""


def string_hash(data: bytes) -> int:
    """`std::hash<std::string>` of a string, a number of 64 bits."""
    whole = len(data) & ~7
    result = _SEED ^ (len(data) * _MULTIPLIER & _MASK)
    for i in range(0, whole, 8):
        word = int.from_bytes(data[i : i + 8], "little") * _MULTIPLIER & _MASK
        result = (result ^ (_shift_mix(word) * _MULTIPLIER & _MASK)) * _MULTIPLIER & _MASK
    if whole < len(data):
        result = (result ^ int.from_bytes(data[whole:], "little")) * _MULTIPLIER & _MASK
    return _shift_mix(_shift_mix(result) * _MULTIPLIER & _MASK)


def _shift_mix(value: int) -> int:
    return value ^ (value >> 47)


def iteration_order(hashes: Sequence[int]) -> list[int]:
    """The hashes of distinct strings (at most 12 million), inserted in this order, in the order the set yields them."""
    order: list[int] = []
    inserted = 0
    for bucket_count in _BUCKET_COUNTS:
        # A node goes to the front of its bucket, and a bucket's first node to the front of the one list of all
        # nodes; growing moves the nodes over, in list order, by the same rule.
        buckets: dict[int, list[int]] = {}
        for value in [*order, *hashes[inserted:bucket_count]]:
            buckets.setdefault(value % bucket_count, []).append(value)
        order = [value for bucket in reversed(buckets.values()) for value in reversed(bucket)]
        inserted = bucket_count
        if inserted >= len(hashes):
            break
    return order
