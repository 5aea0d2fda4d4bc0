"""A collection that never stands still: a writer adds, changes and deletes pictures while `reindex` builds
the next version beside it and is killed (SIGKILL) again and again. Then an exact ledger of what the new
version has: lost, stale and undeleted points.

    python benchmarks/under_fire.py [--pictures 400] [--kills 3] [--url http://localhost:6333 | --edge]

Without --url it runs on the tests' stand-in of a Qdrant server. With --edge it runs on an embedded
collection, which one process can have open: there the writer has its turns between the kills.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest
import qdrant_standin

from dclip_qdrant.pictures import images
from dclip_qdrant.serving.change import promote
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.reindex import reindex
from dclip_qdrant.serving.stores import place
from dclip_qdrant.serving.student import Student

CLI = [sys.executable, "-m", "dclip_qdrant.cli"]
CHANGES = 12  # a round of the writer's


class Shop:
    """A folder of pictures with a table of prices, which changes at random."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.made = folder, random.Random(seed), 0
        self.price: dict[str, int] = {}
        self.count = {"added": 0, "other pixels": 0, "other price": 0, "deleted": 0}

    def draw(self, name: str) -> None:
        values = np.random.default_rng(self.random.getrandbits(32)).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(values).resize((48, 48)).save(self.folder / name)

    def add(self) -> None:
        name = f"{self.made:06d}.png"
        self.made += 1
        self.draw(name)
        self.price[name] = self.random.randrange(1000)

    def change(self) -> None:
        what = self.random.choice(list(self.count))
        name = self.random.choice(list(self.price))
        if what == "added":
            self.add()
        elif what == "other pixels":
            self.draw(name)
        elif what == "other price":
            self.price[name] += 1
        elif len(self.price) > 10:
            del self.price[name]
            (self.folder / name).unlink()
        self.count[what] += 1

    def write(self) -> None:
        rows = [{"file_name": name, "price": price} for name, price in self.price.items()]
        (self.folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    parser.add_argument("--edge", action="store_true")
    args = parser.parse_args()
    standin = None
    if args.edge:
        with tempfile.TemporaryDirectory(prefix="dclip-fire-") as root:
            run_embedded(Path(root), args.pictures, args.kills, args.seed)
        return
    if args.url is None:
        standin = qdrant_standin.Standin("http://127.0.0.1:9/")
        threading.Thread(target=standin.serve_forever, daemon=True).start()
    url = args.url or standin.url
    tag = f"dclip-fire-{time.time_ns()}"
    with tempfile.TemporaryDirectory(prefix="dclip-fire-") as root:
        run(Path(root), url, args.pictures, args.kills, args.seed, tag)
    qdrant_standin.clear(url, tag)
    if standin is not None:
        standin.shutdown()


def run(root: Path, url: str, pictures: int, kills: int, seed: int, tag: str) -> None:
    (root / "shop").mkdir()
    students = [student(root / f"student-{i}", i) for i in range(2)]
    shop = Shop(root / "shop", seed)
    for _ in range(pictures):
        shop.add()
    shop.write()
    here = place(url=url)
    old, name = here.open(tag), f"{tag}-next"
    ingest(shop.folder, students[0], old)
    here.point(f"{tag}-live", old.name)

    stop = threading.Event()

    def write() -> int:
        rounds = 0
        own = place(url=url)
        while not stop.is_set():
            for _ in range(CHANGES):
                shop.change()
            shop.write()
            ingest(shop.folder, students[0], own.open(old.name), replace=True, prune=True)
            rounds += 1
            stop.wait(0.2)
        own.close()
        return rounds

    pool = ThreadPoolExecutor(1)
    writer = pool.submit(write)
    command = [*CLI, "reindex", "--from", old.name, "--to", name, "--student", str(students[1].folder)]
    command += ["--url", url, "--quiet", "--rejects", str(root / "rejects.jsonl")]
    killed = 0
    try:
        while killed < kills and not writer.done():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(shop.random.uniform(2, 8))  # in its start, in the middle, or it is done already
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait(60)
                killed += 1
        time.sleep(2)
    finally:
        stop.set()
        rounds = writer.result(600)
        pool.shutdown()
    _, report = reindex(here, old.name, students[1], to=name)
    promote(here, f"{tag}-live", name, force=True)
    print(f"{rounds} rounds of the writer: " + ", ".join(f"{n} {what}" for what, n in shop.count.items()))
    print(f"reindex killed {killed} times; its last run: {report.line()}")
    print(ledger(shop, students[1], here.open(f"{tag}-live")))
    here.close()


def run_embedded(root: Path, pictures: int, kills: int, seed: int) -> None:
    (root / "shop").mkdir()
    students = [student(root / f"student-{i}", i) for i in range(2)]
    shop, edge = Shop(root / "shop", seed), str(root / "edge")
    for _ in range(pictures):
        shop.add()

    def write(rounds: int) -> None:
        here = place(edge=edge)
        for _ in range(rounds):
            for _ in range(CHANGES):
                shop.change()
            shop.write()
            ingest(shop.folder, students[0], here.open("old"), replace=True, prune=True)
        here.close()

    write(1)
    here = place(edge=edge)
    here.point("live", "old")
    here.close()
    command = [*CLI, "reindex", "--from", "old", "--to", "next", "--student", str(students[1].folder)]
    command += ["--edge", edge, "--quiet", "--rejects", str(root / "rejects.jsonl")]
    killed = 0
    while killed < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(shop.random.uniform(0.4, 1.4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            killed += 1
        write(5)
    here = place(edge=edge)
    _, report = reindex(here, "old", students[1], to="next")
    promote(here, "live", "next", force=True)
    print(", ".join(f"{n} {what}" for what, n in shop.count.items()))
    print(f"reindex killed {killed} times; its last run: {report.line()}")
    print(ledger(shop, students[1], here.open("live")))
    here.close()


def student(folder: Path, seed: int) -> Student:
    folder.mkdir()
    return Student.load(conftest.exported(conftest.write_base(folder, seed), folder))


def ledger(shop: Shop, student: Student, store) -> str:
    """What the promoted collection has, against the shop itself."""
    have = {p.payload["key"]: p for p in store.scroll(with_vectors=True)}
    lost = shop.price.keys() - have.keys()
    undeleted = have.keys() - shop.price.keys()
    stale = 0
    for name in shop.price.keys() & have.keys():
        data = (shop.folder / name).read_bytes()
        vector = student.embed_images([images.open_rgb(data, name)])[0]
        point = have[name]
        fresh = point.payload["content_hash"] == images.content_hash(data)
        fresh &= point.payload["price"] == shop.price[name] and float(point.image @ vector) > 0.9999
        stale += not fresh
    return f"{len(have)} points: {len(lost)} lost, {stale} stale, {len(undeleted)} undeleted"


if __name__ == "__main__":
    main()
