"""Fixtures: a few rendered scenes, a tiny CLIP made on the spot, and a student exported from it once a
session."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

TINY = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "size": 32,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def pytest_report_header() -> str | None:
    """What the live tests run on."""
    url = os.environ.get("QDRANT_URL")
    if not url:
        return None
    from dclip_qdrant.serving.stores.qdrant_connection import Connection

    server = Connection(url, api_key=os.environ.get("QDRANT_API_KEY"))
    try:
        info = server.call(server.client.info)
        return f"Qdrant {info.version} at {server.url}, {len(server.collections())} collections"
    finally:
        server.close()


def write_base(folder: Path, seed: int) -> Path:
    """A random, seeded CLIP in an open_clip folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = open_clip.CLIP(**TINY["model_cfg"])
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    return folder


def exported(base: Path, folder: Path) -> Path:
    from dclip_qdrant.jobs.export import export
    from dclip_qdrant.training.models import two_tower

    return export(
        two_tower.load(str(base)), folder / "tiny", name="tiny", metrics={}, recipe={"name": "tiny"}
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), 0)


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory) -> Path:
    """60 rendered scenes with captions.jsonl."""
    import scenes

    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_team(folder, train=40, val=10, test=10)
    return folder


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory) -> Path:
    import scenes

    folder = tmp_path_factory.mktemp("labelled")
    scenes.write_labelled(folder, 24)
    return folder


@pytest.fixture(scope="session")
def pairs_folder(scenes_folder, tmp_path_factory) -> Path:
    from dclip_qdrant.pairs.build import build

    out = tmp_path_factory.mktemp("made") / "pairs"
    build(str(scenes_folder), str(out))
    return out


def once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of pytest's processes makes and the others read: exports take seconds."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with FileLock(str(shared / f"{name}.lock"), timeout=1200):
        if not (shared / f"{name}.done").exists():
            (shared / name).mkdir()
            make(shared / name)
            (shared / f"{name}.done").touch()
    return shared / name


@pytest.fixture(scope="session")
def student_folder(tiny_base, tmp_path_factory) -> Path:
    return once(tmp_path_factory, "student", lambda folder: exported(tiny_base, folder)) / "tiny"


@pytest.fixture(scope="session")
def other_student(tmp_path_factory) -> Path:
    """Another model under the same name: what a team has after training again."""

    def make(folder: Path) -> None:
        exported(write_base(tmp_path_factory.mktemp("base2"), 1), folder)

    return once(tmp_path_factory, "student2", make) / "tiny"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def on_head(tmp_path_factory):
    """The environment of jobs that join a Ray head of these tests' own, which starts once for all of them."""
    from ray_head import RayHead
    from ray_jobs_here import ENV

    with RayHead(tmp_path_factory.mktemp("head") / "log", {**ENV, "PYTHONPATH": str(ROOT)}) as head:
        yield {**ENV, "RAY_ADDRESS": head.gcs, "DASHBOARD": head.address, "HEAD_PID": str(head.process.pid)}


FIRST = ("test_jobs.py", "test_private_cluster.py", "test_other_jobs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that wait for Ray first: each takes as long as many others, which the next free process
    takes."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def student(student_folder):
    from dclip_qdrant.serving.student import Student

    return Student.load(student_folder)
