"""Servers, as one command reaches them: connections, and files read in parts through them."""

from __future__ import annotations

from collections.abc import Callable

from weightops.stores.web.http import Http
from weightops.stores.web.policy import Policy
from weightops.stores.web.ranges import RangeReader
from weightops.stores.web.urls import DEFAULT_ENDPOINT


class Web(Http):
    """`Http`, and `ranges`, which reads parts of files through it. Raises as `Http` does."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        endpoint: str = DEFAULT_ENDPOINT,
        token: str | None = None,
        proxy_for: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        super().__init__(policy, endpoint=endpoint, token=token, proxy_for=proxy_for)
        self.ranges = RangeReader(self)

    def close(self) -> None:
        self.ranges.close()
        super().close()
