"""The shape of the house: what may import what, and what an import may load.

The rules hold for every file of the package, found by listing; imports inside functions count too.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dclip_qdrant"

# What each folder may import besides itself. `.` are the modules at the top: the few things all rooms share.
MAY_IMPORT = {
    ".": set(),
    "pictures": {"."},
    "tables": {"."},
    "detectors": {".", "pictures"},
    "pairs": {".", "pictures", "tables"},
    "training": {".", "pictures", "tables", "pairs", "detectors"},
    "serving": {".", "pictures", "tables", "pairs", "detectors"},
    "apps": {".", "pictures", "tables", "detectors", "serving"},
    "service": {".", "pictures", "tables", "detectors", "serving"},
    "tasks": {".", "pictures", "tables", "pairs", "detectors", "training"},
    "jobs": {".", "pictures", "tables", "pairs", "detectors", "training", "serving", "tasks", "service"},
    "cli": {".", "pictures", "tables", "pairs", "detectors", "serving", "apps", "service", "jobs"},
}
DATA_FOLDERS = {"recipes", "suites"}  # TOML alone

# Who may import a heavy package, anywhere in a file; every other folder stays without it.
HEAVY = {
    "torch": {"training", "tasks", "jobs", "detectors"},
    "torchvision": {"training", "tasks"},
    "timm": {"training"},
    "open_clip": {"training"},
    "safetensors": {"training", "tasks", "jobs"},
    "ray": {"jobs"},
    "ultralytics": {"detectors"},
    "onnxruntime": {"serving"},
    "qdrant_client": {"serving", "apps"},
    "qdrant_edge": {"serving"},
    "fastembed": {"apps"},
    "starlette": {"service"},
    "uvicorn": {"service"},
    "click": {"cli"},
}
SLOW_TO_LOAD = ("torch", "ray", "open_clip", "ultralytics", "torchvision", "timm")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    assert len(found) > 80
    return found


MODULES = modules()


def folder_of(module: str) -> str:
    """`dclip_qdrant.serving.stores.edge` -> `serving`; a module at the top -> `.`."""
    parts = module.split(".")
    is_folder = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_folder else "."


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports; `from package import name` gives `package.name`."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file: Path) -> set[str]:
    """The modules of the package that a file imports."""
    names = {name for name in imports(file) if name.split(".")[0] == "dclip_qdrant"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def test_every_folder_has_a_rule():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == (set(MAY_IMPORT) - {"."}) | DATA_FOLDERS
    assert not [f for name in DATA_FOLDERS for f in (PACKAGE / name).rglob("*.py")]


def test_arrows_go_down_only():
    wrong = [
        f"{module} -> {target}"
        for module, file in MODULES.items()
        if module != "dclip_qdrant"  # the front door: names that load on first use
        for target in sorted(own_imports(file))
        if folder_of(target) != folder_of(module) and folder_of(target) not in MAY_IMPORT[folder_of(module)]
    ]
    assert not wrong


def test_training_and_serving_never_import_each_other():
    for one, other in (("training", "serving"), ("serving", "training")):
        assert other not in MAY_IMPORT[one]


def test_no_circle():
    arrows = {
        module: own_imports(file) - {module} for module, file in MODULES.items() if module != "dclip_qdrant"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(arrows.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_folders(package):
    users = {
        folder_of(module)
        for module, file in MODULES.items()
        if any(name.split(".")[0] == package for name in imports(file))
    }
    assert users <= HEAVY[package]
    assert users, f"nobody uses {package}: the rule is out of date"


def test_ultralytics_which_is_agpl_is_imported_by_one_file():
    users = [m for m, f in MODULES.items() if any(n.split(".")[0] == "ultralytics" for n in imports(f))]
    assert users == ["dclip_qdrant.detectors.yolo"]


def test_objectives_know_torch_and_what_a_batch_is():
    allowed = {"dclip_qdrant.training.encoded", "dclip_qdrant.training.contrast"}
    allowed |= {"dclip_qdrant.training.token_selection", "dclip_qdrant.errors", "dclip_qdrant.lookup"}
    for module, file in MODULES.items():
        if module.startswith("dclip_qdrant.training.objectives"):
            assert own_imports(file) <= allowed, module


def test_ray_jobs_are_thin():
    """A job's script is a front door: it imports its command and nothing else, and stays a few lines."""
    scripts = sorted((ROOT / "ray_jobs").glob("*.py"))
    assert len(scripts) >= 9
    for script in scripts:
        own = {n for n in imports(script) if n.startswith("dclip_qdrant")}
        assert all(name.startswith("dclip_qdrant.cli") for name in own), script
        assert len(script.read_text().splitlines()) <= 30, script


def loaded(code: str) -> set[str]:
    code += "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_and_help_load_nothing_heavy():
    heavy = {*SLOW_TO_LOAD, "qdrant_client", "onnxruntime"}
    assert not loaded("import dclip_qdrant") & {*heavy, "numpy"}
    code = "from dclip_qdrant.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass"
    assert not loaded(code) & heavy


@pytest.mark.slow
def test_a_whole_search_loads_neither_torch_nor_ray(student_folder, scenes_folder, tmp_path):
    code = f"""
from dclip_qdrant import Student, ingest, open_store, search
student = Student.load({str(student_folder)!r})
store = open_store("c", edge={str(tmp_path)!r})
report = ingest({str(scenes_folder / "images")!r}, student, store)
assert report.embedded == 60, report
assert len(search(store, student, text="a red star")) == 10
store.close()"""
    assert not loaded(code) & set(SLOW_TO_LOAD)


def test_public_names_exist():
    import dclip_qdrant

    assert {
        "Student",
        "register",
        "guard",
        "open_store",
        "search",
        "ingest",
        "Recipe",
        "Pairs",
        "DclipError",
    } <= set(dclip_qdrant.__all__)
    for name in dclip_qdrant.__all__:
        assert getattr(dclip_qdrant, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        dclip_qdrant.nonsense  # noqa: B018


def test_editors_see_the_same_public_names():
    """The names under TYPE_CHECKING, which editors complete, are the ones that load on first use."""
    import dclip_qdrant

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        shown |= {alias.name: node.module for alias in node.names}
    assert shown == {name: f"dclip_qdrant.{module}" for name, module in dclip_qdrant._MODULE_OF.items()}
    assert sorted(dclip_qdrant.__all__) == sorted([*shown, "__version__"])


def test_generated_files_are_up_to_date():
    from dclip_qdrant.cli.generated import generated_files

    made = generated_files()
    assert {p.name for p in (ROOT / "schemas").glob("*.json")} == {
        Path(n).name for n in made if "schemas" in n
    }
    for name, content in made.items():
        assert (ROOT / name).read_text() == content, f"{name}: run make generated"


def test_library_messages_name_no_flags():
    """Parameters stand between backticks; front ends translate them."""
    flag = re.compile(r"(?<![\w-])--[a-z]")
    allowed = {"cli", "service"}  # front ends
    wanted = {"--api-key", "%s runs at %s; to stop it: ray job stop --address %s %s"}  # jobs/submit.py
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value[:80]}"
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] not in allowed
        for node in _strings(ast.parse(file.read_text()))
        if flag.search(node.value) and node.value not in wanted
    ]
    assert not wrong


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """String constants that aren't docstrings."""
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node


def test_files_that_texts_name_are_there():
    """A docstring, a comment or a page that names a file in a folder of ours names one that exists."""
    inside = (f.relative_to(ROOT) for f in ROOT.rglob("*") if f.is_file())
    skip = {".venv", "node_modules"}
    ours = [f.as_posix() for f in inside if f.parts[0] != "demo" and not skip & set(f.parts)]
    folders = {Path(f).parent.name for f in ours} - {"demo"}  # demo/ is what `make demo` writes
    named = re.compile(r"(?<![\w/.*<{-])((?:[\w-]+/)+[\w-]+\.(?:py|toml|md))(?![\w/*-])")
    texts = [f for f in ours if f.endswith((".py", ".toml", ".md")) and f != "CHANGELOG.md"]
    assert len(texts) > 100
    gone = [
        f"{text}: {mention}"
        for text in texts
        for mention in named.findall((ROOT / text).read_text())
        if mention.split("/")[0] in folders
        and "my" not in re.split(r"\W|_", mention)
        and not any(f"/{f}".endswith(f"/{mention}") for f in ours)
    ]
    assert not gone
