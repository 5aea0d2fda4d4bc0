"""A Qdrant server as a place of collections and aliases."""

from qdrant_client import QdrantClient
from qdrant_client import models as m

from dclip_qdrant.errors import StoreError
from dclip_qdrant.serving.stores.qdrant import Qdrant
from dclip_qdrant.serving.stores.qdrant_connection import Connection


class Server:
    """See `stores.Place`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        client: QdrantClient | None = None,
        patience: float | None = None,
    ) -> None:
        self.connection = Connection(url, api_key=api_key, client=client, patience=patience)
        self.where = self.connection.url

    def collections(self) -> list[str]:
        return self.connection.collections()

    def aliases(self) -> dict[str, str]:
        return self.connection.aliases()

    def point(self, alias: str, collection: str) -> None:
        """Both operations travel in one request: nobody sees the alias missing."""
        operations: list[m.CreateAliasOperation | m.DeleteAliasOperation] = []
        if alias in self.aliases():
            operations.append(m.DeleteAliasOperation(delete_alias=m.DeleteAlias(alias_name=alias)))
        create = m.CreateAlias(collection_name=collection, alias_name=alias)
        operations.append(m.CreateAliasOperation(create_alias=create))
        client = self.connection.client
        self.connection.call(lambda: client.update_collection_aliases(operations), alias)

    def drop(self, collection: str) -> None:
        if collection in self.aliases().values():
            came = f"{collection!r} is what an alias points at"
            raise StoreError(self.where, came, do="point the alias elsewhere first")
        self.connection.call(lambda: self.connection.client.delete_collection(collection), collection)

    def open(self, name: str, *, alone: bool = False) -> Qdrant:
        return Qdrant(name, self.connection, alone=alone)

    def close(self) -> None:
        self.connection.close()
