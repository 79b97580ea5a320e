"""Every option of the commands that are no step of a recipe reaches its operation, from argv and from Python.

The rows are held against the commands' own options, so that a new option needs one. See also test_wiring.py.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from command_lines import line_of
from support import write_checkpoint

import weightops
from weightops.cli.main import LINES, run
from weightops.formats.proofs.signers import Credentials, Trust
from weightops.inference.asked import Asked
from weightops.inference.prompt_file import Wanted
from weightops.inference.prompts import conversation
from weightops.inference.settings import Settings
from weightops.recipes.verbs import VERBS


class Row(NamedTuple):
    """An option on the command line, the same in Python (None: it is of the command alone), and what arrives."""

    argv: str
    python: dict[str, Any] | None
    arrives: dict[str, Any]


def row(argv: str, python: dict[str, Any] | None, **arrives: Any) -> Row:
    return Row(argv, python, arrives or python or {})


def same(argv: str, **python: Any) -> Row:
    return Row(argv, python, python)


MODEL = [
    row("--dtype bfloat16", {"dtype": "bfloat16"}, dtype=torch.bfloat16),
    same("--device cpu", device="cpu"),
    same("--engine packed", engine="packed"),
    row("--max-memory 1GiB", {"max_memory": 1 << 30}, max_nbytes=(1 << 30) - (300 << 20)),
]
ASKED = [
    same("--max-new-tokens 3", max_new_tokens=3),
    same("--temperature 0.5", temperature=0.5),
    same("--top-k 4 --temperature 1", top_k=4, temperature=1.0),
    same("--top-p 0.5 --temperature 1", top_p=0.5, temperature=1.0),
    same("--min-p 0.5 --temperature 1", min_p=0.5, temperature=1.0),
    same("--repetition-penalty 1.5", repetition_penalty=1.5),
    same("--presence-penalty 0.5", presence_penalty=0.5),
    same("--frequency-penalty -0.5", frequency_penalty=-0.5),
    same("--no-repeat-ngram-size 3", no_repeat_ngram_size=3),
    same("--num-beams 3", num_beams=3),
    same("--seed 6 --temperature 1", seed=6, temperature=1.0),
    same("--stop x --stop y", stop=("x", "y")),
    row("--stop x", {"stop": "x"}, stop=("x",)),
]


def _answered(each: Row) -> Row:
    """How prompts of a file are answered."""
    return row(f"{each.argv} --prompts list.md5", {**(each.python or {}), "prompts": "list.md5"}, **each.arrives)


ROWS: dict[str, list[Row]] = {
    "quantize": [
        same("--bits 3", bits=3),
        same("--group-size 64", group_size=64),
        same("--asym", sym=False),
        row("--act-order", {"act_order": True}, desc_act=True),
        same("--static-groups", static_groups=True),
        same("--method rtn", method="rtn"),
        row("--calibration text.txt", {"calibration": "text.txt"}, calibration=[Path("text.txt")]),
        row("--samples 7 --calibration text.txt", {"samples": 7, "calibration": Path("text.txt")}, samples=7),
        row("--seq-len 9 --calibration text.txt", {"seq_len": 9, "calibration": ["text.txt"]}, seq_len=9),
        row("--seed 5 --calibration text.txt", {"seed": 5, "calibration": "text.txt"}, seed=5),
        same("--damp-percent 0.5", damp_percent=0.5),
        same("--no-mse", mse=False),
        row("--skip a* --skip b", {"skip": ("a*", "b")}),
        row("--skip a*", {"skip": "a*"}, skip=("a*",)),
        row("--checkpoint-format gptq_v2", {"checkpoint_format": "gptq_v2"}, checkpoint_format="gptq_v2", v1=False),
        row("--checkpoint-format awq", {"checkpoint_format": "awq"}, checkpoint_format="awq", v1=False),
        same("--device cpu", device="cpu"),
        row("--max-memory 1GiB", {"max_memory": "1GiB"}, max_nbytes=1 << 30),
        same("--format torch", format="torch"),
        same("--max-shard-size 7MB", max_shard_size="7MB"),
        same("--expect list.md5", expect="list.md5"),
        row("--digest md5 --digest sha256", {"digest": ("md5", "sha256")}),
        same("--card", card=True),
        same("--reflink", reflink=True),
        same("--overwrite", overwrite=True),
        same("--restart", restart=True),
        same("--if-exists skip", if_exists="skip"),
        same("--workers 3", workers=3),
        row("--dry-run", {"dry_run": True}, estimated=True),
    ],
    "imatrix": [
        row("--calibration a --calibration b", {"calibration": (Path("a"), "b")}, calibration=[Path("a"), Path("b")]),
        same("--samples 7", samples=7),
        same("--seq-len 9", seq_len=9),
        same("--seed 5", seed=5),
        same("--device cpu", device="cpu"),
        same("--overwrite", overwrite=True),
        same("--restart", restart=True),
        same("--if-exists skip", if_exists="skip"),
        same("--workers 3", workers=3),
        same("--dry-run", dry_run=True),
    ],
    "eval": [
        same("--seq-len 9", seq_len=9),
        row("--reference other", {"reference": "other"}, reference="other"),
        row("--text text.txt", {"text": "text.txt"}, texts=[Path("text.txt")]),
        row("--text a --text b", {"text": (Path("a"), "b")}, texts=[Path("a"), Path("b")]),
        same("--influence", influence=True),
        row("--experts use.json", {"experts": "use.json"}, experts=True),
        *MODEL,
    ],
    "chat": [
        *ASKED,
        same("--system s", system="s"),
        same("--template alpaca", template="alpaca"),
        row("--logprobs 2 --jsonl", {"logprobs": 2}, logprobs=2),
        same("--dtype bfloat16", dtype="bfloat16"),
        same("--device cpu", device="cpu"),
        same("--engine packed", engine="packed"),
        same("--max-memory 1GiB", max_memory="1GiB"),
    ],
    "generate": [
        row("--prompt two", {"prompt": "two"}),
        *ASKED,
        row("--chat", {"chat": True}, prompt=conversation("one")),
        row("--system s", {"system": "s"}, prompt=conversation("one", system="s")),
        row("--template alpaca", {"template": "alpaca"}, prompt=conversation("one", template="alpaca")),
        row("--logprobs 2 --json", {"logprobs": 2}),
        *MODEL,
    ],
    "check": [
        row("--no-values", {"values": False}),
        row("--no-architecture", {"architecture": False}),
        same("--max-abs 3", max_abs=3.0),
        same("--ignore nan --ignore zero", ignore=("nan", "zero")),
        row("--ignore nan", {"ignore": "nan"}, ignore=("nan",)),
        same("--workers 3", workers=3),
    ],
    "compare": [
        same("--tolerance 0.5", tolerance=0.5),
        row("--strict --tolerance 0", {"strict": True, "tolerance": 0.0}),
        same("--workers 3", workers=3),
        row("--text a --text b", {"text": (Path("a"), "b")}, texts=[Path("a"), Path("b")], reference="source"),
        row("--seq-len 9 --text a", {"seq_len": 9, "text": "a"}, seq_len=9),
        row("--prompts list.md5", {"prompts": Path("list.md5")}, wanted=[Wanted(0, "one", Settings())]),
        *(_answered(each) for each in ASKED),
        row("--logprobs 2 --prompts list.md5", {"prompts": "list.md5", "logprobs": 2}, logprobs=2),
        row(
            "--system s --template alpaca --prompts list.md5",
            {"prompts": "list.md5", "system": "s", "template": "alpaca"},
            prompt=conversation("one", system="s", template="alpaca"),
        ),
        row("--device cpu --prompts list.md5", {"prompts": "list.md5", "device": "cpu"}, device="cpu"),
        *(row(f"{each.argv} --text a", {**(each.python or {}), "text": "a"}, **each.arrives) for each in MODEL),
    ],
    "verify": [
        row("--manifest list.md5", {"manifest": "list.md5"}, manifest=Path("list.md5")),
        same("--quick", quick=True),
        same("--content", content=True),
        same("--extra fail", extra="fail"),
        row("", {}, extra="warn"),
        same("--algorithm md5", algorithm="md5"),
        same("--workers 3", workers=3),
        *(
            row(f"--signature a {argv}", {"signature": "a", **python}, **arrives)
            for argv, python, arrives in (
                ("--key b", {"key": "b"}, {"signature": Path("a"), "trust": Trust(key=Path("b"))}),
                (
                    "--certificate a --certificate b",
                    {"certificate": ("a", "b")},
                    {"trust": Trust(certificate=(Path("a"), Path("b")))},
                ),
                (
                    "--identity i --issuer u --trust-config a",
                    {"identity": "i", "issuer": "u", "trust_config": "a"},
                    {"trust": Trust(identity="i", issuer="u", trust_config=Path("a"))},
                ),
                ("--key b --extra warn", {"key": "b", "extra": "warn"}, {"extra": "warn"}),
                ("--key b", {"key": "b"}, {"extra": "fail"}),
            )
        ),
    ],
    "manifest": [
        row("--digest md5 --digest sha256", {"digest": ("md5", "sha256")}, digests=("md5", "sha256")),
        row("--digest md5", {"digest": "md5"}, digests=("md5",)),
        row("--md5sums", None, digests=("md5",)),
        row("--sha256sums", None, digests=("sha256",)),
        row("--xxh128sums", None, digests=("xxh3_128",)),
        same("--workers 3", workers=3),
    ],
    "sign": [
        row("--key a", {"key": "a"}, credentials=Credentials(key=Path("a"))),
        row(
            "--key a --password-file list.md5",
            {"key": "a", "password_file": "list.md5"},
            credentials=Credentials(key=Path("a"), password=b"one"),
        ),
        row(
            "--key a --certificate b --chain a --chain b",
            {"key": "a", "certificate": "b", "chain": ("a", "b")},
            credentials=Credentials(key=Path("a"), certificate=Path("b"), chain=(Path("a"), Path("b"))),
        ),
        row(
            "--sigstore --identity-token list.md5 --trust-config a",
            {"sigstore": True, "identity_token": "list.md5", "trust_config": "a"},
            credentials=Credentials(sigstore=True, identity_token="one", trust_config=Path("a")),
        ),
        row("--key a --out b", {"key": "a", "out": "b"}, out=Path("b")),
        row("--key a --allow-symlinks", {"key": "a", "allow_symlinks": True}, allow_symlinks=True),
        row("--key a --overwrite", {"key": "a", "overwrite": True}, overwrite=True),
        row("--key a --dry-run", {"key": "a", "dry_run": True}, dry_run=True),
        row("--key a --workers 3", {"key": "a", "workers": 3}, workers=3),
    ],
    "inspect": [
        row("--include a* --include b", {"include": ("a*", "b")}),
        row("--include a*", {"include": "a*"}, include=("a*",)),
        same("--stats", stats=True),
        row("--base other", {"base": "other"}, base_path="other"),
        same("--workers 3 --stats", workers=3, stats=True),
    ],
    "browse": [],
    "serve": [],
    "publish": [
        row("--create", {"create": True}, create=True, public=False),
        row("--create --public", {"create": True, "public": True}, create=True, public=True),
        row("--delete", {"delete": True}, delete=True),
        row("--message one", {"message": "one"}, message="one"),
        row("--endpoint http://127.0.0.1:1", None, place="hf://org/model"),
        row("--dry-run", {"dry_run": True}, dry_run=True),
        row("--workers 3", {"workers": 3}, workers=3),
    ],
    "download": [
        same("--revision v2", revision="v2"),
        row("--include a* --include b", {"include": ("a*", "b")}),
        row("--exclude a*", {"exclude": "a*"}, exclude=("a*",)),
        row("--sha256 ab", {"sha256": "ab"}, digests={"sha256": "ab"}),
        row("--md5 ab", {"md5": "ab"}, digests={"md5": "ab"}),
        same("--checksums list.md5", checksums="list.md5"),
        row("--endpoint http://127.0.0.1:9", None, endpoint="http://127.0.0.1:9"),
        same("--workers 3", workers=3),
        row("--limit-rate 5MB", None, limit_rate=5_000_000),
        row("--timeout 2", None, timeout_s=2.0),
        row("--deadline 3", None, deadline_s=3.0),
        same("--prune", prune=True),
        same("--overwrite", overwrite=True),
        same("--offline", offline=True),
        same("--dry-run", dry_run=True),
    ],
    "work": [
        row("--workers 3", {"workers": 3}, threads=3),
        row("--output-root a --output-root b", {"output_root": ("a", "b")}, roots=["a", "b"]),
        row("--output-root a", {"output_root": "a"}, roots=["a"]),
    ],
    "finish": [
        row("--output-root a --output-root b", {"output_root": ("a", "b")}, roots=["a", "b"]),
    ],
    "env": [],
    "completion": [],
}
SHOWN = {"--json", "--progress", "--verbose", "-v", "-q", "--quiet", "-o", "--out", "-n"}
ELSEWHERE = {
    "quantize": {"--sym", "--mse", "--html"},
    "check": {"--strict", "--html"},
    "compare": {"--html"},
    "verify": {"--junit"},
    "manifest": {"--dry-run", "--overwrite"},
    "serve": {
        *("--model", "--host", "--port", "--template", "--remote", "--api-key", "--allow-host", "--allow-origin"),
        *("--dtype", "--device", "--engine", "--max-memory", "--dry-run"),
    },
    "inspect": {"-t", "--tensors", "--tree", "--depth"},
    "env": {"--gpu"},
    "download": {"--cache"},
    "generate": {"--prompts"},
    "work": {"--group", "--time-limit"},
    "finish": {"--abandon"},
}
"""Of the command alone, and defaults by their names."""
GIVEN = {
    "quantize": ("source --out out", ("source", "out")),
    "imatrix": ("source --out out.dat", ("source", "out.dat")),
    "eval": ("source", ("source", "text.txt")),
    "generate": ("source", ("source", "one")),
    "chat": ("source", ("source",)),
    "check": ("source", ("source",)),
    "compare": ("source other", ("source", "other")),
    "verify": ("source", ("source",)),
    "inspect": ("source", ("source",)),
    "manifest": ("source", ("source",)),
    "work": ("source --group 2", ("source", 2)),
    "finish": ("source", ("source",)),
    "sign": ("source", ("source",)),
    "publish": ("source hf://org/model", ("source", "hf://org/model")),
    "download": ("org/model --out out", ("org/model", "out")),
}
REQUIRED = {"imatrix": "--calibration a", "eval": "--text text.txt", "generate": "--prompt one"}
FUNCTIONS: dict[str, Callable[..., Any]] = {name: getattr(weightops, name) for name in GIVEN if name != "eval"}
FUNCTIONS["eval"] = weightops.evaluate


class Reached(Exception):
    """The operation was reached."""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What arrives at whatever operation is called, by name; those of a structure by its own names."""
    monkeypatch.chdir(tmp_path)
    for name in ("source", "other"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(2)})
    for name in ("text.txt", "list.md5", "a", "b"):
        (tmp_path / name).write_text("one" if name == "list.md5" else "")
    found: dict[str, Any] = {}

    def stand_in(place: str) -> None:
        module, _, name = place.rpartition(".")
        original = getattr(importlib.import_module(module), name)

        def operation(*args: Any, **kwargs: Any) -> None:
            found.update(inspect.signature(original).bind(*args, **kwargs).arguments)
            raise Reached

        monkeypatch.setattr(place, operation)

    for name in ("evaluate.evaluate", "generate.Generation", "chat.Chat"):
        stand_in(f"weightops.inference.{name}")
    stand_in("weightops.operations.check.check")
    for name in ("work.work", "finish.finish"):
        stand_in(f"weightops.engine.job.{name}")
    pool = MagicMock()
    pool.__exit__.return_value = None
    monkeypatch.setattr("weightops.api.talk.open_pool", lambda _, **options: found.update(options) or pool)

    def answer(pool: Any, wanted: list[Wanted], control: Any) -> None:
        found.update(wanted=wanted, settings=wanted[0].settings, prompt=wanted[0].prompt)
        raise Reached

    monkeypatch.setattr("weightops.inference.side_by_side.answer_side_by_side", answer)
    for name in (
        "compare.compare",
        "verify.verify",
        "verify.verify_signature",
        "sign.sign",
        "publish.publish",
        "manifest.make_manifest",
        "inspect.inspect",
        "download.download_into",
    ):
        stand_in(f"weightops.operations.{name}")
    importlib.import_module("weightops.quantization.calibration")  # which would keep what stands in for it
    monkeypatch.setattr("weightops.inference.tokens.read_text", lambda paths: found.update(texts=list(paths)) or "x")
    stand_for_quantize(monkeypatch, found)
    return found


def stand_for_quantize(patch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """The operations of which quantize is made."""

    def note(result: Any, *names: str) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            found.update({name: value for name, value in zip(names, args, strict=False) if name})
            found.update(kwargs)
            return result

        return operation

    @contextmanager
    def quantized(run: Any, out: Path, control: Any, **options: Any) -> Iterator[Any]:
        found.update(options)
        checkpoint = weightops.open_checkpoint("source")
        yield SimpleNamespace(checkpoint=checkpoint, modules=(), bits_per_weight=4.0, work_folder=None)

    def prepare(checkpoint: Any, options: Any, data: Any, *, device: str, control: Any) -> Any:
        found.update(method=options.method, skip=options.skip, checkpoint_format=options.checkpoint_format)
        found.update({name: getattr(options.settings, name) for name in options.settings.__annotations__})
        found.update(device=device)
        model = SimpleNamespace(vocab_size=8, shown="x")
        estimate = SimpleNamespace(n_modules=0, n_blocks=0, packed_nbytes=0, memory_nbytes=0, kept_nbytes=0)
        estimate.hidden_nbytes = 0
        marks = {"plan": "x", "sources": "y"}
        run = SimpleNamespace(model=model, estimate=lambda: found.update(estimated=True) or estimate)
        run.marks = lambda files: marks
        return run

    def write_all(wanted: Any, running: Any) -> Any:
        ((_, each),) = wanted.items()
        found.update(each.files, **running)
        raise Reached

    data = SimpleNamespace(tokens=torch.zeros((2, 8), dtype=torch.int64), warnings=())
    patch.setattr("weightops.quantization.run.sample_length", note(8, "", "seq_len"))
    patch.setattr("weightops.quantization.run.prepare", prepare)
    patch.setattr("weightops.quantization.run.quantized", quantized)
    patch.setattr("weightops.quantization.calibration.read_documents", note([], "calibration"))
    patch.setattr("weightops.quantization.calibration.calibrate", note(data, "", "", "samples", "", "seed"))
    patch.setattr("weightops.inference.tokens.load_tokenizer", note(object()))
    patch.setattr("weightops.inference.tokens.check_tokens", note(None))
    patch.setattr("weightops.api.models.write_all", write_all)
    patch.setattr("weightops.api.importance.write_all", write_all)
    patch.setattr("weightops.quantization.run.window_length", note(8, "", "seq_len"))
    patch.setattr("weightops.quantization.calibration.begun", note(data))
    patch.setattr("weightops.inference.model.BlockModel", note(MagicMock()))
    patch.setattr("weightops.quantization.run.identity", note(None))
    patch.setattr("weightops.quantization.run.marks", note({"plan": "x", "sources": "y"}))
    patch.setattr("weightops.quantization.importance.find_layers", note(SimpleNamespace(matrices=(), warnings=())))
    patch.setattr("weightops.quantization.importance.expected", note({}))
    patch.setattr("weightops.quantization.importance.matrix_of", note(weightops.open_checkpoint("source")))
    work = MagicMock()
    work.__enter__.return_value = SimpleNamespace(n_done=0, work_folder=None)
    patch.setattr("weightops.quantization.work.Work", note(work))


def held_in(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        came = arrived(found, name)
        assert (tuple(came) if isinstance(value, tuple) else came) == value, name


def arrived(found: dict[str, Any], name: str) -> Any:
    if name in found:
        return getattr(found[name], "name", found[name]) if name == "reference" else found[name]
    if "settings" in found and name in Asked.__annotations__:
        settings = found["settings"]
        return getattr(settings if hasattr(settings, name) else settings.sampling, name)
    web = found["control"].stores.web
    return web.endpoint if name == "endpoint" else getattr(web.policy, name)


CASES = [(command, each) for command, rows in ROWS.items() for each in rows]


@pytest.mark.parametrize(("command", "option"), CASES, ids=lambda x: x if isinstance(x, str) else x.argv)
def test_an_option_reaches_the_operation_from_the_command(seen: dict[str, Any], command: str, option: Row) -> None:
    required = REQUIRED.get(command, "")
    words = [*GIVEN[command][0].split(), *option.argv.split(), "--quiet"]
    words += required.split() if required.split()[:1] != option.argv.split()[:1] else []
    assert run([command, *words]) == (0 if option.argv == "--dry-run" and command == "quantize" else 1)
    held_in(seen, option.arrives)


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, each) for command, each in CASES if each.python is not None],
    ids=lambda x: x if isinstance(x, str) else x.argv,
)
def test_an_option_reaches_the_operation_from_python(seen: dict[str, Any], command: str, option: Row) -> None:
    given = inspect.signature(FUNCTIONS[command]).bind_partial(*GIVEN[command][1]).arguments | (option.python or {})
    try:
        FUNCTIONS[command](**given)
    except Reached:
        pass
    else:
        assert option.argv == "--dry-run"
    held_in(seen, option.arrives)


def test_the_rows_are_all_that_there_is() -> None:
    assert ROWS.keys() | set(map(line_of, VERBS)) | {"run"} == {*LINES}
    for name, rows in ROWS.items():
        command = importlib.import_module(f"weightops.cli.commands.{name}").command
        options = [option for option in command.params if option.param_type_name == "option"]
        flags = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        known = {word for each in rows for word in each.argv.split() if word.startswith("--")}
        assert flags - SHOWN - ELSEWHERE.get(name, set()) == known - SHOWN, name
        if name not in FUNCTIONS:
            continue
        parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"control", "web"}
        keywords -= {word.removeprefix("--") for word in ELSEWHERE.get(name, ())}
        assert keywords <= {keyword for each in rows for keyword in each.python or ()}, name


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *(
            (f"quantize source --out out --method rtn {option}", f"{option.split()[0]} has no use with --method rtn")
            for option in ("--samples 128", "--seq-len 8", "--seed 0", "--damp-percent 0.01", "--calibration text.txt")
        ),
        ("quantize source --out out --method rtn --act-order", "--act-order has no use"),
        ("quantize source --out out --method rtn --static-groups", "--static-groups has no use"),
        ("quantize source --out out --dry-run --html x.html", "--html has no use with --dry-run"),
        ("generate source --prompt x --top-k 3", "at temperature 0 nothing is drawn"),
        ("generate source --prompt x --top-p 0.5", "at temperature 0 nothing is drawn"),
        ("generate source --prompt x --seed 0", "--seed has no use at --temperature 0"),
        ("inspect source --depth 2", "--depth has no use without --tree"),
        ("inspect source --workers 2", "--workers has no use without --stats"),
        ("compare source other --dtype float16", "--dtype has no use without --text or --prompts"),
        ("compare source other --seq-len 9", "--seq-len has no use without --text"),
        ("compare source other --max-new-tokens 9", "--max-new-tokens has no use without --prompts"),
        ("compare source other --prompts list.md5 --seed 1", "--seed has no use at --temperature 0"),
        ("compare source other --strict", "strict says what counts as a difference"),
        ("verify source --quick --content", "quick reads no tensors, and content nothing else"),
        ("verify source --content --extra warn", "--extra has no use with --content"),
        ("verify source --content --algorithm md5", "--algorithm has no use with --content"),
        ("manifest source --md5sums --json", "--json has no use with a checksum list"),
        ("manifest source --sha256sums --overwrite", "--overwrite has no use with a checksum list"),
        ("manifest source --xxh128sums --digest md5", "--digest has no use with a checksum list"),
        *(
            (f"download org/model --out out --offline {option}", f"{option.split()[0]} has no use with --offline")
            for option in ("--sha256 x", "--md5 x", "--checksums x", "--prune", "--overwrite")
        ),
        ("extract-lora --base source --tuned other --out out --rank 3 --max-rank 256", "for an energy without a rank"),
    ],
)
def test_an_option_without_a_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("source", "other"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(2)})
    assert run([*command.split(), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Hint: " in error


@pytest.mark.parametrize("option", [{"md5": "x"}, {"checksums": "x"}, {"prune": True}, {"overwrite": True}])
def test_offline_has_no_use_for_what_servers_are_asked(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(weightops.errors.UsageError, match="has no use offline"):
        weightops.download("org/model", tmp_path / "out", offline=True, **option)
