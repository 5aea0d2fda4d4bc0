"""A connection to a Qdrant server: calls that wait and try again, and where an older version keeps what it
has no place for."""

import time
import uuid
from collections.abc import Callable
from typing import Any

from grpc import RpcError, StatusCode
from qdrant_client import QdrantClient
from qdrant_client import models as m
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from dclip_qdrant.errors import PointError, StoreError

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
TRIES = 5
LONGEST_WAIT = 30.0  # seconds
TEXT_SCORING = (1, 20)  # the first version whose text index answers BM25
NEW_VECTORS = (1, 18)  # ... that adds a vector to a live collection
WEIGHTED_RRF = (1, 17)
METADATA = (1, 16)
ASIDE = "dclip-metadata"  # where an older server keeps it


def client_address(url: str) -> dict[str, Any]:
    """What QdrantClient takes for a URL; grpc://HOST[:6334] and grpcs:// speak gRPC (and REST on 6333 for
    what gRPC lacks)."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("grpc", "grpcs"):
        return {"url": url}
    host, _, port = (
        rest.rstrip("/").rpartition(":")
        if rest.rstrip("/").rpartition(":")[2].isdigit()
        else (rest.rstrip("/"), "", "6334")
    )
    return {
        "host": host,
        "port": 6333,
        "grpc_port": int(port),
        "prefer_grpc": True,
        "https": scheme == "grpcs",
    }


class Connection:
    """A Qdrant server; each call waits and tries again when it is busy or away."""

    def __init__(self, url: str, *, api_key: str | None = None, client: QdrantClient | None = None) -> None:
        self.url = url
        self.client = client or _client(url, api_key)
        self._version: tuple[int, int] | None = None

    def call(self, request: Callable[[], Any], where: str = "") -> Any:
        """Calls the server; honours Retry-After.

        Raises:
            PointError: what it refuses. StoreError: the rest.
        """
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            wait = 0.5 * 2**attempt
            try:
                return request()
            except UnexpectedResponse as e:
                if e.status_code not in RETRY_ON or last:
                    kind = PointError if e.status_code in REFUSED else StoreError
                    came = f"HTTP {e.status_code}: {e.content.decode(errors='replace')[:300]}"
                    raise kind(f"{self.url}/{where}", came) from e
                wait = float(e.headers.get("retry-after", wait)) if e.headers else wait
            except (ResponseHandlingException, ApiException) as e:
                if last:
                    came = f"no answer: {str(e)[:200]}"
                    raise StoreError(self.url, came, "a Qdrant server", "check `url`") from e
            except RpcError as e:
                if e.code() not in RETRY_ON_GRPC or last:
                    kind = PointError if e.code() in REFUSED_GRPC else StoreError
                    came = f"{e.code().name}: {(e.details() or '')[:300]}"
                    raise kind(f"{self.url}/{where}", came) from e
            except ValueError as e:  # qdrant-client's own engine
                raise PointError(where, str(e)[:300]) from e
            time.sleep(min(wait, LONGEST_WAIT))
        return None

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


def _client(url: str, api_key: str | None) -> QdrantClient:
    if url == ":memory:":
        return QdrantClient(":memory:")
    return QdrantClient(**client_address(url), api_key=api_key, timeout=60, check_compatibility=False)
