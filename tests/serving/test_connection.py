"""What a server that is busy, away or refuses becomes, and what people write as its address."""

import http.server
import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import grpc
import pytest

from dclip_qdrant.errors import PointError, StoreError, UsageError
from dclip_qdrant.serving.stores import open_store, place, qdrant_connection
from dclip_qdrant.serving.stores.qdrant_address import address_of, key_of


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(qdrant_connection, "time", clock)
    return clock


class Busy(http.server.BaseHTTPRequestHandler):
    """Refuses `left` times, then knows of no collection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        if server.left:
            server.left -= 1
            return self.answer(server.status, {"status": {"error": server.says}}, server.headers)
        return self.answer(200, {"result": {"exists": False, "collections": []}, "status": "ok", "time": 0.0})

    def answer(self, code, body, headers=()):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def busy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    server.asked, server.left, server.status, server.says, server.headers = [], 0, 429, "slow down", {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(20)


def in_seconds(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("3", 3, 3), ("0.5", 0.5, 1), ("date", 5, 10), ("", 0.5, 1), ("soon", 0.5, 1), (None, 0.5, 0.5)],
)
def test_what_a_busy_server_asks_for_is_waited(busy, clock, status, header, least, most):
    busy.left, busy.status = 1, status
    if header is not None:
        busy.headers = {"Retry-After": in_seconds(9) if header == "date" else header}
    assert open_store("c", url=busy.url).exists() is False
    (slept,) = clock.slept
    assert least <= slept <= most


def test_a_server_that_stays_busy_is_one_line_after_the_patience(busy, clock, caplog):
    busy.left, busy.headers = 10_000, {"Retry-After": "7"}
    with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match="HTTP 429: slow down$") as e:
        open_store("c", url=busy.url, patience=60).exists()
    assert "\n" not in str(e.value)
    assert sum(clock.slept) == 60
    (line,) = [r.getMessage() for r in caplog.records]  # said once
    assert line == f"{busy.url}: HTTP 429: slow down; waiting for up to 60 s"


def test_a_server_that_is_away_is_waited_for(clock, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match="no answer.*check `url`") as e:
        open_store("c", url="http://127.0.0.1:9").count()
    assert "\n" not in str(e.value)
    assert sum(clock.slept) == qdrant_connection.PATIENCE == 120
    assert "http://127.0.0.1:9: no answer" in caplog.text


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_not_tried_again_and_says_what_to_set(busy, clock, status):
    busy.left, busy.status, busy.says = 5, status, "Invalid API key or JWT"
    expected = f"HTTP {status}: Invalid API key or JWT; expected a key.*QDRANT_API_KEY"
    with pytest.raises(StoreError, match=expected):
        open_store("c", url=busy.url, api_key="wrong").exists()
    assert clock.slept == []


def test_a_gateways_page_is_one_line(busy, clock, monkeypatch):
    monkeypatch.setattr(Busy, "do_GET", lambda self: self.answer(404, b"<html>\n<h1>Not\n here</h1>"))
    with pytest.raises(StoreError, match="HTTP 404: <html> <h1>Not here</h1>"):
        open_store("c", url=busy.url).exists()
    monkeypatch.setattr(Busy, "do_GET", lambda self: self.answer(200, b"<html>hello</html>"))
    with pytest.raises(StoreError, match="an answer that isn't Qdrant's") as e:
        open_store("c", url=busy.url).exists()
    assert "\n" not in str(e.value)
    assert clock.slept == []


class Said(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "the reason"


def test_grpc_answers_become_our_errors(clock):
    server, tries = place(url=":memory:", patience=10), []

    def refuse(code):
        def call():
            tries.append(code)
            raise Said(code)

        return call

    with pytest.raises(PointError, match="INVALID_ARGUMENT: the reason"):
        server.connection.call(refuse(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(StoreError, match="UNAUTHENTICATED: the reason.*QDRANT_API_KEY"):
        server.connection.call(refuse(grpc.StatusCode.UNAUTHENTICATED))
    assert len(tries) == 2
    with pytest.raises(StoreError, match="UNAVAILABLE"):
        server.connection.call(refuse(grpc.StatusCode.UNAVAILABLE))
    assert clock.slept == [0.5, 1, 2, 4, 2.5]  # twice as long each time, 10 s in all


@pytest.mark.parametrize(
    ("url", "shown", "options"),
    [
        ("http://h:6333", "http://h:6333", {"url": "http://h:6333"}),
        ("h", "http://h:6333", {"url": "http://h:6333"}),
        (" 'http://h:6333'\n", "http://h:6333", {"url": "http://h:6333"}),
        ("https://v.example.org/qdrant/", "https://v.example.org:6333/qdrant", None),
        ("https://v.example.org:443/qdrant", "https://v.example.org:443/qdrant", None),
        (
            "http://me:s%40cret@h:80",
            "http://me:***@h:80",
            {"url": "http://h:80", "auth": ("me", "s@cret")},
        ),
        ("http://[::1]:7000", "http://[::1]:7000", {"url": "http://[::1]:7000", "trust_env": False}),
        ("localhost:6333", "http://localhost:6333", {"url": "http://localhost:6333", "trust_env": False}),
        (
            "grpc://h",
            "grpc://h:6334",
            {"host": "h", "port": 6333, "grpc_port": 6334, "prefer_grpc": True, "https": False},
        ),
        (
            "grpcs://h.example:7000/",
            "grpcs://h.example:7000",
            {"host": "h.example", "port": 6333, "grpc_port": 7000, "prefer_grpc": True, "https": True},
        ),
    ],
)
def test_addresses(url, shown, options):
    address = address_of(url)
    assert address.shown == shown
    assert address.options == (options or {"url": shown})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://h:abc",
        "http://a:6333,http://b:6333",
        "http://a:6333\nhttp://b",
        "http://me:secret@h:1 x",
        "http://h:6333?a=b",
        "http://[::1",
        "grpc://h/path",
        "//",
    ],
)
def test_what_is_no_address_is_one_line_without_a_password(url):
    with pytest.raises(UsageError) as e:
        open_store("c", url=url)
    assert "`url`" in e.value._line()
    assert "\n" not in str(e.value)
    assert "secret" not in str(e.value)


def test_keys_are_trimmed_and_never_shown():
    assert key_of(" 'abc-1'\n") == "abc-1"
    assert key_of("") is key_of(None) is None
    for key in ("top\nsecret", "top secret", "töp-secret"):
        with pytest.raises(UsageError) as e:
            open_store("c", url="http://h", api_key=key)
        assert "secret" not in str(e.value)
        assert "`api_key`" in e.value._line()


def test_a_password_goes_along_and_is_not_shown(busy, clock):
    busy.left, busy.status = 1, 400
    url = busy.url.replace("http://", "http://me:secret@")
    with pytest.raises(PointError) as e:
        open_store("c", url=url).exists()
    assert "secret" not in str(e.value)
    assert busy.asked[0][1]["Authorization"] == "Basic bWU6c2VjcmV0"


def test_this_machine_is_not_asked_through_a_proxy(busy, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert open_store("c", url=busy.url, patience=0).exists() is False


def test_a_key_over_http_is_one_line_and_none_on_this_machine(caplog):
    with caplog.at_level(logging.WARNING):
        open_store("c", url="http://127.0.0.1:6333", api_key="k").close()
        open_store("c", url="https://h", api_key="k").close()
        assert caplog.text == ""
        open_store("c", url="http://h", api_key="k").close()
    assert "http://h:6333: the key travels unencrypted" in caplog.text
