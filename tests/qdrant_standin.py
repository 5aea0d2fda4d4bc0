"""A stand-in for the Qdrant server: its REST paths over qdrant-client's in-memory engine, and its inference as the server does it (v1.19,
src/common/inference): every object with a model is sent to `inference.address`, in order, and its vector put in its place.

No Qdrant binary can be had where these tests run. `python tests/qdrant_standin.py INFERENCE_ADDRESS [TOKEN]` prints its address and serves.
"""

import json
import re
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import TypeAdapter
from qdrant_client import models
from qdrant_client.local.qdrant_local import QdrantLocal


class Refused(Exception):
    pass


class Standin(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, inference: str, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.inference, self.token, self.engine, self.lock = inference, token, QdrantLocal(":memory:"), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

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
        inputs = [{"data": x[kind(x)], "data_type": kind(x), "model": x["model"], "options": x.get("options")} for x in found]
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
        engine = self.server.engine
        try:
            with self.server.lock:
                if path == "/":
                    self.answer(200, {"title": "qdrant - vector search engine", "version": "1.20.0"})
                    return
                if m := re.fullmatch(r"/collections/([^/]+)/exists", path):
                    result: Any = {"exists": engine.collection_exists(m[1])}
                elif (m := re.fullmatch(r"/collections/([^/]+)", path)) and self.command == "PUT":
                    c = models.CreateCollection(**body)
                    result = engine.create_collection(m[1], vectors_config=c.vectors, metadata=c.metadata)
                elif m := re.fullmatch(r"/collections/([^/]+)", path):
                    result = engine.get_collection(m[1])
                elif (m := re.fullmatch(r"/collections/([^/]+)/points", path)) and self.command == "PUT":
                    result = engine.upsert(m[1], [models.PointStruct(**p) for p in self.server.infer(body, "update")["points"]])
                elif m := re.fullmatch(r"/collections/([^/]+)/points/query", path):
                    q = models.QueryRequest(**self.server.infer(body, "search"))
                    result = engine.query_points(
                        m[1],
                        query=q.query,
                        prefetch=q.prefetch,
                        using=q.using,
                        query_filter=q.filter,
                        limit=q.limit or 10,
                        with_payload=True,
                    )
                else:
                    self.answer(404, {"status": {"error": path}})
                    return
            plain = result if isinstance(result, bool | dict) else json.loads(TypeAdapter(type(result)).dump_json(result))
            self.answer(200, {"result": plain, "status": "ok", "time": 0.0})
        except Refused as e:
            self.answer(400, {"status": {"error": str(e)}, "time": 0.0})
        except ValueError as e:
            self.answer(404, {"status": {"error": str(e)}, "time": 0.0})

    do_GET = do_PUT = do_POST = do


if __name__ == "__main__":
    standin = Standin(*sys.argv[1:])
    print(standin.url, flush=True)
    standin.serve_forever()
