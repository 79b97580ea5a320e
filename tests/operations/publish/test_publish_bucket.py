"""Publishing into a bucket: the manifest comes last, and nothing is replaced or sent twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import pytest
import torch
from publishing import listed, make_model, save_manifest, save_signature
from safetensors.torch import save_file

import weightops
from weightops.engine.control import Control
from weightops.errors import Interrupted, OutputExists, SourceMissing, UsageError, WeightopsError
from weightops.operations.publish import Publication, bucket
from weightops.stores.s3.connection import S3
from weightops.stores.s3.store import S3Store
from weightops.stores.s3.target import PART_NBYTES
from weightops.stores.stores import BUCKETS, Stores


@pytest.fixture
def store(store_endpoint: str) -> Iterator[S3Store]:
    """A folder of an empty bucket."""
    with buckets.connect(store_endpoint) as connection:
        yield S3Store(buckets.new_bucket(connection), "models/mine", connection)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def control_of(endpoint: str) -> Control:
    return Control(stores=Stores(connect={BUCKETS: lambda: buckets.connect(endpoint)}))


def publish(store: S3Store, folder: Path, endpoint: str, **options: Any) -> Publication:
    return weightops.publish(folder, store.shown, control=control_of(endpoint), **options)


def there(store: S3Store) -> dict[str, bytes]:
    return {name: store.get(name) for name in store.listed("")}


def test_a_model_is_there_and_then_nothing_is_left_to_send(store: S3Store, model: Path, store_endpoint: str) -> None:
    shown = publish(store, model, store_endpoint, dry_run=True)
    assert (shown.visibility, there(store)) == ("as the bucket's policy says", {})
    made = publish(store, model, store_endpoint)
    assert there(store) == listed(model)
    etag = hashlib.md5((model / "model.safetensors").read_bytes()).hexdigest()
    proofs = {file.name: file.proof for file in made.files}
    assert proofs["model.safetensors"] == f"the store lists its size and ETag, {etag}"
    assert all(proofs.values())
    again = publish(store, model, store_endpoint)
    assert (again.sent_nbytes, {file.status for file in again.files}) == (0, {"there"})
    assert weightops.verify(store.shown, control=control_of(store_endpoint)).verdict


def test_a_large_object_is_proven_by_its_parts(store: S3Store, model: Path, store_endpoint: str) -> None:
    save_file({"b": torch.zeros(PART_NBYTES // 2)}, model / "other.safetensors")
    save_manifest(model)
    made = publish(store, model, store_endpoint)
    (proof,) = (file.proof for file in made.files if file.name == "other.safetensors")
    assert proof.endswith("-3")
    assert there(store) == listed(model)
    assert publish(store, model, store_endpoint).sent_nbytes == 0


def test_an_etag_of_another_kind_is_no_proof(
    store: S3Store, model: Path, store_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, model, store_endpoint)
    monkeypatch.setattr(bucket, "part_nbytes", lambda nbytes: 1000)  # as if another program had sent it
    found = publish(store, model, store_endpoint)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert {file.name: file.proof for file in found.files}["model.safetensors"] == f"read again there, SHA-256 {digest}"
    assert found.sent_nbytes == 0


def test_a_checksum_that_the_store_keeps_has_to_be_right(store: S3Store, model: Path, store_endpoint: str) -> None:
    publish(store, model, store_endpoint)
    data = (model / "model.safetensors").read_bytes()
    url = f"{store.shown}/model.safetensors"
    with buckets.connect(store_endpoint) as connection:
        connection.call("PUT", url, headers={"x-amz-sdk-checksum-algorithm": "CRC64NVME"}, body=data)
        kept = connection.call("HEAD", url, headers={"x-amz-checksum-mode": "ENABLED"}).headers
    proofs = {file.name: file.proof for file in publish(store, model, store_endpoint).files}
    assert proofs["model.safetensors"].endswith(f" and CRC64NVME, {kept['x-amz-checksum-crc64nvme']}")


def test_an_object_whose_checksum_is_wrong_is_not_what_was_sent(
    store: S3Store, model: Path, store_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, model, store_endpoint)
    monkeypatch.setattr(bucket.Bucket, "_kept_checksum", lambda self, found: "AAAAAAAAAAA=")
    with pytest.raises(OutputExists, match="another model is published there"):
        publish(store, model, store_endpoint)


def test_an_interrupted_run_sends_no_object_again(
    store: S3Store, model: Path, store_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    control = control_of(store_endpoint)
    call = S3.call

    def counting(self: S3, method: str, url: str, *given: Any, **options: Any) -> Any:
        if method == "PUT" and "probe" not in url:
            if len(sent) == 3:
                control.cancel()
            answer = call(self, method, url, *given, **options)
            sent.append(url)
            return answer
        return call(self, method, url, *given, **options)

    monkeypatch.setattr(S3, "call", counting)
    with pytest.raises(Interrupted, match="interrupted"):
        weightops.publish(model, store.shown, workers=1, control=control)
    assert 0 < len(store.listed("")) < len(listed(model))
    assert not store.has("weightops-manifest.json")
    publish(store, model, store_endpoint)
    assert there(store) == listed(model)
    assert len(sent) == len({*sent}) == len(listed(model))
    assert sent[-1].endswith("/weightops-manifest.json")


def test_uploads_that_were_left_are_gone_when_all_is_there(store: S3Store, model: Path, store_endpoint: str) -> None:
    save_file({"b": torch.zeros(PART_NBYTES // 2)}, model / "other.safetensors")
    save_manifest(model)
    left = store.target("other.safetensors", 2 * PART_NBYTES)
    left.write(0, memoryview(bytes(PART_NBYTES + 1)), PART_NBYTES + 1)
    left.close()
    publish(store, model, store_endpoint)
    with pytest.raises(WeightopsError, match="does not know the upload"):
        left.commit()


def test_nothing_is_replaced(store: S3Store, model: Path, store_endpoint: str) -> None:
    store.put("other.safetensors", b"theirs")
    with pytest.raises(OutputExists, match=r"other.safetensors exists, and is not the file"):
        publish(store, model, store_endpoint)
    assert there(store) == {"other.safetensors": b"theirs"}
    store.remove("other.safetensors")
    publish(store, model, store_endpoint)
    (model / "README.md").write_text("# new\n")
    save_manifest(model)
    with pytest.raises(OutputExists, match="another model is published there"):
        publish(store, model, store_endpoint)


def test_files_that_the_folder_lacks_stay_unless_they_are_to_be_deleted(
    store: S3Store, model: Path, store_endpoint: str
) -> None:
    store.put("old.txt", b"")
    store.put(".weightops/job", b"")
    assert publish(store, model, store_endpoint).kept == ("old.txt",)
    assert publish(store, model, store_endpoint, delete=True).deleted == ("old.txt",)
    assert there(store).keys() == {*listed(model), ".weightops/job"}


def test_what_was_published_verifies_as_it_was_signed(
    store: S3Store, model: Path, store_endpoint: str, tmp_path: Path
) -> None:
    save_signature(model)
    publish(store, model, store_endpoint)
    for name, data in there(store).items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
    signature = tmp_path / "got/model.sig"
    assert weightops.verify(tmp_path / "got", signature=signature, key=tmp_path / "signer.pub").verdict


def test_what_has_no_sense_for_a_bucket_is_refused(store: S3Store, model: Path, store_endpoint: str) -> None:
    for options in ({"create": True}, {"message": "text"}, {"create": True, "public": True}):
        with pytest.raises(UsageError, match="is not made, belongs to the bucket, and has no commits"):
            publish(store, model, store_endpoint, **options)
    with pytest.raises(SourceMissing, match="no such bucket"):
        weightops.publish(model, "s3://no-such-bucket/a", control=control_of(store_endpoint))


def test_a_store_that_only_pretends_conditions_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data/held").mkdir(parents=True)
    with buckets.rclone(tmp_path / "data") as endpoint, pytest.raises(WeightopsError, match="only pretends"):
        weightops.publish(model, "s3://held/mine", control=control_of(endpoint))
    assert not (tmp_path / "data/held/mine/model.safetensors").exists()


@pytest.mark.parametrize("nbytes", [0, 1, 9, 10, 11, 20, 21])
def test_an_etag_is_that_of_the_parts(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "part_nbytes", lambda nbytes: 10)
    data = bytes(range(nbytes))
    digests = [hashlib.md5(data[i : i + 10]).digest() for i in range(0, nbytes, 10)]
    whole = f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(digests)}"
    etag = bucket._ETag(nbytes)
    for start in range(0, nbytes, 7):
        etag.update(memoryview(data[start : start + 7]))
    assert etag.text() == (whole if nbytes > 10 else hashlib.md5(data).hexdigest())
