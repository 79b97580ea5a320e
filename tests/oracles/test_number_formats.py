"""Checkpoints that the libraries of number formats write, held to what they make of them, to the bit.

Each library runs in an environment of its own, which `make formats` makes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from environments import environment, run_script
from safetensors import safe_open

import weightops
from weightops.formats.folder import open_checkpoint

NEW, OLD = environment("formats"), environment("formats-old")
LIBRARIES = {
    "compressed-tensors": (NEW, "formats_compressed_tensors.py"),
    "bitsandbytes": (NEW, "formats_bitsandbytes.py"),
    "torchao": (NEW, "formats_others.py", "torchao"),
    "quanto": (NEW, "formats_others.py", "quanto"),
    "mlx": (NEW, "formats_others.py", "mlx"),
    "modelopt": (NEW, "formats_others.py", "modelopt"),
    "transformers": (NEW, "formats_others.py", "transformers"),
    "compressed-tensors-0.12": (OLD, "formats_old.py", "compressed"),
    "hqq": (OLD, "formats_old.py", "hqq"),
}


def differences(folder: Path, out: Path) -> list[str]:
    """The weights of a case that are not the library's, bit for bit but for the sign of zero."""
    wrong = []
    for file, dtype in (("native", None), ("float32", "float32")):
        if not (folder / f"{file}.safetensors").exists():
            continue
        weightops.dequantize(folder / "model", out / file, dtype=dtype)
        found = open_checkpoint(out / file)
        with safe_open(folder / f"{file}.safetensors", "pt") as expected:
            for name in expected.keys():  # noqa: SIM118  no mapping
                theirs, ours = expected.get_tensor(name), found[name].torch()
                # Adding zero makes -0 and 0 the same: libraries disagree about the sign of FP4's code 8. Of rows of
                # zeros some make codes that are no numbers.
                pair = ((tensor + 0).nan_to_num(nan=1e4) for tensor in (theirs, ours))
                if theirs.dtype != ours.dtype or not torch.equal(*pair):
                    wrong.append(f"{folder.name}: {name}: {ours.dtype} {file}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_are_those_of_the_library(library: str, tmp_path: Path) -> None:
    where, script, *arguments = LIBRARIES[library]
    run_script(where, script, *arguments, tmp_path / "made")
    cases = sorted(path for path in (tmp_path / "made").iterdir())
    assert [line for folder in cases for line in differences(folder, tmp_path / "out" / folder.name)] == []
