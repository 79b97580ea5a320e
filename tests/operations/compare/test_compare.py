"""Changes that were planted are found, named and measured; what is equal is said to be so."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import given_tensor
from tiny_models import quantize_tiny, save_tiny

import weightops
from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.operations.compare import Comparison, TensorChange, compare

State = dict[str, torch.Tensor]
Q, OUT = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in float16."""
    folder = tmp_path_factory.mktemp("compare") / "base"
    save_tiny(folder, "llama", hidden_size=128, intermediate_size=256)
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def against(base: Path, tmp_path: Path) -> Callable[..., Comparison]:
    """Compare the base with what an edit makes of its tensors."""

    def run(edit: Callable[[State], State | None], **options: float | bool) -> Comparison:
        torch.manual_seed(0)
        folder = tmp_path / "other"
        shutil.copytree(base, folder, dirs_exist_ok=True)
        state = load_file(folder / "model.safetensors")
        state = edit(state) or state
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
        return compare(open_checkpoint(base), open_checkpoint(folder), workers=2, **options)  # type: ignore[arg-type]

    return run


def only(found: Comparison) -> TensorChange:
    """The one tensor that changed."""
    (tensor,) = found.changed
    return tensor


def test_equal_models_are_equal(against: Callable[..., Comparison]) -> None:
    found = against(lambda state: None, tolerance=0)
    assert found.relation == "B holds the same weights as A, byte for byte."
    assert found.kinds == {"identical": len(found.tensors)}
    assert (found.findings, found.relative, found.differs) == ((), 0, False)


def test_a_nan_is_one_element(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        state[UP][3, 7] = math.nan

    found = against(edit, tolerance=1e9)
    tensor = only(found)
    assert (tensor.name, tensor.kind, tensor.changed, tensor.first_odd) == (UP, "not-finite", 1, (3, 7))
    assert (tensor.a.nan, tensor.b.nan) == (0, 1)
    assert found.relation.startswith("B is A but for NaN or infinities in 1 tensor; the other")
    assert f"{UP}: 1 of 32768 elements are NaN in B, 0 in A, the first at [3, 7]" in found.findings[0].text
    assert found.differs


def test_names_without_their_first_part_are_the_same(against: Callable[..., Comparison]) -> None:
    found = against(lambda state: {name.removeprefix("model."): t for name, t in state.items()}, tolerance=0)
    assert found.kinds == {"identical": len(found.tensors)}
    assert found.differs is False
    assert any("begin with 'model.' in A where they begin with '' in B" in note for note in found.notes)


def test_a_larger_vocabulary_is_equal_in_its_common_rows(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        for name in (EMBEDDING, "lm_head.weight"):
            state[name] = torch.cat([state[name], torch.randn(8, 128).half()])

    found = against(edit, tolerance=1.0)
    assert found.relation == "B holds the same weights as A, byte for byte, with 8 rows more in the vocabulary."
    tensor = next(each for each in found.tensors if each.name == EMBEDDING)
    assert (tensor.kind, tensor.added_a, tensor.added_b, tensor.elements) == ("identical", 0, 8, 320 * 128)
    assert f"{EMBEDDING}: rows 320 to 327 are in B alone; the others are equal" in [f.text for f in found.findings]
    assert found.differs  # rows without a partner


def test_a_cast_is_exactly_that(against: Callable[..., Comparison]) -> None:
    found = against(lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    assert found.relation == "B is A rounded to bfloat16, exactly."
    assert found.kinds == {"cast": len(found.tensors)}
    wide = against(lambda state: {name: tensor.float() for name, tensor in state.items()}, tolerance=0)
    assert wide.relation == "B holds the same numbers as A (float32 in the place of float16)."
    assert wide.differs is False


def test_a_cast_with_one_bit_changed_is_none(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> State:
        cast = {name: tensor.bfloat16() for name, tensor in state.items()}
        cast[UP][0, 0] *= 1.5
        return cast

    assert [each.name for each in against(edit).tensors if each.kind not in ("cast", "equal")] == [UP]


def test_a_quantised_copy_lies_within_steps(base: Path, tmp_path: Path) -> None:
    weights = quantize_tiny(base, tmp_path / "gptq")
    found = compare(open_checkpoint(base), open_checkpoint(tmp_path / "gptq"), tolerance=0.001)
    assert found.relation.startswith(
        f"B is A quantised (gptq, 4 bits, groups of 32) in {len(weights)} tensors; the other"
    )
    tensor = next(each for each in found.tensors if each.name == UP)
    assert (tensor.kind, tensor.b.form) == ("quantised", "gptq, 4 bits, groups of 32")
    assert tensor.within_half_step == pytest.approx(1, abs=0.02)
    original = load_file(base / "model.safetensors")[UP].double()
    assert tensor.relative == pytest.approx(float((weights[UP] - original).norm() / original.norm()), rel=1e-4)
    assert found.unpaired == []
    packed = {n for n in open_checkpoint(tmp_path / "gptq") if n.endswith(("qweight", "qzeros", "scales", "g_idx"))}
    assert {lone.name for lone in found.lone} == packed
    back = compare(open_checkpoint(tmp_path / "gptq"), open_checkpoint(base))
    assert back.relation.startswith("A is B quantised (gptq, 4 bits, groups of 32)")
    quantize_tiny(base, tmp_path / "8", bits=8)
    both = compare(open_checkpoint(tmp_path / "8"), open_checkpoint(tmp_path / "gptq"))
    assert both.relation.startswith(
        "A and B are quantised forms of the same weights, to within a step (gptq, 8 bits, groups of 32 and"
    )


def test_a_dequantised_copy_is_told_from_the_original(base: Path, tmp_path: Path) -> None:
    quantize_tiny(base, tmp_path / "gptq")
    weightops.dequantize(tmp_path / "gptq", tmp_path / "plain", dtype="float16")
    packed, plain = open_checkpoint(tmp_path / "gptq"), open_checkpoint(tmp_path / "plain")
    words = "(gptq, 4 bits, groups of 32) dequantised, byte for byte."
    assert compare(packed, plain).relation == f"B is A {words}"
    assert compare(plain, packed).relation == f"A is B {words}"


def test_other_weights_than_the_quantised_ones_are_no_quantised_copy(base: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "llama", seed=1, hidden_size=128, intermediate_size=256)
    quantize_tiny(tmp_path / "other", tmp_path / "gptq")
    found = compare(open_checkpoint(base), open_checkpoint(tmp_path / "gptq"))
    assert "quantised" not in found.kinds
    assert found.relation.startswith("B's weights are not made from A's")


def test_a_merged_lora_is_of_low_rank(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        for name in (Q, Q.replace(".1.", ".0.")):
            change = torch.randn(128, 4) @ torch.randn(4, 128) * 0.05
            state[name] = (state[name].float() + change).half()

    found = against(edit)
    assert [(each.kind, each.rank) for each in found.changed] == [("low-rank", 4), ("low-rank", 4)]
    assert all(1 <= (each.stable_rank or 0) <= 4 for each in found.changed)
    assert "a change of low rank, as a merged LoRA makes it (at most 4 directions hold 99 %), in 2 of" in found.relation
    assert "self_attn.q_proj.weight in 2 layers (r99 at most 4" in found.findings[0].text


@pytest.mark.parametrize("name", [Q, OUT])
def test_one_scaled_head_is_named(against: Callable[..., Comparison], name: str) -> None:
    def edit(state: State) -> None:
        part = state[name][32:64] if name == Q else state[name][:, 32:64]
        part *= 1.5

    tensor = only(found := against(edit))
    assert (tensor.kind, tensor.n_heads, [head.head for head in tensor.heads]) == ("heads", 4, [1])
    assert tensor.heads[0].scale == pytest.approx(1.5, rel=1e-3)
    assert "of its 4 heads, head 1 (times 1.5" in found.findings[0].text


def test_two_edited_rows_are_named_with_their_tokens(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        state[EMBEDDING][[40, 300]] += 0.25

    tensor = only(found := against(edit))
    assert (tensor.kind, tensor.changed_rows, {row.row for row in tensor.rows}) == ("rows", 2, {40, 300})
    assert {row.token for row in tensor.rows if row.row == 40} == {"G"}
    assert "2 of 320 rows changed" in found.findings[0].text


def test_exchanged_tensors_are_told_from_trained_ones(against: Callable[..., Comparison]) -> None:
    other = UP.replace(".0.", ".2.")

    def edit(state: State) -> None:
        state[UP], state[other] = state[other].clone(), state[UP].clone()

    found = against(edit)
    assert {(each.name, each.kind, each.moved_from) for each in found.changed} == {
        (UP, "moved", other),
        (other, "moved", UP),
    }
    assert f"{UP} holds in B what is {other} in A" in [finding.text for finding in found.findings]


def test_a_scaled_norm_is_scaled(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        state["model.norm.weight"] *= 1.01

    tensor = only(against(edit))
    assert tensor.kind == "scaled"
    assert tensor.scale == pytest.approx(1.01, abs=1e-4)


def test_training_changes_everything(against: Callable[..., Comparison]) -> None:
    found = against(lambda state: {n: (t.float() * (1 + 0.02 * torch.randn(t.shape))).half() for n, t in state.items()})
    assert found.kinds == {"broad": len(found.tensors)}
    assert found.relative == pytest.approx(0.02, rel=0.05)
    assert found.relation.startswith(f"B differs from A in {len(found.tensors)} of {len(found.tensors)} tensors, by 2")


def test_what_has_no_partner_is_named(against: Callable[..., Comparison]) -> None:
    def edit(state: State) -> None:
        state["extra.weight"] = torch.ones(3)
        state[UP] = state[UP][:, :5]
        del state[Q]

    found = against(edit, tolerance=1e9)
    assert {(lone.where, lone.name) for lone in found.unpaired} == {("a", Q), ("b", "extra.weight"), ("both", UP)}
    assert found.relation.endswith("; 3 tensors have no partner.")
    assert found.differs
    texts = [finding.text for finding in found.findings]
    assert f"1 tensor in A alone: {Q}" in texts
    assert f"{UP}: float16 [256, 128] in A, float16 [256, 5] in B" in texts


@pytest.mark.parametrize(("tolerance", "differs"), [(0.0, True), (0.005, True), (0.02, False)])
def test_a_tolerance_is_held_by_every_tensor(
    against: Callable[..., Comparison], tolerance: float, differs: bool
) -> None:
    def edit(state: State) -> None:
        state[UP] = (state[UP].float() * 1.01).half()

    assert against(edit, tolerance=tolerance).differs is differs
    assert against(edit).differs is None


def test_options_that_cannot_be_meant_are_refused(against: Callable[..., Comparison]) -> None:
    with pytest.raises(UsageError, match="the tolerance is -1"):
        against(lambda state: None, tolerance=-1.0)
    with pytest.raises(UsageError, match="strict says what counts"):
        against(lambda state: None, strict=True)


def test_types_without_numbers_are_compared_by_bytes() -> None:
    plain = torch.arange(8, dtype=torch.uint8)
    complex_ = torch.tensor([1 + 2j, 3 - 1j])
    one = Checkpoint("a", {"n": given_tensor(plain), "c": given_tensor(complex_)})
    other = Checkpoint("b", {"n": given_tensor(plain), "c": given_tensor(complex_ + 1)})
    kinds = {each.name: each.kind for each in compare(one, other).tensors}
    assert kinds == {"n": "identical", "c": "not-numbers"}


def test_nothing_in_common_is_a_sentence() -> None:
    one, other = (Checkpoint(name, {name: given_tensor(torch.ones(2, 2))}) for name in "ab")
    assert compare(one, other).relation == "A and B have no tensor in common."
    assert compare(Checkpoint("a", {}), Checkpoint("b", {})).tensors == ()


def test_numbers_beyond_float64s_squares_are_no_error() -> None:
    a = torch.full((20, 20), 1e200, dtype=torch.float64)
    found = compare(Checkpoint("a", {"w": given_tensor(a)}), Checkpoint("b", {"w": given_tensor(-a)}), tolerance=1e9)
    assert found.tensors[0].relative is None
    assert found.differs
    json.dumps(found.relative, allow_nan=False)
