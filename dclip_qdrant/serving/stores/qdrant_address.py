"""What people write as a server's address and key -> what qdrant-client takes, and what may be shown."""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from dclip_qdrant.errors import UsageError

SCHEMES = ("http", "https", "grpc", "grpcs")
EXPECTED = "http://HOST:6333"
REST_PORT, GRPC_PORT = 6333, 6334
AROUND = " \t\r\n\"'"  # what copying out of a page or a settings file leaves around a value
LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """A server: `shown` for people, without a password; `options` for QdrantClient; whether it is this
    machine."""

    shown: str
    options: dict[str, Any]
    loopback: bool
    encrypted: bool


def address_of(url: str) -> Address:
    """`http://HOST[:6333]`, https:// or without a scheme; grpc://HOST[:6334] and grpcs:// speak gRPC (and
    REST on 6333 for what gRPC lacks). A user and a password before the host go along as HTTP's basic
    authentication.

    Raises:
        UsageError: anything else. The line shows no password.
    """
    text = url.strip(AROUND)
    if not text:
        raise UsageError("`url`", "an empty address", EXPECTED)
    parts = _split(text if "://" in text else f"http://{text}", text)
    host, port = parts.hostname or "", parts.port
    if parts.scheme not in SCHEMES:
        raise UsageError("`url`", f"{parts.scheme}://", f"{EXPECTED}, or https://, grpc://, grpcs://")
    if not host or not re.fullmatch(r"[\w.:-]+", host):
        raise UsageError("`url`", f"no host in {_masked(text)!r}", EXPECTED)
    if parts.query or parts.fragment:
        raise UsageError("`url`", f"{_masked(text)!r} has a ? or a #", EXPECTED)
    speaks_grpc = parts.scheme.startswith("grpc")
    port = port or (GRPC_PORT if speaks_grpc else REST_PORT)
    path = parts.path.rstrip("/")
    bracketed = f"[{host}]" if ":" in host else host
    user = f"{parts.username}:***@" if parts.username else ""
    loopback = LOOPBACK.fullmatch(host) is not None
    encrypted = parts.scheme in ("https", "grpcs")
    options: dict[str, Any] = {"trust_env": False} if loopback else {}  # a proxy can't reach this machine
    if parts.username:
        options["auth"] = (unquote(parts.username), unquote(parts.password or ""))
    if speaks_grpc:
        if path:
            raise UsageError("`url`", f"a path in {_masked(text)!r}", f"{parts.scheme}://HOST:{GRPC_PORT}")
        options |= {"host": bracketed, "port": REST_PORT, "grpc_port": port, "prefer_grpc": True}
        options["https"] = encrypted
    else:
        options["url"] = f"{parts.scheme}://{bracketed}:{port}{path}"
    return Address(f"{parts.scheme}://{user}{bracketed}:{port}{path}", options, loopback, encrypted)


def _split(url: str, text: str) -> SplitResult:
    if re.search(r"[\s,;]", text):
        raise UsageError("`url`", f"{_masked(text)!r} is more than one address", "one")
    try:
        parts = urlsplit(url)
        _ = parts.port  # is read only when it is asked for
        return parts
    except ValueError as e:
        raise UsageError("`url`", f"{_masked(text)!r}: {e}", EXPECTED) from None


def _masked(text: str) -> str:
    return re.sub(r"(//)?[^/\s]*@", r"\1***@", text)


def key_of(api_key: str | None) -> str | None:
    """The key as a header can carry it.

    Raises:
        UsageError: a line break, a space or a letter beyond ASCII inside. The line doesn't show the key.
    """
    key = (api_key or "").strip(AROUND)
    if not key:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError(
            "`api_key`", "a key with a line break, a space or a letter that isn't ASCII inside", "one word"
        )
    return key
