"""Every example runs and finds what the student says; the ready-made deployments name what exists."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import processes
import pytest

from dclip_qdrant.pictures.images import open_rgb, read
from dclip_qdrant.serving.student import Student

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
APPS = EXAMPLES / "apps"
NEEDS = {
    "one_line.py": "fastembed",
    "langchain_app.py": "langchain_qdrant",
    "llama_index_app.py": "llama_index",
    "haystack_app.py": "haystack",
}


@pytest.fixture(scope="module")
def pictures(scenes_folder) -> list[str]:
    return [str(p) for p in sorted((scenes_folder / "images").glob("*.jpg"))[:12]]


@pytest.fixture(scope="module")
def wanted(student_folder, pictures) -> list[tuple[float, str]]:
    """The best picture for the words, and the first picture for itself."""
    s = Student.load(student_folder)
    scores = s.embed_images([open_rgb(read(p), p) for p in pictures]) @ s.embed_texts(["a red square"])[0]
    return [(float(scores.max()), pictures[int(np.argmax(scores))]), (1.0, pictures[0])]


def check(out: str, wanted: list[tuple[float, str]]) -> None:
    lines = [line.split(None, 1) for line in out.strip().splitlines()]
    assert [path for _, path in lines] == [path for _, path in wanted]
    np.testing.assert_allclose(
        [float(score) for score, _ in lines], [score for score, _ in wanted], atol=2e-3
    )


def run(*command: str, **env: str) -> str:
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "DCLIP_STUDENTS": "",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    return processes.run(command, env={**os.environ, **quiet, **env}, code=0).stdout


def test_every_example_is_run_here():
    assert {p.name for p in APPS.glob("*.py")} == {
        *NEEDS,
        "untouched.py",
    }  # untouched: tests/apps/test_registration.py runs the like in an environment of its own
    assert all(len(p.read_text().splitlines()) < 80 for p in APPS.iterdir() if p.suffix in (".py", ".mjs"))


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, student_folder, pictures, wanted):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed (the dev extra brings it)")
    check(run(sys.executable, str(APPS / name), str(student_folder), *pictures), wanted)


def test_untouched_knows_the_model_once_the_environment_does(student_folder, pictures, wanted, tmp_path):
    """The hook itself, without writing into this environment's site-packages: a sitecustomize does what the
    .pth would."""
    pytest.importorskip("fastembed", reason="the fastembed extra is not installed")
    (tmp_path / "sitecustomize.py").write_text(
        "from dclip_qdrant.apps import autoregister\nautoregister.students = lambda: "
        f"[{str(student_folder)!r}]\nautoregister.hook()\n"
    )
    check(
        run(
            sys.executable,
            str(APPS / "untouched.py"),
            "dclip/tiny",
            *pictures,
            PYTHONPATH=f"{tmp_path}{os.pathsep}{EXAMPLES.parent}",
        ),
        wanted,
    )


@pytest.fixture(scope="module")
def standin(student_folder):
    """`dclip-qdrant serve`, and the stand-in of a Qdrant server that asks it."""
    pytest.importorskip("starlette", reason="the serve extra is not installed")
    from qdrant_standin import Standin

    command = [
        sys.executable,
        "-m",
        "dclip_qdrant.cli",
        "serve",
        "--student",
        str(student_folder),
        "--port",
        "0",
    ]
    env = {**os.environ, "DCLIP_SERVE_TOKEN": "a-token-of-some-length"}
    with processes.started(command, stderr=subprocess.PIPE, env=env) as service:
        address = service.stderr.readline().split(" at ")[1].split(",")[0].strip()
        server = Standin(address, "a-token-of-some-length")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()
        server.server_close()


def test_a_python_app_through_the_servers_own_inference(standin, student_folder, pictures, wanted):
    import base64

    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import UnexpectedResponse

    client = QdrantClient(url=standin, cloud_inference=True, check_compatibility=False, timeout=600)
    size = Student.load(student_folder).dim
    client.create_collection(
        "py", vectors_config={"image": models.VectorParams(size=size, distance=models.Distance.COSINE)}
    )
    image = lambda p: models.Image(image=base64.b64encode(Path(p).read_bytes()).decode(), model="dclip/tiny")
    client.upsert(
        "py",
        [
            models.PointStruct(id=i, vector={"image": image(p)}, payload={"path": p})
            for i, p in enumerate(pictures)
        ],
    )
    words = models.Document(text="a red square", model="dclip/tiny")
    found = [
        client.query_points("py", query=q, using="image", limit=1).points[0]
        for q in (words, image(pictures[0]))
    ]
    check("".join(f"{h.score} {h.payload['path']}\n" for h in found), wanted)
    both = client.query_points(
        "py",
        prefetch=[
            models.Prefetch(query=words, using="image", limit=5),
            models.Prefetch(query=image(pictures[0]), using="image", limit=5),
        ],
        query=models.FusionQuery(fusion=models.Fusion.RRF),
        limit=3,
    ).points
    assert len(both) == 3
    with pytest.raises(UnexpectedResponse, match="paths are never opened"):
        client.query_points("py", query=models.Image(image=pictures[0], model="dclip/tiny"), using="image")
    with pytest.raises(UnexpectedResponse, match="no model"):
        client.query_points("py", query=models.Document(text="a", model="dclip/other"), using="image")
    client.close()


def test_javascript_through_the_servers_own_inference(standin, student_folder, pictures, wanted):
    if shutil.which("node") is None or not (APPS / "node_modules").is_dir():
        pytest.skip("no Node.js, or `npm install` was not run in examples/apps")
    check(
        run(
            "node",
            str(APPS / "service.mjs"),
            standin,
            "dclip/tiny",
            *pictures,
            DCLIP_DIM=str(Student.load(student_folder).dim),
        ),
        wanted,
    )


def test_deployments_name_what_exists():
    import yaml
    from click.testing import CliRunner

    from dclip_qdrant.cli import main

    flags = CliRunner().invoke(main, ["serve", "--help"]).output
    compose = yaml.safe_load((EXAMPLES / "deploy" / "compose.yaml").read_text())["services"]
    pods = list(yaml.safe_load_all((EXAMPLES / "deploy" / "kubernetes.yaml").read_text()))
    container = pods[0]["spec"]["template"]["spec"]["containers"][0]
    for command in (" ".join(compose["dclip"]["command"]), " ".join(container["args"])):
        assert "dclip-qdrant serve" in command
        for flag in (w for w in command.split() if w.startswith("--")):
            assert flag in flags
    assert compose["qdrant"]["environment"]["QDRANT__INFERENCE__ADDRESS"] == "http://dclip:7070/inference"
    assert [p["kind"] for p in pods] == ["Deployment", "Service", "ConfigMap"]
    assert pods[2]["data"]["QDRANT__INFERENCE__ADDRESS"] == "http://dclip:7070/inference"
    assert (
        pods[0]["spec"]["selector"]["matchLabels"]
        == pods[0]["spec"]["template"]["metadata"]["labels"]
        == pods[1]["spec"]["selector"]
    )
    assert (
        container["ports"][0]["name"]
        == pods[1]["spec"]["ports"][0]["targetPort"]
        == container["readinessProbe"]["httpGet"]["port"]
    )
    assert "ports" not in compose["dclip"]  # only the server reaches it
