"""One layer quantised by gptqmodel's own GPTQ class, in its own environment, and by ours: the same integers."""

from __future__ import annotations

import itertools
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gptq import ORDERS, a_layer, output_error

from weightops.ops.gptq.solver import Hessian, Settings, dequantized, solve

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-gptqmodel/bin/python"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not PYTHON.exists(), reason="needs gptqmodel in an environment of its own: make gptqmodel")
def test_gptqmodel_finds_the_same_integers(tmp_path: Path) -> None:
    weight, inputs = a_layer(512, 256, tokens=2048)
    batches = inputs.reshape(8, 256, 512)
    chosen = [
        Settings(sym=sym, mse=False, v1=False, reference_order=True, **{"group_aware": False, **ORDERS[order]})
        for sym, order in itertools.product([True, False], ORDERS)
    ]
    cases = [
        {
            "bits": one.bits,
            "group_size": one.group_size,
            "sym": one.sym,
            "desc_act": one.desc_act,
            "act_group_aware": one.group_aware,
            "static_groups": one.static_groups,
            "damp_percent": one.damp_percent,
        }
        for one in chosen
    ]
    torch.save({"weight": weight, "inputs": batches, "cases": cases}, tmp_path / "in")
    script = ROOT / "tests/oracles/gptqmodel_single.py"
    run = subprocess.run(
        [PYTHON, script, tmp_path / "in", tmp_path / "out"],
        # Without it, its pool of workers cannot be had on two cores.
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    for one, theirs in zip(chosen, torch.load(tmp_path / "out", weights_only=True), strict=True):
        hessian = Hessian(512)
        for batch in batches:
            hessian.add(batch)
        own = hessian.matrix()
        assert torch.allclose(own, theirs["hessian"], rtol=1e-4, atol=1e-5 * float(own.max()))
        ours = solve(weight, theirs["hessian"].clone(), one)
        scales, zeros = theirs["scales"].T, theirs["zeros"].T
        groups = theirs["g_idx"].long()
        assert torch.equal(ours.q, (torch.round(theirs["weight"].T / scales[groups]) + zeros[groups]).byte())
        assert torch.equal(ours.scales, scales.half())
        assert torch.equal(ours.zeros, zeros.byte())
        assert torch.equal(ours.g_idx, theirs["g_idx"])
        # Our own order has the same error.
        fast = solve(weight, theirs["hessian"], replace(one, reference_order=False))
        error = output_error(weight, theirs["weight"], inputs)
        assert output_error(weight, dequantized(fast), inputs) == pytest.approx(error, rel=0.01)
