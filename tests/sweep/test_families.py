"""Every family of `families.py` through every verb, held against transformers and peft.

One module fixture makes a family's model, so that its verbs run one after the other. What is refused has to be in
`EXCEPTIONS`, and what is there has to be refused, with its sentence.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import quietly
from families import ADAPTED, EXCEPTIONS, FAMILIES, FAULTS, ODD_LAYERS, VERBS, page, settings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_tokenizer, text
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import weightops
from weightops.errors import WeightopsError

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(2, 34)[None]
LAYERS = [0, 3]
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_in_docs_is_that_of_the_table() -> None:
    assert (ROOT / "docs/families.md").read_text() == page(), "python tests/sweep/families.py > docs/families.md"


@dataclass(frozen=True)
class Family:
    """A model in a folder, with its tokenizer, and as transformers loads it; a folder for what is made of it."""

    kind: str
    folder: Path
    model: PreTrainedModel
    out: Path

    @contextmanager
    def through(self, verb: str) -> Iterator[None]:
        """The verb is run in here; where the table says so it is refused."""
        assert verb in VERBS
        if (self.kind, verb) in FAULTS:
            pytest.xfail(FAULTS[self.kind, verb])
        with quietly():
            if (self.kind, verb) in EXCEPTIONS:
                with pytest.raises(WeightopsError, match=EXCEPTIONS[self.kind, verb]):
                    yield
                pytest.skip(f"refused: {EXCEPTIONS[self.kind, verb]}")
            yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp(request.param)
    with quietly():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**settings(request.param)))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        made.save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        yield Family(request.param, folder / "model", loaded(folder / "model"), folder / "out")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "family" in request.fixturenames:
        for path in request.getfixturevalue("family").folder.parent.iterdir():
            if path.name != "model":
                shutil.rmtree(path)


def loaded(folder: Path, **options: Any) -> Any:
    """transformers' model of a folder, which lacks nothing and has nothing more."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), {key: sorted(map(str, value))[:4] for key, value in report.items() if value}
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


def state(folder: Path) -> State:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [n for n, t in found.items() if t.dtype != expected[n].dtype or not torch.equal(t, expected[n])] == []


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


@pytest.mark.slow
def test_check(family: Family) -> None:
    with family.through("check"):
        report = weightops.check(family.folder)
        assert [finding.message for finding in report.findings if finding.severity != "note"] == []
        assert report.held_against is not None


@pytest.mark.slow
def test_shard(family: Family) -> None:
    with family.through("shard"):
        weightops.shard(family.folder, family.out, max_shard_size="100kB")
        assert len(list(family.out.glob("*.safetensors"))) > 1
        assert_same(state(family.out), state(family.folder))
        assert torch.equal(logits(loaded(family.out)), logits(family.model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast(family: Family, dtype: str) -> None:
    with family.through("cast"):
        weightops.cast(family.folder, family.out, dtype=dtype)
        loaded(family.folder, dtype=dtype).save_pretrained(family.out.with_name("expected"))
        assert_same(state(family.out), state(family.out.with_name("expected")))


@pytest.mark.slow
def test_fp8(family: Family) -> None:
    with family.through("fp8"):
        weightops.cast(family.folder, family.out, scheme="fp8")
        model = loaded(family.out)
        found = logits(model)  # after which the weights are plain ones
        assert distance(found, logits(family.model)) < 0.4
        weights, expected = _with_experts_stacked(model.state_dict()), family.model.state_dict()
        changed = [distance(weights[name], tensor) for name, tensor in expected.items()]
        assert max(changed) < 0.04
        assert sum(each > 0 for each in changed) >= 4


def _with_experts_stacked(state: State) -> State:
    """With the experts that transformers has as layers in Llama 4, where it is quantised, as it has them elsewhere."""
    result = dict(state)
    for module in {name.partition(".experts.")[0] for name in state if ".experts.0.gate_proj.weight" in name}:
        count = sum(name.startswith(f"{module}.experts.") and name.endswith("up_proj.weight") for name in state)
        gate, up, down = (
            torch.stack([state[f"{module}.experts.{expert}.{layer}.weight"].T for expert in range(count)])
            for layer in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{module}.experts.gate_up_proj"] = torch.cat([gate, up], 2)
        result[f"{module}.experts.down_proj"] = down
    return result


@pytest.mark.slow
def test_diff(family: Family) -> None:
    with family.through("diff"):
        tuned = family.out.with_name("tuned")
        model = loaded(family.folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        model.save_pretrained(tuned)
        weightops.diff(family.folder, tuned, family.out)
        weightops.recover(family.folder, family.out, family.out.with_name("recovered"))
        assert_same(state(family.out.with_name("recovered")), state(tuned))


@pytest.mark.slow
def test_merge(family: Family) -> None:
    with family.through("merge"):
        other = family.out.with_name("other")
        changed = loaded(family.folder)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        changed.save_pretrained(other)
        save_tokenizer(other)
        places = ((family.folder, 0.25), (other, 0.75))
        models = [{"model": str(place), "parameters": {"weight": weight}} for place, weight in places]
        weightops.merge(models, family.out, method="linear")
        one, two = (loaded(place).state_dict() for place, _ in places)
        found = loaded(family.out).state_dict()
        assert found.keys() == one.keys()
        for name, tensor in found.items():
            mean = one[name] * 0.25 + two[name] * 0.75 if tensor.is_floating_point() else one[name]
            assert torch.allclose(tensor, mean, rtol=1e-6, atol=1e-7), name


@pytest.mark.slow
def test_merge_lora(family: Family) -> None:
    with family.through("merge-lora"):
        _adapt(family)
        weightops.merge_lora(family.folder, family.out.with_name("adapter"), family.out)
        assert_same(state(family.out), state(family.out.with_name("merged")))


@pytest.mark.slow
def test_extract_lora(family: Family) -> None:
    with family.through("extract-lora"):
        _adapt(family)
        weightops.extract_lora(
            family.folder, family.out.with_name("merged"), family.out, rank=8
        )  # peft doubles that of experts
        model = PeftModel.from_pretrained(loaded(family.folder), family.out).merge_and_unload()
        base, tuned = family.model.state_dict(), loaded(family.out.with_name("merged")).state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(base[name], tuned[name]):
                assert distance(tensor - base[name], tuned[name] - base[name]) < 0.01, name


def _adapt(family: Family) -> None:
    """An adapter by peft, and what peft merges it into."""
    torch.manual_seed(1)
    targets = list(ADAPTED[family.kind]) if family.kind in ADAPTED else "all-linear"
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(loaded(family.folder), config)
    model.save_pretrained(family.out.with_name("adapter"))
    model.merge_and_unload().save_pretrained(family.out.with_name("merged"))


@pytest.mark.slow
def test_quantize(family: Family) -> None:
    with family.through("quantize"):
        skip = ODD_LAYERS.get(family.kind, ())
        weightops.quantize(family.folder, family.out, method="rtn", bits=8, group_size=16, skip=skip, device="cpu")
        plain = family.out.with_name("plain")
        weightops.dequantize(family.out, plain, dtype="float32")
        found = loaded(plain)
        expected = family.model.state_dict()
        changed = [distance(tensor, expected[name]) for name, tensor in found.state_dict().items()]
        assert 0 < max(changed) < 0.01
        assert_greedy(family.out, found)


@pytest.mark.slow
def test_eval(family: Family, tmp_path: Path) -> None:
    with family.through("eval"):
        file = tmp_path / "text.txt"
        file.write_text(text(20))
        (score,) = weightops.evaluate(family.folder, file, seq_len=48, device="cpu").scores
        tokenizer = AutoTokenizer.from_pretrained(family.folder)
        tokens = torch.tensor(tokenizer(file.read_text())["input_ids"])
        windows = tokens[: len(tokens) // 48 * 48].reshape(-1, 48)
        with torch.no_grad():
            found = [family.model(w[None], use_cache=False).logits[0, :-1].log_softmax(-1) for w in windows]
        losses = [-x.gather(1, w[1:, None]).mean() for x, w in zip(found, windows, strict=True)]
        assert score.nll == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


@pytest.mark.slow
def test_generate(family: Family) -> None:
    with family.through("generate"):
        assert_greedy(family.folder, family.model)


def assert_greedy(folder: Path, model: Any) -> None:
    """The tokens that `generate` finds are those of transformers."""
    generation = weightops.generate(folder, "the stream of", max_new_tokens=12, device="cpu")
    "".join(generation)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([tokenizer("the stream of")["input_ids"]])
    with torch.no_grad():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
    ends = [token for token in expected[0, prompt.shape[1] :].tolist() if token != 1]
    assert [token for token in generation.tokens if token != 1] == ends


@pytest.mark.slow
def test_prune(family: Family) -> None:
    with family.through("prune"):
        weightops.shard(family.folder, family.out, layers=",".join(map(str, LAYERS)))
        found = loaded(family.out)
        assert torch.equal(logits(found), logits(_pruned(loaded(family.folder))))


def _pruned(model: Any) -> Any:
    """A model with its other layers taken out by hand."""
    config = model.config
    count = config.num_hidden_layers
    name, layers = next(
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
    )
    model.set_submodule(name, nn.ModuleList([layers[layer] for layer in LAYERS]))
    body = model.get_submodule(name.rpartition(".")[0])
    for packed, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        part = getattr(body, packed, None)
        if part is not None:
            parts = part.weight.detach().chunk(count, axis)
            part.weight = nn.Parameter(torch.cat([parts[layer] for layer in LAYERS], axis))
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in LAYERS])
    config.num_hidden_layers = len(LAYERS)
    return model
