"""Shard indexes: `model.safetensors.index.json`, `pytorch_model.bin.index.json` and their kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.paths import check_relative


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Which file holds which tensor. `total_size` is what the index claims, which is often wrong."""

    weight_map: dict[str, str]
    total_size: int | None

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def parse_index(data: bytes, shown: str) -> ShardIndex:
    """The index in a file's bytes; `shown` is its path, safe for a terminal.

    Raises `CorruptInput` for names that leave the folder, duplicate keys, or a map that is none.
    """
    document = strict_json.load_object(data, shown)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptInput(f"{shown}: expected a weight_map from tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptInput(f"{shown}: the file of {escape(tensor)} is not a string")
        check_relative(name, shown)
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(weight_map, int(total) if isinstance(total, (int, float)) else None)


def render_index(weight_map: Mapping[str, str], total_size: int, total_parameters: int | None) -> bytes:
    """The file as transformers writes it; 4.28, of 2023, wrote no `total_parameters`."""
    metadata = {"total_size": total_size}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    return strict_json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, ascii_only=True)
