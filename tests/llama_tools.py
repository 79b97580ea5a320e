"""llama.cpp's own programs, built from the sources in `.venv-llamacpp` against the libraries there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from environments import environment

LLAMACPP = environment("llamacpp")
_SOURCES = {
    "llama-quantize": ("quantize/quantize.cpp", "quantize/main.cpp"),
    "llama-gguf-split": ("gguf-split/gguf-split.cpp",),
    "llama-imatrix": ("imatrix/imatrix.cpp",),
}
_LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")


def run_tool(name: str, *arguments: object, cwd: Path) -> str:
    """What one of the programs says, run in a folder; skips where it cannot be built."""
    folder = next(LLAMACPP.glob("lib/python*/site-packages/lib"), None)
    if folder is None or not (LLAMACPP / "llama.cpp").exists() or shutil.which("g++") is None:
        pytest.skip("`make llamacpp` makes what llama.cpp's programs are built of, and g++ builds them")
    done = subprocess.run(
        [_built(name, folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def _built(name: str, libraries: Path) -> Path:
    program = LLAMACPP / "bin" / name
    if program.exists():
        return program
    root = LLAMACPP / "llama.cpp"
    made = program.with_name(f"{name}.{os.getpid()}")
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O1", "-o", made),
            *(f"-I{root / part}" for part in ("include", "common", "ggml/include", "vendor")),
            *(root / "tools" / source for source in _SOURCES[name]),
            f"-L{libraries}",
            *(f"-l{library}" for library in _LIBRARIES),
        ],
        check=True,
    )
    made.rename(program)
    return program
