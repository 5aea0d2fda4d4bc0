"""The features stage's pictures/s over the bare frozen forward of the same pixels and texts, and the memory
of its actor over its model's; one process, no Ray.

    python benchmarks/features.py --pairs PAIRS --base MODEL [--pictures 512]
"""

import argparse
import resource
import tempfile
import time

import numpy as np
import psutil
import pyarrow as pa
import torch

from dclip_qdrant.jobs.cluster import READ_COLUMNS
from dclip_qdrant.jobs.features import BATCH, Featurise
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training.models.bottom import FORWARD


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pictures", type=int, default=512)
    args = parser.parse_args()
    table = Pairs.open(args.pairs).table(READ_COLUMNS).slice(0, args.pictures).combine_chunks()
    actor = Featurise(
        base=args.base,
        student=None,
        student_image=False,
        student_text=False,
        recipe=Recipe.load("sft").as_dict(),
        regions=None,
        seed=0,
        pictures=False,
        out=tempfile.mkdtemp(),
        threads=torch.get_num_threads(),
    )
    model, size = actor.base, actor.base.preprocess.size
    resident = psutil.Process().memory_info().rss
    blocks = [pa.table(table.slice(start, BATCH)) for start in range(0, table.num_rows, BATCH)]
    forward = FORWARD[actor.device]
    pixels = torch.randn(forward, 3, size, size)
    captions = [caption for own in table["captions"].to_pylist() for caption in own]
    ids = [model.tokens(captions[start : start + 256]) for start in range(0, len(captions), 256)]
    actor(blocks[0])  # warms up
    began = time.perf_counter()
    for block in blocks:
        actor(block)
    stage = table.num_rows / (time.perf_counter() - began)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(int(np.ceil(table.num_rows / forward))):
            model.encode_image(pixels)
        for some in ids:
            model.encode_text(some)
    plain = table.num_rows / (time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    above = (peak - resident) / 2**20
    print(f"features {stage:.1f}, bare {plain:.1f} pictures/s with captions, ratio {stage / plain:.2f}")
    print(f"memory: {resident / 2**20:.0f} MB with the model, at most {above:.0f} MB above it")


if __name__ == "__main__":
    main()
