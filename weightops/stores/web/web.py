"""Servers, as one command reaches them: connections, and files read in parts through them."""

from __future__ import annotations

from collections.abc import Callable

from weightops.errors import CorruptInput
from weightops.io.source_file import SourceFile
from weightops.stores.web.http import Http
from weightops.stores.web.policy import Policy
from weightops.stores.web.ranges import RangeReader
from weightops.stores.web.small import read_whole
from weightops.stores.web.urls import DEFAULT_ENDPOINT


class Web(Http):
    """`Http`, and reading files through it by their identity (a `Remote`), `ahead` ranges at a time.

    Raises as `Http` does.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        endpoint: str = DEFAULT_ENDPOINT,
        token: str | None = None,
        proxy_for: Callable[[str], str | None] = lambda url: None,
        ahead: int = 1,
    ) -> None:
        super().__init__(policy, endpoint=endpoint, token=token, proxy_for=proxy_for)
        self.ranges = RangeReader(self, ahead)

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        self.ranges.read_into(file, offset, out, following)

    def read(self, file: SourceFile) -> bytes:
        """A small file, whole, held against its digest; raises as `read_whole`, `CorruptInput` for another size."""
        algorithm, _, digest = file.digest.partition(":")
        data = read_whole(file.path, self, {algorithm: digest} if digest else {})
        if len(data) != file.nbytes:
            raise CorruptInput(f"{file.shown}: has {len(data)} bytes, expected {file.nbytes}")
        return data

    def proven_nbytes(self, file: SourceFile) -> int:
        return self.ranges.proofs.position(file)

    def is_proven(self, file: SourceFile) -> bool:
        return self.ranges.proofs.is_proven(file)

    def forget(self, file: SourceFile) -> None:
        self.ranges.forget(file)

    def close(self) -> None:
        self.ranges.close()
        super().close()
