"""check on quantised folders: nothing is found in healthy ones, and each fault is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gptq_models import Quantised, Scheme, bloom, llama, quantised, without

from weightops.formats.folder import open_checkpoint
from weightops.operations.check.operation import check

Q = "model.layers.0.self_attn.q_proj"


def found(folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    report = check(open_checkpoint(folder), **options)
    return [(f.severity, f.code, f.message) for f in report.findings]


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bits=3, shuffled=True), Scheme(group_size=-1)], ids=str)
@pytest.mark.parametrize("model", [llama, bloom])
def test_a_healthy_model(tmp_path: Path, model: Callable[[], Any], scheme: Scheme) -> None:
    quantised(model(), scheme).save(tmp_path / "model")
    said = found(tmp_path / "model")
    assert said == []


def test_other_tensors_may_have_another_type_than_scales(tmp_path: Path) -> None:
    made = quantised(llama(), Scheme())
    state = {n: t.bfloat16() if n.endswith("weight") and t.is_floating_point() else t for n, t in made.state.items()}
    replace(made, state=state, config={**made.config, "torch_dtype": "bfloat16"}).save(tmp_path / "model")
    assert [(s, c) for s, c, _ in found(tmp_path / "model")] == []


def test_shapes_are_held_against_config_json(tmp_path: Path) -> None:
    made = quantised(llama(), Scheme())
    replace(made, config={**made.config, "intermediate_size": 128}).save(tmp_path / "model")
    assert any(
        "gate_proj.weight is [96, 64], config.json says [128, 64]" in text for _, _, text in found(tmp_path / "model")
    )
    missing = {name: tensor for name, tensor in made.state.items() if not name.startswith(f"{Q}.")}
    replace(made, state=missing).save(tmp_path / "missing")
    assert any("1 tensors of a llama model are missing" in text for _, _, text in found(tmp_path / "missing"))


def poked(name: str, value: float) -> Callable[[Quantised], Quantised]:
    def edit(made: Quantised) -> Quantised:
        tensor = made.state[name].clone()
        tensor.view(-1)[5] = value
        return replace(made, state={**made.state, name: tensor})

    return edit


def labelled(**fields: Any) -> Callable[[Quantised], Quantised]:
    return lambda made: replace(made, scheme=replace(made.scheme, **fields))


FAULTS: list[tuple[Callable[[Quantised], Quantised], str, str, str]] = [
    (poked(f"{Q}.scales", float("nan")), "error", "nan", "q_proj.scales holds 1 of 128 elements"),
    (poked(f"{Q}.scales", float("inf")), "error", "infinite", "q_proj.scales holds 1 of 128 elements"),
    (poked(f"{Q}.scales", 0), "warning", "quantization", "q_proj.scales holds 1 zeros of 128"),
    (poked(f"{Q}.scales", 1e-6), "warning", "quantization", "q_proj.scales holds 1 of 128 that are subnormal"),
    (poked(f"{Q}.g_idx", 2), "error", "quantization", "q_proj.g_idx names group 2, expected 0 to 1"),
    (poked(f"{Q}.g_idx", 1), "warning", "quantization", "q_proj.g_idx: groups have 31 to 33 columns, expected 32"),
    (poked(f"{Q}.qzeros", 0x77777787), "error", "zero-convention", "the config says sym, and 1 modules have other"),
    (poked(f"{Q}.qzeros", 0x777777F7), "warning", "zero-convention", "1 stored zero points are all ones"),
    (labelled(checkpoint_format="gptq_v2"), "error", "zero-convention", "are those of a symmetric model in gptq"),
    (labelled(bits=8), "error", "quantization", "the tensors have 4 bits, the config says 8"),
    (
        labelled(group_size=64),
        "error",
        "quantization",
        "the tensors have 3 groups of 96 inputs, the config's group_size",
    ),
    (labelled(shuffled=True), "note", "quantization", "the config says desc_act, and g_idx has the columns"),
    (lambda made: without(made, f"{Q}.qzeros"), "error", "quantization", "q_proj has no qzeros"),
    (lambda made: without(made, f"{Q}.g_idx"), "warning", "quantization", "1 modules have no g_idx"),
    (
        lambda made: without(labelled(shuffled=True)(made), ".g_idx"),
        "error",
        "quantization",
        "14 modules have no g_idx",
    ),
]


@pytest.mark.parametrize(("edit", "severity", "code", "text"), FAULTS, ids=[text for *_, text in FAULTS])
def test_each_fault_is_found(
    tmp_path: Path, edit: Callable[[Quantised], Quantised], severity: str, code: str, text: str
) -> None:
    edit(quantised(llama(), Scheme())).save(tmp_path / "model")
    said = found(tmp_path / "model")
    assert [(s, c) for s, c, message in said if text in message] == [(severity, code)], said


def test_act_order_that_the_config_denies(tmp_path: Path) -> None:
    made = quantised(llama(), Scheme(shuffled=True))
    labelled(shuffled=False)(made).save(tmp_path / "model")
    said = found(tmp_path / "model")
    assert [(s, c) for s, c, text in said if "the config says no desc_act, and 14 modules" in text] == [
        ("error", "quantization")
    ]


def test_modules_of_two_conventions(tmp_path: Path) -> None:
    one, other = (quantised(llama(), Scheme(checkpoint_format=form)) for form in ("gptq", "gptq_v2"))  # type: ignore[arg-type]
    replace(one, state={**one.state, f"{Q}.qzeros": other.state[f"{Q}.qzeros"]}).save(tmp_path / "model")
    assert any("are stored minus one (gptq)" in text for _, _, text in found(tmp_path / "model"))


def test_files_that_say_how_it_is_quantised(tmp_path: Path) -> None:
    made = quantised(llama(), Scheme(sym=False))
    assert any("asymmetric, in checkpoint_format gptq" in t for _, _, t in found(made.save(tmp_path / "asymmetric")))
    for name in ("neither", "beside", "inside"):
        made.save(tmp_path / name)
    for name in ("neither", "beside"):
        (tmp_path / name / "config.json").write_text(json.dumps(made.config))
    for name in ("neither", "inside"):
        (tmp_path / name / "quantize_config.json").unlink()
    texts = {name: [(s, c, t) for s, c, t in found(tmp_path / name)] for name in ("neither", "beside", "inside")}
    assert [(s, c) for s, c, t in texts["neither"] if "of a quantised model" in t] == [("error", "leftover")]
    assert [s for s, _, t in texts["beside"] if "only quantize_config.json says" in t] == ["warning"]
    assert [s for s, _, t in texts["inside"] if "only config.json says" in t] == ["note"]
    assert not [t for _, c, t in texts["beside"] if c in ("missing", "unexpected")]


def test_values_are_left_alone_where_none_are_read(tmp_path: Path) -> None:
    poked(f"{Q}.g_idx", 2)(quantised(llama(), Scheme())).save(tmp_path / "model")
    assert found(tmp_path / "model", values=False) == []


def test_another_method_is_not_taken_for_gptq(tmp_path: Path) -> None:
    made = quantised(llama(), Scheme())
    folder = made.save(tmp_path / "model")
    config = {**made.config, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    said = found(folder)
    assert [(s, c) for s, c, text in said if "quant_method awq, the tensors" in text] == [("warning", "quantization")]
