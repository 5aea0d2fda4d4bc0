"""A connection to a Qdrant server: calls that wait and try again, and where an older version keeps what it
has no place for."""

import json
import logging
import math
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from grpc import RpcError, StatusCode
from qdrant_client import QdrantClient
from qdrant_client import models as m
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from dclip_qdrant.errors import DclipError, PointError, StoreError
from dclip_qdrant.serving.stores.qdrant_address import Address, address_of, key_of

logger = logging.getLogger(__name__)

RETRY_ON = (408, 429, 500, 502, 503, 504)
RETRY_ON_GRPC = (
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.INTERNAL,
    StatusCode.ABORTED,
)
REFUSED = (400, 413, 422)  # these points, not the server
REFUSED_GRPC = (StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE)
IN_MEMORY = ":memory:"  # as an address: qdrant-client's own engine
PATIENCE = 120.0  # seconds for which a call waits for a server that is busy or away
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
SAY_AFTER = 2.0  # seconds of waiting before it is said
NEVER = "rate limiter capacity"  # in what a server says of a request that its limiter never lets through
CHECK = "check `url`: the address, the port and http or https"
NO_RIGHT = (401, 403)
NO_RIGHT_GRPC = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
TEXT_SCORING = (1, 20)  # the first version whose text index answers BM25
NEW_VECTORS = (1, 18)  # ... that adds a vector to a live collection
WEIGHTED_RRF = (1, 17)
METADATA = (1, 16)
ASIDE = "dclip-metadata"  # where an older server keeps it


class OverLimit(PointError):
    """A request that is larger than all that the collection's rate limiter ever lets through: waiting doesn't
    help, smaller requests do."""


@dataclass(frozen=True)
class Fault:
    """A call that failed: what to raise, whether it may heal, and the seconds that the server asked for."""

    error: DclipError
    heals: bool = False
    wait: float | None = None


class Connection:
    """A Qdrant server; each call waits and tries again when it is busy or away."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        client: QdrantClient | None = None,
        patience: float | None = None,
    ) -> None:
        """`patience`: seconds that a call waits for a server that is busy or away, in all."""
        self.patience = PATIENCE if patience is None else patience
        address = None if client or url == IN_MEMORY else address_of(url)
        self.url = address.shown if address else url
        self.client = client or (_client(address, api_key) if address else QdrantClient(IN_MEMORY))
        self.in_memory = self.client.init_options.get("location") == IN_MEMORY
        self._version: tuple[int, int] | None = None

    def call(self, request: Callable[[], Any], where: str = "") -> Any:
        """Calls the server; honours Retry-After.

        Raises:
            PointError: what it refuses. StoreError: the rest, and a server that is still busy or away when
            the patience is at its end.
        """
        began, attempt, said = time.monotonic(), 0, False
        while True:
            try:
                return request()
            except (QdrantException, ApiException, RpcError, ValueError) as e:
                fault = self._fault(e, where)
                cause = e
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt if fault.wait is None else max(0.1, fault.wait))
            left = self.patience - (time.monotonic() - began)
            if not fault.heals or left <= 0:
                raise fault.error from cause
            if not said and time.monotonic() - began + wait > SAY_AFTER:
                logger.warning("%s: %s; waiting for up to %.0f s", self.url, fault.error.came, left)
                said = True
            time.sleep(min(wait, left))
            attempt += 1

    def _fault(self, error: Exception, where: str) -> Fault:
        place = f"{self.url}/{where}".rstrip("/")
        if isinstance(error, ResourceExhaustedResponse):
            if NEVER in str(error):
                return Fault(OverLimit(place, f"HTTP 429: {error}"))
            return Fault(StoreError(place, f"HTTP 429: {error}"), True, error.retry_after_s)
        if isinstance(error, UnexpectedResponse):
            status = error.status_code or 0
            came = f"HTTP {status}: {_sentence(error.content)}"
            if status in NO_RIGHT:
                return Fault(_no_right(place, came))
            if status == 429 and NEVER in came:
                return Fault(OverLimit(place, came))
            kind = PointError if status in REFUSED else StoreError
            wait = _seconds(error.headers.get("retry-after") if error.headers else None)
            return Fault(kind(place, came), status in RETRY_ON, wait)
        if isinstance(error, RpcError):
            code: Any = error.code()  # pyright: ignore[reportAttributeAccessIssue]
            details: str = error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
            came = f"{code.name}: {details[:300]}"
            if code in NO_RIGHT_GRPC:
                return Fault(_no_right(place, came))
            if NEVER in came:
                return Fault(OverLimit(place, came))
            kind = PointError if code in REFUSED_GRPC else StoreError
            return Fault(kind(place, came), code in RETRY_ON_GRPC)
        if isinstance(error, ResponseHandlingException):
            # qdrant-client wraps what httpx met, and also an answer that it can't read
            inner = error.source
            came = f"no answer: {str(inner)[:200] or type(inner).__name__}"
            do = "check `url`: the address, the port and http or https"
            heals = isinstance(inner, httpx.TransportError) and not isinstance(
                inner, httpx.UnsupportedProtocol
            )
            if not heals:
                came = f"an answer that isn't Qdrant's ({type(inner).__name__})"
            return Fault(StoreError(self.url, came, "a Qdrant server", do), heals)
        if isinstance(error, json.JSONDecodeError):
            return Fault(_not_qdrants(self.url, "it isn't JSON"))
        if isinstance(error, ValueError):  # qdrant-client's own engine, and what it refuses to send
            return Fault(PointError(place, str(error)[:300]))
        return Fault(StoreError(place, str(error)[:300]))

    def version(self) -> tuple[int, int]:
        if self._version is None:
            major, minor, *_ = self.call(self.client.info).version.split(".")
            self._version = int(major), int(minor)
        return self._version

    def collections(self) -> list[str]:
        names = (c.name for c in self.call(self.client.get_collections).collections)
        return sorted(name for name in names if name != ASIDE)

    def aliases(self) -> dict[str, str]:
        return {a.alias_name: a.collection_name for a in self.call(self.client.get_aliases).aliases}

    def metadata_aside(self, name: str) -> dict[str, Any]:
        """What an older server was told of a collection."""
        if not self.call(lambda: self.client.collection_exists(ASIDE)):
            return {}
        points = self.call(lambda: self.client.retrieve(ASIDE, [self._aside_id(name)]), ASIDE)
        return dict(points[0].payload or {}) if points else {}

    def set_metadata_aside(self, name: str, metadata: dict[str, Any]) -> None:
        if not self.call(lambda: self.client.collection_exists(ASIDE)):
            self.call(lambda: self.client.create_collection(ASIDE, vectors_config={}), ASIDE)
        point = m.PointStruct(id=self._aside_id(name), vector={}, payload=metadata)
        self.call(lambda: self.client.upsert(ASIDE, [point], wait=True), ASIDE)

    def _aside_id(self, name: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, self.aliases().get(name, name)))

    def close(self) -> None:
        self.client.close()


def _not_qdrants(url: str, why: str) -> StoreError:
    return StoreError(url, f"an answer that isn't Qdrant's ({why})", "a Qdrant server", CHECK)


def _no_right(where: str, came: str) -> StoreError:
    do = "set QDRANT_API_KEY, or `api_key`, to one that may read, and write where you ingest"
    return StoreError(where, came, "a key with the right to do this", do)


def _sentence(content: bytes) -> str:
    """What the server says, out of its JSON."""
    text = content.decode(errors="replace")
    try:
        status = json.loads(text)["status"]
        text = status["error"] if isinstance(status, dict) else text
    except (ValueError, KeyError, TypeError):
        pass  # a gateway's page, or another shape
    return " ".join(str(text).split())[:300]


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: a number of seconds or a date (RFC 9110, 10.2.3); None where it says
    neither."""
    text = (retry_after or "").strip()
    try:
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _whole_seconds(response: httpx.Response) -> None:
    """qdrant-client reads Retry-After as a whole number, and raises something else where it is a date."""
    if response.status_code == 429 and "retry-after" in response.headers:
        seconds = _seconds(response.headers["retry-after"])
        response.headers["retry-after"] = str(math.ceil(1.0 if seconds is None else seconds))


def _client(address: Address, api_key: str | None) -> QdrantClient:
    key = key_of(api_key)
    if key and not address.encrypted and not address.loopback:
        logger.warning("%s: the key travels unencrypted; https:// keeps it secret", address.shown)
    with warnings.catch_warnings():  # said above, once
        warnings.filterwarnings("ignore", message="Api key is used with an insecure connection")
        return QdrantClient(
            **address.options,
            api_key=key,
            timeout=60,
            check_compatibility=False,
            event_hooks={"response": [_whole_seconds]},
        )
