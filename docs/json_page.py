"""Write docs/json.md, with examples that are made by running the commands: `python docs/json_page.py`.

It takes half a minute. Times, rates and versions differ from run to run, so that the page is not compared with what
this would write; a test holds every example on it to its schema.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from json_schemas import FOLDER, file_name, schemas
from safetensors.torch import save_file

import weightops
from weightops.cli import machine
from weightops.cli.events import SCHEMA as EVENTS
from weightops.cli.machine import Cache, EnvDocument
from weightops.cli.main import run
from weightops.inference.events import SCHEMA as SPOKEN
from weightops.io.strict_json import as_json

TARGET = Path(__file__).with_name("json.md")
TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny-llama"
INTRODUCTION = """\
# JSON

With `--json` a command prints one document on stdout, and nothing else there; progress, warnings and errors are lines
on stderr, as ever. Every document names its schema, such as `"schema": "weightops-verify/1"`, and has the shape that
the [JSON Schema](https://json-schema.org) of that name, linked below, says. Under one name
fields may be added; where one is taken away or comes to mean something else, the number changes, and the changelog says
so.

    weightops verify ./zhixi --json | jq .verdict

Numbers are numbers: bytes in fields that end in `nbytes`, seconds in `_s`. What is not known is null. A number that is
not finite, which JSON does not have, is null too. Text is escaped to ASCII, so that it survives any terminal.

When a command fails, the document on stdout is an error, `weightops-error/2`, and the
[exit code](commands.md#exit-codes) is the one that it names. `verify`, `check`, `compare` and
`merge --verify` do not fail when they find something: they print their own document, and exit with 3.
"""
PRINTED = {
    "weightops-write/2": (
        "`recover`, `convert`, `diff`, `merge`, `merge-lora`, `extract-lora`, `cast`, `shard`, `dequantize`, `pack`, "
        "`repack` and `imatrix`",
        "weightops cast ./model --dtype bfloat16 --out ./model-bf16 --json",
    ),
    "weightops-run/2": ("`run`", "weightops run ./release.yaml --dry-run --json"),
    "weightops-work/1": ("`work`", "weightops work ./job --group 0 --json"),
    "weightops-finish/1": ("`finish`", "weightops finish ./job --json"),
    "weightops-quantize/1": (
        "`quantize`",
        "weightops quantize ./tiny-llama --method rtn --group-size 32 --skip '*.mlp.*' --skip '*.[123].*' "
        "--skip '*.[kvo]_proj' --out ./tiny-llama-4bit --json",
    ),
    "weightops-download/1": ("`download`", "weightops download org/name --out ./name --json"),
    "weightops-check/1": ("`check`", "weightops check ./model --no-architecture --json"),
    "weightops-verify/1": ("`verify`", "weightops verify ./model-bf16 --json"),
    "weightops-publish/1": ("`publish`", "weightops publish ./model-bf16 hf://org/model-bf16 --create --json"),
    "weightops-sign/1": ("`sign`", "weightops sign ./model-bf16 --key ./signer.key --json"),
    "weightops-inspect/2": ("`inspect`", "weightops inspect ./model --stats --tree --json"),
    "weightops-compare/1": ("`compare`", "weightops compare ./model ./model-bf16 --tolerance 0.01 --json"),
    "weightops-merge-plan/1": (
        "`merge --explain`",
        "weightops merge ./model ./tuned --method linear --weight 0.25 --weight 0.75 --explain --json",
    ),
    "weightops-merge-proof/1": (
        "`merge --verify`",
        "weightops merge ./model ./tuned --method linear --weight 0.5 --verify ./model --json",
    ),
    "weightops-eval/1": ("`eval`", "weightops eval ./tiny-llama --text ./short.txt --seq-len 64 --influence --json"),
    "weightops-generate/1": (
        "`generate`",
        'weightops generate ./tiny-llama --prompt "Once upon a time" --max-new-tokens 5 --json',
    ),
    "weightops-batch/1": (
        "`generate --prompts`",
        "weightops generate ./tiny-llama --prompts ./prompts.txt --max-new-tokens 5 --out ./answers.jsonl --json",
    ),
    "weightops-manifest/1": (
        "`manifest`; the same is [weightops-manifest.json](formats.md) in every output",
        "weightops manifest ./model --json",
    ),
    "weightops-env/2": ("`env`", "weightops env --json"),
    "weightops-error/2": ("any command that fails", "weightops inspect ./nowhere --json"),
}
PROGRESS = """\
## weightops-progress/1

`--progress json` makes of progress a line of JSON for each event, on stderr. Other lines there, which do not begin with
a brace, are warnings and errors for people. Every event has its `phase`, such as writing, downloading or verifying
(null outside of one), the `nbytes` of the phase that are done, `total_nbytes` and `nbytes_per_s` (null where they are
not known), and `eta_s`, the seconds that are left at this rate, which is that of the last minute. What was there before
does not count into it.

| event | | also has |
|---|---|---|
| `start` | a phase has begun | |
| `file` | a file is begun (of a download) | `name`, `file_nbytes`, `resumed_nbytes` |
| `advance` | about once a second | |
| `done` | a file is finished, now or (`kept`) by an earlier run | `name`, `file_nbytes`, `kept` |
| `note` | something that a waiting person would want to know | `text` |
| `stop` | the phase is over, or was cut short | `elapsed_s` |
"""
_EVENTS = "weightops download org/name --out ./again --progress json"
TALK = """\
## weightops-text-event/1

`chat --jsonl` prints what happens as a line of JSON for each event. So does whatever else makes texts: `column` is then
the number of the text among several that were asked for together."""
_TALK = 'echo "Once upon a time" | weightops chat ./tiny-llama --template chatml --max-new-tokens 3 --jsonl'
WRITTEN = {
    "weightops-delta/1": (
        "weightops-delta.json, in what `diff` makes",
        "weightops diff --raw ./model --tuned ./tuned --out ./delta",
        "delta/weightops-delta.json",
    ),
    "weightops-quantize-report/1": (
        "quantize_report.json, in what `quantize` makes",
        "",
        "tiny-llama-4bit/quantize_report.json",
    ),
    "weightops-experts/1": (
        "what `eval --experts` writes, and `experts --keep` takes",
        "weightops eval ./moe --text ./short.txt --seq-len 64 --experts ./use.json --quiet",
        "use.json",
    ),
    "weightops-answers/1": ("the first line of what `generate --prompts` writes", "", "answers.jsonl:1"),
    "weightops-answer/1": ("the other lines of it", "", "answers.jsonl:2"),
    "weightops-chat/1": ("what `/save` writes in `chat`", "", "chat.json"),
    "weightops-partial/1": (
        "OUT.partial/run.json, while a run is at work, or when it was cut short",
        "",
        "out.partial/run.json",
    ),
    "weightops-job/1": (
        "JOB/job.json, what several machines share",
        "weightops shard ./model --out ./shared --job ./another-job",
        "another-job/job.json",
    ),
    "weightops-job-group/1": ("JOB/groups/00000.json, a part of it", "", "another-job/groups/00000.json"),
    "weightops-job-output/1": ("JOB/outputs/0.json, how an output ends", "", "another-job/outputs/0.json"),
    "weightops-job-owner/1": (
        "OUT.partial/weightops-job.json, while a job makes OUT",
        "",
        "shared.partial/weightops-job.json",
    ),
    "weightops-job-record/1": ("JOB/records/00000.json, a part that is done", "", "job/records/00000.json"),
    "weightops-job-finished/1": ("JOB/finished.json, when all of it is", "", "job/finished.json"),
    "weightops-blocks/1": ("OUT.blocks/run.json, the same of `quantize`", "", "out.blocks/run.json"),
}


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A folder with small models, and a hub with one of them, as the working directory."""
    sys.path[:0] = [str(TINY.parent.parent)]
    from signing_keys import save_key
    from writable_hub import WritableHub

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name, WritableHub(token="hf_abc") as hub:
        folder = Path(name)
        os.chdir(folder)
        try:
            for seed, model in enumerate(("model", "tuned")):
                torch.manual_seed(seed)
                Path(model).mkdir()
                tensors = {"norm.weight": torch.randn(4), "head.weight": torch.randn(2, 4)}
                save_file(tensors, f"{model}/model.safetensors", metadata={"format": "pt"})
                Path(model, "config.json").write_text('{"torch_dtype": "float32"}\n', encoding="utf-8")
            shutil.copytree(TINY, "tiny-llama")
            text = Path("tiny-llama/heldout.txt").read_text(encoding="utf-8")
            Path("short.txt").write_text(text[:1500], encoding="utf-8")
            prompts = ("Once", "The weights", "of the")
            experts = [{"source_model": "./tiny-llama", "positive_prompts": [each]} for each in prompts]
            mixture = {"base_model": "./tiny-llama", "gate_mode": "cheap_embed", "experts": experts}
            weightops.experts(None, "moe", from_dense=mixture)
            Path("prompts.txt").write_text("Once upon a time\nThe weights\n", encoding="utf-8")
            outputs = {"./out-f16": {"from": "cut", "dtype": "float16"}}
            recipe: dict[str, Any] = {"sources": {"raw": "./model"}, "outputs": outputs}
            recipe["tensors"] = {"cut": {"shard": {"source": "raw", "drop": "norm.weight"}}}
            Path("release.yaml").write_text(json.dumps(recipe), encoding="utf-8")
            weightops.shard("model", "cut", job="job")
            save_key(folder, "signer")
            hub.add("org/name", {path.name: path.read_bytes() for path in Path("model").iterdir()})
            os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_abc"}
            yield folder
        finally:
            os.chdir(before)


def of_no_machine() -> EnvDocument:
    """What `env` shows, of a machine that nobody has."""
    cache = Cache(path="/home/me/.cache/huggingface/hub", exists=True, nbytes=26_000_000_000)
    return EnvDocument(
        versions=machine.versions(),
        system="Linux-6.12.0-x86_64-with-glibc2.41",
        cores=16,
        memory=machine.Memory(total_nbytes=64_000_000_000, available_nbytes=60_000_000_000),
        disk=machine.Disk(folder="/data", kind="xfs", total_nbytes=2_000_000_000_000, free_nbytes=900_000_000_000),
        hub=machine.Hub(endpoint="https://huggingface.co", is_offline=False, has_token=True, cache=cache),
        gpus=(machine.Gpu(name="NVIDIA RTX A6000", nbytes=51_527_024_640),),
        gpus_by="nvidia-smi",
    )


def printed(line: str, *, errors: bool = False) -> str:
    """What a command prints on stdout, or on stderr."""
    if line == "weightops env --json":
        return json.dumps(as_json(of_no_machine()), indent=2)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if run(shlex.split(line)[1:]) and not {"./nowhere", "--verify"} & {*line.split()}:
            raise SystemExit(f"{line} failed")
    return err.getvalue() if errors else out.getvalue()


def cut_short() -> None:
    """Leave what runs that were killed leave."""
    code = "import sys; from weightops.cli.main import run; run(sys.argv[1:])"
    stop = "import os; from {0} import {1}; {1}.{2} = lambda *_: os._exit(1); " + code
    import subprocess

    for place, line in (
        (("weightops.engine.staging", "Staging", "publish"), "shard ./model --out ./out"),
        (("weightops.quantization.work", "Work", "commit"), "quantize ./tiny-llama --method rtn --out ./out"),
    ):
        command = [sys.executable, "-c", stop.format(*place), *shlex.split(line)]
        subprocess.run(command, check=False, capture_output=True)


def talked() -> str:
    """What `chat --jsonl` prints of a short conversation, which it saves."""
    before, sys.stdin = sys.stdin, io.StringIO("Once upon a time\n/save chat.json\n")
    try:
        return printed(_TALK.partition("| ")[2])
    finally:
        sys.stdin = before


def written(path: str) -> str:
    """What is in a file, or in a line of it."""
    name, _, number = path.partition(":")
    text = Path(name).read_text(encoding="utf-8")
    lines = text.splitlines()
    return json.dumps(json.loads(lines[int(number or 1) - 1]), indent=2) if number or len(lines) == 1 else text


def example(text: str) -> str:
    """A document as it is shown: of folders of this machine, as if they lay in `/models`."""
    return f"```json\n{text.strip().replace(str(Path.cwd()), '/models')}\n```"


def render() -> str:
    """The page."""
    parts = [INTRODUCTION, "| schema | printed by |\n|---|---|"]
    rows = [f"| [`{name}`]({FOLDER.name}/{file_name(name)}) | {by} |" for name, (by, _) in PRINTED.items()]
    rows += [
        f"| [`{EVENTS}`]({FOLDER.name}/{file_name(EVENTS)}) | what takes long, on stderr, with `--progress json` |",
        f"| [`{SPOKEN}`]({FOLDER.name}/{file_name(SPOKEN)}) | `chat --jsonl`, a line for each event |",
    ]
    parts[-1] = "\n".join([parts[-1], *rows])
    rows = [f"| [`{name}`]({FOLDER.name}/{file_name(name)}) | {where} |" for name, (where, _, _) in WRITTEN.items()]
    parts += ["Files that are JSON are described in the same way:", "\n".join(["| schema | file |\n|---|---|", *rows])]
    parts += [
        "The examples below were made by the commands above them, on models of a few numbers. (The machine of `env` is "
        "made up.)"
    ]
    with prepared():
        for name, (_, line) in PRINTED.items():
            parts += [f"## {name}", f"    {line}", example(printed(line))]
        parts += [PROGRESS, f"    {_EVENTS}", f"```jsonl\n{printed(_EVENTS, errors=True).strip()}\n```"]
        parts += [TALK, f"    {_TALK}", f"```jsonl\n{talked().strip()}\n```"]
        cut_short()
        for name, (_, line, path) in WRITTEN.items():
            if line:
                printed(line)
            parts += [f"## {name}", *([f"    {line}"] if line else []), example(written(path))]
    assert {*PRINTED, *WRITTEN, EVENTS, SPOKEN} == schemas().keys()
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
