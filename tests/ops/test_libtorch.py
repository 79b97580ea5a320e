"""libtorch's C interface against torch itself: the same kernels, so the same bits, NaNs and subnormals included."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import random, sys
from weightops.ops import libtorch
from weightops.spec import DType

library = libtorch._library()
assert library is not None and "torch" not in sys.modules
source = random.Random(0)
count = 1 << 14
sums, casts = {}, {}
for dtype in libtorch._ADDED_BY_C:
    a, b = source.randbytes(count * dtype.itemsize), source.randbytes(count * dtype.itemsize)
    for sign in (1, -1):
        out = bytearray(a)
        library.accumulate(memoryview(out), memoryview(bytearray(b)), dtype, sign)
        sums[dtype, sign] = a, b, bytes(out)
for old in libtorch._BY_C:
    a = source.randbytes(count * old.itemsize)
    for new in libtorch._BY_C:
        out = bytearray(count * new.itemsize)
        library.convert(memoryview(out), new, memoryview(bytearray(a)), old)
        casts[old, new] = a, bytes(out)

import torch

torch.set_num_threads(1)

def tensor(data, dtype):
    return libtorch.as_torch(memoryview(bytearray(data)), dtype)

def bits(values):
    return values.view(torch.uint8).numpy().tobytes()

for (dtype, sign), (a, b, found) in sums.items():
    x, y = tensor(a, dtype), tensor(b, dtype)
    assert bits(x.add_(y) if sign == 1 else x.sub_(y)) == found, (dtype, sign)
for (old, new), (a, found) in casts.items():
    assert bits(tensor(a, old).to(getattr(torch, new.value))) == found, (old, new)
print(len(sums), len(casts))
"""


def test_the_c_interface_gives_the_bits_of_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "64"]
