"""Give FOLDER/model the tokenizer of FOLDER/donor by each METHOD, with K common rows, into FOLDER/theirs/METHOD."""

import runpy
import sys

folder, k, *methods = sys.argv[1:]
for method in methods:
    sys.argv = [
        "tokensurgeon",
        f"{folder}/model",
        f"{folder}/donor",
        f"{folder}/theirs/{method}",
        "-a",
        method,
        "-k",
        k,
    ]
    try:
        runpy.run_module("mergekit.scripts.tokensurgeon", run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
