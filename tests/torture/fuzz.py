"""Odd rows, damaged pictures and archives, and requests that nobody meant, by the thousand, at random from a
seed: none may end an ingestion or the service with a traceback, hang, keep a healthy picture out, or leave a
collection that doesn't open.

    python tests/torture/fuzz.py [--inputs 10000] [--seed 0]

Exit code 1: a fault, printed with what caused it.
"""

import argparse
import base64
import faulthandler
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import conftest

from dclip_qdrant.errors import DclipError
from dclip_qdrant.service.limits import Limits
from dclip_qdrant.service.run import build_service
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import open_store
from dclip_qdrant.serving.student import Student

HANGS_AFTER = 300.0  # seconds; the slowest input takes one on a quiet machine
ROWS, DAMAGED = 25, 50  # inputs of one source
WORDS = (
    "a red square",
    "zwei Hunde",
    "東京の夜",
    "",
    " ",
    "x" * 3000,
    "\u2028",
    "\x00",
    "\ud83d",
    "=1+1",
    '"',
)
NAMES = (
    "good-0.png",
    "gone.png",
    "../up.png",
    "/etc/passwd",
    ".",
    "http://",
    "a\nb.png",
    "NaN",
    "s3://x/y.png",
)

FORMS = (
    *(("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")),
    *(("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("BMP", "RGB"), ("ICO", "RGBA"), ("PPM", "RGB")),
    *(("TGA", "RGB"), ("JPEG2000", "RGB")),
)


class Torture:
    """A student, its folder of work, and the faults that were found."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.random = root, seed, random.Random(seed)
        (root / "base").mkdir()
        self.folder = conftest.exported(conftest.write_base(root / "base", 0), root / "base")
        self.student = Student.load(self.folder)
        self.inputs: dict[str, int] = {}
        self.faults: list[str] = []
        self.made = 0

    def fresh(self) -> Path:
        """A folder with two healthy pictures."""
        self.made += 1
        folder = self.root / f"source-{self.made}"
        folder.mkdir()
        for number in range(2):
            (folder / f"good-{number}.png").write_bytes(picture("PNG", number))
        return folder

    def count(self, kind: str, inputs: int) -> None:
        self.inputs[kind] = self.inputs.get(kind, 0) + inputs
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)

    def fault(self, kind: str, cause: str, error: BaseException | str) -> None:
        shown = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        print(f"FAULT in {kind}: {shown[:600]}\n  of {cause[:1500]}", flush=True)
        self.faults.append(kind)

    def ingested(self, kind: str, source: Path, cause: str, *, healthy: tuple[str, ...] = ()) -> None:
        """Ingests the source into a collection of its own and looks at it after opening it again."""
        edge = self.root / "edge"
        shutil.rmtree(edge, ignore_errors=True)
        try:
            store = open_store("c", edge=str(edge))
            try:
                report = ingest(source, self.student, store)
            finally:
                store.close()
            outcomes = report.embedded + report.unchanged + report.updated + report.rejected
            if report.seen != outcomes:
                self.fault(kind, cause, f"{report.seen} pictures seen, {outcomes} accounted for")
            again = open_store("c", edge=str(edge))
            payloads = [point.payload for point in again.scroll()]
            keys = {payload["key"] for payload in payloads}
            if keys:
                words = any(payload["caption"] for payload in payloads)  # without any, hybrid is refused
                search(again, self.student, text="a red square", mode="hybrid" if words else "dense", limit=3)
            again.close()
            if set(healthy) - keys:
                self.fault(kind, cause, f"healthy pictures are missing: {set(healthy) - keys}")
        except DclipError as e:
            if healthy:
                self.fault(kind, cause, e)
        except Exception as e:
            self.fault(kind, cause, e)


def picture(form: str, seed: int, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (24, 24), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).convert(mode)
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    options: dict[str, Any] = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    if form == "GIF":
        options = {"save_all": True, "append_images": [image.rotate(90)]}
    image.save(out, form, **options)
    return out.getvalue()


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to eight of them changed, a piece cut out, doubled, or the end cut off."""
    out = bytearray(data)
    kind = chance.randrange(5)
    at = chance.randrange(len(out))
    piece = chance.randrange(1, max(2, len(out) // 4))
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            out[chance.randrange(min(len(out), 200) if chance.random() < 0.5 else len(out))] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
    elif kind == 1:
        del out[at : at + piece]
    elif kind == 2:
        out[at:at] = out[at : at + piece]
    elif kind == 3:
        del out[at:]
    else:
        out[at : at + piece] = chance.randbytes(piece)
    return bytes(out)


# --- rows

text = st.one_of(st.sampled_from(WORDS), st.text(max_size=40))
leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    text,
    st.sampled_from([2**63, -(2**70), 1e308, 10**400, "9999-12-31T23:59:59", "0000-00-00"]),
)
value = st.recursive(
    leaf,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=12,
)
names = st.one_of(st.sampled_from(NAMES), value)
captions = st.sampled_from(["caption", "captions", "text", "TEXT", "sentences"])
row = st.one_of(
    value,
    st.builds(
        lambda name, key, caption, extra: {"file_name": name, key: caption} | extra,
        names,
        captions,
        value,
        st.dictionaries(
            st.sampled_from(["key", "split", "uri", "labels", "boxes", "price", "a.b", "", "caption"]),
            value,
            max_size=3,
        ),
    ),
)


def as_line(thing: Any) -> bytes:
    return json.dumps(thing, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"\n", b" ")


line = st.one_of(
    row.map(as_line), row.map(as_line), st.binary(max_size=60).map(lambda b: b.replace(b"\n", b""))
)


def rows(torture: Torture, count: int) -> None:
    good = [json.dumps({"file_name": f"good-{i}.png", "caption": "a red square"}).encode() for i in range(2)]

    def jsonl(lines: list[bytes]) -> None:
        torture.count("rows", len(lines))
        folder = torture.fresh()
        (folder / "captions.jsonl").write_bytes(b"\n".join([good[0], *lines, good[1]]) + b"\n")
        torture.ingested("JSONL", folder, repr(lines), healthy=("good-0.png", "good-1.png"))
        shutil.rmtree(folder)

    def table(lines: list[bytes]) -> None:
        torture.count("rows", len(lines))
        folder = torture.fresh()
        cells = [b",".join(part[:30] for part in (b"good-0.png", line)) for line in lines]
        (folder / "captions.csv").write_bytes(b"file_name,caption,price\n" + b"\n".join(cells) + b"\n")
        torture.ingested("CSV", folder, repr(cells))
        shutil.rmtree(folder)

    for way, share in ((jsonl, 4), (table, 1)):
        examples(way, st.lists(line, min_size=ROWS, max_size=ROWS), count * share // 5 // ROWS, torture.seed)


def examples(way: Callable[[Any], None], strategy: Any, count: int, seed: int) -> None:
    """Calls `way` with so many things that the strategy draws from the seed."""
    checks = list(HealthCheck)
    options: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": checks}
    hypothesis.seed(seed)(settings(max_examples=max(1, count), **options)(given(strategy)(way)))()


# --- files


def pictures(torture: Torture, count: int) -> None:
    healthy = [picture(form, seed, mode) for seed, (form, mode) in enumerate(FORMS)]
    endings = ("png", "jpg", "webp", "gif", "tif", "bmp")
    for _ in range(count // DAMAGED):
        torture.count("pictures", DAMAGED)
        folder = torture.fresh()
        for number in range(DAMAGED):
            data = damaged(torture.random.choice(healthy), torture.random)
            (folder / f"odd-{number}.{torture.random.choice(endings)}").write_bytes(data)
        kept = torture.faults.copy()
        torture.ingested("pictures", folder, str(folder), healthy=("good-0.png", "good-1.png"))
        if kept == torture.faults:
            shutil.rmtree(folder)


def archives(torture: Torture, count: int) -> None:
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for number in range(4):
            for ending, data in (("png", picture("PNG", number)), ("txt", b"a red square")):
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    columns = {"image": [picture("PNG", n) for n in range(4)], "caption": ["a red square"] * 4}
    pq.write_table(pa.table(columns), table)
    for number in range(count):
        torture.count("archives", 1)
        folder = torture.root / f"archive-{number}"
        folder.mkdir()
        name, data = torture.random.choice((("a.tar", tar.getvalue()), ("a.parquet", table.getvalue())))
        (folder / name).write_bytes(damaged(data, torture.random))
        kept = torture.faults.copy()
        torture.ingested("archives", folder, str(folder / name))
        if kept == torture.faults:
            shutil.rmtree(folder)


# --- requests


def requests(torture: Torture, count: int) -> None:
    edge = torture.root / "served"
    folder = torture.fresh()
    store = open_store("c", edge=str(edge))
    ingest(folder, torture.student, store)
    store.close()
    image = base64.b64encode(picture("PNG", 0)).decode()
    one = {"data": "a red square", "data_type": "text", "model": "dclip/tiny", "options": None}
    valid: list[tuple[str, dict[str, Any]]] = [
        ("/inference", {"inputs": [one, one | {"data": image, "data_type": "image"}], "inference": "search"}),
        ("/v1/embeddings", {"model": "dclip/tiny", "input": ["a", "b"], "encoding_format": "float"}),
        (
            "/api/search",
            {"collection": "c", "text": "a", "mode": "dense", "filters": ["width>=1"], "limit": 3},
        ),
        ("/api/search", {"collection": "c", "image": image, "mode": "regions", "filters": [], "limit": 3}),
    ]
    filters = st.builds(
        lambda key, op, rest: [key + op + rest],
        st.sampled_from(["width", "labels", "caption", "key", "a.b", "a[]", ""]),
        st.sampled_from(["=", "!=", ">=", "<", "~"]),
        text,
    )
    part = st.one_of(value, filters, st.binary(max_size=40).map(lambda b: base64.b64encode(b).decode()))
    limits = Limits(body_bytes=2 << 20, picture_bytes=1 << 20, picture_pixels=1_000_000)
    service = build_service([str(torture.folder)], edge=str(edge), limits=limits)
    with TestClient(service.app, base_url="http://localhost") as client:

        def ask(drawn: tuple[tuple[str, dict[str, Any]], list[tuple[int, Any]], bool]) -> None:
            (path, body), changes, whole = drawn
            torture.count("requests", 1)
            body = json.loads(json.dumps(body))
            for place, new in changes:
                key = list(body)[place % len(body)]
                if key == "inputs" and isinstance(body[key], list) and isinstance(body[key][0], dict):
                    body[key][0][list(one)[place % 4]] = new
                else:
                    body[key] = new
            data = as_line(changes[0][1] if whole else body)
            try:
                answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
                if answer.status_code >= 500:
                    torture.fault("requests", f"{path} {data!r}", f"{answer.status_code} {answer.text[:300]}")
                answer.json()
            except Exception as e:
                torture.fault("requests", f"{path} {data!r}", e)

        changes = st.lists(st.tuples(st.integers(0, 7), part), min_size=1, max_size=2)
        drawn = st.tuples(st.sampled_from(valid), changes, st.sampled_from([False] * 9 + [True]))
        examples(ask, drawn, count, torture.seed)
        if client.get("/healthz").status_code != 200:
            torture.fault("requests", "all of them", "the service is no longer there")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("error")  # what Python would print between our lines is a fault as well
    root = Path(tempfile.mkdtemp(prefix="dclip-fuzz-"))
    torture = Torture(root, args.seed)
    for way, share in ((rows, 0.35), (pictures, 0.35), (archives, 0.05), (requests, 0.25)):
        way(torture, round(args.inputs * share))
    faulthandler.cancel_dump_traceback_later()
    counts = ", ".join(f"{count:,} {kind}" for kind, count in torture.inputs.items())
    print(f"{counts}: {len(torture.faults)} faults")
    if torture.faults:
        print(f"what caused them lies in {root}")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
