"""Which tile sizes a multiplication runs with: tables of tuned ones by device and shape, and seeds for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Rows of `x` fall into the first bucket that holds them; more than the last count as the last."""
REDUCTIONS = ("atomic", "two_pass")


@dataclass(frozen=True)
class Config:
    """How one multiplication is cut up."""

    block_m: int = 16
    block_n: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    reduction: str = "two_pass"
    """How the splits of K are added: by float32 atomics, or as partial sums that a second pass adds in order."""
    dequantize: bool = False
    """Whether the weight is dequantised first and torch's own multiplication used; nothing else matters then."""

    def deterministic(self) -> Config:
        """The same, with a result that does not depend on the order in which programs finish."""
        return replace(self, reduction="two_pass")


@dataclass(frozen=True)
class Key:
    """What a tuned config is kept under."""

    device: str
    m: int
    """A bucket."""
    n: int
    k: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.device}|m{self.m}|n{self.n}|k{self.k}|g{self.group_size}"


def bucket(m: int) -> int:
    """The bucket of `m` rows."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


TABLE: dict[str, Config] = {}
"""Tuned configs by key; `load` adds to it."""


def read_table(path: Path) -> dict[str, Config]:
    """The configs of a file that the tuner wrote. Raises ValueError naming the file and entry that is not a config."""
    try:
        entries = json.loads(path.read_text("utf-8"))
        return {str(key): Config(**entry) for key, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of kernel configs: {error}.") from error


def write_table(path: Path, table: Mapping[str, Config]) -> None:
    """Write configs where `read_table` finds them."""
    text = json.dumps({key: asdict(config) for key, config in sorted(table.items())}, indent=1)
    path.write_text(text + "\n", "utf-8", newline="\n")


def load(path: Path) -> None:
    """Use the configs of a file from now on, before the seeds."""
    TABLE.update(read_table(path))


# Up to so many rows: tile of M, tile of N, warps, stages, programs for each multiprocessor. The seeds follow what
# public tunings of split-K kernels on an H100 found (a padded tile of 16 rows beats a matrix-vector kernel), and
# what the compiler says of registers and shared memory (`python -m weightops_kernels.aot`); no GPU has confirmed them.
SEEDS = (
    (16, 16, 128, 4, 4, 4),
    (32, 32, 128, 4, 3, 3),
    (511, 64, 128, 8, 3, 2),
)
DEQUANTIZE_FROM = 512
"""Rows from which dequantising first is taken to be faster: it costs about as much as reading and writing
2.5 bytes for each weight, which many rows share."""


def seed(m: int, n: int, k: int, multiprocessors: int) -> Config:
    """A config for shapes that no table knows: enough splits of K to fill the device, none empty."""
    if m >= DEQUANTIZE_FROM:
        return Config(dequantize=True)
    _, block_m, block_n, warps, stages, programs = next(s for s in SEEDS if m <= s[0])
    tiles = -(-m // block_m) * -(-n // block_n)
    blocks = max(1, -(-k // 128))
    split = min(blocks, 16, max(1, round(programs * multiprocessors / max(1, tiles))))
    return Config(block_m, block_n, split, warps, stages)


def choose(device: str, m: int, n: int, k: int, group_size: int, multiprocessors: int) -> Config:
    """The tuned config of a shape on a device, or a seed."""
    found = TABLE.get(str(Key(device, bucket(m), n, k, group_size)))
    return found or seed(m, n, k, multiprocessors)
