"""Tiny models with a layer that predicts the token after the next, and without."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import tiny

FURTHER = {"mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": torch.ones(64)}


def save_with_mtp(folder: Path, tuned: Path | None = None) -> None:
    """Write a model as Qwen 3 Next is published; and as training leaves it, in the folder `tuned`."""
    tiny("qwen3_next", **{**COMMON, **FAMILIES["qwen3_next"]}).save_pretrained(folder)
    if tuned is not None:
        shutil.copytree(folder, tuned)
    save_file({**load_file(folder / "model.safetensors"), **FURTHER}, folder / "model.safetensors", {"format": "pt"})
