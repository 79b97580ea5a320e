"""Run one `weightops download` again and again, killed at its first, second, third, ... change to the disk.

    python killer.py OUT BEFORE AFTER STEP

BEFORE and AFTER are revisions of org/model at HF_ENDPOINT; BEFORE is in OUT already each time, unless it is "-".
Of the changes, each STEP-th is tried.
After each kill nothing but files of the two revisions may stand under final names; then the same command runs
undisturbed, and in turn the one that goes back to BEFORE, and must leave what a run leaves that was never killed.
Prints JSON: how many kills there were, and what was wrong after which.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from killing import forked

from weightops import api  # noqa: F401
from weightops.cli.commands import download as download_command  # noqa: F401
from weightops.formats.proofs.manifest import NAME as FINAL
from weightops.stores.transfer import transfer
from weightops.stores.transfer.partial import STATE


def download(out: Path, revision: str, fatal: int | None) -> int:
    return forked(["download", f"org/model@{revision}", "--out", str(out)], fatal)


def state(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(out.rglob("*"))
    }


def listed(out: Path) -> Any:
    """The files in the manifest."""
    return json.loads((out / FINAL).read_bytes())["files"]


def named(out: Path) -> set[tuple[str, str]]:
    """What stands under final names, the manifest apart."""
    return {item for item in state(out).items() if not item[0].startswith((STATE, FINAL))}


def main() -> None:
    out, before, after = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    transfer._TICK_S = 0.005
    step = int(sys.argv[4])
    references, manifests = {}, {}
    for revision in {before, after} - {"-"}:
        assert download(out, revision, None) == 0
        references[revision], manifests[revision] = state(out), listed(out)
        shutil.copytree(out, out.with_name(f"reference-{revision}"), copy_function=shutil.copy2)
        shutil.rmtree(out)
    allowed = {item for reference in references.values() for item in reference.items()}
    wrong: list[Any] = []
    kills = 0
    while True:
        if before != "-":
            shutil.copytree(out.with_name(f"reference-{before}"), out, copy_function=shutil.copy2)
        if download(out, after, kills + 1) != -signal.SIGKILL:
            break
        kills += 1
        strange = named(out) - allowed if out.exists() else set()
        then = before if before != "-" and kills % 2 else after
        again = download(out, then, None)
        left = state(out)
        missing = references[then].items() - left.items()
        # Files of the other revision may stay, as stale ones do; the manifest names them.
        strange |= {(name, digest) for name, digest in left.items() - allowed if name != FINAL}
        if again or strange or any(name != FINAL for name, _ in missing) or listed(out) != manifests[then]:
            wrong.append([kills, then, again, sorted(strange), sorted(missing)])
        shutil.rmtree(out)
        kills += step - 1
    print(json.dumps({"kills": kills, "wrong": wrong}))


main()
