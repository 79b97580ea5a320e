"""What mergekit-tokensurgeon 0.1.5 makes of the same models, in an environment of its own: `make mergekit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from environments import environment, run_script
from test_vocab_transplant import donor_files
from tokenizer_folders import bpe, dumped
from vocabularies import matrices, write_model

import weightops

METHODS = ("zero", "mean", "subword", "omp")


@pytest.mark.slow
def test_rows_are_those_of_mergekit_but_for_the_sums_that_it_rounds_often(tmp_path: Path) -> None:
    files = bpe("qwen2", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    files["config.json"] = dumped({"bos_token_id": 900, "eos_token_id": 901, "pad_token_id": None})
    files["generation_config.json"] = dumped({"eos_token_id": [900, 901]})
    write_model(tmp_path / "model", files)
    write_model(tmp_path / "donor", donor_files(), hidden_size=8)
    run_script(environment("mergekit"), "mergekit_transplants.py", tmp_path, 5, *METHODS)
    for method in METHODS:
        ours, theirs = tmp_path / method, tmp_path / "theirs" / method
        options = {"k": 5} if method == "omp" else {}
        weightops.vocab(tmp_path / "model", ours, tokenizer=tmp_path / "donor", method=method, **options)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            own, other = (matrices(folder)[name].float() for folder in (ours, theirs))
            assert own.shape == other.shape
            far = ((own - other).abs() > 2**-6 * other.abs().amax(1, keepdim=True) + 1e-3).any(1)
            # A near tie is decided otherwise, and letters that stand for bytes are no text.
            assert far.sum() <= {"omp": 0.03, "subword": 0.15}.get(method, 0) * len(own), (method, name)
            if method in ("zero", "mean"):
                assert torch.equal(own, other)
        ids = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
        assert len({tuple(each.get(f"{role}_token_id") for role in ("bos", "eos", "pad")) for each in ids}) == 1
        wrong = theirs / "generation_config.json"
        right = json.loads((ours / "generation_config.json").read_text())["eos_token_id"]
        assert right == 500
        assert not wrong.exists() or json.loads(wrong.read_text())["eos_token_id"] != right
