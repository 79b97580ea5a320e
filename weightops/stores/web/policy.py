"""How patient we are with a network: time-outs, attempts, waiting between them."""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from weightops.errors import WeightopsError

_PARAMETER = re.compile(r";\s*([rt])\s*=\s*([0-9]{1,9})(?![0-9.])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits in seconds and bytes per second; `deadline_s` is for all that is done with one `Web`.

    A connection that brings less than `min_rate` over `timeout_s` of waiting counts as broken, as one does that
    brings nothing. `attempts` are those in a row without progress.
    """

    connect_timeout_s: float = 10.0
    timeout_s: float = 30.0
    min_rate: float = 1000.0
    attempts: int = 6
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    max_retry_after_s: float = 300.0
    deadline_s: float | None = None
    limit_rate: int | None = None

    def delay_s(self, failures: int) -> float:
        """How long to wait after so many failures in a row: exponential, capped, spread by chance."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)


class Transient(WeightopsError):
    """Something that may well work when it is tried again; `retry_after_s` is the server's wish."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def wished_wait_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server wishes us to wait, by Retry-After or RateLimit; 0 if it says nothing."""
    return max(_retry_after_s(headers.get("Retry-After", "")), _rate_limit_s(headers.get("RateLimit", "")))


def _rate_limit_s(value: str) -> float:
    """Seconds until the limits that are used up begin anew: `"resolvers";r=0;t=40`, more of them after commas.

    Source: draft-ietf-httpapi-ratelimit-headers-09, section 4.
    """
    limits = (dict(_PARAMETER.findall(limit)) for limit in value.split(","))
    return max((float(limit["t"]) for limit in limits if limit.get("r") == "0" and "t" in limit), default=0.0)


def _retry_after_s(value: str) -> float:
    """Seconds from a Retry-After header, which holds a number or a date (RFC 9110, section 10.2.3); 0 if neither."""
    if value.isascii() and value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
