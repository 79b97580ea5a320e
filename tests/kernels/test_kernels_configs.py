"""Tables of tuned configs, and seeds for what they do not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weightops_kernels import configs, tune
from weightops_kernels.configs import Config, Key


def test_a_tuned_config_is_used_for_its_device_shape_and_bucket_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "TABLE", {})
    tuned = Config(32, 256, 5, 8, 4, "atomic")
    configs.write_table(tmp_path / "table.json", {str(Key("GPU", 16, 4096, 11008, 128)): tuned})
    configs.load(tmp_path / "table.json")
    assert configs.choose("GPU", 9, 4096, 11008, 128, 132) == tuned
    for device, m, n, group_size in (("other", 9, 4096, 128), ("GPU", 17, 4096, 128), ("GPU", 9, 4096, 32)):
        assert configs.choose(device, m, n, 11008, group_size, 132) != tuned


@pytest.mark.parametrize("text", ["[]", "{", '{"a": {"block": 3}}', '{"a": 1}'])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is not a table of kernel configs"):
        configs.read_table(tmp_path / "table.json")


@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 511])
def test_seeds_fill_the_device_and_leave_no_split_empty(m: int) -> None:
    for n, k in ((28672, 8192), (4096, 4096), (32, 64), (11008, 4096)):
        config = configs.seed(m, n, k, 132)
        programs = -(-m // config.block_m) * -(-n // config.block_n) * config.split_k
        assert 1 <= config.split_k <= max(1, k // 128)
        assert programs >= 66 or config.split_k in (16, max(1, k // 128))


def test_many_rows_are_dequantised_first() -> None:
    assert configs.seed(4096, 4096, 4096, 132).dequantize


def test_a_deterministic_config_has_no_atomics() -> None:
    assert Config(split_k=4, reduction="atomic").deterministic() == Config(split_k=4, reduction="two_pass")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_the_tuner_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune", "--out", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert "tune needs a CUDA GPU, and torch finds none." in capsys.readouterr().err


def test_the_tuner_tries_dequantising_and_no_split_that_would_be_empty() -> None:
    few, many = (list(tune.candidates(m, 512)) for m in (1, 1024))
    assert max(config.split_k for config in few) == 4
    assert not any(config.dequantize for config in few)
    assert any(config.dequantize for config in many)
