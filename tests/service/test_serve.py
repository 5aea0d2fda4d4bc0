"""The inference service: the protocol, micro-batching, and a table of bad requests that each get their status
while the service lives on."""

import asyncio
import base64
import io
import json
import textwrap
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the serve extra is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from pictures import b64, png
from starlette.testclient import TestClient

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pictures.images import open_rgb
from dclip_qdrant.service.batcher import Batcher, Line
from dclip_qdrant.service.limits import Limits, Refused
from dclip_qdrant.service.run import build_service, is_loopback
from dclip_qdrant.serving.student import Student

TOKEN = "a-token-of-some-length"


def one(data, kind="text", model="dclip/tiny", **more):
    return {
        "inputs": [{"data": data, "data_type": kind, "model": model, "options": None} | more],
        "inference": "search",
        "token": None,
    }


@pytest.fixture(scope="module")
def client(student_folder):
    limits = Limits(
        body_bytes=2 << 20, picture_bytes=1 << 20, picture_pixels=1_000_000, inputs=8, text_chars=2000
    )
    with TestClient(
        build_service([str(student_folder)], limits=limits).app, base_url="http://localhost"
    ) as c:
        yield c


def test_the_protocol_gives_our_vectors_in_order(client, student):
    body = {
        "inputs": [
            one("a red ball")["inputs"][0],
            one(b64(png()), "image", student.model_name)["inputs"][0],
            one("two dogs", "object")["inputs"][0],
            one("data:image/png;base64," + b64(png(seed=1)), "image")["inputs"][0],
            one({"text": "a cat"}, "object")["inputs"][0],
        ],
        "inference": "update",
        "token": None,
    }
    got = client.post("/inference", json=body).json()
    texts = student.embed_texts(["a red ball", "two dogs", "a cat"])
    images = student.embed_images([open_rgb(png(), "a"), open_rgb(png(seed=1), "b")])
    np.testing.assert_allclose(
        got["embeddings"], np.stack([texts[0], images[0], texts[1], images[1], texts[2]]), atol=1e-5
    )


def test_regions_are_multivectors(client, student):
    got = client.post(
        "/inference",
        json={
            "inputs": [
                one("a red ball", model="dclip/tiny/regions")["inputs"][0],
                one(b64(png()), "image", "dclip/tiny/regions")["inputs"][0],
            ]
        },
    ).json()["embeddings"]
    np.testing.assert_allclose(got[0], student.embed_texts(["a red ball"]), atol=1e-5)
    assert np.shape(got[1]) == (5, student.dim)
    np.testing.assert_allclose(got[1][0], student.embed_images([open_rgb(png(), "a")])[0], atol=1e-5)


def test_openai_shape(client, student):
    got = client.post("/v1/embeddings", json={"model": "dclip/tiny", "input": ["a red ball", "a cat"]}).json()
    assert [d["index"] for d in got["data"]] == [0, 1]
    np.testing.assert_allclose(
        [d["embedding"] for d in got["data"]], student.embed_texts(["a red ball", "a cat"]), atol=1e-5
    )
    assert got["usage"]["prompt_tokens"] == 5 + 4
    packed = client.post(
        "/v1/embeddings", json={"model": "dclip/tiny", "input": "a cat", "encoding_format": "base64"}
    ).json()["data"][0]["embedding"]
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed), "<f4"), student.embed_texts(["a cat"])[0], atol=1e-5
    )
    assert client.get("/v1/models").json()["data"][0]["id"] == student.model_name


def test_openais_clients_as_they_are(client):
    """LiteLLM sends null for what nobody set; LangChain sends a thousand texts, or token ids."""
    ask = lambda **body: client.post("/v1/embeddings", json={"model": "dclip/tiny", "input": ["a"]} | body)
    plain = ask().json()["data"]
    answer = ask(encoding_format=None, dimensions=None, user=None)
    assert (answer.status_code, answer.json()["data"]) == (200, plain)
    assert len(ask(input=[f"text {i}" for i in range(1000)]).json()["data"]) == 1000
    assert ask(input=["a"] * 2049).status_code == 413
    for ids in ([[64, 3290]], [64, 3290]):
        answer = ask(input=ids)
        assert answer.status_code == 400
        assert "token ids" in answer.json()["error"]["message"]
        assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


def test_pictures_as_apps_encode_them(client):
    """URIs may be percent-encoded, base64 may be of the URL alphabet, lines may be broken."""
    raw = next(data for data in (png((w, 9)) for w in range(1, 200)) if {*"+/"} < {*b64(data)})
    vector = lambda text: client.post("/inference", json=one(text, "image")).json()["embeddings"][0]
    wanted = vector(b64(raw))
    for text in (
        base64.urlsafe_b64encode(raw).decode(),
        "data:image/png;base64," + urllib.parse.quote(b64(raw), safe=""),
        "data:image/png;charset=utf-8;base64," + b64(raw),
        "\n".join(textwrap.wrap(b64(raw), 76)),
    ):
        assert vector(text) == wanted


bomb = io.BytesIO()
Image.new("1", (3000, 3000)).save(bomb, "PNG")
truncated = png((200, 200))[:400]
BAD = {
    "not JSON": (b"{", 400, "not JSON"),
    "not UTF-8": (b'"\xff"', 400, "UTF-8"),
    "an empty body": (b"", 400, "not JSON"),
    "NaN": (b'{"inputs": NaN}', 400, "NaN"),
    "Infinity as data": (
        b'{"inputs": [{"data": Infinity, "data_type": "text", "model": "dclip/tiny"}]}',
        400,
        "Infinity",
    ),
    "nested too deeply": (b"[" * 200_000, 400, "body"),
    "a list": ([], 400, "expected"),
    "no inputs": ({}, 400, "inputs: missing"),
    "an empty list": ({"inputs": []}, 400, "empty list"),
    "inputs that isn't a list": ({"inputs": "a"}, 400, "expected a list"),
    "too many inputs": ({"inputs": [{}] * 9}, 413, "at most 8"),
    "an input that isn't an object": ({"inputs": [3]}, 400, "inputs[0]: the number 3"),
    "no model": ({"inputs": [{"data": "a", "data_type": "text"}]}, 400, "inputs[0].model: missing"),
    "an unknown model": (one("a", model="dclip/tinny"), 400, "did you mean"),
    "another vendor's model": (one("a", model="openai/clip"), 400, "no model"),
    "an unknown data_type": (one("a", "video"), 400, "expected text, image or object"),
    "a wrong purpose": (one("a") | {"inference": "train"}, 400, '"search" or "update"'),
    "options that aren't an object": (one("a", options=[1]), 400, "expected an object or null"),
    "an unknown option": (one("a", options={"dims": 3}), 400, "'dims' is unknown"),
    "a length of nothing": (one("a", options={"dim": 0}), 400, "expected a whole number above 0"),
    "a length beyond the student's": (one("a", options={"dim": 10_000}), 400, "dclip/tiny"),
    "an empty text": (one("  \n"), 400, "an empty text"),
    "a number as text": (one(7), 400, "the number 7"),
    "a text too long": (one("x" * 2001), 413, "2,001 characters"),
    "half a surrogate pair": (
        b'{"inputs": [{"data": "\\ud800", "data_type": "text", "model": "dclip/tiny"}]}',
        400,
        "surrogate",
    ),
    "an object of nothing known": (one({"audio": "x"}, "object"), 400, "expected a text"),
    "a null picture": (one(None, "image"), 400, "missing"),
    "bad base64": (one("####", "image"), 400, "neither base64"),
    "base64 of a text": (one(b64(b"hello there"), "image"), 400, "looks like text"),
    "a truncated picture": (one(b64(truncated), "image"), 400, "can't be decoded"),
    "an SVG": (one(b64(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "image"), 400, "not a picture"),
    "a bomb": (one(b64(bomb.getvalue()), "image"), 413, "3000 x 3000 pixels"),
    "a picture too large": (one(b64(b"\0" * (1 << 20 | 99)), "image"), 413, "at most 1,048,576"),
    "a path": (one("/etc/passwd", "image"), 400, "neither base64"),
    "a Windows path": (one("C:\\boot.ini", "image"), 400, "expected base64 or data:"),
    "file://": (one("file:///etc/passwd", "image"), 400, "a file: URI"),
    "ftp://": (one("ftp://example.org/a.png", "image"), 400, "a ftp: URI"),
    "http://": (one("http://169.254.169.254/latest/meta-data", "image"), 400, "not allowed"),
    "https:// in capitals": (one("HTTPS://example.org/a.png", "image"), 400, "not allowed"),
    "a URL with a password": (one("http://user:pass@localhost/a.png", "image"), 400, "not allowed"),
    "a broken URL": (one("http://[::1/a.png", "image"), 400, "not a URL"),
    "a data: URI without base64": (one("data:image/png,abc", "image"), 400, "isn't base64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_their_status_and_the_service_lives_on(client, name):
    body, status, says = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/inference", content=content, headers={"Content-Type": "application/json"})
    body = answer.json()
    assert (answer.status_code, list(body)) == (status, ["error"])
    assert says in body["error"]
    assert "\n" not in body["error"]
    assert client.post("/inference", json=one("still here")).status_code == 200


def test_bad_doors(client):
    for answer, status in (
        (
            client.post(
                "/inference", content=b"x" * (2 << 20 | 1), headers={"Content-Type": "application/json"}
            ),
            413,
        ),
        (
            client.post(
                "/inference",
                content=(b"x" * 4096 for _ in range(600)),
                headers={"Content-Type": "application/json"},
            ),
            413,
        ),  # no length said
        (client.post("/inference", content=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (client.get("/inference"), 405),
        (client.get("/nothing/here"), 404),
        (client.get("/page/../app.py"), 404),
        (client.get("/page/secret.py"), 404),
        (client.post("/inference", json=one("a"), headers={"Host": "evil.example"}), 403),
        (client.get("/api/labels/c"), 404),
    ):
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
    for body, status in (
        ({"model": "x", "input": "a"}, 404),
        ({"model": "dclip/tiny", "input": []}, 400),
        ({"model": "dclip/tiny", "input": [[1, 2]]}, 400),
        ({"model": "dclip/tiny", "input": "a", "dimensions": 10_000}, 400),
        ({"model": "dclip/tiny", "input": "a", "dimensions": True}, 400),
        ({"model": "dclip/tiny/regions", "input": "a"}, 400),
        ({"input": "a"}, 400),
        ({"model": "dclip/tiny", "input": "a", "encoding_format": "hex"}, 400),
    ):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == status
        # OpenAI's clients read .error.message
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_token(student_folder):
    with TestClient(
        build_service([str(student_folder)], host="0.0.0.0", token=TOKEN).app, base_url="http://anything"
    ) as c:
        assert c.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"api-key": "no"}):
            assert c.post("/inference", json=one("a"), headers=headers).status_code == 401
            assert c.get("/metrics", headers=headers).status_code == 401
            assert (
                c.post(
                    "/v1/embeddings", json={"model": "dclip/tiny", "input": "a"}, headers=headers
                ).status_code
                == 401
            )
        assert (
            c.post("/inference", json=one("a"), headers={"Authorization": f"Bearer {TOKEN}"}).status_code
            == 200
        )
        assert c.post("/inference", json=one("a"), headers={"api-key": TOKEN}).status_code == 200
        # as the Qdrant server sends it
        assert c.post("/inference", json=one("a") | {"token": TOKEN}).status_code == 200
        assert c.post("/inference", json=one("a") | {"token": "wrong"}).status_code == 401
        assert TOKEN not in c.post("/inference", json=one("a") | {"token": "wrong"}).text


def test_others_need_a_token(student_folder):
    assert [
        is_loopback(h) for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "10.0.0.1", "example.org")
    ] == [True] * 3 + [False] * 4
    with pytest.raises(UsageError, match="can be reached by others"):
        build_service([str(student_folder)], host="0.0.0.0")
    with pytest.raises(UsageError, match="16 or more"):
        build_service([str(student_folder)], host="0.0.0.0", token="short")


def test_two_students_by_name(student_folder, other_student, tmp_path):
    with pytest.raises(UsageError, match="two students named"):
        build_service([str(student_folder), str(other_student)])


def test_pictures_from_an_allowed_host_alone(student_folder, student):
    class Host(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/away" else 200)
            if self.path == "/away":
                self.send_header("Location", "/picture")
            self.end_headers()
            if self.path != "/away":
                self.wfile.write(b"\0" * 2_000_000 if self.path == "/large" else png())

        def log_message(self, *_):
            pass

    host = HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    try:
        where = f"127.0.0.1:{host.server_port}"
        service = build_service(
            [str(student_folder)], limits=Limits(fetch_hosts=(where,), picture_bytes=1 << 20)
        )
        with TestClient(service.app, base_url="http://localhost") as c:
            got = c.post("/inference", json=one(f"http://{where}/picture", "image"))
            np.testing.assert_allclose(
                got.json()["embeddings"], student.embed_images([open_rgb(png(), "a")]), atol=1e-5
            )
            for url, says in (
                (f"http://{where}/away", "answered 302"),
                (f"http://{where}/large", "more than"),
                (f"http://127.0.0.1:{host.server_port + 1}/picture", "not allowed"),
                ("http://127.0.0.1/picture", "not allowed"),
            ):
                assert says in c.post("/inference", json=one(url, "image")).json()["error"]
    finally:
        host.shutdown()
        host.server_close()


def test_metrics_and_readiness(student_folder):
    service = build_service([str(student_folder)])
    with TestClient(service.app, base_url="http://localhost") as c:
        for _ in range(200):
            if c.get("/readyz").status_code == 200:
                break
        c.post("/inference", json=one("a"))
        c.post("/inference", json=one("####", "image"))
        lines = c.get("/metrics").text.splitlines()
        assert 'dclip_requests_total{route="/inference",status="200"} 1.0' in lines
        assert 'dclip_requests_total{route="/inference",status="400"} 1.0' in lines
        assert f'dclip_inputs_total{{kind="text",model="{next(iter(service.engine.students))}"}} 1.0' in lines
    assert not service.ready


def test_what_waits_together_is_embedded_together():
    """The first request goes alone; the nine that come meanwhile go in batches of at most four, in order, and
    each gets its own vector."""
    sizes, gate = [], threading.Event()

    def embed(items):
        sizes.append(len(items))
        gate.wait(10)
        return np.array([[float(i)] for i in items])

    async def run():
        batcher = Batcher(embed, ThreadPoolExecutor(1), most=4)
        first = asyncio.create_task(batcher([0]))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher([i])) for i in range(1, 10)]
        await asyncio.sleep(0.05)
        gate.set()
        return [(await t)[0][0] for t in (first, *rest)]

    assert asyncio.run(run()) == list(map(float, range(10)))
    assert sizes == [1, 4, 4, 1]


def test_a_failed_batch_fails_its_callers_alone():
    def embed(items):
        if "bad" in items:
            raise ValueError("secret detail")
        return np.full((len(items), 1), np.nan if "nan" in items else 1.0)

    async def run():
        batcher = Batcher(embed, ThreadPoolExecutor(1), most=1)
        return await asyncio.gather(
            *(batcher([x]) for x in ("good", "bad", "nan", "good")), return_exceptions=True
        )

    good, bad, nan, again = asyncio.run(run())
    assert good[0] == again[0] == 1.0
    assert bad.status == nan.status == 500
    assert "secret" not in bad.message


def test_a_full_line_says_come_back():
    line = Line(3)
    line.enter(3)
    with pytest.raises(Refused) as e:
        line.enter(1)
    assert (e.value.status, e.value.headers) == (429, {"Retry-After": "1"})
    line.leave(2)
    line.enter(2)


def test_short_vectors_are_the_first_components(client, student_folder):
    from dclip_qdrant.metrics import normalise

    whole = Student.load(student_folder).embed_texts(["a red star"])[0]
    short = normalise(whole[:5])
    got = client.post("/inference", json=one("a red star", options={"dim": 5})).json()["embeddings"][0]
    assert got == pytest.approx(short.tolist(), abs=1e-5)
    got = client.post(
        "/v1/embeddings", json={"model": "dclip/tiny", "input": "a red star", "dimensions": 5}
    ).json()["data"][0]["embedding"]
    assert got == pytest.approx(short.tolist(), abs=1e-5)
