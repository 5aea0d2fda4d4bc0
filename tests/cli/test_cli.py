"""The command line as a person meets it: exit codes, one clear line, clean stdout."""

import json
import os
import re
from pathlib import Path

import click
import pytest
from processes import python

ROOT = Path(__file__).resolve().parents[2]


def run(*args, cwd=None, env=None):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DCLIP_", "QDRANT_", "COLLECTION_"))}
    env = {**clean, "PYTHONPATH": str(ROOT), **(env or {})}
    return python("-m", "dclip_qdrant.cli", *args, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def work(student_folder, scenes_folder, tmp_path_factory):
    """A folder with an ingested embedded collection `c`."""
    folder = tmp_path_factory.mktemp("cli")
    done = run(
        "ingest",
        scenes_folder,
        "--student",
        student_folder,
        "--collection",
        "c",
        "--edge",
        folder / "edge",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "collection": "c",
        "seen": 60,
        "embedded": 60,
        "updated": 0,
        "unchanged": 0,
        "rejected": 0,
        "points": 60,
    }
    assert "60 pictures: 60 embedded" in done.stderr
    return folder


@pytest.mark.slow
def test_ingest_again_search_inspect(work, student_folder, scenes_folder):
    again = run(
        "ingest", scenes_folder, "--student", student_folder, "--collection", "c", "--edge", "edge", cwd=work
    )
    assert "60 pictures: 0 embedded, 60 there already" in again.stderr
    where = ("--student", student_folder, "--collection", "c", "--edge", work / "edge")
    rows = json.loads(run("search", "a red star", *where, "-n", "3", "--format", "json").stdout)
    assert len(rows) == 3
    assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    lines = run("search", "a red star", *where, "--format", "jsonl", "--mode", "hybrid").stdout.splitlines()
    assert len([json.loads(line) for line in lines]) == 10
    paths = run(
        "search", "a red star", *where, "--format", "paths", "--filter", "split=test"
    ).stdout.splitlines()
    assert len(paths) == 10
    assert all(Path(p).is_file() and "test-" in p for p in paths)
    by_picture = json.loads(run("search", "--image", paths[0], *where, "-n", "1", "--format", "json").stdout)
    assert by_picture[0]["uri"] == paths[0]
    table = run("search", "a red star", *where).stdout
    assert table.splitlines()[0].startswith("  1  0.")
    facts = json.loads(run("inspect", "c", "--edge", work / "edge", "--format", "json").stdout)
    assert facts["points"] == 60
    assert facts["filled_by"].startswith("dclip/tiny@")
    assert json.loads(run("inspect", student_folder, "--format", "json").stdout)["dim"] == 32
    assert "fingerprint" in run("inspect", student_folder).stdout


@pytest.mark.slow
def test_config_file_is_below_environment_is_below_flags(work, student_folder):
    (work / "dclip.toml").write_text(
        f'student = "{student_folder}"\nedge = "edge"\n[search]\ncollection = "c"\nlimit = 2\n'
    )
    assert len(run("search", "a star", "--format", "paths", cwd=work).stdout.splitlines()) == 2
    assert (
        len(
            run(
                "search", "a star", "--format", "paths", cwd=work, env={"DCLIP_SEARCH_LIMIT": "3"}
            ).stdout.splitlines()
        )
        == 3
    )
    assert (
        len(
            run(
                "search", "a star", "--format", "paths", "-n", "4", cwd=work, env={"DCLIP_SEARCH_LIMIT": "3"}
            ).stdout.splitlines()
        )
        == 4
    )
    (work / "dclip.toml").unlink()


@pytest.mark.slow
def test_rejects_give_exit_code_3_and_the_list(student_folder, scenes_folder, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "good.jpg").write_bytes((scenes_folder / "images" / "test-00000.jpg").read_bytes())
    (tmp_path / "src" / "bad.jpg").write_text("text")
    done = run("ingest", "src", "--student", student_folder, "--collection", "c", cwd=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["embedded"] == 1
    assert (tmp_path / "dclip-edge" / "c" / "collection.json").exists()
    assert "bad.jpg" in (tmp_path / "c-rejects.jsonl").read_text()
    assert done.stderr.splitlines()[-1].startswith("error: src: 1 pictures rejected")


@pytest.mark.slow
def test_evaluate_json(student_folder, pairs_folder, labelled_folder):
    done = run(
        "evaluate",
        "--student",
        student_folder,
        "--pairs",
        pairs_folder,
        "--labelled",
        labelled_folder,
        "--format",
        "json",
        "--bootstrap",
        "20",
    )
    out = json.loads(done.stdout)
    assert {"t2i", "i2t", "mrr", "map", "zero_shot", "retention", "n_images"} <= set(out)
    assert {"r@1", "r@5", "r@10"} <= set(out["t2i"])


def test_pairs(scenes_folder, tmp_path):
    done = run("pairs", scenes_folder, "-o", tmp_path / "pairs")
    assert done.returncode == 0
    assert json.loads(done.stdout)["splits"] == {"train": 40, "val": 10, "test": 10}
    again = run("pairs", scenes_folder, "-o", tmp_path / "pairs")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_curate(pairs_folder, tmp_path):
    done = run("curate", f"{pairs_folder}=10", "-o", tmp_path / "mixed", "--near", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"] == {"train": 10, "val": 10, "test": 10}
    assert "30 over the count" in done.stderr


def test_recipes_list_and_show():
    listed = run("recipes", "list").stdout
    assert listed == run("recipes").stdout
    assert "\nconaclip " in listed
    assert re.search(r"\nclip_refine +CLIP-Refine.*\n +behind sft\+wise_ft: -0.7 \[", listed)
    shown = run("recipes", "show", "clip_refine").stdout
    assert shown.startswith("clip_refine: CLIP-Refine")
    assert "\nPick it: when you have no detector" in shown
    assert 'name = "random_alignment"' in shown
    assert run("recipes", "clip_refine").stdout == shown
    assert run("recipes", "show", "clip_refine", "--toml").stdout.startswith("# CLIP-Refine")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("curate", "/no/such", "-o", "x"), 2, "no such file or folder"),
        (("curate", "a", "b", "--mix", "dclip", "-o", "x"), 2, "three, without counts"),
        (("fetch", "/no/such.tsv", "-o", "x"), 1, "no such file"),
        (("serch",), 2, "did you mean 'search'"),
        (("pairs", "/no/such", "-o", "x"), 2, "no such file or folder"),
        (("search", "x", "--student", "/no/such", "--collection", "c"), 1, "no such folder"),
        (("search", "x", "--student", "/no/such", "--collection", "c", "--filter", "oops"), 2, "--filter"),
        (("search", "--image", "/no/such.jpg", "--student", "s", "--collection", "c"), 1, "can't be read"),
        (("evaluate", "--student", "/no/such", "--pairs", "x"), 1, "no such folder"),
        (("recipes", "dclpi"), 2, "did you mean"),
        (("ingest", "x", "--student", "s"), 2, "--collection"),
        (("--config", "/no/such.toml", "recipes"), 2, "no file"),
    ],
)
def test_mistakes_get_one_clear_line_and_the_right_code(args, code, says, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_missing_detector_weights_and_collection_are_named(work, student_folder, scenes_folder):
    done = run(
        "ingest",
        scenes_folder,
        "--student",
        student_folder,
        "--collection",
        "d",
        "--edge",
        work / "edge",
        "--detector",
        "yolo",
        "--weights",
        "/no/such.pt",
    )
    assert (done.returncode, "no file /no/such.pt" in done.stderr) == (2, True)
    done = run("search", "x", "--student", student_folder, "--collection", "nope", "--edge", work / "edge")
    assert (done.returncode, "expected one of c" in done.stderr) == (1, True)
    done = run(
        "search",
        "x",
        "--student",
        student_folder,
        "--collection",
        "c",
        "--edge",
        work / "edge",
        env={"QDRANT_API_KEY": "s3cret"},
    )
    assert done.returncode == 0
    assert "s3cret" not in run("search", "--help", env={"QDRANT_API_KEY": "s3cret"}).stdout


@pytest.mark.slow
def test_another_student_gives_exit_code_4(work, tiny_base, tmp_path):
    from dclip_qdrant.jobs.export import export
    from dclip_qdrant.training.models.two_tower import load

    model = load(str(tiny_base))
    model.model.visual.proj.data *= 1.01
    other = export(model, tmp_path / "other", name="other", metrics={}, recipe={"name": "x"})
    done = run("search", "x", "--student", other, "--collection", "c", "--edge", work / "edge")
    assert done.returncode == 4
    assert "filled by dclip/tiny@" in done.stderr


def test_an_absent_extra_is_one_line_with_the_pip_command(tmp_path):
    """qdrant-edge and ultralytics made unfindable, as on a base install."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('qdrant_edge', 'ultralytics', 'onnxscript'):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
""")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = (
        "import dclip_qdrant.cli.front as f, dclip_qdrant.serving.stores as s, click; "
        "f.run(click.Command('x', callback=lambda: s.open_store('c', edge='x')))"
    )
    done = python("-c", code, env={**os.environ, **env})
    assert done.returncode == 1
    assert 'pip install "dclip-qdrant[edge]"' in done.stderr
    code = (
        "import dclip_qdrant.cli.front as f, dclip_qdrant.detectors as d, click; "
        "f.run(click.Command('x', callback=lambda: d.build('yolo', {})))"
    )
    done = python("-c", code, env={**os.environ, **env})
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "error: the yolo detector: the package 'ultralytics' is not installed -> pip "
        'install "dclip-qdrant[train]"'
    )


def test_version_shows_the_stack():
    out = run("--version").stdout
    assert out.startswith("dclip-qdrant 0.1.0")
    assert "qdrant-client" in out


@pytest.mark.parametrize(
    ("given", "wanted"), [("first", 1), ("all", None), ("none", 0), ("3", 3), ("0", "!"), ("some", "!")]
)
def test_how_many_captions_are_indexed(given, wanted):
    from dclip_qdrant.cli.ingest import ingest_command

    option = next(p for p in ingest_command.params if p.name == "captions")
    context = click.Context(ingest_command)
    if wanted == "!":
        with pytest.raises(click.BadParameter, match="a number above 0, first, all or none"):
            option.process_value(context, given)
    else:
        assert option.process_value(context, given) == wanted
