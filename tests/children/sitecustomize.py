"""Has a program that a test starts pass for the system that the test runs on (see tests/systems.py)."""

from __future__ import annotations

import os
import sys

tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, tests)
import systems  # noqa: E402

sys.path.remove(tests)
systems.install(os.environ.get(systems.VARIABLE, ""))
