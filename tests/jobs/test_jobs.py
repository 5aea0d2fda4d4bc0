"""The Ray jobs on a head of our own: whole, killed and submitted again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from processes import RUN_S, started, wait_until
from ray_jobs_here import ROOT, job
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def distill_args(tiny_base, pairs_folder, labelled_folder, out):
    # enough epochs to be caught in the middle of one, a checkpoint after every step
    return [
        "--recipe",
        "tiny",
        "--base",
        tiny_base,
        "--pairs",
        pairs_folder,
        "--labelled",
        labelled_folder,
        "--out",
        out,
        "--no-compare",
        "--min-retention",
        "0",
        "--allow-no-gain",
        "--set",
        "train.epochs=40",
        "--set",
        "train.batch_size=8",
        "--set",
        "train.checkpoint_s=0",
    ]


@pytest.fixture(scope="module")
def unbroken(on_head, tiny_base, pairs_folder, labelled_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    done = job("distill", *distill_args(tiny_base, pairs_folder, labelled_folder, out), env=on_head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done


def with_stages(unbroken, out, *kinds):
    """A folder in which these stages of the unbroken run, and its exported base, are done already."""
    for kind in kinds:
        (folder,) = (unbroken[0] / "stages").glob(f"{kind}-????????????")
        shutil.copytree(folder, out / "stages" / folder.name)
    shutil.copytree(unbroken[0] / "base", out / "base")
    return out


def is_train_worker(process):
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended meanwhile; a zombie counts as one of these
        return False


def kill_train_workers(on_head):
    """SIGKILL for Ray Train's workers of our own head; how many there were."""
    processes = psutil.Process(int(on_head["HEAD_PID"])).children(recursive=True)
    workers = [process for process in processes if is_train_worker(process)]
    for worker in workers:
        worker.kill()
    return len(workers)


def test_distill_leaves_a_student_a_table_and_the_base(unbroken, student_folder):
    from dclip_qdrant.serving.student import Student

    out, done = unbroken
    table = json.loads((out / "table.json").read_text())
    assert [r["name"] for r in table["rows"]] == ["base", "tiny"]
    assert set(table["rows"][1]["t2i"]) == {"r@1", "r@5", "r@10", "mrr", "map"}
    assert table["rows"][0]["n_images"] == 10
    student, base = Student.load(out / "student"), Student.load(out / "base")
    assert student.fingerprint != base.fingerprint
    # the text tower was frozen
    assert student.embed_texts(["a red star"]) == pytest.approx(base.embed_texts(["a red star"]), abs=1e-5)
    assert f"student: {out}/student" in done.stdout
    assert "| base |" in done.stdout


def test_a_second_submission_reuses_everything(unbroken, on_head, tiny_base, pairs_folder, labelled_folder):
    out, _ = unbroken
    before = (out / "student" / "manifest.json").read_bytes()
    done = job("distill", *distill_args(tiny_base, pairs_folder, labelled_folder, out), env=on_head)
    assert done.returncode == 0
    for stage in (
        "regions: reused",
        "features: reused",
        "teacher cache: reused",
        "student tiny seed 0: reused",
        "export: reused",
    ):
        assert stage in done.stderr
    assert (out / "student" / "manifest.json").read_bytes() == before


def test_killed_job_and_killed_worker_end_with_the_same_metrics(
    unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path
):
    """SIGKILL the whole job in mid-epoch, submit again, SIGKILL the worker in mid-epoch, let it go on."""
    with_stages(unbroken, tmp_path, "regions", "features", "teacher", "teacher-cache")
    command = [
        sys.executable,
        "ray_jobs/distill.py",
        *map(str, distill_args(tiny_base, pairs_folder, labelled_folder, tmp_path)),
    ]
    checkpoints = lambda: sorted(
        tmp_path.glob("stages/student-*/checkpoints/step-*.pt"), key=lambda p: int(p.stem[5:])
    )

    def step():
        found = checkpoints()
        return int(found[-1].stem[5:]) if found else 0

    with started(command, cwd=ROOT, env=on_head) as process:
        wait_until(lambda: step() >= 5, process)
        os.kill(process.pid, signal.SIGKILL)
        kill_train_workers(on_head)
    at_kill = step()
    assert 5 <= at_kill < 190
    log = tmp_path / "log"
    with (
        log.open("w") as sink,
        started(command, cwd=ROOT, env=on_head, stdout=sink, stderr=subprocess.STDOUT) as process,
    ):
        wait_until(lambda: step() >= at_kill + 5, process, log=log)
        assert kill_train_workers(on_head)
        assert process.wait(RUN_S) == 0, log.read_text()[-3000:]
    assert len(re.findall("resumed at epoch", log.read_text())) >= 2
    wanted = json.loads((unbroken[0] / "table.json").read_text())["rows"]
    got = json.loads((tmp_path / "table.json").read_text())["rows"]
    for a, b in zip(wanted, got, strict=True):
        for way in ("t2i", "i2t"):
            assert b[way] == pytest.approx(a[way], abs=1e-3)


@pytest.mark.long
def test_a_streamed_run_whose_worker_was_killed_ends_as_the_unbroken_one(
    unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path
):
    whole, broken = (with_stages(unbroken, tmp_path / name, "regions", "features") for name in ("a", "b"))
    streamed = lambda out: [
        *distill_args(tiny_base, pairs_folder, labelled_folder, out),
        "--reader",
        "stream",
    ]
    done = job("distill", *streamed(whole), env=on_head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = tmp_path / "log"
    steps = lambda: len(list(broken.glob("stages/student-*/checkpoints/step-*.pt")))
    with (
        log.open("w") as sink,
        started(
            [sys.executable, "ray_jobs/distill.py", *map(str, streamed(broken))],
            cwd=ROOT,
            env=on_head,
            stdout=sink,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        wait_until(lambda: steps() > 0, process, log=log)
        assert kill_train_workers(on_head)
        assert process.wait(RUN_S) == 0, log.read_text()[-3000:]
    assert "resumed at epoch" in log.read_text()
    (metrics,) = broken.glob("stages/student-*/metrics.jsonl")
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["epoch"] for row in epochs] == list(range(1, 41))
    assert epochs[-1]["cosine"] > 0
    wanted, got = (json.loads((out / "table.json").read_text())["rows"] for out in (whole, broken))
    assert len(got) == 2
    for way in ("t2i", "i2t"):
        assert got[1][way] == wanted[1][way]


def test_compare_reuses_what_is_there_and_one_failed_run_does_not_sink_the_rest(
    unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path
):
    out = with_stages(
        unbroken, tmp_path / "out", "regions", "features", "teacher", "teacher-cache", "student", "base"
    )
    # a recipe that is well-formed and can't be trained: phrases, and a text tower that doesn't learn
    (tmp_path / "broken.toml").write_text(
        'name = "broken"\n[[objectives]]\nname = "cosine"\nof = "spans"\n[train]\nspan_share = 0.5\n'
    )
    (tmp_path / "hubs.toml").write_text(
        (ROOT / "dclip_qdrant/recipes/sft.toml").read_text().replace('"sft"', '"hubs"', 1)
        + "\n[hubness]\nstrengths = [20.0]\n"
    )
    settings = '["train.epochs=40", "train.batch_size=8", "train.checkpoint_s=0"]'
    (tmp_path / "s.toml").write_text(
        'name = "s"\nseeds = [0]\n[[groups]]\ntitle = "One"\nmain = "tiny"\nset = '
        f'{settings}\nrecipes = ["sft", "{tmp_path}/broken.toml", "{tmp_path}/hubs.toml"]\n'
    )
    done = job(
        "compare",
        "--suite",
        tmp_path / "s.toml",
        "--pairs",
        pairs_folder,
        "--base",
        tiny_base,
        "--labelled",
        labelled_folder,
        "--out",
        out,
        "--min-retention",
        0,
        env=on_head,
    )
    assert done.returncode == 3, done.stdout[-3000:] + done.stderr[-3000:]
    for what in (
        "student tiny seed 0: reused",
        "base: reused",
        "student sft seed 0: done",
        "student broken seed 0: failed",
    ):
        assert what in done.stdout + done.stderr
    assert "run it again: what is done is reused" in done.stderr
    (group,) = json.loads((out / "compare.json").read_text())["groups"]
    assert [r["name"] for r in group["rows"]] == [
        "base",
        "tiny",
        "tiny+wise_ft",
        "sft",
        "sft+wise_ft",
        "hubs",
        "hubs+wise_ft",
    ]
    assert list(group["failures"]) == ["student broken seed 0"]
    assert "a text tower that learns" in group["failures"]["student broken seed 0"]
    assert {(d["of"], d["than"]) for d in group["differences"]} == {
        ("tiny+wise_ft", "base"),
        ("tiny+wise_ft", "sft"),
        ("tiny+wise_ft", "sft+wise_ft"),
        ("sft+wise_ft", "base"),
        ("sft+wise_ft", "sft"),
        ("hubs+wise_ft", "base"),
        ("hubs+wise_ft", "sft"),
        ("hubs+wise_ft", "sft+wise_ft"),
    }
    report = (out / "results.md").read_text()
    assert "Failed: student broken seed 0" in report
    assert "| tiny+wise_ft |" in report
    weights_say_what_the_run_said(out, "hubs", tiny_base, pairs_folder)


def weights_say_what_the_run_said(out, name, tiny_base, pairs_folder):
    """The run measured a frozen text tower by cached vectors and a map; its weights, from the beginning, must
    give the same figures."""

    from dclip_qdrant import metrics
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.training.evaluate import EvalSet
    from dclip_qdrant.training.models import two_tower

    (stage,) = (
        p.parent
        for p in out.glob("stages/student-*/manifest.json")
        if json.loads(p.read_text())["metrics"]["name"] == name
    )
    model, test = two_tower.load(str(tiny_base)), EvalSet(Pairs.open(str(pairs_folder)), "test", None)
    base_text = test.vectors(model, cached_text=False)[1]
    model.load_weights(load_file(stage / "weights.safetensors"))
    # hubness turns text vectors too
    assert abs(test.vectors(model, cached_text=False)[1] - base_text).max() > 0.01
    got, wanted = (
        metrics.retrieval(test.ranks(model), bootstrap=0),
        json.loads((stage / "manifest.json").read_text())["metrics"]["chosen"]["test"],
    )
    for way in ("t2i", "i2t"):
        assert got[way] == pytest.approx(wanted[way], abs=1e-6)


@pytest.mark.long
def test_two_workers_that_stream_learn_what_one_learns_from_memory(
    unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path
):
    """The batches are others; tests/training/test_two_workers.py asserts equal ones, without Ray."""
    with_stages(unbroken, tmp_path, "regions", "features", "teacher", "teacher-cache")
    args = distill_args(tiny_base, pairs_folder, labelled_folder, tmp_path)
    done = job("distill", *args, "--workers", 2, "--reader", "stream", env=on_head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "execution finished" not in done.stderr  # Ray Data's own lines stay away
    (metrics,) = tmp_path.glob("stages/student-*/metrics.jsonl")
    (wanted,) = unbroken[0].glob("stages/student-*/metrics.jsonl")
    last = lambda file: json.loads(file.read_text().splitlines()[-1])
    assert last(metrics)["epoch"] == 40
    assert last(metrics)["cosine"] == pytest.approx(last(wanted)["cosine"], abs=0.01)


def test_a_loss_that_is_no_number_is_one_line_and_is_not_tried_again(
    unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path
):
    with_stages(unbroken, tmp_path, "regions", "features", "teacher", "teacher-cache")
    args = distill_args(tiny_base, pairs_folder, labelled_folder, tmp_path)
    done = job("distill", *args, "--set", "train.lr=1e30", "--set", "train.warmup=0", env=on_head)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "the loss is" in last
    assert "lower the learning rate" in last
    assert "resumed at epoch" not in done.stdout + done.stderr  # once
