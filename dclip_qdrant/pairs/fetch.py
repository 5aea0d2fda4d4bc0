"""Pictures by URL, from a list of captions and addresses (Conceptual Captions' TSV): bounded, polite,
resumable; what fails is listed with its reason.

Nothing fetches by itself: this runs only when it is asked to. The result is a folder that `pairs` reads.
"""

import hashlib
import ipaddress
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import ImageError, InputError
from dclip_qdrant.pictures import http, images
from dclip_qdrant.tables import storage


@dataclass(frozen=True)
class Manners:
    """How much is taken, how fast, and who says so."""

    limit: int | None = None  # pictures, in the list's order
    threads: int = 16
    host_seconds: float = 0.2  # between two requests to one host
    timeout: float = 10.0
    max_bytes: int = 20 << 20
    agent: str = "dclip-qdrant (image-caption pairs for training; one request at a time to a host)"
    # addresses of private networks and this machine: a list from elsewhere must not reach them
    private: bool = False


class Refused(Exception):
    pass


@dataclass
class FetchReport:
    """How many addresses were in the list, were fetched now, were known from before, and failed."""

    asked: int = 0
    fetched: int = 0
    known: int = 0
    rejected: int = 0

    def row(self) -> dict[str, int]:
        return asdict(self)


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


def fetch(
    source: str,
    out: str,
    manners: Manners | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> FetchReport:
    """Reads `source` (TSV: caption, URL, as Conceptual Captions has it; or JSONL with `url` and `caption`)
    and writes `out/images/*`, `out/captions.jsonl` and `out/rejects.jsonl`.

    A second run takes up where the first was stopped; addresses that failed before are not asked again unless
    their lines are removed from rejects.jsonl.

    Raises:
        InputError: no such list, or a line of another form.
    """
    manners = manners or Manners()
    folder = storage.local_path(out, "`out`")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    known = _known_urls(folder)
    report, hosts, lock = FetchReport(), Hosts(manners.host_seconds), threading.Lock()

    def fetch_one(row: tuple[str, str]) -> None:
        url, caption = row
        name, line = "captions.jsonl", {}
        try:
            host = urllib.parse.urlsplit(url).hostname or ""
            line = _store(folder, url, caption, hosts.turn(host, lambda: get(url, manners)))
        except (Refused, ImageError, ValueError) as e:
            name, line = "rejects.jsonl", {"url": url, "reason": str(e)}
        with lock:
            with (folder / name).open("a") as f:
                f.write(json.dumps(line) + "\n")
            if name == "captions.jsonl":
                report.fetched += 1
            else:
                report.rejected += 1
            progress(report.fetched + report.rejected)

    def fresh() -> Iterator[tuple[str, str]]:
        for url, caption in islice(rows(source), manners.limit):
            report.asked += 1
            if url in known:
                report.known += 1
                continue
            known.add(url)
            yield url, caption

    waiting = fresh()
    with ThreadPoolExecutor(manners.threads) as pool:
        while window := list(islice(waiting, manners.threads * 16)):
            list(pool.map(fetch_one, window))
    return report


def _known_urls(folder: Path) -> set[str]:
    """What an earlier run asked for already."""
    known: set[str] = set()
    for name in ("captions.jsonl", "rejects.jsonl"):
        if (folder / name).exists():
            known.update(json.loads(line)["url"] for line in (folder / name).read_text().split("\n") if line)
    return known


def _store(folder: Path, url: str, caption: str, data: bytes) -> dict[str, Any]:
    """Keeps a picture; its line in captions.jsonl. Raises ImageError."""
    image = images.open_rgb(data, url)
    name = f"images/{hashlib.sha256(url.encode()).hexdigest()[:24]}{_suffix(data)}"
    storage.write_bytes(folder / name, data)
    size = {"width": image.width, "height": image.height}
    return {"file_name": name, "captions": [caption], "url": url, **size}


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
                raise InputError(
                    f"{source}, line {n}",
                    f"{line[:60]!r}",
                    'caption<TAB>URL, or {"url": ..., "caption": ...}',
                ) from e
            yield url.strip(), caption.strip()


def get(url: str, manners: Manners, *, hops: int = 3) -> bytes:
    """The bytes behind a URL. Raises Refused with the reason."""
    for _ in range(hops):
        check(url, manners)
        try:
            answer = http.get(
                url,
                agent=manners.agent,
                timeout=manners.timeout,
                most_bytes=manners.max_bytes,
                proxies=True,
            )
        except http.HttpRefused as e:
            raise Refused(str(e)) from None
        if answer.location is None:
            return answer.data
        url = urllib.parse.urljoin(url, answer.location)
    raise Refused(f"more than {hops - 1} redirects")


def check(url: str, manners: Manners) -> None:
    """Refuses what isn't http(s), and hosts of private networks: a list made by strangers must not reach
    inside."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise Refused("not an http or https address")
    if manners.private:
        return
    try:
        addresses = {
            info[4][0]
            for info in socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
        }
    except (OSError, UnicodeError):
        raise Refused("no such host") from None
    if not all(ipaddress.ip_address(a).is_global for a in addresses):
        raise Refused("an address of a private network")


def _suffix(data: bytes) -> str:
    kinds = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
    return kinds.get(data[:2], ".jpg")
