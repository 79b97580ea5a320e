"""Outputs in a bucket: whose they are, what is seen of them when, and that a run that died anywhere is continued."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import buckets
import pytest
import torch
from command_family import make_family
from support import write_checkpoint

import weightops
from weightops.engine.control import Control
from weightops.errors import (
    Claimed,
    CorruptInput,
    Differs,
    NetworkFailed,
    NoRoom,
    OutputExists,
    SourceMissing,
    Unfinished,
    UsageError,
    WeightopsError,
)
from weightops.formats.job_owner import JobOwner
from weightops.formats.proofs import manifest
from weightops.stores.s3 import target
from weightops.stores.s3.store import S3Store
from weightops.stores.stores import BUCKETS, Stores
from weightops.stores.web.http import Http


class Bucket:
    """A bucket with a model in it, `raw`, and what the tests do there."""

    def __init__(self, endpoint: str, connection: buckets.S3, folder: Path) -> None:
        self.endpoint, self.connection, self.folder = endpoint, connection, folder
        self.name = buckets.new_bucket(connection)
        self.url = f"s3://{self.name}"
        self.all = S3Store(self.name, "", connection)
        self.raw = f"{self.url}/raw"

    def control(self) -> Control:
        return Control(stores=Stores(connect={BUCKETS: lambda: buckets.connect(self.endpoint)}))

    def write(self, out: str | Path, dtype: str = "bfloat16", **options: Any) -> weightops.Result:
        found = {"max_shard_size": "40KB", "control": self.control(), **options}
        return weightops.cast(self.raw, out, dtype=dtype, **found)

    def finish(self, job: str, *, abandon: bool = False) -> list[object]:
        return list(weightops.finish(job, abandon=abandon, control=self.control()))

    def work(self, job: str, group: int) -> bool:
        return weightops.work(job, group, control=self.control())

    def manifest(self, out: str) -> bytes | None:
        return self.all.find(f"{out}/{manifest.NAME}")

    def below(self, out: str) -> list[str]:
        return [name.removeprefix(f"{out}/") for name in self.all.listed(out)]


@pytest.fixture
def bucket(tmp_path: Path, store_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(target, "PART_NBYTES", 20_000)
    monkeypatch.setattr(target, "_STEP_NBYTES", 1)
    with buckets.connect(store_endpoint) as connection:
        bucket = Bucket(store_endpoint, connection, tmp_path)
        torch.manual_seed(0)
        write_checkpoint(tmp_path / "raw", {f"{n}.weight": torch.randn(64, 200) for n in "abc"})
        for path in (tmp_path / "raw").iterdir():
            bucket.all.put(f"raw/{path.name}", path.read_bytes())
        yield bucket


def expected(bucket: Bucket) -> bytes:
    """The manifest of the same on disk."""
    bucket.write(bucket.folder / "expected")
    return (bucket.folder / "expected" / manifest.NAME).read_bytes()


class Dying:
    """From the `fatal`-th request on all fail, as for a process that died; that one `is_made`, or not any more."""

    def __init__(self, fatal: int, *, is_made: bool) -> None:
        self.count, self._fatal, self._is_made = 0, fatal, is_made
        self._request = Http.request
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **options: Any) -> object:
        with self._lock:
            self.count += 1
            number = self.count
        if number >= self._fatal:
            if number == self._fatal and self._is_made:
                self._request(*args, **options).close()
            raise NoRoom("dead")
        return self._request(*args, **options)


def deaths(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[int], object]) -> Iterator[int]:
    """Do something, which dies at one request after the other, until it needs no more of them."""
    for fatal in range(1, 1000, step):
        for is_made in (False, True):
            number = 2 * fatal + is_made
            dying = Dying(fatal, is_made=is_made)
            with monkeypatch.context() as patch, suppress(NoRoom):
                patch.setattr(Http, "request", lambda *args, _dying=dying, **options: _dying(*args, **options))
                do(number)
            yield number
        if dying.count < fatal:
            return


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_run_that_died_at_any_request_is_finished_by_the_next(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, step: int, is_shared: bool
) -> None:
    """By one command, or by one that writes a job, one for each group, and one that finishes it."""
    right = expected(bucket)

    def run(number: int) -> None:
        out, job = f"{bucket.url}/out-{number}", f"{bucket.url}/job-{number}"
        if not is_shared:
            bucket.write(out, workers=1)
            return
        for group in range(bucket.write(out, job=job).groups or 0):
            bucket.work(job, group)
        bucket.finish(job)

    for number in deaths(monkeypatch, step, run):
        out = f"out-{number}"
        was_whole = bucket.manifest(out) is not None
        try:
            run(number)
        except (OutputExists, SourceMissing):
            assert was_whole  # all was done but for the last trace of the job
        assert bucket.manifest(out) == right
        left = [name for name in bucket.below(out) if name.startswith(".weightops/")]
        assert left in ([], [".weightops/job/job.json"])
        assert buckets.uploads(bucket.connection, bucket.name) == []


def test_outputs_in_a_bucket_and_here_are_made_from_one_read(bucket: Bucket) -> None:
    right = expected(bucket)
    options = {"from": "cast", "max_shard_size": "40KB"}
    recipe = {
        "sources": {"source": bucket.raw},
        "tensors": {"cast": {"cast": {"source": "source", "dtype": "bfloat16"}}},
        "outputs": {f"{bucket.url}/out": options, str(bucket.folder / "out"): options, f"{bucket.url}/2": options},
    }
    weightops.run(recipe, control=bucket.control())
    made = {bucket.manifest("out"), bucket.manifest("2"), (bucket.folder / "out" / manifest.NAME).read_bytes()}
    assert len(made) == 1
    assert manifest.parse_manifest(made.pop() or b"", "").content_id == manifest.parse_manifest(right, "").content_id
    assert [name for name in bucket.all.listed("") if ".weightops/" in name] == []
    assert sorted(path.name for path in bucket.folder.iterdir()) == ["expected", "out", "raw"]


def test_a_source_is_read_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digests follow as its bytes pass, through all shards that are made of it."""
    source = f"{bucket.url}/source"
    weightops.shard(bucket.folder / "raw", source, control=bucket.control())
    received: list[int] = []
    throttle = Http.throttle
    with monkeypatch.context() as patch:
        patch.setattr(Http, "throttle", lambda self, nbytes: (received.append(nbytes), throttle(self, nbytes)))
        options = {"max_shard_size": "40KB", "dtype": "bfloat16", "control": bucket.control()}
        weightops.cast(source, f"{bucket.url}/out", **options)
    weights = bucket.all.identity("source/model.safetensors").nbytes
    assert weights <= sum(received) < 1.5 * weights


def test_workers_make_of_a_bucket_in_a_bucket_what_threads_make(bucket: Bucket) -> None:
    right = expected(bucket)
    job = f"{bucket.url}/job"
    result = bucket.write(f"{bucket.url}/out", job=job)
    assert result.groups == 3
    assert bucket.work(job, 1)
    with pytest.raises(Unfinished, match="0,2"):
        bucket.finish(job)
    assert bucket.work(job, 0)
    assert bucket.work(job, 2)
    assert not bucket.work(job, 2)
    bucket.finish(job)
    assert bucket.manifest("out") == right
    assert ".weightops/owner.json" not in bucket.below("out")


def test_several_may_do_and_finish_the_same_at_a_time(bucket: Bucket) -> None:
    right = expected(bucket)
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    failures: list[BaseException] = []

    def all_of_it() -> None:
        try:
            for group in range(3):
                bucket.work(job, group)
            bucket.finish(job)
        except SourceMissing:
            pass  # another one has finished it
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=all_of_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert bucket.manifest("out") == right
    assert buckets.uploads(bucket.connection, bucket.name) == []


def test_another_run_is_refused_by_the_name_of_the_job(bucket: Bucket) -> None:
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    for options in ({}, {"job": f"{bucket.url}/other"}, {"overwrite": True}, {"restart": True}):
        with pytest.raises(Claimed, match=f"{job}$"):
            bucket.write(f"{bucket.url}/out", **options)


def test_what_is_not_finished_is_not_read_by_the_name_of_the_job(bucket: Bucket) -> None:
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    bucket.work(job, 0)
    with pytest.raises(CorruptInput, match=f"not finished, the job {job} is writing it"):
        weightops.inspect(f"{bucket.url}/out", control=bucket.control())


def test_what_is_there_is_not_replaced(bucket: Bucket) -> None:
    bucket.all.put("out/theirs", b"theirs")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputExists, match="out exists"):
            bucket.write(f"{bucket.url}/out", **options)
    assert bucket.below("out") == ["theirs"]


def test_an_output_lies_neither_in_an_input_nor_around_it(bucket: Bucket) -> None:
    for out in (f"{bucket.raw}/out", bucket.raw, bucket.url):
        with pytest.raises(UsageError, match="lie inside one another"):
            bucket.write(out)


def test_a_job_that_is_given_up_leaves_nothing(bucket: Bucket) -> None:
    before = bucket.all.listed("")
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    bucket.work(job, 0)
    left = S3Store(bucket.name, "out", bucket.connection).target("model-00002-of-00003.safetensors", 50_000)
    left.write(0, memoryview(bytes(40_000)), 40_000)  # by a worker that died then
    assert buckets.uploads(bucket.connection, bucket.name) != []
    bucket.finish(job, abandon=True)
    assert bucket.all.listed("") == before
    assert buckets.uploads(bucket.connection, bucket.name) == []
    with suppress(WeightopsError):
        left.close()
    with pytest.raises(WeightopsError, match="does not know the upload"):
        left.commit()


def test_restart_gives_up_what_another_plan_has_begun(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected(bucket)
    dying = Dying(40, is_made=False)
    with monkeypatch.context() as patch:
        patch.setattr(Http, "request", lambda *args, **options: dying(*args, **options))
        with pytest.raises(NoRoom, match="dead"):
            bucket.write(f"{bucket.url}/out", dtype="float16", workers=1)
    with pytest.raises(Claimed, match=r"out/\.weightops/job"):
        bucket.write(f"{bucket.url}/out")
    bucket.write(f"{bucket.url}/out", restart=True)
    assert bucket.manifest("out") == right


def test_a_worker_whose_upload_is_gone_looks_for_the_record(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    close = target.S3Target.close

    def late(self: target.S3Target, nbytes: int | None = None) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(target, "PART_NBYTES", 20_000)
        for group in range(3):
            bucket.work(job, group)
        bucket.finish(job)
        close(self, nbytes)

    monkeypatch.setattr(target.S3Target, "close", late)
    assert not bucket.work(job, 0)


def test_a_worker_that_comes_when_all_is_done_leaves_nothing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"{bucket.url}/out"
    commit = target.S3Target.commit

    def late(self: target.S3Target) -> None:
        monkeypatch.setattr(target.S3Target, "commit", commit)
        bucket.write(out)
        commit(self)

    monkeypatch.setattr(target.S3Target, "commit", late)
    with pytest.raises(WeightopsError, match=r"groups/00001.*is missing"):
        bucket.write(out)
    assert not [name for name in bucket.below("out") if name.startswith(".weightops/")]


def test_a_manifest_that_says_something_else_is_not_taken_for_ours(bucket: Bucket) -> None:
    job = f"{bucket.url}/job"
    bucket.write(f"{bucket.url}/out", job=job)
    for group in range(3):
        bucket.work(job, group)
    bucket.write(bucket.folder / "other", dtype="float16")
    bucket.all.put(f"out/{manifest.NAME}", (bucket.folder / "other" / manifest.NAME).read_bytes())
    with pytest.raises(Differs, match="is not what it makes"):
        bucket.finish(job)


def test_the_same_command_may_skip_what_it_has_made(bucket: Bucket) -> None:
    out = f"{bucket.url}/out"
    assert not bucket.write(out, if_exists="skip").skipped
    assert bucket.write(out, if_exists="skip").skipped
    with pytest.raises(OutputExists, match="made by another plan"):
        bucket.write(out, dtype="float16", if_exists="skip")
    bucket.all.remove("out/config.json")
    with pytest.raises(OutputExists, match=r"config\.json is missing"):
        bucket.write(out, if_exists="skip")


def test_a_server_that_only_pretends_is_refused_before_anything_is_written(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    with buckets.rclone(tmp_path / "served") as endpoint:
        control = Control(stores=Stores(connect={BUCKETS: lambda: buckets.connect(endpoint)}))
        with pytest.raises(WeightopsError, match="only pretends conditional writes") as caught:
            weightops.cast(bucket.folder / "raw", "s3://bucket/out", dtype="bfloat16", control=control)
    assert not isinstance(caught.value, NetworkFailed)
    assert [path for path in (tmp_path / "served").rglob("*") if path.is_file()] == []


def test_a_file_in_a_bucket_has_its_manifest_beside_it(bucket: Bucket) -> None:
    make_family(bucket.folder)
    here, there = bucket.folder / "m.gguf", f"{bucket.url}/sub/m.gguf"
    result = None
    for out in (here, there):
        options = {"to": "gguf", "base": bucket.folder / "llama", "control": bucket.control()}
        weightops.convert(bucket.folder / "lora", out, **options)
        with pytest.raises(OutputExists, match=r"m\.gguf exists"):
            weightops.convert(bucket.folder / "lora", out, **options)
        result = weightops.convert(bucket.folder / "lora", out, if_exists="skip", **options)
        assert result.skipped
    names = ["m.gguf", f"m.gguf.{manifest.NAME}"]
    assert bucket.below("sub") == names
    assert [bucket.all.get(f"sub/{name}") for name in names] == [(bucket.folder / n).read_bytes() for n in names]
    bucket.all.remove(f"sub/{names[1]}")
    bucket.all.put("sub/m.gguf.weightops/owner.json", JobOwner(job="s3://b/j", fingerprint="0").encode())
    with pytest.raises(CorruptInput, match="is not finished, the job s3://b/j is writing it"):
        weightops.inspect(there, control=bucket.control())
