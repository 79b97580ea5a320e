"""Rows of embeddings where a merge file asks for tokens: each token its own, or what stands in where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from merging import WIDTH, evaluated, model, stage
from merging_tokenizers import LETTERS, bpe, files, unigram
from support import evaluate

from weightops.checkpoint import Checkpoint, Written, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.operations.merge import merge
from weightops.operations.merge.vocabulary import Vocabulary, aligned
from weightops.spec import DType

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
P = bpe([("a", "b")], ["<x>"])  # ab is 7, <x> is 8
Q = bpe([("c", "d")], ["<y>", "<x>"])  # cd is 7, <y> is 8, <x> is 9
TOKENIZERS = {"p": P, "q": Q, "r": None, "t": P}
FIRST = {"p": 100, "q": 200, "r": 300, "t": 400}
"""Row number n of a model's embedding is this and n, of its head minus that."""


def owner(
    name: str,
    rows: int | None = None,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    sidecars: Mapping[str, bytes] | None = None,
    **config: Any,
) -> Checkpoint:
    """A model with one row for each token, or so many."""
    found = tokenizer or TOKENIZERS[name]
    rows = rows or (10 if name == "q" else 9)
    matrix = (FIRST[name] + torch.arange(rows, dtype=torch.float32)).unsqueeze(1).expand(-1, WIDTH).contiguous()

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {EMBEDDING: matrix.to(dtype), HEAD: -matrix.to(dtype)}

    beside = {**(files(found) if found else {}), **(sidecars or {})}
    given = {file: Written(data) for file, data in beside.items()}
    return model(name, 1, dtype=dtype, edit=edit, sidecars=given, vocab_size=rows, **config)


def text(names: str = "pq", tokenizer: str = "{source: union}", base: str | None = "p", more: str = "") -> str:
    listed = ", ".join(f"{{model: {name}}}" for name in names)
    base_model = f"base_model: {base}\n" if base else ""
    return (
        f"merge_method: linear\n{base_model}models: [{listed}]\nparameters: {{weight: 1}}\n"
        f"tokenizer: {tokenizer}\n{more}"
    )


def align(said: str, *owners: Checkpoint) -> Vocabulary:
    found = aligned(stage(said), {each.name: each for each in owners}, evaluated)
    assert found is not None
    return found


def rows(found: Vocabulary, name: str, tensor: str = EMBEDDING) -> list[float]:
    """What stands in the first column; all columns are alike."""
    lazy = found.tensors[name][tensor]
    values = np.frombuffer(evaluate(lazy), "<f4").reshape(lazy.spec.shape)
    assert (values == values[:, :1]).all()
    return [float(value) for value in values[:, 0]]


def tokens(found: Vocabulary) -> list[str]:
    sidecar = found.sidecars["tokenizer.json"]
    assert isinstance(sidecar, Written)
    document = json.loads(sidecar.data)
    ids = dict(document["model"]["vocab"]) | {each["content"]: each["id"] for each in document["added_tokens"]}
    return sorted(ids, key=lambda token: ids[token])


SEVEN = len(LETTERS)


def own(name: str, *numbers: int) -> list[float]:
    return [*(FIRST[name] + n for n in range(SEVEN)), *numbers]


def test_a_union_has_the_tokens_of_all_and_what_a_model_lacks_is_that_of_the_one_that_has_it() -> None:
    found = align(text(), owner("p"), owner("q"))
    assert tokens(found) == [*LETTERS, "ab", "<x>", "cd", "<y>"]
    assert rows(found, "p") == own("p", 107, 108, 207, 208)
    assert rows(found, "q") == own("q", 107, 209, 207, 208)
    for name in "pq":
        assert rows(found, name, HEAD) == [-value for value in rows(found, name)]


def test_the_base_comes_first_wherever_it_stands_and_without_one_the_first_model() -> None:
    assert tokens(align(text(base="q"), owner("p"), owner("q"))) == [*LETTERS, "cd", "<y>", "<x>", "ab"]
    assert tokens(align(text("qp", base=None), owner("p"), owner("q"))) == [*LETTERS, "cd", "<y>", "<x>", "ab"]


def test_with_the_bases_tokens_those_of_others_are_left_out() -> None:
    found = align(text(tokenizer="{source: base}"), owner("p"), owner("q"))
    assert found.sidecars["tokenizer.json"].data == files(P)["tokenizer.json"]
    assert rows(found, "p") == own("p", 107, 108)
    assert rows(found, "q") == own("q", 107, 209)


def test_a_model_is_left_as_it_is_where_its_rows_are_right_already() -> None:
    p = owner("p")
    found = align(text(tokenizer="{source: base}"), p, owner("q"))
    assert found.tensors["p"][EMBEDDING] == p[EMBEDDING]


def test_tokens_of_one_model_and_what_config_says_of_them() -> None:
    generation = {"generation_config.json": b'{"eos_token_id": 9}'}
    q = owner("q", sidecars=generation, bos_token_id=4, eos_token_id=9, pad_token_id=None)
    found = align(text(tokenizer="{source: q}"), owner("p", bos_token_id=1), q)
    assert rows(found, "p") == own("p", 207, 208, 108)
    assert rows(found, "q") == own("q", 207, 208, 209)
    assert found.settings == {"bos_token_id": 4, "eos_token_id": 9}
    assert found.sidecars["generation_config.json"].data == generation["generation_config.json"]
    kept = align(text(tokenizer="{source: base}"), owner("p", bos_token_id=1), q)
    assert (kept.settings, "generation_config.json" in kept.sidecars) == ({}, False)


def test_padding_that_models_carry_is_cut_and_asked_for_it_is_the_mean_of_the_rows() -> None:
    owners = owner("p", 16), owner("q", 12)
    assert rows(align(text(), *owners), "p") == own("p", 107, 108, 207, 208)
    found = align(text(tokenizer="{source: union, pad_to_multiple_of: 8}"), *owners)
    for name in "pq":
        assert len(rows(found, name)) == 16
        assert rows(found, name)[11:] == pytest.approx([sum(rows(found, name)[:11]) / 11] * 5)
    assert len(rows(align(text(tokenizer="{pad_to_multiple_of: 11}"), *owners), "p")) == 11


def test_tokens_beyond_the_rows_of_a_model_do_not_count_and_are_named() -> None:
    found = align(text(), owner("p", 8), owner("q", 8))
    assert tokens(found) == [*LETTERS, "ab", "cd"]
    assert rows(found, "p") == own("p", 107, 207)
    assert rows(found, "q") == own("q", 107, 207)
    assert found.notes == (
        "p: has a token without a row, which does not count: <x>",
        "q: has 2 tokens without rows, which do not count: <y>, <x>",
    )


def test_a_token_that_no_model_has_a_row_for_is_zeros() -> None:
    found = align(text(tokenizer="{source: q}"), owner("p", 8), owner("q", 8))
    assert rows(found, "p") == rows(found, "q")[:0] + own("p", 207, 0, 0)
    assert rows(found, "q") == own("q", 207, 0, 0)


def test_a_model_without_a_tokenizer_has_that_of_the_base() -> None:
    found = align(text("pqr"), owner("p"), owner("q"), owner("r"))
    assert rows(found, "r") == own("r", 307, 308, 207, 208)
    assert found.notes == ("r: has no tokenizer, and is taken to have that of p",)
    with pytest.raises(IncompatibleInputs, match="r: has no tokenizer, and the merge file asks for its tokens"):
        align(text("pr", base="r"), owner("p"), owner("r"))


def test_where_several_have_a_token_and_the_base_has_it_it_is_the_bases_else_the_mean() -> None:
    third = owner("t", 11, tokenizer=bpe([("b", "d"), ("c", "d")], ["<x>", "<x2>"]))
    found = align(text("pqt"), owner("p"), owner("q"), third)
    assert tokens(found) == [*LETTERS, "ab", "<x>", "cd", "bd", "<y>", "<x2>"]
    assert rows(found, "p") == own("p", 107, 108, (207 + 408) / 2, 407, 208, 410)
    assert rows(found, "t") == own("t", 107, 409, 408, 407, 208, 410)
    # the base has ab, and nobody else
    assert rows(found, "q")[7] == 107
    without = align(text("pqt", base=None), owner("p"), owner("q"), third)
    assert rows(without, "p") == rows(found, "p")


def test_the_base_decides_where_it_has_the_token_and_another_lacks_it() -> None:
    third = owner("t", 8, tokenizer=bpe([("a", "b")]))  # has ab, as p has; q has not
    assert rows(align(text("pqt"), owner("p"), owner("q"), third), "q")[7] == 107
    mean = align(text("pqt", base=None), owner("p"), owner("q"), third)
    assert rows(mean, "q")[7] == (107 + 407) / 2


RULES = {
    "zero": ("{source: {kind: zero}}", [(107, 207), (0, 207)]),
    "a model": ("{source: q}", [(207, 207)]),
    "another token by its text": ("{source: {kind: model_token, model: p, token: a}}", [(103, 207)]),
    "another token by its number": ("{source: {kind: model_token, model: q, token_id: 5}}", [(205, 207)]),
}


@pytest.mark.parametrize(("rule", "expected"), [(r, e[-1]) for r, e in RULES.values()], ids=RULES)
def test_a_rule_says_where_a_row_comes_from_in_models_that_lack_it(rule: str, expected: tuple[int, int]) -> None:
    found = align(text(tokenizer=f"{{source: union, tokens: {{cd: {rule}}}}}"), owner("p"), owner("q"))
    assert (rows(found, "p")[9], rows(found, "q")[9]) == expected


@pytest.mark.parametrize(("rule", "expected"), [(r, e[-1][0]) for r, e in RULES.values()], ids=RULES)
def test_with_force_it_is_so_in_all_models(rule: str, expected: int) -> None:
    said = f"{{source: union, tokens: {{cd: {rule[:-1]}, force: true}}}}}}"
    found = align(text(tokenizer=said), owner("p"), owner("q"))
    assert (rows(found, "p")[9], rows(found, "q")[9]) == (expected, expected)


def test_forced_without_a_source_it_is_what_it_would_be_anyway() -> None:
    found = align(text(tokenizer="{source: union, tokens: {<x>: {force: true}}}"), owner("p"), owner("q"))
    assert (rows(found, "p")[8], rows(found, "q")[8]) == (108, 108)


def test_a_rule_without_force_does_nothing_where_all_models_have_the_token() -> None:
    found = align(text(tokenizer="{source: union, tokens: {<x>: {source: {kind: zero}}}}"), owner("p"), owner("q"))
    assert (rows(found, "p")[8], rows(found, "q")[8]) == (108, 209)


def test_a_rule_for_a_new_token_adds_it() -> None:
    said = "{source: base, tokens: {<new>: {source: {kind: model_token, model: q, token: <y>}}, <none>: {}}}"
    found = align(text(tokenizer=said), owner("p"), owner("q"))
    assert tokens(found) == [*LETTERS, "ab", "<x>", "<new>", "<none>"]
    assert rows(found, "p") == own("p", 107, 108, 208, 0)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("{source: p}", "p has not the token <y>"),
        ("{source: {kind: model_token, model: p, token: nothing}}", "p has not the token nothing"),
        ("{source: {kind: model_token, model: p, token_id: 9}}", "p has not the row 9"),
        ("{source: {kind: model_token, model: p}}", "has a model, and either token or token_id"),
        ("{source: {kind: model_token, model: p, token: a, token_id: 3}}", "has a model, and either token or token_id"),
        ("{source: {kind: model_token, model: p, token_id: -1}}", "expected the number of a token"),
        ("{source: {kind: nothing}}", "expected zero or model_token"),
        ("{force: 3}", "expected true or false"),
        ("{sorce: p}", "unknown field"),
    ],
)
def test_rules_that_cannot_be_followed_are_told_with_their_line(rule: str, problem: str) -> None:
    said = text(tokenizer=f"\n  tokens:\n    <y>: {rule}")
    with pytest.raises(UsageError, match=rf"m\.yml:\d: tokenizer\.tokens\.<y>.*{problem}"):
        align(said, owner("p"), owner("q"))


def test_tokens_that_cannot_be_taken_out_of_a_tokenizer() -> None:
    pieces = unigram(["<unk>", "<s>", "</s>", "a", "b"])
    with pytest.raises(IncompatibleInputs, match="they can be taken out of BPE tokenizers alone"):
        align(text(), owner("p", 4, tokenizer=pieces), owner("q"))


def test_rows_are_of_the_type_that_holds_all() -> None:
    half, brain = owner("p", dtype=torch.float16), owner("q", dtype=torch.bfloat16)
    found = align(text(), half, brain)
    assert {tensor.spec.dtype for tensors in found.tensors.values() for tensor in tensors.values()} == {DType.F32}
    assert rows(found, "p") == own("p", 107, 108, 207, 208)


def test_without_a_word_on_tokens_there_is_nothing_to_do() -> None:
    said = text().replace("tokenizer: {source: union}\n", "")
    assert aligned(stage(said), {"p": owner("p"), "q": owner("q")}, evaluated) is None


def test_the_merged_model_has_the_rows_and_config_says_how_many() -> None:
    owners = owner("p"), owner("q")
    said = stage(text())
    config = said.plain({each: each.model for each in said.references})
    result = merge(owners, config=config, text=text(), names=["p", "q"], evaluate=evaluated)
    assert result.config()["vocab_size"] == 11
    merged = np.frombuffer(evaluate(result[EMBEDDING]), "<f4").reshape(11, WIDTH)[:, 0]
    both = align(text(), *owners)
    assert merged.tolist() == [(a + b) / 2 for a, b in zip(rows(both, "p"), rows(both, "q"), strict=True)]


def test_settings_follow_the_tokenizers_model_in_the_result() -> None:
    q = owner("q", sidecars={"generation_config.json": b'{"eos_token_id": 9}'}, eos_token_id=9)
    said = stage(text(tokenizer="{source: q}"))
    config = said.plain({each: each.model for each in said.references})
    own_files = {"generation_config.json": written_json({"eos_token_id": 2}).data}
    p = owner("p", sidecars=own_files, eos_token_id=2)
    result = merge((p, q), config=config, names=["p", "q"], evaluate=evaluated)
    assert (result.config()["eos_token_id"], result.config()["vocab_size"]) == (9, 10)
    assert json.loads(result.sidecar("generation_config.json") or b"") == {"eos_token_id": 9}
