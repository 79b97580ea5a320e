"""The two main jobs from start to verified result, with models that are really trained: run it by `make demo`.

First tuned weights are recovered from raw ones and a delta (`demo_recover`); then a model is quantised, and what that
costs is measured (`demo_quantize`). Both are killed half-way, and go on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the files here instead of in a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="weightops-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    # As the program itself does, before torch is loaded: threads that wait in a loop stand in the way of other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from demo_quantize import quantise
    from demo_recover import recover
    from demo_steps import say

    try:
        recover(folder)
        quantise(folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    say("Done: diffed, recovered, killed, resumed, verified, loaded; quantised, killed, resumed, measured, read back.")


if __name__ == "__main__":
    main()
