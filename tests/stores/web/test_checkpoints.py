"""Commands on checkpoints that lie on servers: the same result as from disk, proven, from few bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fetching import wait_until
from hub import Fault, Hub
from support import digests, write_checkpoint
from systems import needs_itself

import weightops
from weightops.engine import proof
from weightops.engine.control import Control
from weightops.errors import (
    AuthenticationFailed,
    CorruptInput,
    Differs,
    IncompatibleInputs,
    NetworkFailed,
    NoWeights,
    PlanDiffers,
    SourceMissing,
    UsageError,
    WeightopsError,
)
from weightops.recipes.execute import Result
from weightops.stores.web import ranges
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

GOLDEN = Path(__file__).parents[2] / "golden" / "knowlm"
QUICK = Policy(timeout_s=0.3, attempts=4, first_delay_s=0.01)
WEIGHTS = (".safetensors", ".wdelta", ".bin")
MB: Any = {"max_shard_size": "1MB"}
STATE = dict[str, torch.Tensor]


def state(seed: int, layers: int = 12) -> STATE:
    """Names as transformers gives them: in the order of their layers, not of the alphabet."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    tensors = {"model.embed_tokens.weight": normal(500, 256)}
    for i in range(layers):
        tensors |= {f"model.layers.{i}.mlp.weight": normal(512, 256), f"model.layers.{i}.norm.weight": normal(256)}
    return {**tensors, "lm_head.weight": normal(500, 256)}


def contents(folder: Path) -> dict[str, bytes | Path]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights_nbytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in WEIGHTS)


def sent(hub: Hub) -> int:
    """Bytes of weight files that went out."""
    return sum(r.bytes_sent for r in hub.log if r.name is not None and r.name.endswith(WEIGHTS))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw in one file, by name; tuned in several and two containers, by layer; an exact delta and published diffs."""
    folder = tmp_path_factory.mktemp("family")
    write_checkpoint(folder / "raw", state(0), {"vocab_size": 500})
    write_checkpoint(folder / "one", state(1), {"vocab_size": 500})
    (folder / "one" / "tokenizer.model").write_bytes(b"pieces")
    opened = weightops.open_checkpoint(folder / "one")
    by_layer = replace(opened, tensors={name: opened[name] for name in state(1)})
    weightops.save(by_layer, folder / "tuned", **MB)
    weightops.save(by_layer, folder / "torch", format="torch", **MB)
    weightops.diff(folder / "raw", folder / "tuned", folder / "delta", **MB)
    weightops.diff(folder / "raw", folder / "tuned", folder / "small", compress=True, **MB)
    subtract: Any = {"method": "subtract", "dtype": "float16", **MB}
    weightops.diff(folder / "raw", folder / "tuned", folder / "published", **subtract)
    weightops.diff(folder / "raw", folder / "tuned", folder / "published-bin", format="torch-1.12", **subtract)
    return folder


@pytest.fixture(autouse=True)
def small_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors here have a hundredth of the usual size, so have the gaps that are read through."""
    for module in (ranges, proof):
        monkeypatch.setattr(module, "SKIPPED_NBYTES", 16 << 10)


@pytest.fixture
def hub(family: Path) -> Iterator[Hub]:
    with Hub() as hub:
        for folder in family.iterdir():
            hub.add(f"org/{folder.name}", contents(folder))
        yield hub
        while WEBS:
            WEBS.pop().close()


WEBS: list[Web] = []


def control(hub: Hub, token: str | None = None) -> Control:
    """A control with a web of its own, which lasts as long as the fixture."""
    WEBS.append(Web(QUICK, endpoint=hub.endpoint, token=token))
    return Control(web=WEBS[-1])


def shard(hub: Hub, source: str, out: Path, **options: Any) -> Result:
    return weightops.shard(source, out, control=control(hub), **{**MB, **options})


# --- the same results, from few bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("diff", ["delta", "small", "published", "published-bin"])
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_recover_gives_the_same_bytes_as_from_disk(
    hub: Hub, family: Path, tmp_path: Path, diff: str, container: str
) -> None:
    options: dict[str, Any] = {"format": container, "max_shard_size": "1MB"}
    weightops.recover(family / "raw", family / diff, tmp_path / "local", **options)
    remote = weightops.recover(family / "raw", f"hf://org/{diff}", tmp_path / "remote", **options, control=control(hub))
    assert remote.warnings == ()
    files = {name: (digests(tmp_path / name)) for name in ("local", "remote")}
    manifests = [json.loads((tmp_path / name / "weightops-manifest.json").read_bytes()) for name in files]
    assert re.fullmatch(rf"hf://org/{diff}@[0-9a-f]{{40}}", manifests[1]["sources"]["diff"]["name"])
    assert manifests[0]["content_id"] == manifests[1]["content_id"]
    assert [files[name].pop("weightops-manifest.json") for name in files]
    assert files["local"] == files["remote"]
    assert sent(hub) < 1.05 * weights_nbytes(family / diff)


def test_the_golden_case_comes_out_with_the_md5_of_the_original_script(tmp_path: Path) -> None:
    with Hub() as hub:
        for name in ("raw", "diff"):
            hub.add(f"org/{name}", contents(GOLDEN / name))
        weightops.recover(
            "hf://org/raw",
            "hf://org/diff@main",
            tmp_path / "out",
            format="torch-1.12",
            max_shard_size="150KB",
            expect=GOLDEN / "recovered.md5",
            control=control(hub),
        )


@pytest.mark.parametrize("source", ["one", "tuned", "torch", "delta"])
@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_shard_fetches_each_byte_once_and_proves_it(
    hub: Hub, family: Path, tmp_path: Path, source: str, container: str
) -> None:
    result = shard(hub, f"hf://org/{source}", tmp_path / "out", format=container)
    assert result.warnings == ()
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / source).content_id
    assert sent(hub) < 1.05 * weights_nbytes(family / source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (family / source / "config.json").read_bytes()


def test_diff_of_two_repositories_recovers_what_it_was_made_from(hub: Hub, family: Path, tmp_path: Path) -> None:
    weightops.diff("hf://org/raw", "hf://org/tuned", tmp_path / "delta", control=control(hub))
    made = weightops.recover(family / "raw", tmp_path / "delta", tmp_path / "out")
    assert made.manifest is not None
    assert made.manifest.content_id == weightops.manifest(family / "tuned").content_id


def test_a_raw_checkpoint_that_is_not_the_base_is_refused_from_afar(hub: Hub, family: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleInputs, match="not the base of this delta"):
        weightops.recover("hf://org/one", family / "delta", tmp_path / "out", control=control(hub))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["one", "tuned", "torch"])
def test_inspect_reads_headers_only(hub: Hub, family: Path, source: str) -> None:
    with Web(QUICK, endpoint=hub.endpoint) as web:
        found = weightops.inspect(f"hf://org/{source}", web=web)
    local = weightops.inspect(family / source)
    assert (found.tensors, found.shards, found.content_id) == (local.tensors, local.shards, local.content_id)
    assert found.sidecars == local.sidecars
    assert found.path == f"hf://org/{source}"
    # 64 KiB of each of these small files are more than their headers.
    assert sent(hub) <= len(set(found.shards.values())) * (100 << 10)


def test_a_dry_run_says_what_comes_over_the_network(
    hub: Hub, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from weightops.cli.main import run

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    command = ["recover", "--raw", str(family / "raw"), "--out", str(tmp_path / "out"), "--dry-run", "--diff"]
    assert run([*command, "hf://org/published"]) == 0
    assert ", 3.7 MB over the network" in capsys.readouterr().out
    assert run([*command, str(family / "published")]) == 0
    assert "network" not in capsys.readouterr().out
    assert sent(hub) <= 5 * (64 << 10)


def odd(folder: Path) -> None:
    """Views and a legacy file, of which neither lies in a row."""
    torch.manual_seed(0)
    matrix = torch.randn(400, 300)
    folder.mkdir()
    torch.save({"t": matrix.t(), "part": matrix[::3], "shared": matrix}, folder / "pytorch_model-00001-of-00002.bin")
    legacy = {"b": torch.randn(50_000), "a": torch.randn(300, 200).t(), "empty": torch.ones(0, 2)}
    torch.save(legacy, folder / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False)


def test_views_and_legacy_files_are_read_as_from_disk(hub: Hub, tmp_path: Path) -> None:
    odd(tmp_path / "odd")
    hub.add("org/odd", contents(tmp_path / "odd"))
    result = weightops.shard("hf://org/odd", tmp_path / "out", control=control(hub))
    assert result.warnings == ()
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(tmp_path / "odd").content_id


# --- proof ------------------------------------------------------------------------------------------------------------

FLIPPED = ["one", "tuned", "published"]


@pytest.mark.parametrize("source", FLIPPED)
def test_a_flipped_byte_is_found_and_nothing_is_published(hub: Hub, family: Path, tmp_path: Path, source: str) -> None:
    name = max((p for p in (family / source).iterdir() if p.suffix in WEIGHTS), key=lambda p: p.stat().st_size).name
    hub.always[name] = Fault("flip", 100_000)
    with pytest.raises(Differs, match=rf"{name}: sha256 is [0-9a-f]{{64}}, expected [0-9a-f]{{64}}") as caught:
        shard(hub, f"hf://org/{source}", tmp_path / "out")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_in_a_torch_file_is_found_by_its_own_checksum(hub: Hub, family: Path, tmp_path: Path) -> None:
    name = min(p.name for p in (family / "torch").glob("*.bin"))
    hub.always[name] = Fault("flip", 300_000)
    with pytest.raises((CorruptInput, Differs), match=r"CRC-32|sha256"):
        shard(hub, "hf://org/torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_flipped_byte_in_a_small_file_is_found(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.always[name] = Fault("flip", 3)
    with pytest.raises(Differs, match=name):
        shard(hub, "hf://org/tuned", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_pass_in_order_is_fetched_once_more(hub: Hub, family: Path, tmp_path: Path) -> None:
    """One file with the layers by name goes to several with the layers by number."""
    arguments: Any = ("hf://org/raw", family / "published")
    plan = weightops.recover(*arguments, tmp_path / "out", control=control(hub), dry_run=True, **MB).plan
    hub.log.clear()
    weightops.recover(*arguments, tmp_path / "out", control=control(hub), **MB)
    nbytes = weights_nbytes(family / "raw")
    assert 1.2 * nbytes < proof.fetched_nbytes(plan) < 2 * nbytes
    assert 1.2 * nbytes < sent(hub) < 1.2 * proof.fetched_nbytes(plan)
    hub.always["model.safetensors"] = Fault("flip", nbytes - 1)
    with pytest.raises(Differs, match="sha256"):
        weightops.recover(*arguments, tmp_path / "flipped", control=control(hub), **MB)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_workers_prove_as_much(hub: Hub, family: Path, tmp_path: Path) -> None:
    result = shard(hub, "hf://org/one", tmp_path / "out", workers=3)
    assert result.warnings == ()
    assert sent(hub) < 2.5 * weights_nbytes(family / "one")
    hub.always["model.safetensors"] = Fault("flip", 3_000_000)
    with pytest.raises(Differs, match="sha256"):
        shard(hub, "hf://org/one", tmp_path / "flipped", workers=3)
    assert not (tmp_path / "flipped").exists()


def test_a_second_run_proves_its_files_anew(hub: Hub, family: Path, tmp_path: Path) -> None:
    with Web(QUICK, endpoint=hub.endpoint) as web:
        for out in ("first", "second"):
            weightops.shard("hf://org/one", tmp_path / out, control=Control(web=web), **MB)
        opened = weightops.open_checkpoint("hf://org/one", web)
        hub.always["model.safetensors"] = Fault("flip", 1_000_000)
        with pytest.raises(Differs, match="sha256"):
            weightops.save(opened, tmp_path / "third", control=Control(web=web), **MB)


def test_what_is_read_in_part_is_named(hub: Hub, family: Path, tmp_path: Path) -> None:
    half = {name: tensor for i, (name, tensor) in enumerate(state(2).items()) if i < 14}
    write_checkpoint(tmp_path / "diff", half)
    hub.add("org/big", {"model.safetensors": (family / "raw" / "model.safetensors").read_bytes()})
    result = weightops.recover(
        "hf://org/big", tmp_path / "diff", tmp_path / "out", drop=["*"], control=control(hub), workers=1
    )
    assert [w for w in result.warnings if "model.safetensors: read in part: not held against its sha256" in w]
    assert sent(hub) < weights_nbytes(family / "raw")


# --- networks that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("cut", 100_000),
        Fault("reset", 100_000),
        Fault("stall", 100_000, 60),
        Fault("status", 503),
        Fault("status", 429),
    ],
    ids=lambda fault: f"{fault.kind} {fault.at}",
)
def test_passing_failures_are_survived(hub: Hub, family: Path, tmp_path: Path, fault: Fault) -> None:
    for name in contents(family / "tuned"):
        hub.faults[name] = [fault, None, fault]
    result = shard(hub, "hf://org/tuned", tmp_path / "out")
    assert result.warnings == ()
    assert digests(tmp_path / "out")["config.json"] == digests(family / "tuned")["config.json"]
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / "tuned").content_id


def save(
    hub: Hub, out: Path, source: str = "hf://org/tuned", *, break_off: str | None = None, error: int = 503
) -> Result:
    """Save a checkpoint with its own shards; the file `break_off` fails once its header has been read."""
    with Web(QUICK, endpoint=hub.endpoint) as web:
        opened = weightops.open_checkpoint(source, web)
        if break_off:
            hub.always[break_off] = Fault("status", error)
        try:
            return weightops.save(opened, out, max_shard_size="source", control=Control(web=web))
        finally:
            hub.always.clear()


def test_a_run_that_failed_continues_and_fetches_what_it_lacks(hub: Hub, family: Path, tmp_path: Path) -> None:
    shards = sorted((family / "tuned").glob("*.safetensors"))
    with pytest.raises(NetworkFailed, match="gave up after 4 attempts"):
        save(hub, tmp_path / "out", break_off=shards[2].name)
    hub.log.clear()
    result = save(hub, tmp_path / "out")
    assert len(result.resumed) == 2
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / "tuned").content_id
    # The first two were proven by the run that failed: nothing but their headers is fetched.
    lacking = sum(path.stat().st_size for path in shards[2:])
    assert sent(hub) <= lacking + 2 * (64 << 10)


def test_a_repository_that_moves_on_is_another_plan(hub: Hub, family: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="status 404"):
        save(hub, tmp_path / "out", break_off=sorted(contents(family / "tuned"))[2], error=404)
    hub.add("org/tuned", {**contents(family / "tuned"), "config.json": b'{"model_type": "other"}'})
    with pytest.raises(PlanDiffers, match=r"hf://org/tuned@[0-9a-f]{40}.*, now .*hf://org/tuned@[0-9a-f]{40}"):
        save(hub, tmp_path / "out")


def test_a_file_on_a_plain_server_that_changed_is_another_plan(hub: Hub, family: Path, tmp_path: Path) -> None:
    url = serve(hub, family / "tuned", without="weightops-manifest.json")
    first, *_, last = sorted(n for n in contents(family / "tuned") if n.endswith(".safetensors"))
    with pytest.raises(SourceMissing, match="status 404"):
        save(hub, tmp_path / "out", url, break_off=f"model/{last}", error=404)
    hub.static[f"model/{first}"] = bytes(hub.static[f"model/{first}"])[:-1] + b"x"
    with pytest.raises(PlanDiffers, match="etag was"):
        save(hub, tmp_path / "out", url)


def test_a_file_that_changes_while_it_is_read_is_refused(hub: Hub, family: Path, tmp_path: Path) -> None:
    data = (family / "one" / "model.safetensors").read_bytes()
    hub.static["model.safetensors"] = data
    with Web(QUICK, endpoint=hub.endpoint) as web:
        opened = weightops.open_checkpoint(f"{hub.endpoint}/static/files/model.safetensors", web)
        hub.static["model.safetensors"] = data[:-1] + b"x"
        with pytest.raises(CorruptInput, match="changed while it was being read"):
            weightops.save(opened, tmp_path / "out", control=Control(web=web))
    assert list(tmp_path.iterdir()) == []


@needs_itself("fork")
def test_ctrl_c_ends_a_silent_read_within_a_second(hub: Hub, tmp_path: Path) -> None:
    hub.always["model.safetensors"] = Fault("stall", 500_000, 60)
    process = subprocess.Popen(
        [sys.executable, "-m", "weightops", "shard", "hf://org/one", "--out", str(tmp_path / "out")],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while sent(hub) < 500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began < 1.5
    assert "the same command again" in err


# --- who may read -----------------------------------------------------------------------------------------------------


def test_a_public_repository_needs_no_token_and_a_private_one_does(family: Path) -> None:
    with Hub(token="hf_secret") as hub:
        hub.add("org/private", contents(family / "tuned"))
        assert weightops.inspect("hf://org/private", web=control(hub, token="hf_secret").stores.web).nbytes
        assert not any("authorization" in r.headers for r in hub.log if r.server == "cdn")
        with pytest.raises(AuthenticationFailed, match="no such repository, or a private one") as caught:
            weightops.inspect("hf://org/private", web=control(hub).stores.web)
        assert caught.value.exit_code == 14


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("hf://org/nowhere", WeightopsError),
        ("hf://org/tuned@nowhere", SourceMissing),
        ("hf://org/empty", NoWeights),
        ("hf://org", UsageError),
        ("{}/static/files/nowhere.safetensors", SourceMissing),
        ("{}/static/files/nowhere/", NoWeights),
        ("http://user:password@127.0.0.1/x.safetensors", UsageError),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path, source: str, error: type[WeightopsError]) -> None:
    hub.add("org/empty", {"README.md": b"nothing"})
    with pytest.raises(error):
        shard(hub, source.format(hub.endpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- folders and files on plain servers -------------------------------------------------------------------------------


def serve(hub: Hub, folder: Path, without: str = "") -> str:
    hub.static.update({f"model/{n}": data for n, data in contents(folder).items() if n != without})
    return f"{hub.endpoint}/static/files/model/"


def test_a_folder_with_a_manifest_is_proven_by_it(hub: Hub, family: Path, tmp_path: Path) -> None:
    url = serve(hub, family / "tuned")
    result = shard(hub, url, tmp_path / "out")
    assert result.warnings == ()
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / "tuned").content_id
    assert sent(hub) < 1.05 * weights_nbytes(family / "tuned")
    hub.always["model/model-00002-of-00005.safetensors"] = Fault("flip", 200_000)
    with pytest.raises(Differs, match="xxh3_128"):
        shard(hub, url, tmp_path / "out2")


@pytest.mark.parametrize("source", ["one", "tuned", "torch"])
def test_a_folder_without_a_manifest_is_found_by_the_usual_names(
    hub: Hub, family: Path, tmp_path: Path, source: str
) -> None:
    url = serve(hub, family / source, without="weightops-manifest.json")
    result = shard(hub, url, tmp_path / "out")
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / source).content_id
    assert {"config.json", "tokenizer.model"} <= {p.name for p in (tmp_path / "out").iterdir()}
    unproven = [w for w in result.warnings if "names no digest" in w]
    assert len(unproven) == (0 if source == "torch" else len(list((family / source).glob("*.safetensors"))))


@pytest.mark.parametrize("without", ["", "weightops-manifest.json"])
def test_a_compressed_delta_in_a_folder_on_a_server_is_recovered_from(
    hub: Hub, family: Path, tmp_path: Path, without: str
) -> None:
    url = serve(hub, family / "small", without)
    made = weightops.recover(family / "raw", url, tmp_path / "out", control=control(hub))
    assert made.manifest is not None
    assert made.manifest.content_id == weightops.manifest(family / "tuned").content_id
    assert sent(hub) < 1.05 * weights_nbytes(family / "small")


def test_one_weight_file_by_its_url(hub: Hub, family: Path, tmp_path: Path) -> None:
    url = f"{serve(hub, family / 'one')}model.safetensors?Signature=1"
    result = shard(hub, url, tmp_path / "out")
    assert result.manifest is not None
    assert result.manifest.content_id == weightops.manifest(family / "tuned").content_id
    assert ["names no digest" in w for w in result.warnings] == [True]
    assert not any("Signature" in w for w in result.warnings)
    assert "Signature" not in (tmp_path / "out" / "weightops-manifest.json").read_text()


def test_without_a_web_one_with_defaults_is_opened(hub: Hub, family: Path, tmp_path: Path) -> None:
    url = serve(hub, family / "tuned")
    assert weightops.inspect(url).content_id == weightops.inspect(family / "tuned").content_id
    assert weightops.shard(url, tmp_path / "out", **MB).warnings == ()
    opened = weightops.open_checkpoint(url)
    hub.log.clear()
    control = Control()
    assert weightops.save(opened, tmp_path / "saved", control=control, **MB).warnings == ()
    assert control.stores._open == {}, "connections that were made for a run are closed with it"
    wait_until(lambda: sent(hub) == weights_nbytes(family / "tuned"))


def test_a_page_for_people_is_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.static["model.safetensors"] = b"<!DOCTYPE html><p>Sign in"
    with pytest.raises(CorruptInput, match="HTML page"):
        shard(hub, f"{hub.endpoint}/static/files/model.safetensors", tmp_path / "out")


# --- strangers --------------------------------------------------------------------------------------------------------


def renamed(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda files: files.update({name: b"x"})


def index_to(name: str) -> Callable[[dict[str, Any]], object]:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    return lambda files: files.update({"model.safetensors.index.json": json.dumps(index).encode()})


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "terminal escape": renamed("a\x1b[2Jb.json"),
    "backslash": renamed("a\\..\\canary.json"),
    "bidirectional override": renamed("a\u202eb.json"),
    "index to the parent": index_to("../canary"),
    "absolute index": index_to("/etc/passwd"),
    "index to a file that is missing": index_to("other.safetensors"),
    "header longer than the file": lambda files: files.update({"model.safetensors": b"\xff" * 7 + b"\0{}"}),
    "a pickle": lambda files: files.update({"model.safetensors": b"\x80\x02."}),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_repositories_are_refused(hub: Hub, family: Path, tmp_path: Path, attack: str) -> None:
    files: dict[str, Any] = dict(contents(family / "one"))
    HOSTILE[attack](files)
    hub.add("org/hostile", files)
    with pytest.raises(CorruptInput, match=r"not a plain path|header of|incomplete|this is a pickle") as caught:
        shard(hub, "hf://org/hostile", tmp_path / "out")
    assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "/etc/passwd"])
def test_hostile_manifests_are_refused(hub: Hub, family: Path, tmp_path: Path, name: str) -> None:
    document = json.loads((family / "tuned" / "weightops-manifest.json").read_bytes())
    document["files"][name] = {"nbytes": 1, "digests": {}}
    url = serve(hub, family / "tuned")
    hub.static["model/weightops-manifest.json"] = json.dumps(document).encode()
    with pytest.raises(CorruptInput, match="not a plain path"):
        shard(hub, url, tmp_path / "out")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    from weightops.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return lambda *arguments: main.run(list(arguments))


def test_commands_take_repositories_and_urls(
    hub: Hub, family: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{serve(hub, family / 'one')}model.safetensors"
    assert run("inspect", "hf://org/tuned") == 0
    assert run("inspect", url, "--json") == 0
    assert run("diff", "--raw", "hf://org/raw", "--tuned", url, "--out", "delta", "-q") == 0
    assert run("recover", "--raw", "hf://org/raw@main", "--diff", "delta", "--out", "out", "-q") == 0
    assert weightops.manifest("out").content_id == weightops.manifest(family / "tuned").content_id
    assert "names no digest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "hf://org/tuned"], 10),
        (["manifest", "https://example.org/model/"], 2),
        (["shard", "hf://org/tuned", "--out", "hf://org/mine"], 2),
        (["inspect", "hf://org/tuned@none"], 10),
        (["inspect", "hf://org/nowhere"], 14),
        (["inspect", "hf://org"], 2),
    ],
)
def test_exit_codes(run: Callable[..., int], tmp_path: Path, arguments: list[str], code: int) -> None:
    assert run(*arguments) == code
    assert list(tmp_path.iterdir()) == []


def test_offline_is_respected(run: Callable[..., int], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.log.clear()
    assert run("inspect", "hf://org/tuned") == 10
    assert hub.log == []


def test_local_commands_import_no_network(family: Path, tmp_path: Path) -> None:
    code = """
import sys
from weightops.cli.main import run
for line in sys.stdin.read().splitlines():
    assert run(line.split()) == 0, line
print({"urllib3", "huggingface_hub", "httpx2", "weightops.stores.web.web"} & {*sys.modules})
"""
    lines = [
        f"inspect {family / 'tuned'}",
        f"shard {family / 'tuned'} --out {tmp_path / 'a'}",
        f"recover --raw {family / 'raw'} --diff {family / 'delta'} --out {tmp_path / 'b'}",
        f"verify {tmp_path / 'a'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
