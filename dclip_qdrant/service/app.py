"""The routes. Every answer that isn't 200 is {"error": ...} with the right status."""

import asyncio
import base64
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dclip_qdrant.errors import DclipError
from dclip_qdrant.metrics import shorten
from dclip_qdrant.service.engine import Engine
from dclip_qdrant.service.gallery import Gallery
from dclip_qdrant.service.inputs import parse_inference, parse_json, text_input
from dclip_qdrant.service.limits import Refused

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
HEADERS = {  # the page loads nothing from elsewhere, and nobody frames it
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: "
        "blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action "
        "'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# what an error of ours is to whoever asks; anything else is the fault of what stands behind us
STATUS = {"usage": 400, "input": 400, "too_large": 413, "mismatch": 409}
Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """The ASGI application around an engine; `token` guards everything but the health checks and the page's
    static files."""

    def __init__(
        self,
        engine: Engine,
        *,
        gallery: Gallery | None = None,
        token: str | None = None,
        loopback: bool = True,
    ) -> None:
        self.engine, self.gallery, self.token, self.loopback, self.ready = (
            engine,
            gallery,
            token,
            loopback,
            False,
        )
        routes = [
            ("/healthz", self.healthz, "GET", False),
            ("/readyz", self.readyz, "GET", False),
            ("/metrics", self.metrics, "GET", True),
            ("/inference", self.inference, "POST", True),
            ("/v1/embeddings", self.openai, "POST", True),
            ("/v1/models", self.models, "GET", True),
            ("/", self.page, "GET", False),
            ("/page/{name}", self.page, "GET", False),
            ("/api/info", self.info, "GET", True),
            ("/api/search", self.search, "POST", True),
            ("/api/start/{collection}", self.start, "GET", True),
            ("/api/labels/{collection}", self.labels, "GET", True),
            ("/api/picture/{collection}/{id}", self.picture, "GET", True),
        ]
        self.app = Starlette(
            routes=[
                Route(path, self._guarded(path, handler, guard), methods=[method])
                for path, handler, method, guard in routes
            ],
            exception_handlers={HTTPException: self._http_error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        warm = asyncio.get_running_loop().run_in_executor(self.engine.decoders, self._warm)
        yield
        self.ready = False
        await asyncio.wait([warm])
        self.engine.close()
        if self.gallery:
            self.gallery.close()

    def _warm(self) -> None:
        self.engine.warm()
        self.ready = True

    # --- what every request passes

    def _guarded(self, path: str, handler: Handler, guard: bool) -> Handler:
        async def run(request: Request) -> Response:
            began, status = time.perf_counter(), 500
            try:
                self._check_host(request)
                if guard and self.token is not None and path != "/inference":
                    self._check_token(_given_token(request))
                response = await handler(request)
                status = response.status_code
                response.headers.update(HEADERS)
                return response
            except Refused as e:
                status = e.status
                return _error(path, e.status, e.message, e.headers)
            except DclipError as e:
                status = STATUS.get(e.kind, 502)
                return _error(path, status, str(e))
            except ClientDisconnect:
                status = 499
                return Response(status_code=499)
            except Exception as e:
                import traceback

                traceback.print_exc()
                return _error(path, 500, f"a fault in the service: {type(e).__name__}")
            finally:
                self.engine.figures.requests.labels(path, str(status)).inc()
                self.engine.figures.seconds.labels(path).observe(time.perf_counter() - began)

        return run

    async def _http_error(self, request: Request, e: Exception) -> Response:
        status = getattr(e, "status_code", 500)
        text = {
            404: f"no {request.url.path[:80]} here",
            405: f"{request.method} is not for {request.url.path[:80]}",
        }.get(status, str(getattr(e, "detail", "error")))
        return _error(request.url.path, status, text, dict(getattr(e, "headers", None) or {}))

    def _check_host(self, request: Request) -> None:
        """A web page of somebody else that points its name at 127.0.0.1 must not reach a service without a
        token (DNS rebinding)."""
        if self.loopback and self.token is None:
            host = request.headers.get("host", "")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.lower() not in LOOPBACK:
                raise Refused(403, f"host {host[:80]!r}; this service answers to localhost")

    def _check_token(self, given: str | None) -> None:
        if self.token is not None and not hmac.compare_digest((given or "").encode(), self.token.encode()):
            raise Refused(
                401,
                "no token, or a wrong one; send Authorization: Bearer ...",
                {"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, request: Request) -> bytes:
        """The body, up to the limit; only JSON, so that no foreign form can post here."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"content-type {kind[:60]!r}; expected application/json")
        most = self.engine.limits.body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise Refused(413, f"a body of {int(length):,} bytes; at most {most:,}", {"Connection": "close"})
        out = bytearray()
        async for chunk in request.stream():
            out += chunk
            if len(out) > most:
                raise Refused(413, f"a body of more than {most:,} bytes", {"Connection": "close"})
        return bytes(out)

    # --- inference

    async def inference(self, request: Request) -> Response:
        """What a Qdrant server asks when QDRANT__INFERENCE__ADDRESS points here (research: qdrant v1.19,
        src/common/inference/service.rs)."""
        given = _given_token(request)
        if self.token is not None and given is not None:
            self._check_token(given)
        body = parse_json(await self._body(request))
        if self.token is not None and given is None:
            text = body.get("token") if isinstance(body, dict) else None
            self._check_token(text if isinstance(text, str) else None)
        vectors = await self.engine.embed(parse_inference(body, self.engine.limits))
        return JSONResponse({"embeddings": [v.tolist() for v in vectors], "usage": None})

    async def openai(self, request: Request) -> Response:
        """POST /v1/embeddings as OpenAI's clients send it: input is a text or a list of texts."""
        body = parse_json(await self._body(request))
        if not isinstance(body, dict):
            raise Refused(400, "body: expected an object with model and input")
        model, given, form = body.get("model"), body.get("input"), body.get("encoding_format")
        if not isinstance(model, str):
            raise Refused(400, "model: expected a student's name")
        if form not in (None, "float", "base64"):  # null is the default, as OpenAI's service takes it
            raise Refused(400, "encoding_format: expected float or base64")
        try:
            student, regions = self.engine.student(model)
        except Refused as e:
            raise Refused(404, e.message) from None
        if regions:
            raise Refused(
                400, "model: regions are multivectors, which this shape can't carry; use /inference"
            )
        dim = body.get("dimensions")
        if dim is not None and (
            not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= student.dim
        ):
            raise Refused(400, f"dimensions: expected 1 to {student.dim}, what this student has")
        texts = [given] if isinstance(given, str) else given
        if _has_token_ids(texts):
            raise Refused(
                400,
                "input: token ids, which are another tokenizer's; send texts (LangChain's OpenAIEmbeddings: "
                "check_embedding_ctx_length=False)",
            )
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise Refused(400, "input: expected a text or a list of texts")
        if len(texts) > self.engine.limits.texts:
            raise Refused(413, f"input: {len(texts):,} texts; at most {self.engine.limits.texts:,} a request")
        inputs = [text_input(t, model, f"input[{i}]", self.engine.limits) for i, t in enumerate(texts)]
        vectors = [shorten(v, dim) for v in await self.engine.embed(inputs)]
        tokens = await asyncio.get_running_loop().run_in_executor(
            self.engine.decoders, student.token_count, texts
        )
        shape = lambda v: (
            v.tolist()
            if form != "base64"
            else base64.b64encode(np.ascontiguousarray(v, "<f4").tobytes()).decode()
        )
        data = [{"object": "embedding", "index": i, "embedding": shape(v)} for i, v in enumerate(vectors)]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "model": student.model_name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {
                        "id": n,
                        "object": "model",
                        "created": 0,
                        "owned_by": "dclip-qdrant",
                        "dimensions": s.dim,
                    }
                    for n, s in self.engine.students.items()
                ],
            }
        )

    # --- health

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        if not self.ready:
            raise Refused(503, "the students are being loaded", {"Retry-After": "1"})
        return JSONResponse({"status": "ready", "students": list(self.engine.students)})

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.engine.figures.registry), media_type=CONTENT_TYPE_LATEST)

    # --- the page

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        kinds = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
        if name not in kinds:
            raise Refused(404, f"no {name[:80]!r} here")
        return Response(
            (PAGE / name).read_bytes(), media_type=kinds[name], headers={"Cache-Control": "no-cache"}
        )

    def _gallery(self) -> Gallery:
        if self.gallery is None:
            raise Refused(404, "no collections: start the service with --edge PATH or --url URL")
        return self.gallery

    async def info(self, _: Request) -> Response:
        found = await self._in_thread(self.gallery.collections) if self.gallery else ([], [])
        return JSONResponse(
            {
                "students": [{"name": n, "dim": s.dim} for n, s in self.engine.students.items()],
                "collections": found[0],
                "unavailable": found[1],
            }
        )

    async def search(self, request: Request) -> Response:
        return JSONResponse(
            await self._in_thread(self._gallery().search, parse_json(await self._body(request)))
        )

    async def start(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self._gallery().start, request.path_params["collection"]))

    async def labels(self, request: Request) -> Response:
        return JSONResponse(
            {"labels": await self._in_thread(self._gallery().labels, request.path_params["collection"])}
        )

    async def picture(self, request: Request) -> Response:
        data = await self._in_thread(
            self._gallery().thumbnail, request.path_params["collection"], request.path_params["id"]
        )
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def _in_thread(self, f: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.engine.decoders, f, *args)


def _given_token(request: Request) -> str | None:
    text = request.headers.get("authorization", "")
    return text[7:].strip() if text[:7].lower() == "bearer " else request.headers.get("api-key")


def _error(path: str, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """{"error": "one line"}; under /v1/ the object that OpenAI's clients read."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = message.encode("utf-8", "backslashreplace").decode()  # what came may be no Unicode text
    body: Any = (
        {"message": message, "type": kind, "param": None, "code": None}
        if path.startswith("/v1/")
        else message
    )
    return JSONResponse({"error": body}, status_code=status, headers={**HEADERS, **(headers or {})})


def _has_token_ids(given: Any) -> bool:
    """Whether an `input` is a list of numbers, or of lists of numbers."""
    first = given[0] if isinstance(given, list) and given else None
    first = first[0] if isinstance(first, list) and first else first
    return isinstance(first, int) and not isinstance(first, bool)
