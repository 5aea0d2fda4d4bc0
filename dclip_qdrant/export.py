"""Towers -> student folder: ONNX, tokenizer, preprocessing, open_clip weights, model card; parity-checked; manifest last."""

import hashlib
import html
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dclip_qdrant.errors import ParityError
from dclip_qdrant.lookup import need
from dclip_qdrant.models.two_tower import TwoTower
from dclip_qdrant.student import MANIFEST_VERSION, Student, fingerprint_of
from dclip_qdrant.text import write_tokenizer

TOLERANCE = 1e-4  # torch and onnxruntime order their sums differently; seen: 2e-7 on small towers
PARITY_TEXTS = (
    "a photo of a cat", "two dogs run across a wet field while a child in a red coat watches them from the fence", "", "it's John's 2nd car, isn't it?",
    "caf\u00e9 \u201cna\u00efve\u201d &amp; more", "\u6771\u4eac\u30bf\u30ef\u30fc at night", "word " * 120,
)  # fmt: skip


class _Image(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.tower = model.model.visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.tower(pixel_values), dim=-1)


class _Text(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(input_ids), dim=-1)


def export(model: TwoTower, out: str | Path, *, name: str, metrics: dict[str, Any], recipe: dict[str, Any], card: str = "") -> Path:
    """Writes the student folder; an existing student there is replaced only once the new one is whole and agrees with torch.

    Raises:
        ParityError: tokens, pixels or embeddings of the folder differ from the towers'.
        MissingExtra: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        need(package, "export")
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        model = model.to("cpu").eval()
        _to_onnx(
            _Image(model),
            torch.randn(2, 3, model.preprocess.size, model.preprocess.size),
            work / "image.onnx",
            "pixel_values",
            "image_embeds",
            {0: "batch"},
        )
        length = 9 if model.dynamic_text else model.context_length
        ids = model.tokenizer(["a photo of a cat", "two dogs"], context_length=model.context_length)[:, :length].clone()
        ids[:, -1] = ids[:, :].max() if model.dynamic_text else ids[:, -1]
        _to_onnx(
            _Text(model),
            ids,
            work / "text.onnx",
            "input_ids",
            "text_embeds",
            {0: "batch", 1: "length"} if model.dynamic_text else {0: "batch"},
        )
        text = write_tokenizer(model, work)
        (work / "preprocessor_config.json").write_text(json.dumps(model.preprocess.as_fastembed(), indent=1) + "\n")
        config = {"model_cfg": _for_local_dir(model.config), "preprocess_cfg": model.preprocess.as_open_clip()}
        (work / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.contiguous() for k, v in model.weights().items()}, work / "open_clip_model.safetensors")
        (work / "recipe.toml").write_text(_toml(recipe))
        (work / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        files = (
            "image.onnx",
            "text.onnx",
            "tokenizer.json",
            "tokenizer_config.json",
            "preprocessor_config.json",
            "open_clip_config.json",
            "open_clip_model.safetensors",
        )
        fingerprint = fingerprint_of(work)
        facts = {
            "version": MANIFEST_VERSION, "name": name, "fingerprint": fingerprint, "dim": model.dim, "image_size": model.preprocess.size,
            "context_length": model.context_length, "preprocess": model.preprocess.as_open_clip(), "text": text, "base": Path(model.name).name if Path(model.name).exists() else model.name,
            "parameters": {"image": sum(p.numel() for p in model.model.visual.parameters()), "text": sum(p.numel() for n, p in model.model.named_parameters() if not n.startswith("visual."))},
        }  # fmt: skip
        (work / "README.md").write_text(_card(facts, card))
        facts["files"] = {
            f: hashlib.sha256((work / f).read_bytes()).hexdigest() for f in (*files, "recipe.toml", "metrics.json", "README.md")
        }
        (work / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
        check_parity(model, Student.load(work))
        if target.exists():
            shutil.rmtree(target)
        work.chmod(0o755)  # mkdtemp's is private; a student is to be read by others
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _to_onnx(module: nn.Module, example: Tensor, path: Path, name: str, out: str, dynamic: dict[int, str]) -> None:
    """The dynamo exporter: the older one bakes the sequence length into attention and fails at run time at another length."""
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.onnx.export(module.eval(), (example,), str(path), input_names=[name], output_names=[out], dynamo=True, dynamic_shapes=shapes, external_data=False,
                              opset_version=18, verbose=False)  # fmt: skip
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def check_parity(model: TwoTower, student: Student, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the towers and the folder, over two batch sizes and many text lengths.

    Raises:
        ParityError: tokens differ, pixels differ, or embeddings differ by more than `tolerance`.
    """
    expected = model.tokenizer(list(PARITY_TEXTS), context_length=model.context_length)
    for text, want, got in zip(PARITY_TEXTS, expected.tolist(), student.tokens(list(PARITY_TEXTS)), strict=True):
        got = [*got, *want[len(got) :]] if not any(want[len(got) :]) else list(got)
        if want != got:
            raise ParityError("export", f"tokens of {text[:40]!r} are {got[:12]}", f"{want[:12]}")
    rng = np.random.default_rng(0)
    s = model.preprocess.size
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((s, s), (2 * s + 3, s + 5), (s // 2, s))]
    worst = 0.0
    with torch.no_grad():
        pixels = torch.from_numpy(model.preprocess.normalise(np.stack([model.preprocess.pixels(p) for p in pictures])))
        images = F.normalize(model.model.encode_image(pixels), dim=-1).numpy()
        texts = F.normalize(model.model.encode_text(expected), dim=-1).numpy()
    for n in (1, len(pictures)):
        worst = max(worst, float(np.abs(student.embed_images(pictures[:n]) - images[:n]).max()))
    for n in (1, len(PARITY_TEXTS)):
        worst = max(worst, float(np.abs(student.embed_texts(list(PARITY_TEXTS[:n])) - texts[:n]).max()))
    if not worst <= tolerance:
        raise ParityError("export", f"embeddings differ from torch by {worst:.2e}", f"at most {tolerance:.0e}")
    return worst


def _for_local_dir(config: dict) -> dict:
    """The model config without what would send open_clip to a hub for weights that the folder already holds."""
    config = json.loads(json.dumps(config))
    if "timm_model_name" in config.get("vision_cfg", {}):
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config.get("text_cfg", {}):
        config["text_cfg"]["hf_model_pretrained"] = False
    return config


def _toml(value: dict[str, Any], path: str = "") -> str:
    """A recipe as TOML; recipes hold nothing but tables, lists and plain values."""
    plain = {k: v for k, v in value.items() if not isinstance(v, dict) and not (isinstance(v, list) and v and isinstance(v[0], dict))}
    out = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for k, v in value.items():
        here = f"{path}.{k}" if path else k
        if isinstance(v, dict):
            out += ["", f"[{here}]", _toml(v, here).strip()]
        elif k not in plain:
            for item in v:
                out += ["", f"[[{here}]]", _toml(item, here).strip()]
    return "\n".join(out) + "\n"


def _card(facts: dict[str, Any], card: str) -> str:
    p = facts["parameters"]
    return f"""# {html.escape(facts["name"])}

A light CLIP made by dclip-qdrant from `{facts["base"]}`: {p["image"] / 1e6:.1f} M image and {p["text"] / 1e6:.1f} M text parameters, {facts["dim"]}-wide vectors,
{facts["image_size"]} x {facts["image_size"]} pixels. Fingerprint `{facts["fingerprint"]}`.

{card}
## Use

```python
from dclip_qdrant import Student

student = Student.load("THIS_FOLDER")
vectors = student.embed_texts(["a photo of a cat"])
```

Stock open_clip loads it too: `open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")`.
"""
