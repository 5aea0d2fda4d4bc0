"""Apps that never mention us: a `.pth` file in their environment imports this, and the students listed beside
it are registered when fastembed is imported.

Opt-in (`dclip-qdrant autoregister --enable STUDENT_DIR`), undone by `--disable`, ignored where
DCLIP_AUTOREGISTER=0. Importing this costs an entry in `sys.meta_path`; nothing else happens before the app
itself imports fastembed, and nothing is ever raised into the app.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PTH = "dclip_qdrant_autoregister.pth"
LIST = "dclip_qdrant_students.txt"  # beside it: one folder a line
LINE = (
    "import sys; exec('try:\\n from dclip_qdrant.apps.autoregister import hook\\n "
    "hook()\\nexcept ImportError:\\n pass')\n"
)


def hook() -> None:
    if os.environ.get("DCLIP_AUTOREGISTER", "1") != "0" and not any(
        isinstance(f, Finder) for f in sys.meta_path
    ):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds fastembed as it would have been found, and registers the students once it is loaded."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "fastembed":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register_listed()

            spec.loader.exec_module = exec_module
        return spec


def register_listed() -> None:
    """Registers the folders of the list; what can't be registered is warned of."""
    try:
        folders = students()
        if folders:
            from dclip_qdrant.apps.registration import ENV, register_environment

            os.environ[ENV] = os.pathsep.join(
                dict.fromkeys([*os.environ.get(ENV, "").split(os.pathsep), *folders])
            ).strip(os.pathsep)
            register_environment()
    except Exception as e:
        import warnings

        warnings.warn(f"dclip-qdrant: students were not registered: {e}", RuntimeWarning, stacklevel=2)


def site() -> str:
    """This environment's site-packages."""
    import sysconfig

    return sysconfig.get_paths()["purelib"]


def students() -> list[str]:
    """The folders that are listed, in order."""
    try:
        with open(os.path.join(site(), LIST), encoding="utf-8") as f:
            return [line.strip() for line in f if line.strip()]
    except FileNotFoundError:
        return []


def enabled() -> bool:
    return os.path.exists(os.path.join(site(), PTH))


def enable_student(folder: str) -> str:
    """Lists a student folder; the names that it answers to.

    Raises:
        StudentError: not a student. UsageError: another folder has its name. OSError: site-packages can't be
            written.
    """
    from pathlib import Path

    from dclip_qdrant.errors import UsageError
    from dclip_qdrant.serving.student import Student

    student, path = Student.load(folder), Path(folder).resolve()
    for listed in students():
        taken = Path(listed).is_dir() and Path(listed) != path
        if taken and Student.load(listed, verify=False).name == student.name:
            came, do = (
                f"dclip/{student.name} is {listed} already",
                "`disable` first, or export with another name",
            )
            raise UsageError("`enable`", came, "one student a name", do)
    enable(str(path))
    return f"{student.model_name} (and dclip/{student.name})"


def status() -> list[dict[str, str | None]]:
    """Every listed folder: its student's name, or why it can't be loaded."""
    from dclip_qdrant.errors import DclipError
    from dclip_qdrant.serving.student import Student

    rows: list[dict[str, str | None]] = []
    for folder in students():
        try:
            name = Student.load(folder, verify=False).model_name
            rows.append({"folder": folder, "name": name, "error": None})
        except (DclipError, OSError) as e:
            rows.append({"folder": folder, "name": None, "error": str(e)})
    return rows


def enable(folder: str) -> None:
    """Lists the folder and writes the `.pth`. Raises OSError where site-packages can't be written."""
    known = students()
    if folder not in known:
        _write(LIST, "".join(f"{line}\n" for line in [*known, folder]))
    _write(PTH, LINE)


def disable() -> None:
    """Removes both files."""
    import contextlib

    for name in (PTH, LIST):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(site(), name))


def _write(name: str, text: str) -> None:
    from dclip_qdrant.tables import storage

    storage.write_text(os.path.join(site(), name), text)
