"""What a query costs over its parts: text to hits, against the student's text tower and the engine's search
by themselves; p50, asked in turn, so that all of them meet the same machine. And a search from a cold process
against the imports that it can't do without.

    python benchmarks/query.py --student STUDENT_DIR --collection NAME (--edge DIR | --url URL)
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import Query, open_store
from dclip_qdrant.serving.student import Student

THINGS = ("dog", "girl", "car", "boat", "horse", "man in a red shirt", "beach", "child", "street", "mountain")
WAYS = ("running", "in the snow", "from above", "at night", "with a ball", "jumping", "sitting on grass")
COLD = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--edge")
    parser.add_argument("--url")
    parser.add_argument("--queries", type=int, default=300)
    args = parser.parse_args()
    place = {"edge": args.edge} if args.edge else {"url": args.url}

    student, store = Student.load(args.student), open_store(args.collection, **place)
    store.describe()  # opens it
    texts = [f"a {THINGS[i % 10]} {WAYS[i % 7]} {i // 70 or ''}".strip() for i in range(args.queries)]
    vectors = dict(zip(texts, student.embed_texts(texts), strict=True))
    ways: dict[str, Callable[[str], object]] = {
        "forward": lambda text: student.embed_texts([text]),
        "engine": lambda text: store.query(Query(limit=10, vector=vectors[text])),
        "search": lambda text: search(store, student, text=text),
        "diverse": lambda text: search(store, student, text=text, diversity=0.3),
        "hybrid": lambda text: search(store, student, text=text, mode="hybrid"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, text in enumerate(texts):
        for name, ask in ways.items():
            began = time.perf_counter()
            ask(text)
            if number >= 20:
                seconds[name].append(time.perf_counter() - began)
    store.close()
    p50 = {name: float(np.median(values)) * 1000 for name, values in seconds.items()}
    print(", ".join(f"{name} {value:.2f} ms" for name, value in p50.items()))
    print(f"search over forward + engine: {p50['search'] / (p50['forward'] + p50['engine']):.2f}")

    imports = [sys.executable, "-c", "import qdrant_client, onnxruntime"]
    command = [sys.executable, "-m", "dclip_qdrant.cli", "search", "a dog", "--student", args.student]
    command += ["--collection", args.collection, *(f"--{k}={v}" for k, v in place.items())]
    cold = [(timed(imports), timed(command)) for _ in range(COLD)]
    bare, whole = (min(values) for values in zip(*cold, strict=True))
    print(f"cold: search {whole:.2f} s, imports {bare:.2f} s: {whole / bare:.2f}")


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
