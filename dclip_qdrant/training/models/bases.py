"""open_clip models by name or folder, as their authors trained them, or one line that says what is wrong."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn

from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import did_you_mean, missing
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.tables.student_folder import MERGES
from dclip_qdrant.training.models.vocabulary import read_merges

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip prefers them
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """What open_clip is asked for.

    `fingerprint`: of a folder, the hash of its files; None for models of a list or hub, which are named by
    what was loaded. `quick_gelu`: the activation that the weights were trained with, where their list says
    it.
    """

    name: str
    fingerprint: str | None = None
    pretrained: str | None = None
    config: dict[str, Any] | None = None
    quick_gelu: bool | None = None


@dataclass(frozen=True)
class Base:
    """An open_clip model with all that belongs to it."""

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Any
    config: dict[str, Any]
    fingerprint: str


def open_base(name: str, *, weights: bool = True) -> Base:
    """A model by open_clip name (`ViT-B-32/openai`, hub at run time), or a local folder with
    open_clip_config.json and its weights.

    The activation is the one that the weights were trained with: OpenAI's and 26 more of the published ones
    have QuickGELU, also under names of models that have GELU, for which open_clip only warns.

    Raises:
        UsageError: no such folder, a folder without the two files or with broken ones, an unknown name, or
            weights that can't be fetched.
        MissingExtra: a text tower of Hugging Face's without transformers.
    """
    is_folder = Path(name).is_dir()
    source = of_folder(Path(name)) if is_folder else of_list(name, weights=weights)
    activation: dict[str, Any] = {} if source.quick_gelu is None else {"quick_gelu": source.quick_gelu}
    try:
        with _random_as_meant() if not weights else nullcontext():
            model, _, _ = open_clip.create_model_and_transforms(
                source.name,
                pretrained=source.pretrained,
                load_weights=weights,
                pretrained_text=False,
                output_dict=False,
                force_quick_gelu=bool(source.quick_gelu),
                **activation,
            )
        tokenizer = open_clip.get_tokenizer(source.name)
        if is_folder and (Path(name) / MERGES).is_file():
            tokenizer = read_merges(Path(name) / MERGES, tokenizer.context_length)
    except ModuleNotFoundError as e:
        raise missing(e.name or "transformers", f"the model {name}") from e
    except Exception as e:  # hub, network, safetensors and open_clip each raise their own
        if "transformers" in str(e) and "install" in str(e):
            raise missing("transformers", f"the model {name}") from e
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        do = "check the name, the network, or give a local folder"
        if is_folder:
            do = "check the folder's config and weights"
        raise UsageError(name, f"can't be loaded: {' '.join(lines[:3])[:300]}", do=do) from e
    preprocess = Preprocess.of_open_clip(getattr(model.visual, "preprocess_cfg", {}))
    config = source.config or open_clip.get_model_config(source.name)
    if config is None:
        config = json.loads(json.dumps(getattr(model, "config", {"embed_dim": _dim(model)})))
    if source.quick_gelu is not None and source.quick_gelu != bool(config.get("quick_gelu")):
        config = {**config, "quick_gelu": source.quick_gelu}
    fingerprint = source.fingerprint or hash_model(model, config, preprocess)
    return Base(model, preprocess, tokenizer, config, fingerprint)


@contextmanager
def _random_as_meant() -> Iterator[None]:
    """open_clip warns of weights that are random; here nobody asked for any, and whoever reads a job's log
    would take it for their model's."""
    meant = lambda record: "Model initialized randomly" not in record.getMessage()
    root = logging.getLogger()
    root.addFilter(meant)
    try:
        yield
    finally:
        root.removeFilter(meant)


def of_folder(folder: Path) -> Source:
    """Raises UsageError: what is missing or broken in the folder, by name."""
    expected = "a folder that open_clip can load"
    config_file = folder / CONFIG
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    absent = [name for name, there in ((CONFIG, config_file.is_file()), (WEIGHTS[0], weights)) if not there]
    if absent or weights is None:
        raise UsageError(folder, f"no {' and no '.join(absent)}", expected)
    try:
        facts = json.loads(config_file.read_text())
    except ValueError as e:
        raise UsageError(config_file, f"not JSON ({e})", expected) from None
    if not isinstance(facts, dict) or not isinstance(facts.get("model_cfg"), dict):
        has = ", ".join(facts) if isinstance(facts, dict) else type(facts).__name__
        do = "put the model's config one level deeper, and preprocess_cfg beside it"
        raise UsageError(config_file, f"no model_cfg (has: {has})", 'a file {"model_cfg": {...}}', do)
    with weights.open("rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise UsageError(weights, "a Git LFS pointer, not the weights", expected, "git lfs pull")
    fingerprint = hash_files(config_file, weights)
    return Source(f"local-dir:{folder.resolve()}", fingerprint, config=facts["model_cfg"])


def of_list(name: str, *, weights: bool) -> Source:
    """A model of open_clip's list, or of a hub. Raises UsageError: not one of them."""
    if name.startswith("hf-hub:"):
        return Source(name)
    if "/" in name and (name.startswith((".", "/")) or name.count("/") > 1):
        expected = "a folder with open_clip_config.json, or a name like ViT-B-32/openai"
        raise UsageError(name, "no such folder", expected)
    model, _, tag = name.partition("/")
    known = open_clip.list_models()
    if model not in known:
        raise UsageError("`base`", f"no model {model!r}", do=did_you_mean(model, known)[:200])
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights and not tag:
        expected = f"{model}/TAG, TAG one of {', '.join(tags) or '(none published)'}"
        raise UsageError("`base`", f"{model!r} without weights", expected)
    if tag and tag not in tags:
        raise UsageError("`base`", f"no weights {tag!r} for {model}", f"one of {', '.join(tags)}")
    quick_gelu = bool(get_pretrained_cfg(model, tag).get("quick_gelu")) if tag else None
    return Source(model, pretrained=tag or None, quick_gelu=quick_gelu)


def _dim(model: Any) -> int:
    w = model.text_projection
    return w.out_features if isinstance(w, nn.Linear) else w.shape[1]


def hash_model(model: nn.Module, config: dict[str, Any], preprocess: Preprocess) -> str:
    """sha256 over weights, config and preprocessing: a hub's name stays when what is behind it changes."""
    digest = hashlib.sha256(json.dumps([config, asdict(preprocess)], sort_keys=True).encode())
    hash_tensors(digest, model.state_dict())
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: dict[str, Tensor]) -> None:
    """Adds names and bytes, in order of name, to a digest of hashlib's."""
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def hash_files(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()
