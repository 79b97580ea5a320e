"""Who asks for a bucket, and where: credentials, region and endpoint, as AWS's own programs find them; signatures.

botocore finds credentials (environment, profile, SSO, roles of a machine or pod) and renews them, and signs requests by
Signature Version 4. Nothing that it holds is shown or kept: signatures are made for one request, and go with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from weightops.errors import AuthenticationFailed, UsageError
from weightops.io.escape import escape
from weightops.stores.web.urls import origin

_REGION = "us-east-1"
_RANGES = 4
_VARIABLES = {
    "region": ("region", ["AWS_REGION", "AWS_DEFAULT_REGION"], None, None),
    "endpoint_url_s3": (None, ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"], None, None),
}
"""Variables by botocore's names: those that it does not read by itself, though all newer programs of AWS do."""


@dataclass(frozen=True)
class Endpoint:
    """Where buckets are: `url` of a server of one's own, without a slash at its end, or AWS's if it is empty.

    `is_virtual`: the bucket is a part of the host's name, and not of the path.
    """

    url: str = ""
    is_virtual: bool = True

    def of(self, bucket: str, region: str) -> str:
        """What a bucket's URLs begin with."""
        url = self.url or f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
        # A certificate for *.s3.amazonaws.com is not one for a name with more dots.
        if not self.is_virtual or "." in bucket:
            return f"{url}/{bucket}"
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{bucket}.{rest}"


class Account:
    """Signs requests. `credentials` are botocore's, None for requests that nobody signs, as public buckets take them.

    `ranges` is how many ranges of one file are asked for at a time.
    """

    def __init__(
        self, credentials: Any = None, *, region: str = "", endpoint: Endpoint | None = None, ranges: int = _RANGES
    ) -> None:
        # Its notes for debugging hold session tokens and signatures.
        logging.getLogger("botocore.auth").setLevel(logging.WARNING)
        self._credentials = credentials
        self._region = region or _REGION
        self._regions: dict[str, str] = {}
        self.endpoint = endpoint or Endpoint()
        self.ranges = ranges

    @property
    def is_anonymous(self) -> bool:
        """Whether there are no credentials."""
        return self._credentials is None

    def signed(
        self,
        method: str,
        bucket: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str,
    ) -> tuple[str, dict[str, str]]:
        """URL and headers of a request whose body has that digest; raises `AuthenticationFailed`."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError

        region = self._regions.get(bucket, self._region)
        url = f"{self.endpoint.of(bucket, region)}/{quote(key, safe='/~')}"
        if query:
            url += f"?{urlencode(query, quote_via=quote)}"
        if self._credentials is None:
            return url, dict(headers)
        # Proxies and Google's servers give these another value on the way.
        unsigned = {name: value for name, value in headers.items() if name.lower() in ("accept-encoding", "user-agent")}
        request = AWSRequest(method, url, {name: v for name, v in headers.items() if name not in unsigned})
        try:
            signer = S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", region)
            signer.payload = lambda request: sha256
            signer.add_auth(request)
        except BotoCoreError as error:
            raise _refused(error) from None
        return url, {**unsigned, **dict(request.headers.items())}

    def move(self, bucket: str, region: str) -> bool:
        """Take note of a bucket's region; False if that is where it has been looked for."""
        if self._regions.get(bucket, self._region) == region:
            return False
        self._regions[bucket] = region
        return True


def open_account() -> Account:
    """The account that the environment and the files in ~/.aws describe.

    Raises `UsageError` if botocore is not installed or the endpoint is no URL, `AuthenticationFailed` for credentials
    that cannot be read.
    """
    try:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session
    except ModuleNotFoundError:
        raise UsageError(
            "buckets need the botocore package, which is not installed", hint="pip install 'weightops[s3]'"
        ) from None
    session = Session(session_vars=_VARIABLES)
    try:
        profile, everything = session.get_scoped_config(), session.full_config
        own = profile.get("s3", {})
        services = everything.get("services", {}).get(profile.get("services"), {}).get("s3", {})
        url = (
            session.get_config_variable("endpoint_url_s3")
            or services.get("endpoint_url")
            or profile.get("endpoint_url")
            or ""
        ).rstrip("/")
        credentials, region = session.get_credentials(), session.get_config_variable("region")
    except BotoCoreError as error:
        raise _refused(error) from None
    if url:
        _check_endpoint(url)
    is_virtual = own.get("addressing_style", "path" if url else "virtual") != "path"
    ranges = own.get("max_concurrent_requests", "")
    return Account(
        credentials,
        region=region or "",
        endpoint=Endpoint(url, is_virtual),
        ranges=max(1, int(ranges)) if ranges.isdecimal() else _RANGES,
    )


def _check_endpoint(url: str) -> None:
    try:
        origin(url)
    except UsageError as error:
        raise UsageError(
            f"the endpoint for buckets (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or ~/.aws/config) is no URL: {error}",
            hint="as in http://127.0.0.1:9000",
        ) from None
    if urlsplit(url).query:
        raise UsageError("the endpoint for buckets has a query", hint="as in http://127.0.0.1:9000")


def _refused(error: Exception) -> AuthenticationFailed:
    return AuthenticationFailed(
        f"the credentials for buckets cannot be used ({escape(str(error))})",
        hint="`aws sts get-caller-identity` tries the same ones",
    )
