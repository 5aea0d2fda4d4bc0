"""Pictures over HTTP: one request, bounded in time and bytes; redirects are never followed by themselves."""

import http.client
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

REDIRECTS = (301, 302, 303, 307, 308)
WHOLE = 3  # times `timeout`: what a whole answer may take, however slowly it drips
PIECE = 1 << 16
_KEPT = "%/:=&?~#+!$,;'@()*[]-._"  # of an address, as it is


@dataclass(frozen=True)
class Answer:
    """`data` of a 200; of a redirect the `location`. Other answers are HttpRefused."""

    data: bytes = b""
    status: int = 200
    location: str | None = None


class HttpRefused(Exception):
    """Why there is no picture: the answer's status, or what went wrong on the way; one line."""


class HttpTooLarge(HttpRefused):
    """More bytes than are allowed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever asked looks at the new host first, or gives up."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Deadline:
    """Ends the connection after so many seconds in all: a server that sends a byte now and then never runs
    into the socket's own timeout."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """urllib's own, over connections that this deadline knows."""
        deadline = self

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                deadline._socket = self.sock

        class SecureConnection(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                deadline._socket = self.sock

        class Http(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(Connection, req)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
                return self.do_open(SecureConnection, req)

        return [Http(), Https()]


def tidy(url: str) -> str:
    """An address as a request needs it: spaces and letters beyond ASCII are escaped.

    Raises:
        HttpRefused: not an http or https address, control characters, a port that is no number.
    """
    url = url.strip()
    if any(ord(character) < 32 or ord(character) == 127 for character in url):
        raise HttpRefused("an address with control characters")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except (ValueError, UnicodeError):
        raise HttpRefused("not an address (its host or port)") from None
    if parts.scheme.lower() not in ("http", "https") or not host or parts.username or parts.password:
        raise HttpRefused("not an http or https address")
    place = f"[{host}]" if ":" in host else host
    place += "" if port is None else f":{port}"
    path, query = (urllib.parse.quote(part, safe=_KEPT) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme.lower(), place, path or "/", query, ""))


def get(url: str, *, agent: str, timeout: float, most_bytes: int, proxies: bool) -> Answer:
    """One request for a picture. `timeout`: seconds without a byte; the whole may take `WHOLE` times as long.
    `proxies`: whether the environment's proxies are used.

    Raises:
        HttpTooLarge: more than `most_bytes`. HttpRefused: any other answer, or none.
    """
    request = urllib.request.Request(tidy(url), headers={"User-Agent": agent, "Accept": "image/*"})
    with _Deadline(WHOLE * timeout) as deadline:
        handlers = [_NoRedirect(), *deadline.handlers()]
        if not proxies:
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
                data = _read(answer, most_bytes)
        except urllib.error.HTTPError as e:
            location = e.headers.get("Location")
            e.close()
            if e.code in REDIRECTS and location:
                return Answer(status=e.code, location=location)
            raise HttpRefused(f"answered {e.code}") from None
        except (OSError, ValueError, http.client.HTTPException) as e:
            if deadline.over:
                raise HttpRefused(f"took longer than {WHOLE * timeout:g} s") from None
            raise HttpRefused(f"can't be reached ({_name_of(e)})") from None
    if deadline.over:
        raise HttpRefused(f"took longer than {WHOLE * timeout:g} s")
    return Answer(data)


def _read(answer: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """The whole body. Raises HttpTooLarge, or http.client's errors where it breaks off."""
    data = bytearray()
    while piece := answer.read(PIECE):
        data += piece
        if len(data) > most_bytes:
            raise HttpTooLarge(f"more than {most_bytes:,} bytes")
    if answer.length:  # http.client says nothing when reading in pieces comes to a cut end
        raise http.client.IncompleteRead(bytes(data), answer.length)
    return bytes(data)


def _name_of(e: Exception) -> str:
    reason = getattr(e, "reason", None)
    return type(reason).__name__ if isinstance(reason, Exception) else type(e).__name__
