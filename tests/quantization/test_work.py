"""The folder beside a quantised output: only what such a run makes is in it, and only the same run goes on there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_tiny

import weightops
from weightops.engine.staging import Staging
from weightops.errors import Locked, OutputExists, PlanDiffers, UsageError
from weightops.ops.gptq.grid import Settings
from weightops.quantization.options import Options
from weightops.quantization.work import BlocksRun, Work


def a_run(bits: int = 4) -> BlocksRun:
    return BlocksRun(source="a", contents="b", options=Options(Settings(bits=bits)), calibration=None, versions={})


RUN = a_run()


def strangers(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")


def a_link(folder: Path) -> None:
    strangers(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def a_subfolder(folder: Path) -> None:
    (folder / "block-00000.safetensors").mkdir(parents=True)


def strangers_in_ours(folder: Path) -> None:
    with Work(folder.with_name("out"), RUN, 3):
        pass
    (folder / "thesis.txt").write_text("precious")


def strangers_below_ours(folder: Path) -> None:
    with Work(folder.with_name("out"), RUN, 3):
        pass
    (folder / "sub").mkdir()
    (folder / "sub/block-00000.safetensors").write_text("precious")


@pytest.mark.parametrize("make", [strangers, a_link, a_subfolder, strangers_in_ours, strangers_below_ours])
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, make: Callable[[Path], None], restart: bool) -> None:
    make(tmp_path / "out.blocks")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(OutputExists, match=r"out\.blocks"):
        Work(tmp_path / "out", RUN, 3, restart=restart)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    with Work(tmp_path / "out", RUN, 3) as work:
        work.commit(0, {"q": np.zeros(3, np.int32)}, {"loss": 1.0})
        work.hidden(1, (1, 1, 1)).__exit__()
        with pytest.raises(Locked, match=f"process {os.getpid()} on"):
            Work(tmp_path / "out", RUN, 3)
    with Work(tmp_path / "out", RUN, 3) as work:
        assert work.n_done == 1
        assert work.read(0)[1] == {"loss": 1.0}
    with pytest.raises(PlanDiffers, match=r"is of another run: options\.settings\.bits was 4, now 3"):
        Work(tmp_path / "out", a_run(3), 3)
    with Work(tmp_path / "out", a_run(3), 3, restart=True) as work:
        assert work.n_done == 0
        work.work_folder.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["model", "model/q", "."])
def test_nothing_is_written_into_the_source(tmp_path: Path, out: str) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="lie inside one another"):
        weightops.quantize(tmp_path / "model", tmp_path / out, method="rtn", group_size=32, overwrite=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_run_killed_when_it_had_all_but_cleaned_up_leaves_nothing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    options: dict[str, Any] = {"method": "rtn", "group_size": 32}
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "clean", lambda self: self._work.close())  # as the kernel does for a dead process
        weightops.quantize(tmp_path / "model", tmp_path / "out", **options)
    assert (tmp_path / "out.blocks").exists()
    (tmp_path / "out.blocks/thesis.txt").write_text("precious")
    with pytest.raises(OutputExists, match="out exists"):
        weightops.quantize(tmp_path / "model", tmp_path / "out", **options)
    assert (tmp_path / "out.blocks/thesis.txt").read_text() == "precious"
    (tmp_path / "out.blocks/thesis.txt").unlink()
    with pytest.raises(OutputExists, match="out exists"):
        weightops.quantize(tmp_path / "model", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
