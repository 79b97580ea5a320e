"""What is worked out block by block goes into a bucket too; what it needs on the way lies here, and goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import buckets
import pytest

import weightops
from weightops.engine.control import Control
from weightops.errors import NoRoom, OutputExists
from weightops.formats.proofs import manifest
from weightops.stores.s3.store import S3Store
from weightops.stores.stores import BUCKETS, Stores

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"samples": 8, "seq_len": 32}


def test_a_quantised_model_and_an_importance_matrix_in_a_bucket(
    tmp_path: Path,
    model: Callable[[str], Path],
    text: Path,
    store_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with buckets.connect(store_endpoint) as connection:
        bucket = buckets.new_bucket(connection)
        store = S3Store(bucket, "", connection)

        def control() -> Control:
            return Control(stores=Stores(connect={BUCKETS: lambda: buckets.connect(store_endpoint)}))

        def quantize(out: str) -> None:
            options = {"calibration": text, "group_size": 32, **SMALL, "control": control()}
            weightops.quantize(model("llama"), out, **options)

        def imatrix(out: str) -> None:
            weightops.imatrix(model("llama"), out, calibration=text, **SMALL, control=control())

        quantize("here")
        with monkeypatch.context() as patch:
            patch.setattr(S3Store, "target", full)
            with pytest.raises(NoRoom, match="full"):
                quantize(f"s3://{bucket}/there")
        assert (tmp_path / "there.blocks").is_dir()
        quantize(f"s3://{bucket}/there")
        imatrix("m.gguf")
        imatrix(f"s3://{bucket}/m.gguf")
        with pytest.raises(OutputExists, match="there exists"):
            quantize(f"s3://{bucket}/there")
        names = [path.name for path in (tmp_path / "here").iterdir()]
        expected = {f"there/{name}": (tmp_path / "here" / name).read_bytes() for name in names}
        expected |= {name: (tmp_path / name).read_bytes() for name in ("m.gguf", f"m.gguf.{manifest.NAME}")}
        assert {name: store.get(name) for name in store.listed("")} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "m.gguf", f"m.gguf.{manifest.NAME}"]


def full(*_: object, **__: object) -> object:
    raise NoRoom("full")
