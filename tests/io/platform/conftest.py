"""These tests pass for each system themselves, and need Linux for it."""

from __future__ import annotations

import systems

collect_ignore_glob = ["test_*"] if {"plain", "windows"} & set(systems.installed) else []
