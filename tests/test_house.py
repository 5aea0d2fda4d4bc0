"""The shape of the house: what may import what, and what an import may load."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dclip_qdrant"
HEAVY = {"torch", "ray", "open_clip", "ultralytics", "torchvision", "timm"}
# the serving wing and the ground floor, by file; everything else is the training wing or the roof
LIGHT = ["errors.py", "lookup.py", "images.py", "preprocess.py", "regions.py", "spans.py", "recipe.py", "contracts.py", "metrics.py", "labelled.py", "student.py", "collection.py",
         "ingest.py", "search.py", "evaluation.py", "stages.py", "text.py", "progress.py", "preview.py", "front.py", "cli", "pairs", "stores"]  # fmt: skip


def top_imports(file: Path) -> set[str]:
    """Modules imported at the top level of a file (not inside functions)."""
    out = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
    return out


def files(name: str) -> list[Path]:
    path = PACKAGE / name
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found, name
    return found


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name):
    for file in files(name):
        assert not {m.split(".")[0] for m in top_imports(file)} & HEAVY, file


def test_objectives_know_torch_and_encoded_alone():
    for file in files("objectives"):
        ours = {m for m in top_imports(file) if m.startswith("dclip_qdrant")}
        assert ours <= {"dclip_qdrant.contrast", "dclip_qdrant.selection", "dclip_qdrant.encoded", "dclip_qdrant.errors", "dclip_qdrant.lookup"}, file


def test_the_loop_knows_no_ray_and_ray_stays_in_its_files():
    users = {
        f.name
        for f in PACKAGE.rglob("*.py")
        if any(
            line.split()[1].split(".")[0] == "ray"
            for line in f.read_text().splitlines()
            if line.strip().startswith(("import ray", "from ray"))
        )
    }
    assert users == {"suite.py", "cluster.py", "ray_stages.py", "ray_train.py", "ray_ingest.py"}


def test_only_one_file_touches_ultralytics():
    assert [f.name for f in PACKAGE.rglob("*.py") if "from ultralytics" in f.read_text() or "import ultralytics" in f.read_text()] == [
        "yolo.py"
    ]


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_and_help_load_nothing_heavy():
    assert not loaded("import dclip_qdrant") & (HEAVY | {"qdrant_client", "onnxruntime", "numpy"})
    code = "from dclip_qdrant.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass"
    assert not loaded(code) & (HEAVY | {"qdrant_client", "onnxruntime"})


@pytest.mark.slow
def test_a_whole_search_loads_neither_torch_nor_ray(student_folder, scenes_folder, tmp_path):
    code = f"""
from dclip_qdrant.student import Student
from dclip_qdrant.ingest import Embedder, ingest
from dclip_qdrant.search import search
from dclip_qdrant.stores import open_store
s = Student.load({str(student_folder)!r})
store = open_store("c", edge={str(tmp_path)!r})
report = ingest({str(scenes_folder / "images")!r}, Embedder(s), store)
assert report.embedded == 60, report
assert len(search(store, s, text="a red star")) == 10
store.close()"""
    assert not loaded(code) & HEAVY


def test_public_names_exist():
    import dclip_qdrant

    assert sorted(dclip_qdrant.__all__) == [
        "CollectionSpec",
        "DclipError",
        "Pairs",
        "Recipe",
        "Regions",
        "Student",
        "__version__",
        "guard",
        "open_store",
        "register",
    ]
    for name in dclip_qdrant.__all__:
        assert getattr(dclip_qdrant, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        dclip_qdrant.nonsense  # noqa: B018


def test_generated_schemas_are_up_to_date():
    from dclip_qdrant.schemas_json import generated, text

    folder = PACKAGE.parent / "schemas"
    made = generated()
    assert {p.name for p in folder.glob("*.json")} == set(made)
    for name, content in made.items():
        assert (folder / name).read_text() == text(content), f"{name}: run make schemas"


def test_files_that_texts_name_are_there():
    """A docstring, a comment or a page that sends its reader to a file in a folder of ours sends him to one that exists."""
    root = PACKAGE.parent
    inside = (f.relative_to(root) for f in root.rglob("*") if f.is_file())
    ours = [f.as_posix() for f in inside if f.parts[0] != "demo" and not {".venv", "node_modules"} & set(f.parts)]
    folders = {Path(f).parent.name for f in ours} - {"demo"}  # demo/ is what `make demo` writes
    named = re.compile(r"(?<![\w/.*<{-])((?:[\w-]+/)+[\w-]+\.(?:py|toml|md))(?![\w/*-])")
    texts = [f for f in ours if f.endswith((".py", ".toml", ".md")) and f != "CHANGELOG.md"]
    assert len(texts) > 100
    gone = [
        f"{text}: {said}"
        for text in texts
        for said in named.findall((root / text).read_text())
        if said.split("/")[0] in folders and "my" not in re.split(r"\W|_", said) and not any(f"/{f}".endswith(f"/{said}") for f in ours)
    ]
    assert not gone
