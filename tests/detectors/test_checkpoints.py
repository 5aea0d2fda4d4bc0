"""Checkpoints of detectors are pickles: what they would call is known before anything runs."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

from dclip_qdrant.detectors.pickles import check_checkpoint, trusted
from dclip_qdrant.errors import InputError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def named(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name(*arguments), by hand: pickle itself would look the name up."""
    short = lambda text: b"\x8c" + struct.pack("<B", len(text)) + text.encode()
    return (
        b"\x80\x04" + short(module) + short(name) + b"\x93(" + b"".join(short(a) for a in arguments) + b"tR."
    )


def checkpoint(folder: Path, data: bytes, member: str = "archive/data.pkl") -> Path:
    path = folder / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch.serialization", "os.system"),  # a dot in the name walks to another module
        ("torch.nn.modules.conv", "os.system"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("numpy", "load"),
        ("builtins", "eval"),
        ("ultralytics.utils.checks", "check_requirements"),
        ("ultralytics.nn.autobackend", "AutoBackend"),  # reads another file
        ("torch.utils.cpp_extension", "load"),
    ],
)
def test_a_checkpoint_that_would_run_something_is_refused(tmp_path, module, name):
    with pytest.raises(InputError, match=f"would run {module}.{name}"):
        check_checkpoint(checkpoint(tmp_path, named(module, name, "echo pwned")))


def test_getattr_reaches_no_globals(tmp_path):
    ok = named("builtins", "getattr", "a layer", "forward_split")
    check_checkpoint(checkpoint(tmp_path, ok))
    with pytest.raises(InputError, match="getattr.*__globals__"):
        check_checkpoint(checkpoint(tmp_path, named("builtins", "getattr", "a layer", "__globals__")))


def test_old_checkpoints_that_are_no_zip_are_looked_through_as_well(tmp_path):
    parts = [pickle.dumps(value) for value in (0x1950A86A20F9469CFC6C, 1001, {}, OrderedDict(), [])]
    (tmp_path / "old.pt").write_bytes(b"".join(parts))
    check_checkpoint(tmp_path / "old.pt")
    parts[4] = named("os", "system", "echo pwned")
    (tmp_path / "old.pt").write_bytes(b"".join(parts))
    with pytest.raises(InputError, match=r"would run os\.system"):
        check_checkpoint(tmp_path / "old.pt")


def test_honest_ones_pass_and_others_are_named_for_what_they_are(tmp_path):
    import torch

    check_checkpoint(ROOT / "examples" / "demo" / "detector.pt")
    torch.save({"weights": torch.nn.Conv2d(1, 1, 1), "half": torch.zeros(2).half()}, tmp_path / "plain.pt")
    check_checkpoint(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"YOLOv5 or YOLOv7 repository \(models.yolo.Model\).*yolov5su"):
        check_checkpoint(checkpoint(tmp_path, named("models.yolo", "Model")))
    with pytest.raises(InputError, match="TorchScript"):
        check_checkpoint(checkpoint(tmp_path, b"", "archive/constants.pkl"))
    for junk in (b"not a checkpoint", b"", bytes(4096)):
        (tmp_path / "junk.pt").write_bytes(junk)
        with pytest.raises(InputError, match="not a torch checkpoint"):
            check_checkpoint(tmp_path / "junk.pt")


def test_nothing_of_a_refused_checkpoint_ran(tmp_path):
    target = tmp_path / "ran"
    with pytest.raises(InputError):
        check_checkpoint(checkpoint(tmp_path, named("os", "mkdir", str(target))))
    assert not target.exists()
    assert trusted("torch.nn.modules.conv", "Conv2d")
    assert not trusted("posix", "system")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "works"), [("yolo11n-seg", True), ("yolo11n-obb", False), ("yolo11n-cls", False)]
)
def test_weights_of_other_tasks_are_refused_when_they_are_loaded(tmp_path, monkeypatch, name, works):
    from dclip_qdrant.detectors.yolo import Yolo

    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    if works:
        assert Yolo(f"{name}.yaml", image_size=32)._model.task == "segment"
    else:
        with pytest.raises(UsageError, match="gives no boxes; expected a model for detect"):
            Yolo(f"{name}.yaml", image_size=32)
    assert not (tmp_path / ".config" / "Ultralytics").exists()
    assert os.environ["YOLO_OFFLINE"] == "true"
