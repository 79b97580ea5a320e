"""Other systems, as far as Linux can pass for one.

WEIGHTOPS_TEST_SYSTEM names what a run of the tests is to lack, separated by commas; conftest.py reads it, and for the
programs that tests start `children/sitecustomize.py`. The product never does.

    plain     the calls that only Linux has, and /proc: much like macOS, down to its rename with flags
    windows   whatever Windows lacks: fcntl, positioned reads and writes, folders that can be opened, links that can be
              told when opening; renames refuse what is there, and what is open can be neither renamed nor removed
    folded    what lies below the folder of temporary files does so on a file system to which case makes no difference
    flat      no holes in files, and no room that is taken without being written

Names are hidden from `weightops.io.platform` alone: tests/test_layers.py sees to it that nothing else uses them, and
Python's own library, of which Linux' version is at work, needs them.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib
import importlib.util
import io
import mmap
import os
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "WEIGHTOPS_TEST_SYSTEM"
SYSTEMS = ("plain", "windows", "folded", "flat")
PLATFORM = "weightops.io.platform."
TESTS = Path(__file__).parent
installed: list[str] = []

LINUX_ONLY = {
    *("posix_fadvise", "posix_fallocate", "sched_getaffinity", "preadv", "O_DIRECT", "O_TMPFILE", "copy_file_range"),
    *("POSIX_FADV_SEQUENTIAL", "POSIX_FADV_WILLNEED"),
}
POSIX_ONLY = LINUX_ONLY | {
    *("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_SYNC", "pread", "pwrite", "pwritev"),
    *("readv", "writev", "statvfs", "fstatvfs", "sysconf", "pathconf", "fork", "getuid", "geteuid", "mkfifo", "chown"),
    *("ST_RDONLY", "lockf", "uname", "sendfile", "fchmod"),
}


class Lacking(ModuleType):
    """A module without some of its names, and with others changed; the rest is looked up whenever it is used."""

    def __init__(self, original: ModuleType, hidden: set[str] = frozenset(), **changed: Any) -> None:  # type: ignore[assignment]
        super().__init__(original.__name__)
        self.__dict__.update(_original=original, _hidden=hidden, **changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"{self.__name__} has no {name} on the system that this one passes for")
        return getattr(self._original, name)


def _plain() -> dict[str, ModuleType | None]:
    import fcntl

    def ioctl(*_: Any) -> int:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    def rename(here: int, source: bytes, there: int, target: bytes, flags: int) -> int:
        """The call of macOS, by Linux' one."""
        numbers = {-2: -100}
        done: int = library.renameat2(
            numbers.get(here, here), source, numbers.get(there, there), target, {2: 2, 4: 1}[flags]
        )
        return done

    class Library:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.renameatx_np = rename

    library = ctypes.CDLL(None, use_errno=True)
    return {
        "os": Lacking(os, LINUX_ONLY),
        "fcntl": Lacking(fcntl, {"FICLONERANGE"}, ioctl=ioctl),
        "ctypes": Lacking(ctypes, CDLL=Library),
    }


def _windows() -> dict[str, ModuleType | None]:
    def no_library(name: str | None, *_: Any, **__: Any) -> None:
        raise TypeError("bad argument type for built-in operation")

    def opened(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None) -> int:
        assert dir_fd is None
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.open(path, flags, *arguments)

    return {
        "os": Lacking(os, POSIX_ONLY, name="nt", open=opened, O_BINARY=0, supports_dir_fd=set()),
        "fcntl": None,
        "resource": None,
        "ctypes": Lacking(ctypes, CDLL=no_library),
        "mmap": Lacking(mmap, {"MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_ANON", "MAP_SHARED"}),
    }


_LACKING: dict[str, Callable[[], dict[str, ModuleType | None]]] = {"plain": _plain, "windows": _windows}


@contextmanager
def _instead(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """What an import finds under these names; None for nothing."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


class _LackingLoader(Loader):
    def __init__(self, system: str, original: Loader) -> None:
        self._system, self._original = system, original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        with _instead(_LACKING[self._system]()):
            self._original.exec_module(module)
        for name, value in (("PROC", Path("/nowhere")), ("CGROUPS", ())):
            if hasattr(module, name):
                setattr(module, name, value)


class _Finder:
    """Finds the modules of `weightops.io.platform` on another system."""

    def __init__(self, system: str) -> None:
        self._system = system

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith(PLATFORM) else None
        if spec is not None and spec.loader is not None and not name.endswith(".optional"):
            spec.loader = _LackingLoader(self._system, spec.loader)
        return spec


def on(system: str, name: str) -> ModuleType:
    """A module of `weightops.io.platform` as it is on another system; `sys.modules` keeps this one's."""
    spec = importlib.util.find_spec(PLATFORM + name)
    assert spec is not None
    assert spec.loader is not None
    loader = spec.loader._original if isinstance(spec.loader, _LackingLoader) else spec.loader
    spec.loader = _LackingLoader(system, loader)
    module = importlib.util.module_from_spec(spec)
    # What it imports of its own package is to be of that system too.
    within = {n: m for n, m in sys.modules.items() if n.startswith(PLATFORM)}
    others = {PLATFORM + "machine": on(system, "machine")} if name == "entries" else {}
    with _instead(others):
        spec.loader.exec_module(module)
    sys.modules.update(within)
    return module


def lacks(*names: str) -> bool:
    """Whether this system, or the one that it passes for, lacks one of these names of `os` or `fcntl`."""
    own = [os, *(importlib.import_module(name) for name in ("fcntl",) if importlib.util.find_spec(name))]
    missing = {name for name in names if not any(hasattr(module, name) for module in own)}
    if "plain" in installed:
        missing |= LINUX_ONLY | {"ioctl"}
    if "windows" in installed:
        missing |= POSIX_ONLY | {"ioctl", "flock", "fcntl", "dir_fd"}
    if "flat" in installed:
        missing |= {"posix_fallocate"}
    return not missing.isdisjoint(names)


def n_open() -> int:
    """Files that this process has open."""
    import psutil

    process = psutil.Process()
    return len(process.open_files()) if os.name == "nt" else process.num_fds()


def opened_below(folder: Path) -> list[str]:
    """Files below a folder that this process has open, by their names from there."""
    import psutil

    root = os.path.realpath(folder) + os.sep
    return sorted(f.path.removeprefix(root) for f in psutil.Process().open_files() if f.path.startswith(root))


def mkfifo(path: Path) -> None:
    """Make a pipe; ends the test where there are none."""
    import pytest

    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in folders")
    os.mkfifo(path)


def needs(*names: str) -> Any:
    """Skips a test of calls that this system lacks, or the one that it passes for."""
    import pytest

    return pytest.mark.skipif(lacks(*names), reason=f"this system lacks {' or '.join(names)}")


def needs_itself(*names: str) -> Any:
    """Skips a test that cannot do its own work without these names of `os`, or files like /proc."""
    import pytest

    missing = [name for name in names if not (os.path.exists(name) if name.startswith("/") else hasattr(os, name))]
    return pytest.mark.skipif(bool(missing), reason=f"the test needs {' and '.join(names)}")


def install(names: str) -> None:
    """Pass for the systems that are named from now on, and have the programs do so that are started."""
    chosen = [name for name in names.split(",") if name]
    assert set(chosen) <= set(SYSTEMS), f"{VARIABLE} knows {SYSTEMS}"
    for name in chosen:
        if name in installed:
            continue
        installed.append(name)
        if name in _LACKING:
            loaded = [module for module in sys.modules if module.startswith(PLATFORM)]
            assert not loaded, f"{loaded} are imported already"
            sys.meta_path.insert(0, _Finder(name))
        if name == "windows":
            _refuse_what_is_open()
        if name == "folded":
            fold_case(os.path.realpath(tempfile.gettempdir()))
        if name == "flat":
            _fill_holes()
    if chosen:
        os.environ[VARIABLE] = names
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if str(TESTS / "children") not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "children"), *filter(None, paths)])


_OWN_FILES = (__file__, str(TESTS / "killing.py"))


def _is_from_the_product() -> bool:
    """Whether the call comes from weightops, perhaps by way of Python's library."""
    library = sysconfig.get_paths()["stdlib"]
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _OWN_FILES and not (name.startswith((library, "<frozen")) and "site-packages" not in name):
            return f"{os.sep}weightops{os.sep}" in name and not name.startswith(str(TESTS))
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _refuse_what_is_open() -> None:
    """Renames and removals as on Windows, for what the product does; what another process has open is not seen."""
    rename, replace_, unlink = os.rename, os.replace, os.unlink

    def full(path: Any, dir_fd: int | None) -> str:
        folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        return os.path.join(os.path.realpath(os.path.dirname(os.path.join(folder, path))), os.path.basename(path))

    def refuse_open(path: Any, dir_fd: int | None = None) -> None:
        place = full(os.fspath(path), dir_fd)
        for name in os.listdir("/proc/self/fd"):
            try:
                there = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if there == place or (there.startswith(f"{place}/") and not os.path.isdir(there)):
                raise PermissionError(errno.EACCES, f"{there} is open", str(path))

    def refusing_rename(source: Any, target: Any, **folders: Any) -> None:
        if _is_from_the_product():
            refuse_open(source)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
        rename(source, target, **folders)

    def refusing_replace(source: Any, target: Any, **folders: Any) -> None:
        if _is_from_the_product():
            refuse_open(source)
            refuse_open(target)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        replace_(source, target, **folders)

    def refusing_unlink(path: Any, *, dir_fd: int | None = None) -> None:
        if _is_from_the_product():
            refuse_open(path, dir_fd)
        unlink(path, dir_fd=dir_fd)

    os.rename, os.replace, os.unlink, os.remove = refusing_rename, refusing_replace, refusing_unlink, refusing_unlink  # type: ignore[assignment]
    os.supports_dir_fd.add(refusing_unlink)


def fold_case(root: str) -> Callable[[], None]:
    """Have case make no difference below a folder; what puts an end to it."""
    lstat, listdir, readlink = os.lstat, os.listdir, os.readlink

    def found(path: str) -> str:
        """The path with each name as it stands in its folder, where it stands there in other letters."""
        whole = os.path.abspath(path)
        if not whole.startswith(f"{root}/") or _is_there(path):
            return path
        here, changed = root, False
        for part in whole[len(root) + 1 :].split("/"):
            if not _is_there(f"{here}/{part}"):
                try:
                    alike = next((n for n in listdir(here) if n.casefold() == part.casefold()), part)
                except OSError:
                    alike = part
                changed |= alike != part
                part = alike
            here = f"{here}/{part}"
        return here if changed else path

    def _is_there(path: str) -> bool:
        try:
            lstat(path)
        except (OSError, ValueError):
            return False
        return True

    def mapped(path: Any, dir_fd: int | None = None) -> Any:
        if isinstance(path, int | bytes):
            return path
        name = os.fspath(path)
        if not isinstance(name, str) or not name or "\0" in name:
            return path
        if dir_fd is None or name.startswith("/"):
            other = found(name)
            return path if other == name else other
        return os.path.basename(found(f"{readlink(f'/proc/self/fd/{dir_fd}')}/{name}"))

    def one(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **more: Any) -> Any:
            return original(mapped(path, more.get("dir_fd")), *arguments, **more)

        return call

    def two(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **more: Any) -> Any:
            at = more.get("src_dir_fd"), more.get("dst_dir_fd")
            return original(mapped(source, at[0]), mapped(target, at[1]), **more)

        return call

    ones = ("open", "stat", "lstat", "mkdir", "unlink", "remove", "rmdir", "scandir", "listdir", "access", "utime")
    ones += ("readlink", "chmod", "truncate", "mkfifo", "statvfs")
    before: list[tuple[Any, str, Any]] = [
        (os, name, getattr(os, name)) for name in (*ones, "rename", "replace", "link")
    ]
    before += [(builtins, "open", builtins.open), (io, "open", io.open)]
    for holder, name, original in before:
        wrapped = two(original) if name in ("rename", "replace", "link") else one(original)
        setattr(holder, name, wrapped)
        for abilities in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if original in abilities:
                abilities.add(wrapped)

    def end() -> None:
        for holder, name, original in before:
            setattr(holder, name, original)

    return end


def _fill_holes() -> None:
    """Files in which every byte up to the end takes room, and no way to take it but to write."""
    pwrite, ftruncate, one_at_a_time = os.pwrite, os.ftruncate, threading.Lock()

    def fill(fd: int, end: int) -> None:
        size = os.fstat(fd).st_size
        if size < end:
            plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # its own may want aligned memory
            try:
                while size < end:
                    size += pwrite(plain, bytes(min(1 << 20, end - size)), size)
            finally:
                os.close(plain)

    def filling_write(fd: int, data: Any, offset: int) -> int:
        with one_at_a_time:  # as it is for the file system
            fill(fd, offset)
            return pwrite(fd, data, offset)

    def filling_truncate(fd: int, nbytes: int) -> None:
        with one_at_a_time:
            fill(fd, nbytes)
            ftruncate(fd, nbytes)

    def no_room(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    os.pwrite, os.ftruncate, os.posix_fallocate = filling_write, filling_truncate, no_room
