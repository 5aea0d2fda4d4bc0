"""Ingestion's images/s end to end over the student's bare forward images/s, from one run on one machine; and
what memory it takes over the number of pictures.

    python benchmarks/ingest.py --student STUDENT_DIR --pictures FOLDER_OR_PARQUET [--limit 1000]
    python benchmarks/ingest.py --student STUDENT_DIR --memory 10000 --memory 100000 [--url URL]

The second makes so many pictures of 4 x 4 pixels and ingests them, each size in a process of its own. `own`
is what only this process can give back (RssAnon); `mapped` are files, ours and the engine's, that the
operating system drops when somebody else needs the memory.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.stores import open_store, place
from dclip_qdrant.serving.student import Student

GROUP = 1000  # rows of a Parquet row group
STATUS = {"VmRSS": "all", "RssAnon": "own", "RssFile": "mapped"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True)
    parser.add_argument("--pictures")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--memory", type=int, action="append")
    parser.add_argument("--url")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        memory(args.student, args.memory[0], args.url)
    elif args.memory:
        for count in args.memory:
            command = [sys.executable, __file__, "--one", "--student", args.student, "--memory", str(count)]
            subprocess.run(command + (["--url", args.url] if args.url else []), check=True)
    else:
        speed(args.student, args.pictures, args.limit)


def speed(folder: str, pictures: str, limit: int) -> None:
    student = Student.load(folder)
    before = bare(student)
    store = open_store("bench", edge=tempfile.mkdtemp())
    began = time.perf_counter()
    report = ingest(pictures, student, store, limit=limit)
    rate = report.embedded / (time.perf_counter() - began)
    forward = (before + bare(student)) / 2  # machines are shared: looked at on both sides
    print(
        f"bare forward {forward:.1f} images/s, ingest {rate:.1f} images/s: ratio {rate / forward:.2f}; "
        f"{report.embedded:,} pictures"
    )


def bare(student: Student) -> float:
    """Images/s of the tower alone, in the batches that ingestion has."""
    size = student.preprocess.size
    pixels = list(np.random.default_rng(0).integers(0, 256, (256, size, size, 3), dtype=np.uint8))
    student.embed_pixels(pixels)
    began = time.perf_counter()
    for _ in range(3):
        student.embed_pixels(pixels)
    return 3 * len(pixels) / (time.perf_counter() - began)


def memory(folder: str, count: int, url: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="dclip-bench-") as root:
        write_pictures(Path(root) / "pictures.parquet", count)
        student = Student.load(folder)
        name = f"bench-{count}-{time.time_ns()}"
        store = open_store(name, url=url) if url else open_store(name, edge=f"{root}/edge")
        peak = dict.fromkeys(STATUS.values(), 0)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                for key, value in held().items():
                    peak[key] = max(peak[key], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            began = time.perf_counter()
            report = ingest(f"{root}/pictures.parquet", student, store)
            seconds = time.perf_counter() - began
        finally:
            done.set()
            watcher.join()
            store.close()
        if url:
            place(url=url).drop(name)
    shown = ", ".join(f"{name} {megabytes} MB" for name, megabytes in peak.items())
    print(f"{report.embedded:,} pictures in {seconds:.0f} s; at most {shown}")


def held() -> dict[str, int]:
    """Megabytes that this process holds."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {STATUS[line[0][:-1]]: int(line[1]) // 1024 for line in lines if line[0][:-1] in STATUS}


def write_pictures(file: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    schema = pa.schema({"image_id": pa.string(), "image": pa.binary(), "captions": pa.list_(pa.string())})
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, count, GROUP):
            rows = []
            for number in range(start, min(start + GROUP, count)):
                png = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(png, "PNG")
                caption = f"picture {number} of a dog, a cat or number {number % 97}"
                rows.append({"image_id": f"{number:08d}", "image": png.getvalue(), "captions": [caption]})
            writer.write_table(pa.Table.from_pylist(rows, schema))


if __name__ == "__main__":
    main()
