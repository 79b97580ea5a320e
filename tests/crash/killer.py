"""Run a weightops command again and again, killed at its first, second, third, ... change to the disk.

    python killer.py STEP OUT[,OUT...] ARGUMENTS... [then ARGUMENTS...]

Of the changes, each STEP-th is tried. After each kill the same command runs undisturbed; what it leaves is held
against the outputs of a run that was never killed. That one runs in this process, so that children find all that it
has imported, compiled and looked up. Prints JSON: how many changes a whole run makes, and after which
kills the result differed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from killing import forked, run_all

from weightops.ops import libtorch


def state(outs: list[Path]) -> dict[str, str]:
    files = [path for out in outs for path in (sorted(out.iterdir()) if out.exists() else ())]
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def remove(outs: list[Path]) -> list[str]:
    """Remove the outputs and whatever else is there of them; the names of that, unless it is a job or empty."""
    beside = [path for out in outs for path in out.parent.glob(f"{out.name}.*")]
    left = [path.name for path in beside if any(path.iterdir()) and path.suffix != ".job"]
    for path in (*outs, *beside):
        shutil.rmtree(path, ignore_errors=True)
    return left


def main() -> None:
    step, outs, arguments = int(sys.argv[1]), [Path(out) for out in sys.argv[2].split(",")], sys.argv[3:]
    libtorch._library()
    remove(outs)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert run_all(arguments) == 0
    reference = state(outs)
    remove(outs)
    wrong = []
    kills = 0
    while True:
        for out in outs if "--overwrite" in arguments else ():
            out.mkdir()
            (out / "old").write_text("old")
        if forked(arguments, kills + 1) != -signal.SIGKILL:
            break
        kills += 1
        lost = [o.name for o in outs if not (o.exists() or (o.parent / f"{o.name}.partial/replaced").exists())]
        again = forked(arguments, None)
        whole = state(outs) == reference
        left = remove(outs)
        # A run killed when it had all but cleaned up is finished: the next one says that the output exists.
        if again not in (0, 11) or not whole or left or (lost and "--overwrite" in arguments):
            wrong.append([kills, again, lost, left])
        kills += step - 1
    print(json.dumps({"kills": kills, "wrong": wrong, "files": len(reference)}))


main()
