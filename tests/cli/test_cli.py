"""The command line as a user meets it: exit codes, streams, JSON, help that is true."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from adapters import llama, save_adapter, save_model
from command_lines import command_of
from gguf_adapters import save_lora
from gguf_models import save_family
from meta_model import meta_download
from mtp_models import save_with_mtp
from safetensors.torch import load_file
from signing_keys import save_key
from support import digests, write_checkpoint
from systems import needs_itself
from tiny_models import quantize_tiny, save_tiny, save_tokenizer, text
from vision_models import save_whole
from writable_hub import WritableHub

from weightops import cli as package
from weightops import errors
from weightops.cli.main import COMMANDS, ENVIRONMENT, EXIT_CODES, LINES, SUBCOMMANDS, cli, run
from weightops.formats.proofs.manifest import FileEntry, Manifest

ROOT = Path(__file__).parent.parent.parent


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(16, 8, generator=generator).half() for n in ("a", "b")}


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the folders that the help texts name, and a hub with the repositories."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "llama-13b", state(0))
    write_checkpoint(tmp_path / "zhixi", state(1))
    write_checkpoint(tmp_path / "zhixi-diff", state(2))
    write_checkpoint(tmp_path / "model", state(3), shards=2)
    with WritableHub(token="hf_abc", organizations=("zjunlp",)) as hub:
        for repository in ("zjunlp/knowlm-13b-diff", "org/name"):
            hub.add(repository, {p.name: p.read_bytes() for p in (tmp_path / "zhixi-diff").iterdir()})
        hub.static["model.safetensors"] = (tmp_path / "zhixi-diff" / "model.safetensors").read_bytes()
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_abc")
        yield tmp_path


def examples(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The commands under `Example:` in a command's help."""
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out.partition("Example:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("weightops")]


def prepare_examples(command: str, family: Path, found: list[str]) -> None:
    """Small models of the kinds that a command's examples are about."""
    if any("./zhixi.gguf" in line for line in found):
        (family / "zhixi.gguf").write_bytes(b"GGUF")
        entry = FileEntry(nbytes=4, digests={"md5": hashlib.md5(b"GGUF").hexdigest()})
        made = Manifest(schema="weightops-manifest/1", files={"zhixi.gguf": entry})
        (family / "zhixi.gguf.weightops-manifest.json").write_bytes(made.to_bytes())
    if command == "verify":
        assert run(["download", "--cache", "org/name", "-q"]) == 0
    if command in ("verify", "sign"):
        save_key(family, "signer")
    if command == "publish":
        assert run(["manifest", "./zhixi"]) == 0
    if command == "convert":
        meta_download(family / "llama-2-7b")
        assert run([*shlex.split(found[0])[1:-1], str(family / "llama-2-7b-hf")]) == 0
        save_family(family / "qwen3-8b", "qwen3")
        save_family(family / "gemma", "gemma2")
        save_lora(family / "my-lora", family / "qwen3-8b")
        (family / "gguf").mkdir(exist_ok=True)
        assert run(["convert", "./gemma", "--to", "gguf", "--out", "./gguf/gemma-2-9b-Q4_K_M.gguf"]) == 0
    if command == "merge-lora":
        save_model(family / "llama-7b", llama())
        for seed, name in enumerate(("lora", "style", "facts")):
            save_adapter(family / name, family / "llama-7b", seed)
    if command.startswith("adapter"):
        shutil.rmtree(family / "model")
        save_model(family / "model", llama())
        for seed, name in enumerate(("style", "facts")):
            save_adapter(family / name, family / "model", seed)
        assert run(["adapter", "convert", "./style", "--to", "mlx", "--out", "./style-mlx"]) == 0
    if command == "merge":
        for seed, name in enumerate(("base", "a", "b", "chat", "code")):
            save_model(family / name, llama(), seed=seed)
        models = [{"model": f"./{name}", "parameters": {"weight": 0.5}} for name in ("a", "b")]
        (family / "merge.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
        assert (
            run(
                [
                    "merge",
                    str(family / "a"),
                    str(family / "b"),
                    *["--method", "linear", "--weight", "0.5", "--out"],
                    str(family / "merged"),
                ]
            )
            == 0
        )
    if command == "inspect":
        shutil.rmtree(family / "model")
        save_adapter(family / "adapter", save_model(family / "model", llama()))
    if command in ("extract-lora", "cast"):
        for seed, name in enumerate(("llama-13b", "zhixi", "model")):
            shutil.rmtree(family / name)
            sizes = {"hidden_size": 96, "intermediate_size": 192} if command == "cast" else {}
            save_model(family / name, llama(**sizes), seed=seed)
    if command == "shard":
        tensors = {"model.embed_tokens.weight": torch.ones(3, 4), "lm_head.weight": torch.ones(3, 4)}
        write_checkpoint(family / "tied-2023", {**tensors, "model.layers.0.rotary_emb.inv_freq": torch.ones(2)})
        write_checkpoint(family / "trained", {"module.transformer.norm.weight": torch.ones(4)})
        layers = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((2,), float(i)) for i in range(32)}
        write_checkpoint(family / "llama-7b", layers, {"num_hidden_layers": 32})
    if command == "chat":
        save_model(family / "llama-7b", llama(vocab_size=320))
        save_tokenizer(family / "llama-7b")
        save_adapter(family / "my-lora", family / "llama-7b", 0)
    if command == "serve":
        for name in ("llama", "zhixi"):
            shutil.rmtree(family / name, ignore_errors=True)
            save_model(family / name, llama(vocab_size=320))
            save_tokenizer(family / name)
        save_adapter(family / "adapter", family / "llama", 0)
    if command in ("quantize", "eval", "generate", "chat", "serve"):
        shutil.rmtree(family / "model")
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1} if command == "quantize" else {}
        save_tiny(family / "model", "llama", max_position_embeddings=2048, **sizes)
        quantize_tiny(family / "model", family / "model-gptq")
        (family / "text.jsonl").write_text(json.dumps(text(150)))
        save_tokenizer(family / "model", chat_template="{{ messages[-1].content }}")
        (family / "prompts.txt").write_text("one\ntwo\n")
        for name in ("heldout.txt", "text.txt"):
            (family / name).write_text(text(150))
    if command == "eval":
        save_tiny(family / "moe", "mixtral", num_local_experts=72)
    if command == "imatrix":
        shutil.rmtree(family / "model")
        save_family(family / "model", "qwen3")
        (family / "text.txt").write_text(text(150))
    if command == "compare":
        save_tiny(family / "base", "llama", max_position_embeddings=2048)
        quantize_tiny(family / "base", family / "base-gptq")
        shutil.copytree(family / "base", family / "tuned")
        shutil.copytree(family / "model", family / "converted")
        (family / "prompts.txt").write_text("one\ntwo\n")
        (family / "heldout.txt").write_text(text(150))
    if command == "dequantize":
        save_tiny(family / "tiny", "llama")
        quantize_tiny(family / "tiny", family / "model-4bit")
        shutil.copytree(family / "model-4bit", family / "tigerbot", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(family / "model-4bit/model.safetensors"), family / "tigerbot/tigerbot-4bit-128g-0.pt")
        assert run(["cast", "./tiny", "--scheme", "fp8", "--out", "./deepseek-fp8"]) == 0
        tiny = str(Path(__file__).parent.parent / "data" / "tiny-llama")
        (family / "gguf").mkdir()
        assert run(["convert", tiny, "--to", "gguf", "--out", "./gguf/model-Q4_K_M.gguf"]) == 0
    if command == "repack":
        save_tiny(family / "tiny", "llama")
        quantize_tiny(family / "tiny", family / "model-gptq")
        assert run(["repack", "./model-gptq", "--to", "awq", "--out", "./model-awq"]) == 0
    if command == "pack":
        integers = torch.randint(1, 15, (256, 64), dtype=torch.uint8)
        write_checkpoint(family / "integers", {"fc.q": integers, "fc.scales": torch.full((2, 64), 0.1).half()})
    if command == "part":
        save_whole("gemma3", family / "gemma-3-4b-it")
        assert run(["part", "./gemma-3-4b-it", "--take", "text", "--out", "./gemma-3-4b-text-tuned"]) == 0
        save_with_mtp(family / "deepseek-original", family / "deepseek-tuned")
    if command == "experts":
        save_family(family / "qwen3-moe", "qwen3moe")
        for name in ("chat", "code"):
            save_tiny(family / name, "llama")
        mixture = {"base_model": "./chat", "gate_mode": "random"}
        experts = [{"source_model": "./chat"}, {"source_model": "./code"}]
        (family / "moe.yml").write_text(json.dumps({**mixture, "experts": experts}))
    if command == "edit":
        save_family(family / "qwen3-8b", "qwen3")
        steps = [{"select": r"model\.norm\.weight", "scale": {"by": 2}}]
        (family / "steps.yml").write_text(json.dumps({"edit": {"source": "qwen3-8b", "steps": steps}}))
    if command == "vocab":
        shutil.rmtree(family / "model")
        for name in ("model", "base", "small", "large"):
            save_tiny(family / name, "llama", hidden_size=16, num_hidden_layers=1)
        (family / "corpus.txt").write_text(text(9))
        (family / "chatml.jinja").write_text("{{ messages }}<|im_end|>")
    if command in ("work", "finish"):
        shutil.copytree(family / "llama-13b", family / "llama")
        shutil.copytree(family / "zhixi-diff", family / "diff")
    if command == "finish":
        for name in ("tuned-job", "other-job"):
            out = "tuned" if name == "tuned-job" else "other"
            job = ["--raw", "./llama", "--diff", "./diff", "--out", out, "--job", name]
            assert run(["recover", *job]) == 0
        assert run(["work", "./tuned-job", "--group", "0"]) == 0
    if command == "run":
        recipe = {"sources": {"raw": "./llama-13b"}, "outputs": {"./out": {"from": "raw", "dtype": "bfloat16"}}}
        (family / "release.yaml").write_text(json.dumps(recipe))


@pytest.mark.parametrize("command", [*LINES, *SUBCOMMANDS])
def test_the_examples_in_the_help_run(
    command: str, family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examples(command, capsys)
    assert found
    prepare_examples(command, family, found)
    for line in found:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n"))
        words = shlex.split(line.partition(" > ")[0])[1:]
        if "hf://org/name" in words:
            continue  # what a hub has is run by tests/stores
        if "--out" in words and command != "imatrix":  # whose second example takes what the first has made
            words[words.index("--out") + 1] = str(family / f"out-{len(list(family.iterdir()))}")
        # The published lists are those of the real models, which these small ones are not.
        published = [word for word in words if word.startswith("zhixi-13b-")]
        expected = (2 if command == "recover" else 3) if published else 0
        if command == "serve":
            words.append("--dry-run")  # for it would serve for ever
        if command == "browse":
            expected = 2  # for there is no terminal here
        digest = hashlib.sha256((family / "zhixi-diff" / "model.safetensors").read_bytes()).hexdigest()
        words = [digest if word == "HEX" else word for word in words]
        words = [word.replace("https://example.org", f"{os.environ['HF_ENDPOINT']}/static/files") for word in words]
        if command == "verify" and expected == 0:
            assert run(["manifest", "./zhixi", "--overwrite"]) == 0
            assert run(["sign", "./zhixi", "--key", "signer.key", "--overwrite"]) == 0
        assert run(words) == expected, line


@pytest.mark.parametrize("command", [*LINES, *SUBCOMMANDS])
def test_help_names_exit_codes_that_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "-h"]) == 0
    text = capsys.readouterr().out.partition("Exit codes:")[2]
    codes = [int(code) for code in re.findall(r"(?:^|;)\s*(\d+)\s", text)]
    assert codes
    assert all(code in EXIT_CODES for code in codes)


def test_every_error_has_a_documented_exit_code() -> None:
    pending = [errors.WeightopsError]
    while pending:
        error = pending.pop()
        pending += error.__subclasses__()
        assert error.exit_code in EXIT_CODES


def test_docs_are_generated_from_the_help() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.render(), "run `python docs/generate.py`"


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"[`{command}`](docs/commands.md#weightops-{command})" in readme for command in COMMANDS)


def recover(*more: str) -> list[str]:
    return ["recover", "--raw", "llama-13b", "--diff", "zhixi-diff", "--out", "out", *more]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_exit_codes(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recover()) == 0
    assert run(["verify", "out"]) == 0
    assert run(recover()) == 11
    assert run(["recover", "--raw", "nowhere", "--diff", "zhixi-diff", "--out", "new"]) == 10
    assert run(["recover"]) == 2
    assert run(["recver"]) == 2
    assert run(recover("--max-shard-size", "lots", "--overwrite")) == 2
    write_checkpoint(family / "other", {"x": torch.ones(1)})
    assert run(["recover", "--raw", "other", "--diff", "zhixi-diff", "--out", "new"]) == 1
    flip(family / "out" / "model.safetensors", -1)
    assert run(["verify", "out"]) == 3
    flip(family / "out" / "model.safetensors", 8)
    assert run(["inspect", "out"]) == 13
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "Did you mean 'recover'?" in error
    assert "Hint:" in error


def test_json_is_one_document_on_stdout(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, schema in (
        (recover("--json", "--dry-run"), "weightops-write/2"),
        (recover("--json"), "weightops-write/2"),
        (["inspect", "out", "--json"], "weightops-inspect/2"),
        (["verify", "out", "--json"], "weightops-verify/1"),
        (["manifest", "model", "--json"], "weightops-manifest/1"),
        (["env", "--json"], "weightops-env/2"),
        (recover("--json"), "weightops-error/2"),
        (["inspect", "nowhere", "--json"], "weightops-error/2"),
    ):
        run(arguments)
        assert json.loads(capsys.readouterr().out)["schema"] == schema, arguments


def test_checksum_lists_are_read_by_the_tools_they_are_for(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, tool in (("--md5sums", "md5sum"), ("--sha256sums", "sha256sum")):
        assert run(["manifest", "model", option]) == 0
        listing = capsys.readouterr().out
        subprocess.run([tool, "-c", "--strict", "-"], input=listing, text=True, cwd=family / "model", check=True)


def test_underscores_are_dashes(family: Path) -> None:
    assert run(recover("--max_shard_size", "1MB", "--dry_run")) == 0
    assert not (family / "out").exists()


def test_names_from_files_cannot_move_the_cursor(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(family / "odd", {"a\x1b[2Jb\u202e": torch.ones(2)})
    assert run(["inspect", "odd", "--tensors"]) == 0
    write_checkpoint(family / "odd", {"a\x1b[2Jc": torch.ones(3)})
    assert run(["recover", "--raw", "odd", "--diff", "zhixi-diff", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\u202e" not in captured.out + captured.err


def test_no_variable_of_the_environment_sets_an_option(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = click.Context(cli, info_name="weightops", **cli.context_settings)
    assert root.auto_envvar_prefix is None
    for name in LINES:
        command = command_of(name)
        assert [param.name for param in command.params if param.envvar is not None] == []
    (family / "llama-13b" / "MD5SUMS").write_text("0" * 32 + "  config.json\n")
    for variable in ("WEIGHTOPS_VERIFY_QUICK", "WEIGHTOPS_QUICK", "WEIGHTOPS_VERIFY_CONTENT"):
        monkeypatch.setenv(variable, "1")
    assert run(["verify", str(family / "llama-13b"), "-q"]) == 3


def test_what_is_read_of_the_environment_is_documented() -> None:
    documented = {name for names in ENVIRONMENT for name in names.split(", ")}
    read = {
        found
        for path in Path(package.__file__).parent.glob("*.py")
        for found in re.findall(r'(?:environ(?:\.get\()?\[?|_is_set\()"(\w+)"', path.read_text())
    }
    assert "WEIGHTOPS_DEBUG" in read
    assert read - documented == set()
    assert [name for name in documented if name.startswith("WEIGHTOPS_")] == ["WEIGHTOPS_DEBUG"]


def test_unexpected_errors_show_no_traceback(
    family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weightops.api.prove.find_place", lambda *_: 1 / 0)
    assert run(["inspect", "model"]) == 1
    assert "WEIGHTOPS_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("WEIGHTOPS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["inspect", "model"])


def weightops(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "weightops", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_terminal_there_is_one_line_per_shard(family: Path) -> None:
    process = weightops("shard", "model", "--out", "out", "--max-shard-size", "200B", cwd=family)
    out, err = process.communicate()
    assert process.returncode == 0
    assert sorted(err.splitlines()) == [f"wrote model-0000{i}-of-00002.safetensors (360 B)" for i in (1, 2)]
    assert "content " in out


@needs_itself("fork")
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signals_stop_the_run_and_it_continues(tmp_path: Path, number: signal.Signals, code: int) -> None:
    layers = {f"layer.{i}": torch.full((512, 1024), i).half() for i in range(160)}
    write_checkpoint(tmp_path / "model", layers)
    # one worker, so that there is a while left to be stopped in
    arguments = ("shard", "model", "--out", "out", "--max-shard-size", "1100KB", "--workers", "1")
    process = weightops(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out.partial/output").glob("model-*"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert "the same command again" in err
    assert not (tmp_path / "out").exists()
    again = weightops(*arguments, cwd=tmp_path)
    _, err = again.communicate()
    assert again.returncode == 0
    assert "kept model-00001-of-00160" in err
    found = {n: t for p in sorted((tmp_path / "out").glob("*.safetensors")) for n, t in load_file(p).items()}
    assert all(torch.equal(found[n], t) for n, t in layers.items())


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; from weightops.cli.main import run; run(['--help']); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_bits_need_no_torch(family: Path) -> None:
    """Diff, exact recovery, reshard, verify and inspect start without the second that importing torch takes."""
    code = """
import sys
from weightops.cli.main import run
for line in sys.stdin.read().splitlines():
    assert run(line.split()) == 0, line
print('torch' in sys.modules)
"""
    commands = """diff --raw llama-13b --tuned zhixi --out delta
recover --raw llama-13b --diff delta --out again
shard again --out reshard
verify again
inspect again"""
    done = subprocess.run([sys.executable, "-c", code], input=commands, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_nothing_is_left_in_the_working_directory(family: Path) -> None:
    before = digests(family)
    assert run(recover("--dry-run")) == 0
    assert run(["inspect", "model"]) == 0
    assert digests(family) == before
    assert os.listdir(family)


def test_a_manifest_is_made_for_any_folder(family: Path) -> None:
    (family / "plain" / "sub").mkdir(parents=True)
    (family / "plain" / "sub" / "notes.txt").write_text("x")
    assert run(["manifest", "plain"]) == 0
    assert run(["verify", "plain"]) == 0
    (family / "plain" / "sub" / "notes.txt").write_text("y")
    assert run(["verify", "plain"]) == 3
    assert run(["manifest", "plain"]) == 11


def test_a_manifest_may_lie_elsewhere_or_be_tried_only(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["manifest", "model", "--dry-run"]) == 0
    assert "weightops-manifest.json would be written: 4 files, 2 tensors" in capsys.readouterr().out
    assert run(["manifest", "model", "--out", "list.json"]) == 0
    assert not (family / "model/weightops-manifest.json").exists()
    assert run(["verify", "model", "--manifest", "list.json"]) == 0
    assert run(["manifest", "model", "--out", "list.json"]) == 11
    assert run(["manifest", "model", "--out", "list.json", "--overwrite"]) == 0


def test_re_sharding_keeps_the_content(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["manifest", "model"]) == 0
    assert run(["shard", "model", "--out", "other", "--format", "torch"]) == 0
    assert run(["verify", "other", "--manifest", "model/weightops-manifest.json"]) == 3
    assert "every tensor is equal" in capsys.readouterr().out
    assert run(["verify", "other", "--manifest", "model/weightops-manifest.json", "--content"]) == 0
    write_checkpoint(family / "changed", state(3) | {"b": state(4)["b"]})
    assert run(["verify", "changed", "--manifest", "model/weightops-manifest.json", "--content"]) == 3
    assert "tensor b differs" in capsys.readouterr().out
