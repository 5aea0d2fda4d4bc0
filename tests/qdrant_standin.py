"""A stand-in for the Qdrant server: its REST paths over qdrant-client's in-memory engine, and its inference
as the server does it (v1.19, src/common/inference): every object with a model is sent to `inference.address`,
in order, and its vector put in its place.

No Qdrant binary can be had where these tests run. `python tests/qdrant_standin.py INFERENCE_ADDRESS [TOKEN]`
prints its address and serves.
"""

import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models
from qdrant_client.local.qdrant_local import QdrantLocal


class Refused(Exception):
    pass


def clear(url: str, tag: str) -> None:
    """Drops the collections of a server, and their aliases, whose names begin with the tag."""
    client = QdrantClient(url, api_key=os.environ.get("QDRANT_API_KEY"), check_compatibility=False)
    for alias in client.get_aliases().aliases:
        if alias.alias_name.startswith(tag):
            gone = models.DeleteAlias(alias_name=alias.alias_name)
            client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=gone)])
    for collection in client.get_collections().collections:
        if collection.name.startswith(tag):
            client.delete_collection(collection.name)
    client.close()


class Standin(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, inference: str, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.inference, self.token, self.engine, self.lock = (
            inference,
            token,
            QdrantLocal(":memory:"),
            threading.Lock(),
        )
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of a request is no fault of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def infer(self, body: Any, purpose: str) -> Any:
        found: list[dict] = []

        def walk(x: Any) -> None:
            if isinstance(x, dict) and "model" in x and x.keys() & {"text", "image", "object"}:
                found.append(x)
            else:
                for v in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
                    walk(v)

        walk(body)
        if not found:
            return body
        kind = lambda x: next(k for k in ("text", "image", "object") if k in x)
        inputs = [
            {"data": x[kind(x)], "data_type": kind(x), "model": x["model"], "options": x.get("options")}
            for x in found
        ]
        request = urllib.request.Request(
            self.inference,
            json.dumps({"inputs": inputs, "inference": purpose, "token": self.token}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            vectors = iter(json.load(urllib.request.urlopen(request))["embeddings"])
        except urllib.error.HTTPError as e:
            raise Refused(json.load(e)["error"]) from None

        def put(x: Any) -> Any:
            if isinstance(x, dict):
                return next(vectors) if any(x is f for f in found) else {k: put(v) for k, v in x.items()}
            return [put(v) for v in x] if isinstance(x, list) else x

        return put(body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Standin

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        path = self.path.split("?")[0]
        try:
            with self.server.lock:
                if path == "/":
                    self.answer(200, {"title": "qdrant - vector search engine", "version": "1.20.0"})
                    return
                for method, pattern, act in ROUTES:
                    if method == self.command and (m := re.fullmatch(pattern, path)):
                        result = act(self.server, unquote(m[1]) if m.groups() else None, body)
                        break
                else:
                    self.answer(404, {"status": {"error": f"{self.command} {path}"}})
                    return
            if isinstance(result, dict) and "list" in result:
                result = result["list"]
            plain = (
                result
                if isinstance(result, bool | dict | list)
                else json.loads(TypeAdapter(type(result)).dump_json(result))
            )
            self.answer(200, {"result": plain, "status": "ok", "time": 0.0})
        except Refused as e:
            self.answer(400, {"status": {"error": str(e)}, "time": 0.0})
        except ValueError as e:
            self.answer(404 if "not found" in str(e) else 400, {"status": {"error": str(e)}, "time": 0.0})

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do


def _query(server: Standin, name: str, body: Any) -> Any:
    q = models.QueryRequest(**server.infer(body, "search"))
    return server.engine.query_points(
        name,
        query=q.query,
        prefetch=q.prefetch,
        using=q.using,
        query_filter=q.filter,
        limit=q.limit or 10,
        with_payload=True if q.with_payload is None else q.with_payload,
        with_vectors=q.with_vector or False,
    )


def _create(server: Standin, name: str, body: Any) -> Any:
    c = models.CreateCollection(**body)
    return server.engine.create_collection(
        name, vectors_config=c.vectors, sparse_vectors_config=c.sparse_vectors, metadata=c.metadata
    )


def _change(server: Standin, name: str, body: Any) -> Any:
    c = models.UpdateCollection(**body)
    return server.engine.update_collection(name, metadata=c.metadata) if c.metadata is not None else True


def _scroll(server: Standin, name: str, body: Any) -> Any:
    r = models.ScrollRequest(**body)
    points, offset = server.engine.scroll(
        name,
        scroll_filter=r.filter,
        limit=r.limit or 10,
        offset=r.offset,
        with_payload=True if r.with_payload is None else r.with_payload,
        with_vectors=r.with_vector or False,
    )
    return {
        "points": json.loads(TypeAdapter(list[models.Record]).dump_json(points)),
        "next_page_offset": offset,
    }


def _retrieve(server: Standin, name: str, body: Any) -> Any:
    r = models.PointRequest(**body)
    found = server.engine.retrieve(
        name,
        r.ids,
        with_payload=True if r.with_payload is None else r.with_payload,
        with_vectors=r.with_vector or False,
    )
    return {"list": json.loads(TypeAdapter(list[models.Record]).dump_json(found))}


def _batch(server: Standin, name: str, body: Any) -> Any:
    operations = models.UpdateOperations(**server.infer(body, "update")).operations
    results = server.engine.batch_update_points(name, operations)
    return [json.loads(result.model_dump_json()) for result in results]


def _facet(server: Standin, name: str, body: Any) -> Any:
    r = models.FacetRequest(**body)
    return server.engine.facet(name, r.key, limit=r.limit or 10)


def _index(server: Standin, name: str, body: Any) -> Any:
    i = models.CreateFieldIndex(**body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that indexes do nothing for this engine
        if isinstance(i.field_schema, models.TextIndexParams):  # this engine has no other than its default
            plain = {"tokenizer": models.TokenizerType.WORD, "ascii_folding": None, "stemmer": None}
            i.field_schema = i.field_schema.model_copy(update={**plain, "stopwords": None})
        return server.engine.create_payload_index(name, i.field_name, i.field_schema)


def _move(server: Standin, _: None, body: Any) -> Any:
    return server.engine.update_collection_aliases(models.ChangeAliasesOperation(**body).actions)


COLLECTION = "/collections/([^/]+)"
ROUTES = (
    ("GET", "/collections", lambda s, n, b: s.engine.get_collections()),
    ("GET", "/aliases", lambda s, n, b: s.engine.get_aliases()),
    ("POST", "/collections/aliases", _move),
    ("GET", COLLECTION + "/exists", lambda s, n, b: {"exists": s.engine.collection_exists(n)}),
    ("GET", COLLECTION, lambda s, n, b: s.engine.get_collection(n)),
    ("PUT", COLLECTION, _create),
    ("PATCH", COLLECTION, _change),
    ("DELETE", COLLECTION, lambda s, n, b: s.engine.delete_collection(n)),
    ("PUT", COLLECTION + "/index", _index),
    (
        "PUT",
        COLLECTION + "/points",
        lambda s, n, b: s.engine.upsert(n, [models.PointStruct(**p) for p in s.infer(b, "update")["points"]]),
    ),
    ("POST", COLLECTION + "/points", _retrieve),
    ("POST", COLLECTION + "/points/query", _query),
    ("POST", COLLECTION + "/points/scroll", _scroll),
    (
        "POST",
        COLLECTION + "/points/delete",
        lambda s, n, b: s.engine.delete(n, models.PointIdsList(points=b["points"])),
    ),
    ("POST", COLLECTION + "/points/count", lambda s, n, b: s.engine.count(n)),
    ("POST", COLLECTION + "/points/batch", _batch),
    ("POST", COLLECTION + "/facet", _facet),
)


if __name__ == "__main__":
    standin = Standin(*sys.argv[1:])
    sys.stdout.write(standin.url + "\n")
    sys.stdout.flush()
    standin.serve_forever()
