"""Figures of agreement against their formulas on whole arrays, however the positions come in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from weightops.inference.agreement import NOISE, Agreements
from weightops.inference.figures import Divergence

VOCAB, COUNT = 50, 400


def logs(seed: int, like: torch.Tensor | None = None, noise: float = 1.0) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(COUNT, VOCAB) * noise
    return (logits + (like if like is not None else 0)).log_softmax(-1)


def measured(found: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor, step: int = 64) -> Divergence:
    agreements = Agreements(NOISE[torch.float32])
    for start in range(0, COUNT, step):
        rows = slice(start, start + step)
        agreements.add(found[rows], expected[rows], targets[rows], start + 1)
    return agreements.result(lambda token: f"t{token}", lambda index: (f"before {index}", None))


def test_every_figure_is_that_of_its_formula() -> None:
    expected = logs(0)
    found = logs(1, expected, 0.3)
    targets = torch.randint(0, VOCAB, (COUNT - 7,))  # the last positions predict nothing that is there
    result = measured(found, expected, targets)
    p, q = expected.double(), found.double()
    kl, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    for spread, values in ((result.kl, kl), (result.kl_reverse, reverse)):
        assert spread.mean == pytest.approx(float(values.mean()), rel=1e-5)
        assert spread.error == pytest.approx(float(values.std()) / math.sqrt(COUNT), rel=1e-4)
        assert (spread.max, spread.min) == pytest.approx((float(values.max()), float(values.min())), rel=1e-3)
        assert spread.median == pytest.approx(float(np.percentile(values, 50)), rel=1e-4)
        assert spread.percentiles["99.9"] == pytest.approx(float(np.percentile(values, 99.9)), rel=1e-4)
    own, theirs = (x.gather(1, F)[:, 0] for x, F in ((t[: len(targets)], targets[:, None]) for t in (q, p)))
    ratio = theirs - own
    assert result.log_perplexity_ratio.value == pytest.approx(float(ratio.mean()), rel=1e-4)
    # llama.cpp has it from variances and covariance, which is the same.
    variance = own.var() + theirs.var() - 2 * torch.cov(torch.stack([own, theirs]))[0, 1]
    assert result.log_perplexity_ratio.error == pytest.approx(math.sqrt(float(variance) / len(targets)), rel=1e-4)
    assert result.perplexity_ratio.value == pytest.approx(math.exp(float(ratio.mean())), rel=1e-4)
    assert result.correlation == pytest.approx(float(torch.corrcoef(torch.stack([own, theirs]))[0, 1]), rel=1e-4)
    change = own.exp() - theirs.exp()
    assert result.probability.mean == pytest.approx(float(change.mean()), rel=1e-3, abs=1e-7)
    assert result.probability_rms.value == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
    same = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.top1.value == pytest.approx(same)
    assert result.top1.error == pytest.approx(math.sqrt(same * (1 - same) / (COUNT - 1)))
    assert result.differing == round((1 - same) * COUNT)
    assert [each.index for each in result.worst] == [int(i) + 1 for i in kl.argsort(descending=True)[:10]]


def test_pieces_change_nothing() -> None:
    expected = logs(2)
    found, targets = logs(3, expected, 0.3), torch.randint(0, VOCAB, (COUNT,))
    assert measured(found, expected, targets, 64) == measured(found, expected, targets, COUNT)


def test_equal_predictions_have_no_divergence() -> None:
    same, targets = logs(4), torch.randint(0, VOCAB, (COUNT,))
    result = measured(same, same.clone(), targets)
    assert (result.kl.max, result.kl_reverse.max, result.probability_rms.value) == (0, 0, 0)
    assert (result.top1.value, result.top1.error, result.differing, result.first) == (1, 0, 0, None)
    assert result.worst == ()
    assert result.correlation == pytest.approx(1)


def test_where_they_first_part_and_whether_that_is_a_tie() -> None:
    expected = torch.full((COUNT, VOCAB), -10.0)
    expected[:, 3] = 5.0
    found = expected.clone()
    expected[20, 4], found[20, 4] = 5.0 - 4e-5, 5.0 + 4e-5  # within what float32 leaves open
    found[30, 7] = 6.0
    result = measured(found.log_softmax(-1), expected.log_softmax(-1), torch.full((COUNT,), 3))
    assert (result.differing, result.ties) == (2, 1)
    assert result.first is not None
    assert (result.first.index, result.first.is_tie) == (31, False)
    assert (result.first.of_reference.text, result.first.of_model.text) == ("t3", "t7")
    assert result.first.of_model.model - result.first.of_reference.model == pytest.approx(1, abs=1e-5)
    assert result.first.of_reference.reference - result.first.of_model.reference == pytest.approx(15, abs=1e-5)
    found[30, 7] = -10.0
    tie = measured(found.log_softmax(-1), expected.log_softmax(-1), torch.full((COUNT,), 3)).first
    assert tie is not None
    assert (tie.index, tie.is_tie) == (21, True)
