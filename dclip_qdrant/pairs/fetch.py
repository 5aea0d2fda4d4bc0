"""Pictures by URL, from a list of captions and addresses (Conceptual Captions' TSV): bounded, polite, resumable; what fails is listed with its reason.

Nothing fetches by itself: this runs only when it is asked to. The result is a folder that `pairs` reads.
"""

import hashlib
import ipaddress
import json
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dclip_qdrant import images
from dclip_qdrant.errors import ImageError, InputError


@dataclass(frozen=True)
class Manners:
    """How much is taken, how fast, and who says so."""

    limit: int | None = None  # pictures, in the list's order
    threads: int = 16
    host_seconds: float = 0.2  # between two requests to one host
    timeout: float = 10.0
    max_bytes: int = 20 << 20
    agent: str = "dclip-qdrant (image-caption pairs for training; one request at a time to a host)"
    private: bool = False  # addresses of private networks and this machine: a list from elsewhere must not reach them


class Refused(Exception):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is followed by us, after its host was looked at, or not at all."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Hosts:
    """One request at a time to a host, `host_seconds` apart."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._guard = seconds, threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._last: dict[str, float] = {}

    def turn(self, host: str, f: Callable[[], Any]) -> Any:
        with self._guard:
            lock = self._locks.setdefault(host, threading.Lock())
        with lock:
            wait = self._last.get(host, 0.0) + self._seconds - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                return f()
            finally:
                self._last[host] = time.monotonic()


def fetch(source: str, out: str, manners: Manners | None = None, *, progress: Callable[[int], None] = lambda n: None) -> dict[str, int]:
    """Reads `source` (TSV: caption, URL, as Conceptual Captions has it; or JSONL with `url` and `caption`) and writes `out/images/*`, `out/captions.jsonl` and
    `out/rejects.jsonl`. A second run takes up where the first was stopped; addresses that failed before are not asked again unless their lines are
    removed from rejects.jsonl.

    Returns {"asked", "fetched", "known", "rejected"}.

    Raises:
        InputError: no such list, or a line of another form.
    """
    manners = manners or Manners()
    folder = Path(out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    known = {json.loads(line)["url"] for name in ("captions.jsonl", "rejects.jsonl") if (folder / name).exists() for line in (folder / name).read_text().splitlines()}
    counts = {"asked": 0, "fetched": 0, "known": 0, "rejected": 0}
    hosts, write = Hosts(manners.host_seconds), threading.Lock()

    def one(row: tuple[str, str]) -> None:
        url, caption = row
        try:
            data = hosts.turn(urllib.parse.urlsplit(url).hostname or "", lambda: get(url, manners))
            image = images.open_rgb(data, url)
            name = f"images/{hashlib.sha256(url.encode()).hexdigest()[:24]}{_suffix(data)}"
            (folder / name).write_bytes(data)
            line, kind = {"file_name": name, "captions": [caption], "url": url, "width": image.width, "height": image.height}, "captions.jsonl"
        except (Refused, ImageError, ValueError) as e:
            line, kind = {"url": url, "reason": str(e)}, "rejects.jsonl"
        with write:
            with (folder / kind).open("a") as f:
                f.write(json.dumps(line) + "\n")
            counts["fetched" if kind == "captions.jsonl" else "rejected"] += 1
            progress(counts["fetched"] + counts["rejected"])

    def fresh() -> Iterator[tuple[str, str]]:
        for url, caption in islice(rows(source), manners.limit):
            counts["asked"] += 1
            if url in known:
                counts["known"] += 1
                continue
            known.add(url)
            yield url, caption

    todo = fresh()
    with ThreadPoolExecutor(manners.threads) as pool:
        while window := list(islice(todo, manners.threads * 16)):
            list(pool.map(one, window))
    return counts


def rows(source: str) -> Iterator[tuple[str, str]]:
    """(url, caption) of each line."""
    path = Path(source)
    if not path.is_file():
        raise InputError(source, "no such file", "a TSV of captions and URLs, or JSONL")
    with path.open(encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                if path.suffix == ".jsonl":
                    row = json.loads(line)
                    url, caption = row["url"], row["caption"]
                else:
                    caption, url = line.rstrip("\n").split("\t")
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{source}, line {n}", f"{line[:60]!r}", 'caption<TAB>URL, or {"url": ..., "caption": ...}') from e
            yield url.strip(), caption.strip()


def get(url: str, manners: Manners, *, hops: int = 3) -> bytes:
    """The bytes behind a URL. Raises Refused with the reason."""
    opener = urllib.request.build_opener(_NoRedirect())
    for _ in range(hops):
        check(url, manners)
        request = urllib.request.Request(url, headers={"User-Agent": manners.agent, "Accept": "image/*"})
        try:
            with opener.open(request, timeout=manners.timeout) as answer:
                data = answer.read(manners.max_bytes + 1)
        except urllib.error.HTTPError as e:
            if e.code in (301, 302, 303, 307, 308) and e.headers.get("Location"):
                url = urllib.parse.urljoin(url, e.headers["Location"])
                continue
            raise Refused(f"answered {e.code}") from None
        except (OSError, ValueError) as e:
            raise Refused(f"can't be reached ({type(e).__name__})") from None
        if len(data) > manners.max_bytes:
            raise Refused(f"more than {manners.max_bytes:,} bytes")
        return data
    raise Refused(f"more than {hops - 1} redirects")


def check(url: str, manners: Manners) -> None:
    """Refuses what isn't http(s), and hosts of private networks: a list made by strangers must not reach inside."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise Refused("not an http or https address")
    if manners.private:
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise Refused("no such host") from None
    if not all(ipaddress.ip_address(a).is_global for a in found):
        raise Refused("an address of a private network")


def _suffix(data: bytes) -> str:
    kinds = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
    return kinds.get(data[:2], ".jpg")
