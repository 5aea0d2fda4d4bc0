"""Pictures by URL, from a list of captions and addresses (Conceptual Captions' TSV): bounded, polite,
resumable; what fails is listed with its reason.

Nothing fetches by itself: this runs only when it is asked to. The result is a folder that `pairs` reads.
"""

import hashlib
import ipaddress
import json
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import ImageError, UsageError
from dclip_qdrant.pairs.addresses import Address, addresses
from dclip_qdrant.pairs.readers.json_file import loads
from dclip_qdrant.pairs.readers.lines import text_lines
from dclip_qdrant.pictures import http, images
from dclip_qdrant.tables import storage

logger = logging.getLogger(__name__)


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
    """Why a picture was not fetched."""


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
    """Reads `source` (see `addresses`) and writes `out/images/*`, `out/captions.jsonl` and
    `out/rejects.jsonl`.

    A second run takes up where the first was stopped; addresses that failed before are not asked again unless
    their lines are removed from rejects.jsonl. A picture with several captions is fetched once.

    Raises:
        InputError: no such list. UsageError: `out` holds a captions.jsonl that isn't ours.
    """
    manners = manners or Manners()
    folder = storage.local_path(out, "`out`")
    journal = Journal(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    report, hosts, lock = FetchReport(), Hosts(manners.host_seconds), threading.Lock()

    def fetch_one(row: Address) -> None:
        line: dict[str, Any]
        try:
            if row.error is not None:
                raise Refused(row.error)
            url = http.tidy(row.url)
            host = urllib.parse.urlsplit(url).hostname or ""
            line = _store(folder, row, hosts.turn(host, lambda: get(url, manners)))
        except (Refused, http.HttpRefused, ImageError, ValueError) as e:
            line = {"url": row.url, "reason": str(e)}
        with lock:
            journal.add(line)
            report.rejected += "reason" in line
            report.fetched += "reason" not in line
            progress(report.fetched + report.rejected + report.known)

    def add_caption(row: Address) -> None:
        """A further caption of a picture that was asked for before."""
        report.known += 1
        fetched = journal.line_of(row.url)
        if fetched is not None and row.caption not in journal.captions_of(row.url):
            journal.add({**fetched, "captions": [row.caption]})

    rows = islice(addresses(source), manners.limit)
    with ThreadPoolExecutor(manners.threads) as pool:
        while window := list(islice(rows, manners.threads * 16)):
            report.asked += len(window)
            new = {row.url: row for row in reversed(window) if not journal.knows(row.url)}
            list(pool.map(fetch_one, reversed(new.values())))
            for row in window:
                if row is not new.get(row.url):
                    add_caption(row)
    return report


class Journal:
    """What became of every address: `captions.jsonl`, for `pairs` to read, and `rejects.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: folder / name for name in ("captions.jsonl", "rejects.jsonl")}
        self._lines: dict[str, dict[str, Any] | None] = {}  # by address; None: rejected
        self._captions: dict[str, set[str]] = {}
        for name, file in self._files.items():
            if file.exists():
                _drop_cut_line(file)
                for number, text in text_lines(storage.as_path(file)):
                    if text:
                        self._enter(_line_of_ours(f"{file}:{number}", text, name))

    def knows(self, url: str) -> bool:
        return url in self._lines

    def line_of(self, url: str) -> dict[str, Any] | None:
        """A fetched picture's first line."""
        return self._lines[url]

    def captions_of(self, url: str) -> set[str]:
        return self._captions.get(url, set())

    def add(self, line: dict[str, Any]) -> None:
        name = "rejects.jsonl" if "reason" in line else "captions.jsonl"
        with self._files[name].open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._enter(line)

    def _enter(self, line: dict[str, Any]) -> None:
        rejected = "reason" in line
        self._lines.setdefault(line["url"], None if rejected else line)
        if not rejected:
            self._captions.setdefault(line["url"], set()).update(line["captions"])


def _line_of_ours(where: str, text: str, name: str) -> dict[str, Any]:
    """Raises UsageError: a line that no fetch wrote: the file is the user's own."""
    try:
        line = loads(text)
    except ValueError:
        line = None
    wanted = {"url", "reason"} if name == "rejects.jsonl" else {"url", "captions", "file_name"}
    if not isinstance(line, dict) or not wanted <= line.keys():
        expected = "lines of an earlier fetch"
        raise UsageError("`out`", f"{where} is none of ours", expected, "another folder")
    return line


def _drop_cut_line(file: Path) -> None:
    """A run that was killed may have left half of its last line: that address is asked again."""
    with file.open("rb+") as f:
        data = f.read()
        if data and not data.endswith(b"\n"):
            logger.warning("%s: the last line was cut; its address is asked again", file)
            f.truncate(data.rfind(b"\n") + 1)


def _store(folder: Path, row: Address, data: bytes) -> dict[str, Any]:
    """Keeps a picture; its line in captions.jsonl. Raises ImageError."""
    image = images.open_rgb(data, row.url)
    name = f"images/{hashlib.sha256(row.url.encode()).hexdigest()[:24]}{_suffix(data)}"
    storage.write_bytes(folder / name, data)
    size = {"width": image.width, "height": image.height}
    return {"file_name": name, "captions": [row.caption], "url": row.url, **size}


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
    try:
        parts = urllib.parse.urlsplit(http.tidy(url))
    except http.HttpRefused as e:
        raise Refused(str(e)) from None
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
