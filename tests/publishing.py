"""What the tests of `weightops publish` share: a folder to publish, and an impatient way to do so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from signing_keys import save_key
from support import write_checkpoint
from writable_hub import WritableHub

import weightops
from weightops.engine.control import Control
from weightops.errors import Interrupted
from weightops.operations.publish import Publication
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

TOKEN = "hf_abcdefgh"
PLACE = "hf://org/model"
QUICK = Policy(connect_timeout_s=2, timeout_s=2, attempts=3, first_delay_s=0.01, max_delay_s=0.05)
WEIGHTS = ("model.safetensors", "other.safetensors")


def make_model(folder: Path) -> Path:
    """A checkpoint of two files with a card and a manifest, and a file that the manifest does not list."""
    write_checkpoint(folder, {"a": torch.arange(40_000, dtype=torch.float32)})
    save_file({"b": torch.arange(60_000, dtype=torch.float32)}, folder / "other.safetensors")
    (folder / "README.md").write_text("# a model\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/empty.txt").write_text("")
    save_manifest(folder)
    return folder


def save_manifest(folder: Path) -> None:
    """Record what lies in the folder, and then put something else there."""
    (folder / "notes.txt").unlink(missing_ok=True)
    (folder / "weightops-manifest.json").write_bytes(weightops.manifest(folder).to_bytes())
    (folder / "notes.txt").write_text("mine")


def save_signature(folder: Path) -> None:
    """Sign what is published."""
    (folder / "notes.txt").unlink()
    save_key(folder.parent, "signer")
    weightops.sign(folder, key=folder.parent / "signer.key", overwrite=True)


def listed(folder: Path) -> dict[str, bytes]:
    """What of a folder is published."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "notes.txt"}


def publish(hub: WritableHub, folder: Path, place: str = PLACE, **options: Any) -> Publication:
    """`weightops publish` with a policy that does not keep a test waiting."""
    token = options.pop("token", TOKEN)
    with Web(options.pop("policy", QUICK), endpoint=hub.endpoint, token=token) as web:
        return weightops.publish(folder, place, control=options.pop("control", Control(web=web)), **options)


def interrupted_by(hub: WritableHub, folder: Path, when: Callable[[str, int], bool]) -> bool:
    """Publish until a piece of a content arrives of which `when` says so; whether one did."""
    with Web(QUICK, endpoint=hub.endpoint, token=TOKEN) as web:
        control = Control(web=web)

        def look(oid: str, nbytes: int) -> None:
            if when(oid, nbytes):
                control.cancel()

        hub.on_upload = look
        try:
            weightops.publish(folder, PLACE, create=True, workers=1, control=control)
        except Interrupted:
            return True
        finally:
            hub.on_upload = lambda oid, nbytes: None
    return False
