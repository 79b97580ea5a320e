"""Makes this folder's golden files: python3.9 make.py, with torch==1.12.0.

`expected.md5` is of files too large to keep, which hold zeros; `--large` includes those above 4 GiB.
"""

import hashlib
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "float16",
    "bfloat16",
    "int32",
    "float32",
    "complex64",
    "float64",
    "int64",
    "complex128",
]


class Md5:
    """A file that keeps its digest alone."""

    def __init__(self):
        self.state = hashlib.md5()

    def write(self, data):
        self.state.update(data)
        return len(memoryview(data).cast("B"))

    def flush(self):
        pass


def random(dtype, *shape):
    return torch.randint(0, 2 if dtype == "bool" else 100, shape).to(getattr(torch, dtype))


def zeros(count, dtype=torch.uint8):
    return torch.zeros(count, dtype=dtype)


def main():
    torch.manual_seed(0)
    shared = random("float32", 4, 3)
    files = {
        "empty": {},
        "single": {"weight": random("float16", 3, 5)},
        "dtypes": {f"layers.0.{dtype}": random(dtype, 2, 3) for dtype in DTYPES},
        "shapes": {**{str(rank): random("float32", *[2] * rank) for rank in range(6)}, "é": random("int64", 2, 0, 3)},
        "shared": {"embed": shared, "other": random("int32", 300, 30), "head": shared.view(4, 3)},
    }
    for name, state_dict in files.items():
        torch.save(state_dict, HERE / f"{name}.bin")
    torch.save(files["dtypes"], HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    large = {
        "count-1000": lambda: {f"t{i}": zeros(i % 3) for i in range(1000)},
        "count-2001": lambda: {f"t{i}": zeros(i % 3) for i in range(2001)},
    }
    if "--large" in sys.argv:
        large |= {
            "member": lambda: {
                "first": zeros(5),
                "large": zeros((1 << 32) - 1),
                "after": zeros(6, torch.float16),
                "empty": zeros(0),
            },
            "numel": lambda: {"large": zeros((1 << 31) + 8, torch.int16), "after": zeros(3)},
            "offsets": lambda: {f"layer.{i}": zeros(3 << 27, torch.float32) for i in range(3)},
            "count-65600": lambda: {f"t{i}": zeros(i % 3) for i in range(65600)},
        }
    lines = []
    for name, make in large.items():
        file = Md5()
        torch.save(make(), file)
        lines.append(f"{file.state.hexdigest()}  {name}\n")
    (HERE / "expected.md5").write_text("".join(lines))


if __name__ == "__main__":
    main()
