"""The Ray jobs as a user runs them, on a head of our own or a private cluster (no other file of tests starts Ray: two clusters on one machine get in each other's way): whole, killed and submitted again, and what they refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
ENV = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "YOLO_OFFLINE": "true"}


def job(name, *args, env=ENV, timeout=400):
    return subprocess.run(
        [sys.executable, f"ray_jobs/{name}.py", *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def test_extract_regions_with_yolo_previews_and_resumes(pairs_folder, tmp_path):
    args = (
        "--pairs",
        pairs_folder,
        "--out",
        tmp_path,
        "--weights",
        ROOT / "examples/demo/detector.pt",
        "--set",
        "regions.options.image_size=128",
        "--preview",
        3,
    )
    done = job("extract_regions", *args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["pictures"] == 60
    assert "won't fully utilize" not in done.stderr  # Ray Data, when there are fewer blocks than actors
    # the detector's mAP50 is 0.99 on such scenes, which hold 2 to 4 things
    assert 2 * 60 <= facts["boxes"] <= 5 * 60
    stage = Path(facts["stage"])
    assert len(list((stage / "preview").glob("*.jpg"))) == 3
    # half of it lost: only that half is done again
    parts = sorted(stage.glob("part-*.parquet"))
    (stage / "manifest.json").unlink()
    parts[0].unlink()
    again = job("extract_regions", *args)
    assert re.search(r"\d+ of 60 pictures are there already", again.stdout)
    assert json.loads(again.stdout.splitlines()[-1])["boxes"] == facts["boxes"]


@pytest.mark.parametrize(("name", "args", "code", "says"), [
    ("distill", ("--pairs", "/no/such", "--base", "x", "--out", "/tmp/x"), 2, "no such file or folder"),
    ("distill", ("--pairs", "PAIRS", "--base", "/no/such/base", "--out", "/tmp/x", "--recipe", "tiny"), 2, "/no/such/base: no such folder"),
    ("distill", ("--pairs", "PAIRS", "--base", "BASE", "--out", "/tmp/x", "--recipe", "dclpi"), 2, "did you mean 'dclip'"),
    ("distill", ("--pairs", "PAIRS", "--base", "BASE", "--out", "/tmp/x", "--set", "train.epoch=1"), 2, "did you mean 'epochs'"),
    ("distill", ("--pairs", "PAIRS", "--base", "BASE", "--out", "/tmp/x", "--weights", "/no/such.pt"), 2, "no file /no/such.pt"),
    ("distill", ("--pairs", "PAIRS", "--base", "BASE", "--out", "/tmp/x", "--recipe", "tiny", "--seeds", "1,x"), 2, "numbers with commas"),
    ("evaluate", ("--student", "/no/such", "--pairs", "PAIRS"), 1, "no such folder"),
])  # fmt: skip
def test_mistakes_are_said_before_any_work(name, args, code, says, tiny_base, pairs_folder):
    places = {"PAIRS": str(pairs_folder), "BASE": str(tiny_base)}
    done = job(name, *(places.get(a, a) for a in args))
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_path_in_a_submitted_job_is_refused(monkeypatch, tmp_path):
    from dclip_qdrant import cluster
    from dclip_qdrant.errors import UsageError

    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with pytest.raises(UsageError, match="uploaded copy.*absolute path"):
        cluster.absolute("runs", "--out")
    assert cluster.absolute("/runs", "--out") == "/runs"
    assert cluster.absolute("s3://b/runs", "--out") == "s3://b/runs"


def test_serve_job_answers_as_the_student_does_and_stops_when_asked(student_folder, tmp_path):
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    from dclip_qdrant.student import Student

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "ray_jobs/serve.py", "--student", str(student_folder), "--port", str(port), "--max-replicas", "2"]
    log = (tmp_path / "log").open("w+")
    with subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=subprocess.STDOUT, text=True) as process:
        until = time.monotonic() + 150
        while " at http" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.2)
        texts = [f"a red star number {i}" for i in range(40)]
        body = lambda t, model="dclip/tiny": {"inputs": [{"data": t, "data_type": "text", "model": model}], "inference": "search"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client, ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda t: client.post("/inference", json=body(t)).json()["embeddings"][0], texts))
            assert client.post("/inference", json=body("x", "dclip/other")).status_code == 400
        process.terminate()
        assert process.wait(60) == 0
    log.close()
    wanted = Student.load(student_folder).embed_texts(texts)
    for got, vector in zip(answers, wanted, strict=True):
        assert got == pytest.approx(vector.tolist(), abs=1e-5)


def test_serve_job_refuses_an_open_door(student_folder):
    done = job("serve", "--student", student_folder, "--host", "0.0.0.0", timeout=60)
    assert done.returncode == 2
    assert "--host: 0.0.0.0 can be reached by others" in done.stderr.strip().splitlines()[-1]


def test_a_detector_leaves_the_process_as_it_was(tmp_path):
    """ultralytics swaps Image.open for its own (pictures would then be refused for other reasons) and takes a core away from torch."""
    code = """
import os, torch
from PIL import Image
before, threads = Image.open, max(3, torch.get_num_threads())
torch.set_num_threads(threads)
from dclip_qdrant.detectors.yolo import Yolo
Yolo("yolo11n.yaml", image_size=64)([Image.new("RGB", (64, 64))])
assert Image.open is before
assert torch.get_num_threads() == threads
assert "OMP_NUM_THREADS" not in os.environ
from dclip_qdrant import images
try:
    images.open_rgb(b"<svg/>", "x")
except images.ImageError as e:
    assert "not a picture (it looks like text)" in str(e), e
"""
    env = {k: v for k, v in ENV.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path):
    import torch

    from dclip_qdrant.detectors.yolo import _check_pickle
    from dclip_qdrant.errors import InputError

    class Evil:
        def __reduce__(self):
            return os.system, ("echo pwned",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="would run .*system"):
        _check_pickle(tmp_path / "evil.pt")
    _check_pickle(ROOT / "examples" / "demo" / "detector.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="not a torch checkpoint"):
        _check_pickle(tmp_path / "text.pt")


@pytest.fixture(scope="module")
def on_head(tmp_path_factory):
    """The environment of jobs that join a Ray head of these tests' own, which starts once for all of them.

    What needs it stands below what starts a private cluster: Ray won't say which of two clusters on a machine is meant.
    """
    from ray_head import RayHead

    with RayHead(tmp_path_factory.mktemp("head") / "log", {**ENV, "PYTHONPATH": str(ROOT)}) as head:
        yield {**ENV, "RAY_ADDRESS": head.gcs}


def distill_args(tiny_base, pairs_folder, labelled_folder, out):
    # enough epochs to be caught in the middle of one, a checkpoint after every step
    return ["--recipe", "tiny", "--base", tiny_base, "--pairs", pairs_folder, "--labelled", labelled_folder, "--out", out, "--no-compare", "--min-retention", "0",
            "--set", "train.epochs=40", "--set", "train.batch_size=8", "--set", "train.checkpoint_s=0"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(on_head, tiny_base, pairs_folder, labelled_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    done = job("distill", *distill_args(tiny_base, pairs_folder, labelled_folder, out), env=on_head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done


def with_stages(unbroken, out, *kinds):
    """A folder in which these stages of the unbroken run are done already."""
    for kind in kinds:
        (folder,) = (unbroken[0] / "stages").glob(f"{kind}-????????????")
        shutil.copytree(folder, out / "stages" / folder.name)
    return out


def test_distill_leaves_a_student_a_table_and_the_base(unbroken, student_folder):
    from dclip_qdrant.student import Student

    out, done = unbroken
    table = json.loads((out / "table.json").read_text())
    assert [r["name"] for r in table["rows"]] == ["base", "tiny"]
    assert set(table["rows"][1]["t2i"]) == {"r@1", "r@5", "r@10", "mrr", "map"}
    assert table["rows"][0]["n_images"] == 10
    student, base = Student.load(out / "student"), Student.load(out / "base")
    assert student.fingerprint != base.fingerprint
    assert student.embed_texts(["a red star"]) == pytest.approx(base.embed_texts(["a red star"]), abs=1e-5)  # the text tower was frozen
    assert f"student: {out}/student" in done.stdout
    assert "| base |" in done.stdout


def test_a_second_submission_reuses_everything(unbroken, on_head, tiny_base, pairs_folder, labelled_folder):
    out, _ = unbroken
    before = (out / "student" / "manifest.json").read_bytes()
    done = job("distill", *distill_args(tiny_base, pairs_folder, labelled_folder, out), env=on_head)
    assert done.returncode == 0
    for stage in ("regions: reused", "features: reused", "teacher cache: reused", "student tiny seed 0: reused", "export: reused"):
        assert stage in done.stdout
    assert (out / "student" / "manifest.json").read_bytes() == before


def test_killed_job_and_killed_worker_end_with_the_same_metrics(unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path):
    """SIGKILL the whole job in mid-epoch, submit again, SIGKILL the worker in mid-epoch, let it go on."""
    with_stages(unbroken, tmp_path, "regions", "features", "teacher", "teacher-cache")
    command = [sys.executable, "ray_jobs/distill.py", *map(str, distill_args(tiny_base, pairs_folder, labelled_folder, tmp_path))]
    checkpoints = lambda: sorted(tmp_path.glob("stages/student-*/checkpoints/step-*.pt"), key=lambda p: int(p.stem[5:]))

    def step():
        found = checkpoints()
        return int(found[-1].stem[5:]) if found else 0

    with subprocess.Popen(command, cwd=ROOT, env=on_head, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while step() < 20:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(5)  # the head notices and ends the workers
    at_kill = step()
    assert 20 <= at_kill < 200
    said, killed = "", None
    with subprocess.Popen(command, cwd=ROOT, env=on_head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            said += line
            found = re.search(r"RayTrainWorker pid=(\d+).*student tiny seed 0: resumed at", line)
            if found and killed is None:
                until = time.monotonic() + 100
                while step() < min(at_kill + 20, 190) and time.monotonic() < until:
                    time.sleep(0.02)
                killed = int(found.group(1))
                os.kill(killed, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    assert killed is not None, said[-3000:]
    assert len(re.findall("resumed at epoch", said)) >= 2
    wanted = json.loads((unbroken[0] / "table.json").read_text())["rows"]
    got = json.loads((tmp_path / "table.json").read_text())["rows"]
    for a, b in zip(wanted, got, strict=True):
        for way in ("t2i", "i2t"):
            assert b[way] == pytest.approx(a[way], abs=1e-3)


def test_compare_reuses_what_is_there_and_one_failed_run_does_not_sink_the_rest(unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path):
    out = with_stages(unbroken, tmp_path / "out", "regions", "features", "teacher", "teacher-cache", "student", "base")
    # a recipe that is well-formed and can't be trained: phrases, and a text tower that doesn't learn
    (tmp_path / "broken.toml").write_text('name = "broken"\n[[objectives]]\nname = "cosine"\nof = "spans"\n[train]\nspan_share = 0.5\n')
    (tmp_path / "hubs.toml").write_text((ROOT / "dclip_qdrant/recipes/sft.toml").read_text().replace('"sft"', '"hubs"', 1) + "\n[hubness]\nstrengths = [20.0]\n")
    settings = '["train.epochs=40", "train.batch_size=8", "train.checkpoint_s=0"]'
    (tmp_path / "s.toml").write_text(f'name = "s"\nseeds = [0]\n[[groups]]\ntitle = "One"\nmain = "tiny"\nset = {settings}\nrecipes = ["sft", "{tmp_path}/broken.toml", "{tmp_path}/hubs.toml"]\n')
    done = job("compare", "--suite", tmp_path / "s.toml", "--pairs", pairs_folder, "--base", tiny_base, "--labelled", labelled_folder, "--out", out, "--min-retention", 0, env=on_head)
    assert done.returncode == 3, done.stdout[-3000:] + done.stderr[-3000:]
    for what in ("student tiny seed 0: reused", "base: reused", "student sft seed 0: done", "student broken seed 0: failed"):
        assert what in done.stdout
    assert "submit again: what is done is reused" in done.stderr
    (group,) = json.loads((out / "compare.json").read_text())["groups"]
    assert [r["name"] for r in group["rows"]] == ["base", "tiny", "tiny+wise_ft", "sft", "sft+wise_ft", "hubs", "hubs+wise_ft"]
    assert list(group["failures"]) == ["student broken seed 0"]
    assert "a text tower that learns" in group["failures"]["student broken seed 0"]
    assert {(d["of"], d["than"]) for d in group["differences"]} == {("tiny+wise_ft", "base"), ("tiny+wise_ft", "sft"), ("tiny+wise_ft", "sft+wise_ft"), ("sft+wise_ft", "base"), ("sft+wise_ft", "sft"),
                                                                      ("hubs+wise_ft", "base"), ("hubs+wise_ft", "sft"), ("hubs+wise_ft", "sft+wise_ft")}  # fmt: skip
    report = (out / "results.md").read_text()
    assert "Failed: student broken seed 0" in report
    assert "| tiny+wise_ft |" in report
    weights_say_what_the_run_said(out, "hubs", tiny_base, pairs_folder)


def weights_say_what_the_run_said(out, name, tiny_base, pairs_folder):
    """The run measured a frozen text tower by cached vectors and a map; its weights, from the beginning, must give the same figures."""
    from safetensors.torch import load_file

    from dclip_qdrant import metrics
    from dclip_qdrant.models import two_tower
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.training.evaluate import EvalSet

    (stage,) = (p.parent for p in out.glob("stages/student-*/manifest.json") if json.loads(p.read_text())["metrics"]["name"] == name)
    model, test = two_tower.load(str(tiny_base)), EvalSet(Pairs.open(str(pairs_folder)), "test", None)
    base_text = test.vectors(model, cached_text=False)[1]
    model.load_weights(load_file(stage / "weights.safetensors"))
    assert abs(test.vectors(model, cached_text=False)[1] - base_text).max() > 0.01  # hubness turns text vectors too
    got, said = metrics.retrieval(test.ranks(model), bootstrap=0), json.loads((stage / "manifest.json").read_text())["metrics"]["test"]
    for way in ("t2i", "i2t"):
        assert got[way] == pytest.approx(said[way], abs=1e-6)


def test_two_workers_give_what_one_gives(unbroken, on_head, tiny_base, pairs_folder, labelled_folder, tmp_path):
    with_stages(unbroken, tmp_path, "regions", "features")
    done = job("distill", *distill_args(tiny_base, pairs_folder, labelled_folder, tmp_path), "--workers", 2, env=on_head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wanted = json.loads((unbroken[0] / "table.json").read_text())["rows"][1]
    got = json.loads((tmp_path / "table.json").read_text())["rows"][1]
    for way in ("t2i", "i2t"):
        assert got[way]["mrr"] == pytest.approx(wanted[way]["mrr"], abs=0.02)


def test_adapt_job_ends_with_its_table(on_head, tiny_base, tmp_path):
    import scenes

    scenes.write_labelled(tmp_path / "labelled", 120)
    how = ("--labelled", tmp_path / "labelled", "--teacher", tiny_base, "--student", tiny_base, "--out", tmp_path / "out")
    wrong = job("adapt", *how, "--set", "shot=3", env=on_head)
    assert wrong.returncode == 2
    assert "one of shots" in wrong.stderr
    done = job("adapt", *how, *(f for s in ("shots=2", "teacher_epochs=1", "student_epochs=1", "depth=1") for f in ("--set", s)), env=on_head)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| comkd_clip |" in done.stdout


def test_clip_td_job_ends_with_its_table(on_head, tiny_base, tmp_path):
    import questions

    for subset, count, start in (("train", 40, 0), ("test", 10, 5000)):
        questions.write(tmp_path, count, start=start, subset=subset)
    how = ("--task", "snli_ve", "--train", tmp_path / "snli_ve_train.jsonl", "--test", tmp_path / "snli_ve_test.jsonl", "--images", tmp_path / "images", "--teacher", tiny_base,
           "--out", tmp_path / "out", "--part", "0.5", *(f for s in ("unlabelled=true", "batch_size=8", "adapt_epochs=1", "finetune_epochs=1", "width=32") for f in ("--set", s)))  # fmt: skip
    done = job("clip_td", *how, env=on_head)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "clip_td.json").read_text())
    assert [r["method"] for r in rows] == ["task alone", "naive distillation", "clip_td"]
    assert f"| {rows[2]['examples']} | clip_td | {100 * rows[2]['figures']['snli_ve'][0]:.1f} |" in done.stdout
    refused = job("clip_td", "--task", "vcr", *how[2:], env=on_head)
    assert refused.returncode == 2
    assert "--set unlabelled: true with --task vcr" in refused.stderr


def test_ingest_job_and_cli_agree(on_head, student_folder, scenes_folder, tmp_path):
    from dclip_qdrant.ingest import Embedder, ingest
    from dclip_qdrant.stores import open_store
    from dclip_qdrant.student import Student

    (tmp_path / "src").mkdir()
    for i in range(12):
        (tmp_path / "src" / f"{i}.jpg").write_bytes((scenes_folder / "images" / f"train-{i:05d}.jpg").read_bytes())
    (tmp_path / "src" / "bad.jpg").write_text("text")
    args = (
        tmp_path / "src",
        "--student",
        student_folder,
        "--collection",
        "c",
        "--edge",
        tmp_path / "job",
        "--rejects",
        tmp_path / "r.jsonl",
    )
    done = job("ingest", *args, env=on_head)
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
    assert '{"seen": 13, "embedded": 12, "unchanged": 0, "rejected": 1}' in done.stdout
    assert "looks like text" in (tmp_path / "r.jsonl").read_text()
    again = job("ingest", *args, env=on_head)
    assert '{"seen": 13, "embedded": 0, "unchanged": 12, "rejected": 1}' in again.stdout
    ours, theirs = open_store("c", edge=str(tmp_path / "cli")), open_store("c", edge=str(tmp_path / "job"))
    ingest(str(tmp_path / "src"), Embedder(Student.load(student_folder)), ours)
    snapshot = lambda s: {p.id: (p.payload, p.image.round(4).tolist(), p.regions.round(4).tolist()) for p in s.scroll(with_vectors=True)}
    assert snapshot(ours) == snapshot(theirs)
    ours.close()
    theirs.close()
