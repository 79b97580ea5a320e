"""Merge by mergekit each merge file FOLDER/*.yml into FOLDER/theirs/NAME; paths in them count from FOLDER.

In one process, because mergekit takes ten seconds to start; `mergekit-yaml` does the same with one file.
"""

import os
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

os.chdir(sys.argv[1])
for path in sorted(Path().glob("*.yml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    run_merge(config, f"theirs/{path.stem}", MergeOptions(random_seed=1, quiet=True, write_model_card=False))
