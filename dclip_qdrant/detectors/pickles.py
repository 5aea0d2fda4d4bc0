"""What a checkpoint would call, found out without calling it.

YOLO checkpoints are pickles of whole models: reading one runs whatever it names. It is unpickled here with
empty stand-ins in the place of everything it names, and each name is judged: exact pairs of module and name,
classes of layers, and nothing with a dot in it (`torch.serialization` + `os.system` is `os.system`).
"""

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import InputError

_CLASS = re.compile(r"[A-Z]\w*")
# layers and losses: their constructors only build modules
_LAYERS = re.compile(
    r"torch\.nn\.modules(\.\w+)?|torch\.nn\.parameter"
    r"|ultralytics\.nn\.(tasks|modules(\.\w+)?)|ultralytics\.utils\.(loss|tal)"
)
_PAIRS = {
    "builtins": {
        "set",
        "frozenset",
        "slice",
        "dict",
        "list",
        "tuple",
        "object",
        "bytearray",
        "complex",
        "range",
    },
    "collections": {"OrderedDict"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
    "ultralytics.utils": {"IterableSimpleNamespace"},
    "ultralytics.yolo.utils": {"IterableSimpleNamespace"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "numpy": {"dtype", "ndarray"},
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _PAIRS[_module] = {"_reconstruct", "scalar"}
_PAIRS["__builtin__"] = _PAIRS["builtins"]  # Python 2's name, which protocol 2 writes
_TORCH = re.compile(r"\w*Storage|Size|device|dtype|u?int\d+|b?float\d+|double|half|long|short|bool")
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}  # `forward` that was put on an instance
LEGACY_PICKLES = 5  # of a file that isn't a zip: magic number, protocol, system, model, storages


class _StandIn:
    """Takes the place of whatever a pickle names; does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "_StandIn":
        return _StandIn()

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class _Attribute(_StandIn):
    """Takes the place of getattr, and notes what is asked for."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def __call__(self, *arguments: Any, **_: Any) -> _StandIn:
        name = arguments[1] if len(arguments) > 1 else ""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
            self._names.add(f"getattr(…, {name!r})")
        return _StandIn()


class _Reader(pickle.Unpickler):
    """Notes every name, and gives stand-ins."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.strange: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GETATTR:
            return _Attribute(self.strange)
        if not trusted(module, name):
            self.strange.add(f"{module}.{name}")
        return _StandIn  # a class: pickles make instances of what they name

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()

    def get_extension(self, code: int) -> Any:
        self.strange.add(f"extension {code}")
        return _StandIn()


def trusted(module: str, name: str) -> bool:
    """Whether an honest checkpoint of ultralytics uses this name, and calling it is harmless."""
    if "." in name:
        return False
    if name in _PAIRS.get(module, ()):
        return True
    if module == "torch":
        return bool(_TORCH.fullmatch(name))
    if module == "numpy.dtypes":
        return bool(re.fullmatch(r"\w+DType", name))
    return bool(_LAYERS.fullmatch(module) and _CLASS.fullmatch(name))


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that names anything that no YOLO of ultralytics needs; runs nothing of it.

    Raises:
        InputError: such a name; a checkpoint of the YOLOv5 or YOLOv7 repositories, whose code isn't here;
            not a torch checkpoint.
    """
    expected = "a YOLO .pt file of ultralytics (8, 11, ... and yolov5*u.pt)"
    strange: set[str] = set()
    try:
        for data, count in _pickles(path):
            for _ in range(count):
                reader = _Reader(data)
                reader.load()
                strange |= reader.strange
    except Exception as e:  # pickle raises whatever the bytes lead to
        if not strange:
            came = f"not a torch checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:120]})"
            raise InputError(path, came, expected) from e
    if any(name.startswith("models.") for name in strange):
        came = (
            f"a checkpoint of the YOLOv5 or YOLOv7 repository ({sorted(strange)[0]}), whose code isn't here"
        )
        raise InputError(path, came, expected, "take yolov5su.pt and the like, or export your own boxes")
    if strange:
        came = f"a checkpoint that would run {', '.join(sorted(strange)[:3])}"
        raise InputError(path, came, expected, "don't load it, unless you know what made it")


def _pickles(path: Path) -> Iterator[tuple[Any, int]]:
    """Every stream of pickles in a checkpoint, and how many stand in it."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file, LEGACY_PICKLES
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pkl")]
        if any(name.endswith("constants.pkl") for name in names):
            raise ValueError("TorchScript, which is code")
        if not names:
            raise ValueError("a zip without data.pkl")
        for name in names:
            yield io.BytesIO(archive.read(name)), 1
