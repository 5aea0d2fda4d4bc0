"""The Ray jobs on a private cluster of their own, as a user without one runs them; what they refuse before
they start one."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pages import check_serving, commands
from processes import STOP_S, python, run, started, wait_until
from ray_jobs_here import ENV, ROOT, job

pytestmark = pytest.mark.slow


def test_commands_of_the_pages_work_in_order(scenes_folder, tiny_base, tmp_path):
    """What a reader pastes from getting-started and the README, with a small set in the place of theirs."""
    env = {
        **ENV,
        "PICTURES": str(scenes_folder),
        "BASE": str(tiny_base),
        # every stage in seconds, with the demo's detector: options have a variable each
        "DCLIP_DISTILL_RECIPE": "tiny",
        "DCLIP_DISTILL_NO_COMPARE": "1",
        "DCLIP_DISTILL_ALLOW_NO_GAIN": "1",  # a few pictures tell nothing
        "DCLIP_INGEST_DETECTOR_WEIGHTS": str(ROOT / "examples" / "demo" / "detector.pt"),
    }
    done = set()
    for page in (ROOT / "docs" / "getting-started.md", ROOT / "README.md"):
        lines = commands(page)
        named = {line.split()[1] for line in lines}
        assert named >= {"pairs", "distill", "ingest", "search", "tune", "serve"}
        for line in lines:
            if line in done:  # the same as on the other page
                continue
            if line.startswith("dclip-qdrant serve "):
                check_serving(line, env, tmp_path)
            else:
                run(["bash", "-c", line], env=env, cwd=tmp_path, code=0)
            done.add(line)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--pairs", "/no/such", "--base", "x", "--out", "OUT"), 2, "no such file or folder"),
        (
            ("--pairs", "PAIRS", "--base", "/no/such/base", "--out", "OUT", "--recipe", "tiny"),
            2,
            "/no/such/base: no such folder",
        ),
        (
            ("--pairs", "PAIRS", "--base", "BASE", "--out", "OUT", "--recipe", "dclpi"),
            2,
            "did you mean 'dclip'",
        ),
        (
            ("--pairs", "PAIRS", "--base", "BASE", "--out", "OUT", "--set", "train.epoch=1"),
            2,
            "did you mean 'epochs'",
        ),
        (
            ("--pairs", "PAIRS", "--base", "BASE", "--out", "OUT", "--weights", "/no/such.pt"),
            2,
            "no file /no/such.pt",
        ),
        (
            ("--pairs", "PAIRS", "--base", "BASE", "--out", "OUT", "--recipe", "tiny", "--seeds", "1,x"),
            2,
            "numbers with commas",
        ),
    ],
)
def test_mistakes_are_said_before_any_work(
    args, code, says, tiny_base, pairs_folder, tmp_path, monkeypatch, capsys
):
    from dclip_qdrant.cli import front
    from dclip_qdrant.cli.train import distill_command

    monkeypatch.setattr(front, "log_to_stderr", lambda: None)
    places = {"PAIRS": str(pairs_folder), "BASE": str(tiny_base), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        front.run(distill_command, [places.get(a, a) for a in args])
    assert ended.value.code == code
    assert says in capsys.readouterr().err


def test_a_mistake_in_a_script_is_one_line(pairs_folder):
    done = job("evaluate", "--student", "/no/such", "--pairs", pairs_folder)
    assert done.returncode == 1, done.stderr
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_path_in_a_submitted_job_is_refused(monkeypatch, tmp_path):
    from dclip_qdrant.errors import UsageError
    from dclip_qdrant.jobs import cluster

    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with pytest.raises(UsageError, match="uploaded copy.*absolute path"):
        cluster.absolute("runs", "--out")
    assert cluster.absolute("/runs", "--out") == "/runs"
    assert cluster.absolute("s3://b/runs", "--out") == "s3://b/runs"


def test_a_private_cluster_is_its_own_beside_somebody_elses():
    """Ray Train asks whether a run's controller lives of the cluster that a process finds by itself: that of
    `ray start` on the same machine, which knew nothing of it."""
    code = """
import os, ray
from ray._private.services import canonicalize_bootstrap_address
from dclip_qdrant.jobs import cluster
cluster.connect()
found = ray.get(ray.remote(canonicalize_bootstrap_address).remote(None))
own = ray.get_runtime_context().gcs_address
assert found == own, (found, own)
assert not {"RAY_ADDRESS", "RAY_GCS_SERVER_PORT"} & os.environ.keys()
"""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path, for Ray's sockets
        theirs = Path(folder) / "ray" / "ray_current_cluster"  # where `ray start` says which cluster it made
        theirs.parent.mkdir()
        theirs.write_text("192.0.2.1:6379")
        python("-c", code, cwd=ROOT, env={**ENV, "RAY_TMPDIR": folder}, code=0)


def test_a_path_too_long_for_rays_sockets_is_one_line(tmp_path):
    long = tmp_path / ("a" * 80)  # a batch system's TMPDIR is as long
    long.mkdir()
    env = {name: value for name, value in ENV.items() if name != "RAY_TMPDIR"} | {"TMPDIR": str(long)}
    done = python("-c", "from dclip_qdrant.jobs import cluster; cluster.connect()", cwd=ROOT, env=env, code=1)
    line = done.stderr.strip().splitlines()[-1]
    assert f"UsageError: RAY_TMPDIR or TMPDIR: {long}, too long a path for Ray's sockets" in line
    assert line.endswith("-> RAY_TMPDIR=/tmp")


def test_serve_job_answers_as_the_student_does_and_stops_when_asked(student_folder, tmp_path):
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    from dclip_qdrant.serving.student import Student

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "ray_jobs/serve.py",
        "--student",
        str(student_folder),
        "--port",
        str(port),
        "--max-replicas",
        "2",
    ]
    log = (tmp_path / "log").open("w+")
    with started(command, cwd=ROOT, env=ENV, stdout=log, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: " at http" in (tmp_path / "log").read_text(), process, log=tmp_path / "log")
        texts = [f"a red star number {i}" for i in range(40)]
        body = lambda t, model="dclip/tiny": {
            "inputs": [{"data": t, "data_type": "text", "model": model}],
            "inference": "search",
        }
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client,
            ThreadPoolExecutor(20) as pool,
        ):
            answers = list(
                pool.map(lambda t: client.post("/inference", json=body(t)).json()["embeddings"][0], texts)
            )
            assert client.post("/inference", json=body("x", "dclip/other")).status_code == 400
        process.terminate()
        assert process.wait(5 * STOP_S) == 0
    log.close()
    wanted = Student.load(student_folder).embed_texts(texts)
    for got, vector in zip(answers, wanted, strict=True):
        assert got == pytest.approx(vector.tolist(), abs=1e-5)


def test_serve_job_refuses_an_open_door(student_folder):
    done = job("serve", "--student", student_folder, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "--host: 0.0.0.0 can be reached by others" in done.stderr.strip().splitlines()[-1]


def test_a_detector_leaves_the_process_as_it_was(tmp_path):
    """ultralytics swaps Image.open for its own (pictures would then be refused for other reasons) and takes a
    core away from torch."""
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
from dclip_qdrant.pictures import images
try:
    images.open_rgb(b"<svg/>", "x")
except images.ImageError as e:
    assert "not a picture (it looks like text)" in str(e), e
"""
    env = {k: v for k, v in ENV.items() if k != "OMP_NUM_THREADS"}
    python("-c", code, cwd=tmp_path, env=env, code=0)
