"""Memory of a Ray Train worker over the number of pairs, by reader: synthetic pairs and cached features of a
light random model, one epoch of its projections.

    python benchmarks/memory.py [--pictures 100000 --pictures 1000000] [--reader stream] [--workers 1]

Prints a line for each size: the most that a worker held by itself (USS) and with what it shares (RSS), and
pictures/s of the epoch. Takes 7 GB of disk for a million pictures under TMPDIR, which it removes again.
"""

import argparse
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from upath import UPath

from dclip_qdrant.jobs import cluster, train_runs
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables.contracts import FEATURES, PAIRS
from dclip_qdrant.tables.storage import write_json
from dclip_qdrant.training.run import Run

PART, GROUP = 10_240, 512  # rows, as stages write them
HELD_OUT = 512  # pictures of val and of test each
CAPTIONS = 2
WIDTH, TRUNK = 64, 1280  # of the embedding, and of a MobileNet's trunk
MODEL = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_050",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": 64},
}


def write_model(folder: Path) -> str:
    import open_clip
    import torch

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(MODEL))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, folder / "open_clip_model.safetensors")
    return str(folder)


def split_of(i: int, pictures: int) -> str:
    return "train" if i < pictures else "val" if i < pictures + HELD_OUT else "test"


def vectors(rng: np.random.Generator, rows: int, width: int) -> pa.ListArray:
    flat = rng.standard_normal((rows, width), dtype=np.float32)
    return pa.ListArray.from_arrays(np.arange(0, rows * width + 1, width, dtype=np.int32), flat.reshape(-1))


def write_pairs(folder: Path, pictures: int) -> str:
    folder.mkdir()
    total = pictures + 2 * HELD_OUT
    for start in range(0, total, PART):
        rows = [
            {
                "key": f"shard-{i // 10_000:05d}/{i:09d}.jpg",
                "uri": f"/data/pictures/shard-{i // 10_000:05d}/{i:09d}.jpg",
                "image": None,
                "width": 640,
                "height": 480,
                "captions": [f"picture {i} shows thing number {i % 977} ({c})" for c in range(CAPTIONS)],
                "split": split_of(i, pictures),
                "pixel_hash": f"{i:064x}",
            }
            for i in range(start, min(start + PART, total))
        ]
        pq.write_table(PAIRS.table(rows), folder / f"pairs-{start // PART:05d}.parquet")
    splits = {"train": pictures, "val": HELD_OUT, "test": HELD_OUT}
    write_json(
        UPath(folder) / "manifest.json",
        {"fingerprint": f"synthetic-{pictures}", "splits": splits, "captions": total * CAPTIONS},
    )
    return str(folder)


def write_features(folder: Path, pictures: int) -> str:
    folder.mkdir(parents=True)
    rng, total = np.random.default_rng(0), pictures + 2 * HELD_OUT
    for start in range(0, total, PART):
        rows = range(start, min(start + PART, total))
        n = len(rows)
        no_lists = pa.array([[]] * n, pa.list_(pa.list_(pa.float32())))
        per_caption = np.arange(0, n * CAPTIONS + 1, CAPTIONS, dtype=np.int32)
        columns = {
            "key": [f"shard-{i // 10_000:05d}/{i:09d}.jpg" for i in rows],
            "view": pa.array(np.zeros(n), pa.int16()),
            "crop": pa.array([[0.0, 0.0, 1.0, 1.0]] * n, pa.list_(pa.float32())),
            "flip": [False] * n,
            "trunk": vectors(rng, n, TRUNK),
            "split": [split_of(i, pictures) for i in rows],
            "captions": [[f"picture {i} ({c})" for c in range(CAPTIONS)] for i in rows],
            "uri": [f"/data/pictures/{i:09d}.jpg" for i in rows],
            "picture": pa.nulls(n, pa.binary()),
            "image": vectors(rng, n, WIDTH),
            "regions": no_lists,
            "region_boxes": no_lists,
            "region_trunk": no_lists,
            "texts": pa.ListArray.from_arrays(per_caption, vectors(rng, n * CAPTIONS, WIDTH)),
            "text_trunk": no_lists,
        }
        table = pa.table(columns, schema=FEATURES.schema)
        path = folder / f"part-{start // PART:05d}.parquet"
        pq.write_table(table, path, row_group_size=GROUP, compression="zstd", compression_level=1)
    return str(folder)


class Watch(threading.Thread):
    """Samples the memory of this process's Ray Train workers until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.uss, self.rss, self._stop_now = 0, 0, threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                if "RayTrainWorker" not in " ".join(process.info["cmdline"] or []):
                    continue
                try:
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                self.uss, self.rss = max(self.uss, memory.uss), max(self.rss, memory.rss)

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def measure(root: Path, model: str, pictures: int, reader: str, workers: int, batch: int) -> str:
    folder = root / str(pictures)
    if not folder.exists():
        folder.mkdir()
        write_pairs(folder / "pairs", pictures)
        write_features(folder / "features", pictures)
    settings = ["student.text=frozen", "train.epochs=1", f"train.batch_size={batch}", "train.captions=2"]
    recipe = Recipe.load("projections", settings).as_dict()
    run = Run(
        kind="student",
        root=str(folder / f"stages-{reader}-{workers}"),
        inputs={"reader": reader},
        recipe=recipe,
        seed=0,
        base=model,
        student=model,
        pairs=str(folder / "pairs"),
        features=str(folder / "features"),
        streams=reader == "stream",
    )
    watch = Watch()
    watch.start()
    try:
        train_runs.run_in_order([run], workers=workers, storage=str(folder / f"ray-{reader}-{workers}"))
    finally:
        watch.stop()
    (epoch,) = run.stage.manifest()["metrics"]["history"]
    return (
        f"{pictures:>9,} pictures, {reader:<6}, {workers} workers: a worker's own {watch.uss / 1e6:,.0f} MB, "
        f"with what it shares {watch.rss / 1e6:,.0f} MB, {pictures / epoch['seconds']:,.0f} pictures/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, action="append")
    parser.add_argument("--reader", action="append", choices=["memory", "stream"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dclip-memory-") as root:
        model = write_model(Path(root) / "model")
        cluster.connect()
        for reader in args.reader or ["stream", "memory"]:
            for pictures in args.pictures or [100_000, 1_000_000]:
                line = measure(Path(root), model, pictures, reader, args.workers, args.batch)
                print(line, flush=True)


if __name__ == "__main__":
    main()
