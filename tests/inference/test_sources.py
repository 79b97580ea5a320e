"""Models from a hub, a server and a cache: they run as from a folder, and wrong bytes say nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Fault, Hub
from huggingface_hub import snapshot_download
from tiny_models import save_tiny, text

from weightops import api
from weightops.cli.main import run
from weightops.engine.control import Control
from weightops.errors import Differs, NetworkFailed
from weightops.formats.proofs.manifest import NAME
from weightops.inference.opened import Placement
from weightops.stores.stores import Stores
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

WEIGHTS = "model.safetensors"
PLACES = ["hub", "server", "cache", "cache offline"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "model", "llama")
    (folder / "heldout.txt").write_text(text(25))
    return folder


GPTQ: dict[str, Any] = {"group_size": 32, "samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def quantised(model: Path) -> str:
    """The digest of the content of the model, quantised from its folder."""
    done = api.quantize(model / "model", model / "quantised", calibration=model / "heldout.txt", **GPTQ)
    assert done.result is not None
    return done.result.manifest.content_id


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in (model / "model").iterdir()}
        hub.add("org/m", files)
        hub.static.update({f"m/{name}": data for name, data in files.items()})
        hub.static[f"m/{NAME}"] = api.manifest(model / "model").to_bytes()
        yield hub


Place = tuple[str, Control]


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Iterator[Callable[[str], Place]]:
    """A source of each kind, and a control to reach it with."""
    with Web(Policy(attempts=2, first_delay_s=0.01), endpoint=hub.endpoint) as web:

        def place(kind: str) -> Place:
            is_cached = kind.startswith("cache")
            if is_cached:
                snapshot_download("org/m", cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
            hub.log.clear()
            stores = Stores(web, cache=tmp_path / "cache" if is_cached else None, offline=kind.endswith("offline"))
            return f"{hub.endpoint}/static/files/m/" if kind == "server" else "hf://org/m", Control(stores=stores)

        yield place


@pytest.mark.parametrize("kind", PLACES)
def test_a_model_says_and_measures_what_it_does_from_a_folder(
    model: Path, hub: Hub, place: Callable[[str], Place], kind: str
) -> None:
    local = model / "model"
    source, control = place(kind)
    said = "".join(api.generate(source, "Streaming", max_new_tokens=5, control=control))
    assert said == "".join(api.generate(local, "Streaming", max_new_tokens=5))
    found = api.evaluate(source, model / "heldout.txt", seq_len=64, reference=source, control=control)
    expected = api.evaluate(local, model / "heldout.txt", seq_len=64, reference=local)
    assert [score.nll for score in found.scores] == [score.nll for score in expected.scores]
    assert hub.bytes_sent(WEIGHTS) + hub.bytes_sent(f"m/{WEIGHTS}") == 0 or not kind.startswith("cache")


@pytest.mark.parametrize("kind", PLACES)
def test_it_is_quantised_as_from_a_folder(
    model: Path, quantised: str, tmp_path: Path, place: Callable[[str], Place], kind: str
) -> None:
    source, control = place(kind)
    found = api.quantize(source, tmp_path / "out", control=control, calibration=model / "heldout.txt", **GPTQ)
    assert found.result is not None
    assert found.result.manifest.content_id == quantised
    assert not list(tmp_path.glob("out.*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def damage(hub: Hub, tmp_path: Path, kind: str) -> None:
    if kind.startswith("cache"):
        flip(next((tmp_path / "cache").rglob(WEIGHTS)).resolve())
    else:
        hub.always[WEIGHTS] = hub.always[f"m/{WEIGHTS}"] = Fault("flip", 500_000)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "by layer"])
def test_weights_that_are_wrong_write_no_word(
    hub: Hub,
    tmp_path: Path,
    place: Callable[[str], Place],
    kind: str,
    streams: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, control = place(kind)
    damage(hub, tmp_path, kind)
    placement = Placement(is_packed=False, saves_memory=False, streams_weights=streams, nbytes=0)
    monkeypatch.setattr("weightops.inference.opened.Opened.placement", lambda *_: placement)
    found = api.generate(source, "Streaming", max_new_tokens=2, control=control)
    words = iter(found)
    with pytest.raises(Differs, match=rf"{WEIGHTS}: \w+ is [0-9a-f]+, expected"):
        next(words)
    assert found.tokens == []
    with pytest.raises(Differs, match=WEIGHTS):
        next(iter(found))


@pytest.mark.parametrize("kind", PLACES)
def test_they_measure_nothing_and_nothing_is_kept_of_them(
    hub: Hub, model: Path, tmp_path: Path, place: Callable[[str], Place], kind: str
) -> None:
    source, control = place(kind)
    damage(hub, tmp_path, kind)
    with pytest.raises(Differs, match=WEIGHTS):
        api.evaluate(source, model / "heldout.txt", seq_len=64, control=control)
    source, control = place(kind)
    with pytest.raises(Differs, match=WEIGHTS):
        api.quantize(source, tmp_path / "out", method="rtn", group_size=32, control=control)
    assert not list(tmp_path.glob("out*/block-*"))
    assert not (tmp_path / "out").exists()


def test_what_no_digest_proves_is_said(model: Path, hub: Hub, place: Callable[[str], Place]) -> None:
    source, control = place("server")
    del hub.static[f"m/{NAME}"]
    found = api.generate(source, "Streaming", max_new_tokens=1, control=control)
    assert ["names no digest" in warning for warning in found.warnings] == [True]
    assert "".join(found)
    scores = api.evaluate(source, model / "heldout.txt", seq_len=64, control=control)
    assert ["names no digest" in warning for warning in scores.warnings] == [True]


def test_connections_last_as_long_as_the_text_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Web] = []

    def connect() -> Web:
        opened.append(Web(endpoint=hub.endpoint))
        return opened[-1]

    control = Control(stores=Stores(connect={"web": connect}))
    found = api.generate("hf://org/m", "Streaming", max_new_tokens=30, control=control)
    assert control.stores._open == {}, "what was opened to look at the model is closed"
    words = iter(found)
    assert next(words)
    assert list(control.stores._open) == ["web"]
    assert not opened[-1]._closed
    assert "".join(words)
    assert control.stores._open == {}
    assert len(opened) == 2


def test_the_commands_take_them(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run(["generate", "hf://org/m", "--prompt", "Streaming", "--max-new-tokens", "3"]) == 0
    line = ["eval", "hf://org/m@main", "--reference", "hf://org/m", "--seq-len", "64", "--text"]
    assert run([*line, str(model / "heldout.txt")]) == 0
    out = capsys.readouterr().out
    assert "hf://org/m@" in out
    line = ["quantize", "hf://org/m", "--method", "rtn", "--group-size", "32", "--out"]
    assert run([*line, str(tmp_path / "out"), "-q"]) == 0
    assert not (tmp_path / "cache").exists(), "the cache is filled by huggingface_hub and download --cache alone"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["generate", "hf://org/m", "--prompt", "x"]) == 10


def test_a_server_that_falls_silent_is_named(hub: Hub, place: Callable[[str], Place], tmp_path: Path) -> None:
    source, control = place("hub")
    found = api.generate(source, "Streaming", max_new_tokens=1, control=control)
    hub.always[WEIGHTS] = Fault("status", 503)
    with pytest.raises(NetworkFailed, match=WEIGHTS):
        "".join(found)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
