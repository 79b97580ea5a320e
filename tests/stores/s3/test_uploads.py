"""Uploads that have not ended, and buckets that are somewhere else."""

from __future__ import annotations

import buckets
from bucket_faults import Asked, FaultyStore

from weightops.stores.s3.store import S3Store


def test_only_uploads_to_the_very_names_are_aborted(store_endpoint: str) -> None:
    with buckets.connect(store_endpoint) as connection:
        bucket = buckets.new_bucket(connection)
        for key in ("out/a", "out/a", "out/a2", "out/a/b", "other/a"):
            connection.call("POST", f"s3://{bucket}/{key}", {"uploads": ""})
        S3Store(bucket, "out", connection).abort_uploads(["a", "never"])
        assert sorted(buckets.uploads(connection, bucket)) == ["other/a", "out/a/b", "out/a2"]


def test_a_bucket_in_another_region_is_asked_there(store_endpoint: str) -> None:
    with FaultyStore(store_endpoint) as faulty, buckets.connect(faulty.endpoint) as connection:
        regions: list[str] = []

        def elsewhere(asked: Asked) -> None:
            region = asked.headers["Authorization"].split("/")[2]
            if asked.status == 0:
                regions.append(region)
                if region != "eu-west-3":
                    asked.refuse(400, "AuthorizationHeaderMalformed", **{"x-amz-bucket-region": "eu-west-3"})

        store = S3Store(buckets.new_bucket(connection), "", connection)
        faulty.fault = elsewhere
        store.put("a", b"data")
        assert store.get("a") == b"data"
        assert regions[:2] == ["us-east-1", "eu-west-3"]
        assert set(regions[1:]) == {"eu-west-3"}
