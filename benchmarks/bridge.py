"""An upgrade without waiting: recall of a new student on a collection whose old vectors were mapped into its
space, at 0, 25, 50 and 100% of true vectors, beside the old student on its own collection.

The map is learned on pictures of another split, so that 0% is none of those that are measured.

    python benchmarks/bridge.py --old STUDENT_DIR --new STUDENT_DIR --pairs PAIRS [--learn 500]
"""

import argparse
import tempfile
import time

import numpy as np

from dclip_qdrant.pairs import Pairs
from dclip_qdrant.serving.bridge import learn
from dclip_qdrant.serving.collection import CollectionSpec, metadata_of
from dclip_qdrant.serving.evaluation import embed
from dclip_qdrant.serving.golden import Golden, Scores
from dclip_qdrant.serving.items import point_id
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import Point, open_store
from dclip_qdrant.serving.student import Student

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", required=True)
    parser.add_argument("--new", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--learn-split", default="train")
    parser.add_argument("--learn", type=int, action="append", help="pictures that teach the map; repeatable")
    args = parser.parse_args()
    old, new = Student.load(args.old), Student.load(args.new)
    pairs = Pairs.open(args.pairs)
    old_images, _, owner, captions = embed(old, pairs, args.split)
    new_images, _, _, _ = embed(new, pairs, args.split)
    taught_old, _, _, _ = embed(old, pairs, args.learn_split)
    taught_new, _, _, _ = embed(new, pairs, args.learn_split)
    count = len(old_images)
    ids = [point_id(str(number)) for number in range(count)]
    right = [{ids[number]} for number in owner]
    golden = Golden(captions, right, [ids[number] for number in owner])
    order = np.random.default_rng(0).permutation(count)

    def scores(vectors: np.ndarray, student: Student) -> Scores:
        with tempfile.TemporaryDirectory() as folder:
            store = open_store("bench", edge=folder)
            store.create(CollectionSpec.load(), student.dim, metadata_of(student))
            payload = {"student": student.model_name}
            points = [Point(i, v, None, payload) for i, v in zip(ids, vectors, strict=True)]
            for start in range(0, count, 256):
                store.upsert(points[start : start + 256])
            found = Scores.of(
                golden, lambda text: [h.id for h in search(store, student, text=text, limit=10)]
            )
            store.close()
        return found

    def line(name: str, s: Scores) -> None:
        row = s.row()
        print(f"| {name} | {row['r@1'] * 100:.1f} | {row['r@5'] * 100:.1f} | {row['r@10'] * 100:.1f} |")

    print(f"{count:,} pictures, {len(captions):,} captions\n\n| | R@1 | R@5 | R@10 |\n|---|---|---|---|")
    line("the old student on its own vectors", scores(old_images, old))
    for taught in args.learn or [500]:
        began = time.perf_counter()
        bridge = learn(taught_old[:taught], taught_new[:taught])
        mapped = bridge(old_images)
        seconds = time.perf_counter() - began
        print(f"| *map of {taught:,} pictures, cosine {bridge.likeness:.2f}, {seconds:.2f} s* | | | |")
        for part in PARTS:
            true = order[: round(part * count)]
            vectors = mapped.copy()
            vectors[true] = new_images[true]
            line(f"the new student, {100 * len(true) / count:.0f}% embedded", scores(vectors, new))


if __name__ == "__main__":
    main()
