"""Models of which no blocks can be run one after the other are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from weightops.errors import UsageError
from weightops.inference.skeleton import build, find_blocks


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("t5", "here: t5 has an encoder"), ("clip", "here: transformers makes no language model of clip")],
)
def test_what_is_no_decoder_is_refused(model_type: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(CONFIG_MAPPING[model_type](), "here", torch.float32)


def test_a_config_that_cannot_be_built_is_told() -> None:
    config = CONFIG_MAPPING["llama"](**{**CONFIGS["llama"], "hidden_act": "none of them"})
    with pytest.raises(UsageError, match=r"no language model of llama .*none of them"):
        build(config, "here", torch.float32)


@pytest.mark.parametrize("depth", [2, 3])
def test_blocks_are_the_list_as_long_as_the_model_is_deep(depth: int) -> None:
    sizes: dict[str, Any] = CONFIGS["llama"]
    module = build(CONFIG_MAPPING["llama"](**sizes), "here", torch.float32)
    module.config.num_hidden_layers = depth
    if depth == sizes["num_hidden_layers"]:
        assert find_blocks(module, "here") == [f"model.layers.{i}" for i in range(depth)]
    else:
        with pytest.raises(UsageError, match=r"keeps its 2 blocks in no single list.*model\.layers \(3\)"):
            find_blocks(module, "here")
