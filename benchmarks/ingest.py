"""Ingestion's images/s end to end over the student's bare forward images/s, and peak memory; both from one
run on one machine.

python benchmarks/ingest.py --student STUDENT_DIR --pictures FOLDER_OR_PARQUET [--limit 1000]
"""

import argparse
import resource
import tempfile
import time

import numpy as np

from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.stores import open_store
from dclip_qdrant.serving.student import Student

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", required=True)
parser.add_argument("--pictures", required=True)
parser.add_argument("--limit", type=int, default=1000)
args = parser.parse_args()

student = Student.load(args.student)
size = student.preprocess.size
pixels = list(np.random.default_rng(0).integers(0, 256, (256, size, size, 3), dtype=np.uint8))
student.embed_pixels(pixels)
began = time.perf_counter()
for _ in range(2):
    student.embed_pixels(pixels)
bare = 512 / (time.perf_counter() - began)
store = open_store("bench", edge=tempfile.mkdtemp())
began = time.perf_counter()
report = ingest(args.pictures, student, store, limit=args.limit)
rate = report.embedded / (time.perf_counter() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(
    f"bare forward {bare:.1f} images/s, ingest {rate:.1f} images/s: ratio "
    f"{rate / bare:.2f}; {report.embedded:,} pictures, peak {peak:.0f} MB"
)
