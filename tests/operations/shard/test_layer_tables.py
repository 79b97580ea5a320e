"""The periods that models have by themselves are those of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from weightops.layouts.layer_config import _OWN_PERIODS, _PERIODS


def period(values: Sequence[object]) -> int | None:
    """The least step after which a list goes on as it began."""
    return next((n for n in range(1, len(values)) if values[n:] == values[:-n]), None)


@pytest.mark.parametrize("model_type", _OWN_PERIODS)
def test_a_period_is_that_of_the_default_config(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    for key, expected in _OWN_PERIODS[model_type].items():
        stated = getattr(config, key, None)
        assert expected == (stated if stated is not None else period(getattr(config, _PERIODS[key])))
