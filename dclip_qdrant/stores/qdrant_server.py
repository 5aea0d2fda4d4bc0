"""A Qdrant server as a place of collections: calls that wait and try again, aliases, and what an older version must be made up for."""

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpc import RpcError, StatusCode
from qdrant_client import QdrantClient
from qdrant_client import models as m
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from dclip_qdrant.errors import PointError, StoreError

if TYPE_CHECKING:
    from dclip_qdrant.stores.qdrant import Qdrant

RETRY_ON = (408, 429, 500, 502, 503, 504)
RETRY_ON_GRPC = (
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.INTERNAL,
    StatusCode.ABORTED,
)
TRIES = 5
TEXT_SCORING = (1, 20)  # the first version whose text index answers BM25
NEW_VECTORS = (1, 18)  # ... that adds a vector to a live collection
WEIGHTED_RRF = (1, 17)
METADATA = (1, 16)
ASIDE = "dclip-metadata"  # where an older server keeps it


def client_address(url: str) -> dict[str, Any]:
    """What QdrantClient takes for a URL; grpc://HOST[:6334] and grpcs:// speak gRPC (and REST on 6333 for what gRPC lacks)."""
    scheme, _, rest = url.partition("://")
    if scheme not in ("grpc", "grpcs"):
        return {"url": url}
    host, _, port = rest.rstrip("/").rpartition(":") if rest.rstrip("/").rpartition(":")[2].isdigit() else (rest.rstrip("/"), "", "6334")
    return {"host": host, "port": 6333, "grpc_port": int(port), "prefer_grpc": True, "https": scheme == "grpcs"}


class Server:
    """A Qdrant server; each call waits and tries again when it is busy or away."""

    def __init__(self, url: str, *, api_key: str | None = None, client: QdrantClient | None = None) -> None:
        self.where = self.url = url
        self.client = client or (
            QdrantClient(":memory:")
            if url == ":memory:"
            else QdrantClient(**client_address(url), api_key=api_key, timeout=60, check_compatibility=False)
        )
        self._version: tuple[int, int] | None = None

    def call(self, f: Callable[[], Any], where: str = "") -> Any:
        """Calls the server; honours Retry-After. Raises PointError for what it refuses, StoreError for the rest."""
        for attempt in range(TRIES):
            wait = 0.5 * 2**attempt
            try:
                return f()
            except UnexpectedResponse as e:
                if e.status_code not in RETRY_ON or attempt == TRIES - 1:
                    kind = PointError if e.status_code in (400, 413, 422) else StoreError
                    raise kind(f"{self.url}/{where}", f"HTTP {e.status_code}: {e.content.decode(errors='replace')[:300]}") from e
                wait = float(e.headers.get("retry-after", wait)) if e.headers else wait
            except (ResponseHandlingException, ApiException) as e:
                if attempt == TRIES - 1:
                    raise StoreError(self.url, f"no answer: {str(e)[:200]}", "a Qdrant server", "check --url") from e
            except RpcError as e:
                if e.code() not in RETRY_ON_GRPC or attempt == TRIES - 1:
                    kind = PointError if e.code() in (StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE) else StoreError
                    raise kind(f"{self.url}/{where}", f"{e.code().name}: {(e.details() or '')[:300]}") from e
            except ValueError as e:  # qdrant-client's own engine
                raise PointError(where, str(e)[:300]) from e
            time.sleep(min(wait, 30))
        return None

    def version(self) -> tuple[int, int]:
        if self._version is None:
            said = self.call(self.client.info).version.split(".")
            self._version = int(said[0]), int(said[1])
        return self._version

    def metadata_aside(self, name: str) -> dict[str, Any]:
        """What an older server was told of a collection."""
        if not self.call(lambda: self.client.collection_exists(ASIDE)):
            return {}
        id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, self.aliases().get(name, name)))
        found = self.call(lambda: self.client.retrieve(ASIDE, [id_]), ASIDE)
        return dict(found[0].payload or {}) if found else {}

    def set_metadata_aside(self, name: str, metadata: dict[str, Any]) -> None:
        if not self.call(lambda: self.client.collection_exists(ASIDE)):
            self.call(lambda: self.client.create_collection(ASIDE, vectors_config={}), ASIDE)
        id_ = str(uuid.uuid5(uuid.NAMESPACE_URL, self.aliases().get(name, name)))
        self.call(lambda: self.client.upsert(ASIDE, [m.PointStruct(id=id_, vector={}, payload=metadata)], wait=True), ASIDE)

    def collections(self) -> list[str]:
        return sorted(c.name for c in self.call(self.client.get_collections).collections if c.name != ASIDE)

    def aliases(self) -> dict[str, str]:
        return {a.alias_name: a.collection_name for a in self.call(self.client.get_aliases).aliases}

    def point(self, alias: str, collection: str) -> None:
        """Both operations travel in one request: nobody sees the alias missing."""
        create = m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name=collection, alias_name=alias))
        remove = [m.DeleteAliasOperation(delete_alias=m.DeleteAlias(alias_name=alias))] if alias in self.aliases() else []
        self.call(lambda: self.client.update_collection_aliases([*remove, create]), alias)

    def drop(self, collection: str) -> None:
        if collection in self.aliases().values():
            raise StoreError(self.url, f"{collection!r} is what an alias points at", do="point the alias elsewhere first")
        self.call(lambda: self.client.delete_collection(collection), collection)

    def open(self, name: str, *, alone: bool = False) -> "Qdrant":
        from dclip_qdrant.stores.qdrant import Qdrant

        return Qdrant(name, self, alone=alone)

    def close(self) -> None:
        self.client.close()
