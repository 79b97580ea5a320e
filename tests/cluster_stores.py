"""Stores as machines of a simulated cluster see them (`clusters`): a file system, and a bucket in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

from clusters import Cluster, Machine

from weightops.engine.job import finish, place
from weightops.engine.job.outputs import LocalOutput, Output, open_output
from weightops.errors import OutputExists, SourceMissing, UploadGone
from weightops.io.reflink import Extent
from weightops.io.source_file import SourceFile
from weightops.stores.local import LocalStore
from weightops.stores.places import is_url
from weightops.stores.store import Target, WritableStore
from weightops.stores.stores import Stores

T = TypeVar("T")


@contextmanager
def installed(cluster: Cluster, everything: Objects) -> Iterator[None]:
    """Have the engine's jobs see the cluster's stores and time; `everything` lies in all buckets."""

    def seen(store: LocalStore | Bucket) -> Seen:
        return Seen(cluster, cluster.here, store)

    writable = Stores.writable

    def store(stores: Stores, at: str) -> WritableStore:
        return writable(stores, at) if is_url(at) else seen(LocalStore(Path(at)))

    def output(*arguments: Any) -> Output:
        opened = open_output(*arguments)
        return cast(Output, _Output(seen, opened)) if isinstance(opened, LocalOutput) else opened

    with (
        mock.patch.object(Stores, "writable", store),
        mock.patch.object(place, "open_output", output),
        mock.patch.object(Stores, "bucket", lambda stores, at: seen(Bucket(everything, at.key))),
        mock.patch.object(finish, "time", cluster.clock),
        mock.patch("os.fsync"),  # nothing here loses its power
    ):
        yield


class Objects:
    """What lies in a bucket by key, and what is on its way there."""

    def __init__(self) -> None:
        self.whole: dict[str, bytes] = {}
        self.uploads: dict[str, list[Upload]] = {}


class Seen:
    """A place as one machine sees it over the network: each call is a request."""

    is_near = False
    notes: tuple[str, ...] = ()

    def __init__(self, cluster: Cluster, machine: Machine, inner: LocalStore | Bucket) -> None:
        self.shown, self.name = inner.shown, inner.name
        self._cluster, self._machine, self._inner = cluster, machine, inner

    def _ask(self, do: Callable[[], T], again: Callable[[BaseException], T] | None = None) -> T:
        return self._cluster.ask(self._machine, do, again=again)

    def names(self) -> list[str]:
        return self._ask(self._inner.names)

    def below(self, pattern: str) -> list[str]:
        return self._ask(lambda: self._inner.below(pattern))

    def has(self, name: str) -> bool:
        return self._ask(lambda: self._inner.has(name))

    def identity(self, name: str) -> SourceFile:
        return self._ask(lambda: self._inner.identity(name))

    def find(self, name: str) -> bytes | None:
        return self._ask(lambda: self._inner.find(name))

    def get(self, name: str) -> bytes:
        return self._ask(lambda: self._inner.get(name))

    def listed(self, folder: str) -> list[str]:
        return self._ask(lambda: self._inner.listed(folder))

    def put(self, name: str, data: bytes) -> None:
        self._ask(lambda: self._inner.put(name, data))

    def remove(self, name: str) -> None:
        self._ask(lambda: self._inner.remove(name))

    def probe(self) -> None:
        self._ask(self._inner.probe)

    def abort_uploads(self, names: Collection[str]) -> None:
        assert isinstance(self._inner, Bucket)
        for name in names:
            self._ask(partial(self._inner.abort_uploads, [name]))

    def create(self, name: str, data: bytes) -> None:
        def again(error: BaseException) -> None:
            if not isinstance(error, OutputExists) or self._inner.find(name) != data:
                raise error

        self._ask(lambda: self._inner.create(name, data), again)

    @contextmanager
    def putting(self, name: str) -> Iterator[Callable[[bytes], None]]:
        parts: list[bytes] = []
        yield parts.append
        self.put(name, b"".join(parts))

    def target(
        self, name: str, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]] = {}, *, is_most: bool = False
    ) -> Target:
        inner = self._ask(lambda: self._inner.target(name, nbytes, is_most=is_most))
        return _Target(self._cluster, self._machine, inner, name)


class Bucket:
    """A folder in a bucket, at once and without faults; a target replaces no object."""

    notes: tuple[str, ...] = ()

    def __init__(self, everything: Objects, key: str) -> None:
        self.shown = self.name = key
        self._objects, self._uploads, self._inside = everything.whole, everything.uploads, f"{key}/"

    def names(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.listed("")})

    def below(self, pattern: str) -> list[str]:
        raise NotImplementedError

    def has(self, name: str) -> bool:
        return self._inside + name in self._objects

    def identity(self, name: str) -> SourceFile:
        return SourceFile(f"s3://bucket/{self._inside}{name}", len(self.get(name)), 0)

    def get(self, name: str) -> bytes:
        if not self.has(name):
            raise SourceMissing(f"{self.shown}: has no {name}")
        return self._objects[self._inside + name]

    def find(self, name: str) -> bytes | None:
        return self._objects.get(self._inside + name)

    def listed(self, folder: str) -> list[str]:
        start = f"{self._inside}{folder}/" if folder else self._inside
        return sorted(key[len(self._inside) :] for key in self._objects if key.startswith(start))

    def put(self, name: str, data: bytes) -> None:
        self._objects[self._inside + name] = data

    def create(self, name: str, data: bytes) -> None:
        if self.has(name):
            raise OutputExists(f"{self.shown}/{name} exists")
        self.put(name, data)

    def remove(self, name: str) -> None:
        self._objects.pop(self._inside + name, None)

    def probe(self) -> None: ...

    def target(
        self, name: str, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]] = {}, *, is_most: bool = False
    ) -> Upload:
        upload = Upload(self, name)
        self._uploads.setdefault(self._inside + name, []).append(upload)
        return upload

    def abort_uploads(self, names: Collection[str]) -> None:
        for name in names:
            for upload in self._uploads.pop(self._inside + name, []):
                upload.is_gone = True


class Upload:
    """A large object on its way: of it nothing is seen before it is whole, and others may abort it."""

    shared_nbytes = 0

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.is_gone = False
        self._bucket, self._name, self._data = bucket, name, bytearray()

    def write(self, offset: int, block: memoryview, used: int) -> None:
        self._data += block[:used]

    def close(self, nbytes: int | None = None) -> None:
        del self._data[nbytes:]

    def commit(self) -> None:
        data, found = bytes(self._data), self._bucket.find(self._name)
        if found not in (data, None) or (self.is_gone and found is None):
            raise UploadGone(f"{self._name}: what was sent of it is gone")
        self._bucket.put(self._name, data)

    def abandon(self) -> None: ...


class _Target:
    """A file on its way: what `write` is given in another thread is paid for, and may fail, when it is closed."""

    shared_nbytes = 0

    def __init__(self, cluster: Cluster, machine: Machine, inner: Target, name: str) -> None:
        self._cluster, self._machine, self._inner, self._name = cluster, machine, inner, name
        self._nbytes, self._is_done = 0, False

    def write(self, offset: int, block: memoryview, used: int) -> None:
        self._inner.write(offset, block, used)
        self._nbytes += used

    def close(self, nbytes: int | None = None) -> None:
        self._cluster.carry(self._machine, self._nbytes)
        self._cluster.ask(self._machine, lambda: None)
        self._inner.close(nbytes)

    def commit(self) -> None:
        def give_name() -> None:
            self._inner.commit()
            if not self._is_done:  # and not once more, because the answer was lost
                self._machine.commits += 1
                self._cluster.commits[self._name] += 1
            self._is_done = True

        self._cluster.ask(self._machine, give_name, again=lambda error: None)

    def abandon(self) -> None:
        # A machine that has died leaves its file behind; this only lets go of it here.
        if not self._machine.is_dead:
            self._inner.abandon()


class _Output:
    """A folder of a job on a file system, whose stores are reached over the network."""

    def __init__(self, seen: Callable[[LocalStore], Seen], inner: LocalOutput) -> None:
        assert isinstance(inner.store, LocalStore)
        self._seen, self._inner, self.store = seen, inner, seen(inner.store)

    @contextmanager
    def ending(self, *arguments: Any) -> Iterator[Seen | None]:
        with self._inner.ending(*arguments) as store:
            assert store is None or isinstance(store, LocalStore)
            yield None if store is None else self._seen(store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
