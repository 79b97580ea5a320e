"""Uploads that have not ended, and buckets that are somewhere else."""

from __future__ import annotations

import buckets
import pytest
from botocore.credentials import Credentials
from bucket_faults import Asked, FaultyStore

from weightops.errors import NetworkFailed
from weightops.stores.s3.account import Account, Endpoint
from weightops.stores.s3.connection import S3
from weightops.stores.s3.store import S3Store


def test_only_uploads_to_the_very_names_are_aborted(store_endpoint: str) -> None:
    with buckets.connect(store_endpoint) as connection:
        bucket = buckets.new_bucket(connection)
        for key in ("out/a", "out/a", "out/a2", "out/a/b", "other/a"):
            connection.call("POST", f"s3://{bucket}/{key}", {"uploads": ""})
        S3Store(bucket, "out", connection).abort_uploads(["a", "never"])
        assert sorted(buckets.uploads(connection, bucket)) == ["other/a", "out/a/b", "out/a2"]


def test_a_bucket_in_another_region_is_asked_there(store_endpoint: str) -> None:
    keys, where = Credentials(buckets.KEY, buckets.SECRET), Endpoint(store_endpoint, is_virtual=False)
    there = Account(keys, region="eu-west-3", endpoint=where)
    with S3(there, buckets.QUICK) as connection:
        bucket, region = "elsewhere", b"<LocationConstraint>eu-west-3</LocationConstraint>"
        connection.call(
            "PUT", f"s3://{bucket}/", body=b"<CreateBucketConfiguration>%b</CreateBucketConfiguration>" % region
        )
    with FaultyStore(store_endpoint) as faulty, buckets.connect(faulty.endpoint) as connection:
        regions: list[str] = []
        faulty.fault = lambda asked: asked.status or regions.append(asked.headers["Authorization"].split("/")[2])
        store = S3Store(bucket, "", connection)
        store.put("a", b"data")
        assert store.get("a") == b"data"
        assert regions[:2] == ["us-east-1", "eu-west-3"]
        assert set(regions[1:]) == {"eu-west-3"}


def test_servers_that_send_each_other_what_is_asked_of_them_are_left(store_endpoint: str) -> None:
    with FaultyStore(store_endpoint) as faulty, buckets.connect(faulty.endpoint) as connection:
        asked_in: list[str] = []

        def elsewhere(asked: Asked) -> None:
            asked_in.append(asked.headers["Authorization"].split("/")[2])
            other = "us-east-1" if asked_in[-1] != "us-east-1" else "eu-west-3"
            asked.refuse(301, "PermanentRedirect", **{"x-amz-bucket-region": other})

        faulty.fault = elsewhere
        with pytest.raises(NetworkFailed, match="status 301, PermanentRedirect"):
            S3Store("bucket", "", connection).put("a", b"data")
        assert asked_in == ["us-east-1", "eu-west-3"]
