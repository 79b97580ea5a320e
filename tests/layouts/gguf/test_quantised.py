"""GGUF files in the mixes of llama-quantize: its bytes, and what is refused or said."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_models import save_family, save_mxfp4
from quantised_models import save_wide, write_importance

from weightops import api
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.spec import DType

DIGESTS = json.loads((Path(__file__).parents[2] / "golden/llamacpp/quantised.json").read_text())
"""SHA-256 of the files that llama-quantize of llama-cpp-python 0.3.36 makes of these very models, without FMA."""
OPTIONS: dict[str, dict[str, Any]] = {
    "llama q4_k_m": {"imatrix": "importance.gguf"},
    "qwen2 q3_k_s": {},
    "mixtral iq4_xs": {"imatrix": "importance.dat"},
    "mixtral q5_k_m": {"tensor_type": "attn_v=q4_1"},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A GGUF file in float16, beside it the folder that it was made of."""
    save_family(tmp_path / "model", "llama")
    api.convert(tmp_path / "model", tmp_path / "base.gguf", to="gguf", dtype="f16")
    return tmp_path / "base.gguf"


@pytest.mark.parametrize("case", OPTIONS)
def test_files_are_those_of_llama_quantize(tmp_path: Path, case: str) -> None:
    name, kind = case.split()
    options = dict(OPTIONS[case])
    save_wide(tmp_path / "model", name, num_hidden_layers=2)
    if "imatrix" in options:
        api.convert(tmp_path / "model", tmp_path / "base.gguf", to="gguf")
        options["imatrix"] = tmp_path / options["imatrix"]
        write_importance(options["imatrix"], tmp_path / "base.gguf")
    made = tmp_path / "made.gguf"
    said = api.convert(tmp_path / "model", made, to="gguf", dtype=kind, **options).warnings
    assert hashlib.sha256(made.read_bytes()).hexdigest() == DIGESTS[case]
    assert any("says nothing of blk.0.attn_k.weight and 1 more" in sentence for sentence in said) == (name == "llama")
    assert any("as rows are no multiple of 256" in sentence for sentence in said) == (name == "qwen2")


def test_a_gguf_file_becomes_another_of_other_types(small: Path) -> None:
    made = small.with_name("made.gguf")
    api.convert(small, made, to="gguf", dtype="Q5_0")
    with pytest.raises(UsageError, match=r"is q5_0 already, .* quantised to q8_0"):
        api.convert(made, small.with_name("again.gguf"), to="gguf", dtype="q8_0")
    api.convert(made, small.with_name("again.gguf"), to="gguf", dtype="q8_0", allow_requantize=True)
    types = {tensor.spec.dtype for tensor in open_checkpoint(small.with_name("again.gguf")).values()}
    assert types == {DType.F32, DType.Q8_0}
    api.convert(made, small.with_name("back"), to="hf")  # a folder beside the file that it is made of
    with pytest.raises(UsageError, match="keeps its parameters and its tokenizer"):
        api.convert(small, made, to="gguf", dtype="q8_0", tokenizer=False, overwrite=True)
    with pytest.raises(UsageError, match="lie inside one another"):
        api.convert(small, small, to="gguf", dtype="q8_0", overwrite=True)


def test_experts_in_mxfp4_stay_as_they_are(tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "model")
    api.convert(tmp_path / "model", tmp_path / "made.gguf", to="gguf", dtype="q4_0")
    found = open_checkpoint(tmp_path / "made.gguf")
    assert {t.spec.dtype for n, t in found.items() if "_exps.weight" in n} == {DType.MXFP4}
    assert found["blk.0.attn_q.weight"].spec.dtype is DType.Q4_0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "iq2_xs"}, r"IQ2_XS is not written\n.*Q2_K_S is the nearest"),
        ({"dtype": "tq1_0"}, r"TQ1_0 is not written\n.*Q2_K_S is the nearest"),
        ({"dtype": "q9_k"}, r"there is no file type 'q9_k'\n.*Q4_K_M"),
        ({"dtype": "q4_k_m", "tensor_type": "ffn_down"}, "tensor_type is 'ffn_down', expected REGEX=TYPE"),
        ({"dtype": "q4_k_m", "tensor_type": "a=q4_k_m"}, r"no type 'q4_k_m' of tensors\n.*q4_k"),
        ({"dtype": "q4_k_m", "tensor_type": "(=q4_k"}, "is no regular expression"),
        ({"dtype": "q4_k_m", "output_tensor_type": "iq1_s"}, "iq1_s is not written"),
        ({"pure": True}, "pure has no use without a type"),
        ({"dtype": "q4_k_m", "to": "hf"}, "q4_k_m is a type of GGUF alone"),
        ({"dtype": "f16", "to": "hf", "allow_requantize": True}, "allow_requantize has no use"),
    ],
)
def test_what_cannot_be_is_refused(small: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=r".") as error:
        api.convert(small.with_name("model"), small.with_name("x.gguf"), **{"to": "gguf", **options})
    assert re.search(match, f"{error.value}\n{error.value.hint}")
    assert not small.with_name("x.gguf").exists()


def test_importance_of_another_model_is_refused(small: Path, tmp_path: Path) -> None:
    save_family(tmp_path / "wide", "llama", intermediate_size=128)
    api.convert(tmp_path / "wide", tmp_path / "wide.gguf", to="gguf")
    write_importance(tmp_path / "wide.dat", tmp_path / "wide.gguf")
    options: dict[str, Any] = {"to": "gguf", "dtype": "q4_0", "imatrix": tmp_path / "wide.dat"}
    with pytest.raises(IncompatibleInputs, match=r"ffn_down.weight has 128 numbers, expected 96"):
        api.convert(small, tmp_path / "x.gguf", **options)
    writer = gguf.GGUFWriter(tmp_path / "wide.dat", "")
    writer.add_type("imatrix")
    for part in ("in_sum2", "counts"):
        writer.add_tensor(f"enc.0.{part}", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(IncompatibleInputs, match=r"knows none of the tensors of base.gguf, but enc.0"):
        api.convert(small, tmp_path / "x.gguf", **options)


def test_parts_go_into_a_folder_and_come_back(small: Path) -> None:
    folder = small.with_name("parts")
    api.convert(small.with_name("model"), folder, to="gguf", dtype="f16", max_shard_size=60_000)
    names = sorted(path.name for path in folder.glob("*.gguf"))
    assert names[0] == f"model-00001-of-{len(names):05d}.gguf"
    assert len(names) > 2
    joined, whole = open_checkpoint(folder / names[1]), open_checkpoint(small)
    assert (list(joined), joined.metadata) == (list(whole), whole.metadata)
    assert api.verify(folder).verdict
    with pytest.raises(UsageError, match="is one file, which has no largest size"):
        api.convert(small.with_name("model"), small.with_name("parts.gguf"), to="gguf", max_shard_size="1MB")
