"""What a plan adds up, what it refuses, and that it leaves nothing behind."""

import json

import pytest
from processes import python
from ray_jobs_here import ENV, ROOT

from dclip_qdrant.errors import GateError
from dclip_qdrant.jobs.needs import CAPTION_BYTES, PICTURE_BYTES, Shape
from dclip_qdrant.jobs.plan import DRIVER, OBJECTS, Plan, Step

SHAPE = Shape(pictures=1000, captions=5, views=2, regions=4, teacher=512, trunk=1280, text_trunk=0, targets=5)


def test_memory_by_hand():
    # two views of (teacher + trunk + 5 targets), 5 captions, 4 regions of (teacher + trunk), float16
    numbers = 2 * (512 + 1280 + 5 * 512) + 5 * 512 + 4 * (512 + 1280)
    assert SHAPE.numbers() == numbers == 18432
    lists = 1000 * (PICTURE_BYTES + 5 * CAPTION_BYTES)
    assert SHAPE.in_memory() == 1000 * numbers * 2 + lists
    assert SHAPE.in_memory(ranks=4) == 1000 * numbers * 2 + 4 * lists  # vectors once a node, lists in each


def plan(**more):
    steps = [Step("features", 60, memory=2e9, disk=5e9), Step("best", 5400, memory=6e9, disk=1e6)]
    facts = {
        "train": 90_000,
        "total": 100_000,
        "workers": 2,
        "reader": "memory",
        "steps": steps,
        "memory": 16e9,
        "free": 50e9,
        "read": 1e10,
        "network": 3e6,
        "worker": 3e9,
    }
    return Plan(**facts | more)


def test_sums_and_words():
    own = plan()
    assert own.seconds == 5460
    assert own.needs_memory == 6e9 + OBJECTS + DRIVER
    assert own.disk == 5e9 + 1e6
    own.check()
    assert "| best | 1.5 h | 6.0 GB | 1 MB |" in own.text()
    assert "time: 1.5 h" in own.text()
    assert "a worker 3.0 GB, all of train in memory" in own.text()
    assert own.as_dict()["needs_memory"] == own.needs_memory


def test_what_does_not_fit_is_refused():
    with pytest.raises(GateError, match="9.2 GB of memory.*at most 8.0 GB"):
        plan(memory=8e9).check()
    with pytest.raises(GateError, match="5.0 GB of disk.*at most 1.0 GB"):
        plan(free=1e9).check()
    plan(free=None).check()  # a URI: nobody can tell


@pytest.mark.slow
@pytest.mark.long
def test_a_plan_measures_every_stage_and_leaves_nothing(tiny_base, pairs_folder, tmp_path):
    out = tmp_path / "run"
    done = python(
        "ray_jobs/distill.py",
        *("--recipe", "tiny", "--base", tiny_base, "--pairs", pairs_folder, "--out", out),
        *("--plan-pictures", "1000000", "--format", "json"),
        cwd=ROOT,
        env=ENV,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    own = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert own["train"] == 1_000_000
    names = [
        "regions",
        "features",
        "teacher",
        "teacher cache",
        "sft",
        "tiny",
        "export",
        "starts of Ray Train",
    ]
    assert [step["name"] for step in own["steps"]] == names
    assert all(step["seconds"] > 0 for step in own["steps"])
    by_name = {step["name"]: step for step in own["steps"]}
    assert by_name["features"]["disk"] > 1_000_000 * 32 * 4 * 0.5  # a vector of 32 floats and more
    assert by_name["tiny"]["memory"] > 3e8  # torch alone
    assert not list((out / "stages").iterdir())
