"""Run one weightops command again and again, killed at its first, second, third, ... change to the disk.

    python killer.py FOLDER OUT ARGUMENTS...

After each kill the same command runs undisturbed; what it leaves is held against the output of a run that was
never killed. Prints JSON: how many changes a whole run makes, and after which kills the result differed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from killing import forked

from weightops.ops import libtorch


def state(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    libtorch._library()
    shutil.rmtree(out, ignore_errors=True)
    assert forked(arguments, None) == 0
    reference = state(out)
    shutil.rmtree(out)
    wrong = []
    kills = 0
    while True:
        if "--overwrite" in arguments:
            out.mkdir()
            (out / "old").write_text("old")
        if forked(arguments, kills + 1) != -signal.SIGKILL:
            break
        kills += 1
        lost = "--overwrite" in arguments and not (out.exists() or any(out.parent.glob(f"{out.name}.*replaced")))
        again = forked(arguments, None)
        left = list(out.parent.glob(f"{out.name}.*"))
        # A run killed after the output got its name is finished: the next one says that the output exists.
        if again not in (0, 11) or state(out) != reference or left or lost:
            wrong.append([kills, again, lost, [path.name for path in left]])
        for path in (out, *left):
            shutil.rmtree(path, ignore_errors=True)
    print(json.dumps({"kills": kills, "wrong": wrong, "files": len(reference)}))


main()
