"""Towers -> the files of a student folder: ONNX, tokenizer, preprocessing, open_clip weights, model card; the
manifest last."""

import html
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dclip_qdrant.lookup import need
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.student_folder import MANIFEST, MANIFEST_VERSION, MERGES, file_hash, fingerprint_of
from dclip_qdrant.training.models.model_folder import for_local_dir
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.models.vocabulary import is_cut, write_merges
from dclip_qdrant.training.tokenizer_files import write_tokenizer

EXAMPLE_LENGTH = 9  # tokens of the text that a tower of any length is traced with


class _Image(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.tower = model.model.visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        out = self.tower(pixel_values)
        return F.normalize(out[0] if isinstance(out, tuple) else out, dim=-1)  # CoCa's gives its tokens too


class _Text(nn.Module):
    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(input_ids), dim=-1)


def write_student(
    model: TwoTower,
    folder: Path,
    *,
    name: str,
    metrics: dict[str, Any],
    recipe: dict[str, Any],
    card: str = "",
) -> None:
    """Writes a student into an empty folder. `jobs/export.py` checks it against the towers.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        need(package, "export")
    model = model.to("cpu").eval()
    _write_towers(model, folder)
    text = write_tokenizer(model, folder)
    storage.write_json(folder / "preprocessor_config.json", model.preprocess.as_fastembed())
    config = {"model_cfg": for_local_dir(model.config), "preprocess_cfg": model.preprocess.as_open_clip()}
    storage.write_json(folder / "open_clip_config.json", config)
    weights = {key: value.contiguous() for key, value in model.weights().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if is_cut(model.tokenizer):
        write_merges(model.tokenizer, folder / MERGES)
    storage.write_text(folder / "recipe.toml", _toml(recipe))
    storage.write_json(folder / "metrics.json", metrics)
    parameters = dict(model.model.named_parameters())
    image_parameters = sum(p.numel() for n, p in parameters.items() if n.startswith("visual."))
    facts: dict[str, Any] = {
        "version": MANIFEST_VERSION,
        "name": name,
        "fingerprint": fingerprint_of(folder),
        "dim": model.dim,
        "image_size": model.preprocess.size,
        "context_length": model.context_length,
        "preprocess": model.preprocess.as_open_clip(),
        "text": text,
        "base": Path(model.name).name if Path(model.name).exists() else model.name,
        "parameters": {
            "image": image_parameters,
            "text": sum(p.numel() for p in parameters.values()) - image_parameters,
        },
    }
    storage.write_text(folder / "README.md", _card(facts, card))
    facts["files"] = {file.name: file_hash(file) for file in sorted(folder.iterdir())}
    storage.write_json(folder / MANIFEST, facts)


def _write_towers(model: TwoTower, folder: Path) -> None:
    size = model.preprocess.size
    pixels = torch.randn(2, 3, size, size)
    _to_onnx(_Image(model), pixels, folder / "image.onnx", "pixel_values", "image_embeds", {0: "batch"})
    length = EXAMPLE_LENGTH if model.dynamic_text else model.context_length
    ids = model.tokenizer(["a photo of a cat", "two dogs"], context_length=model.context_length)
    ids = ids[:, :length].clone()
    dynamic = {0: "batch"}
    if model.dynamic_text:
        ids[:, -1] = ids.max()  # the end token, so that every row has one
        dynamic[1] = "length"
    _to_onnx(_Text(model), ids, folder / "text.onnx", "input_ids", "text_embeds", dynamic)


def _to_onnx(
    module: nn.Module, example: Tensor, path: Path, name: str, out: str, dynamic: dict[int, str]
) -> None:
    """The dynamo exporter: the older one bakes the sequence length into attention and fails at run time at
    another length."""
    shapes = {name: dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.onnx.export(
                module.eval(),
                (example,),
                str(path),
                input_names=[name],
                output_names=[out],
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                opset_version=18,
                verbose=False,
            )
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _toml(value: dict[str, Any], path: str = "") -> str:
    """A recipe as TOML; recipes hold nothing but tables, lists and plain values."""
    plain = {
        k: v
        for k, v in value.items()
        if not isinstance(v, dict) and not (isinstance(v, list) and v and isinstance(v[0], dict))
    }
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
    p, size = facts["parameters"], facts["image_size"]
    return f"""# {html.escape(facts["name"])}

A light CLIP made by dclip-qdrant from `{facts["base"]}`: {p["image"] / 1e6:.1f} M image and
{p["text"] / 1e6:.1f} M text parameters, {facts["dim"]}-wide vectors, {size} x {size} pixels.
Fingerprint `{facts["fingerprint"]}`.

{card}
## Use

```python
from dclip_qdrant import Student

student = Student.load("THIS_FOLDER")
vectors = student.embed_texts(["a photo of a cat"])
```

Stock open_clip loads it too: `open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")`.
"""
