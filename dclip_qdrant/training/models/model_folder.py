"""A model as an open_clip folder: config, weights and, where the tokenizer isn't CLIP's own, its files. What
`open_base` loads, and stock open_clip (`local-dir:`) but for a cut vocabulary's tokenizer."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.student_folder import MERGES
from dclip_qdrant.training.models.bases import CONFIG, WEIGHTS
from dclip_qdrant.training.models.vocabulary import is_cut, write_merges

MODEL_FOLDER = storage.FolderKind(
    "a model", CONFIG, "model_cfg", (WEIGHTS[0], "*.json", "vocab.txt", "*.model", MERGES)
)


def write_model(
    folder: str,
    *,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    preprocess: Preprocess,
    tokenizer: Any,
) -> None:
    """Writes the folder, once: one that is there is kept.

    Raises:
        UsageError: a URI (open_clip loads local folders), or something else than a model in `folder`.
    """
    target = storage.local_path(folder, "an open_clip model's folder")
    if (target / CONFIG).is_file():
        return
    with storage.new_folder(target, MODEL_FOLDER, overwrite=True) as part:
        save_file({k: v.contiguous() for k, v in weights.items()}, str(part / WEIGHTS[0]))
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.tokenizer.save_pretrained(str(part))
        elif is_cut(tokenizer):
            write_merges(tokenizer, Path(str(part)) / MERGES)
        facts = {"model_cfg": for_local_dir(config), "preprocess_cfg": asdict(preprocess)}
        storage.write_json(part / CONFIG, facts)


def for_local_dir(config: dict[str, Any]) -> dict[str, Any]:
    """The model config without what would send open_clip to a hub for weights that the folder already
    holds."""
    config = json.loads(json.dumps(config))
    if "timm_model_name" in config.get("vision_cfg", {}):
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config.get("text_cfg", {}):
        config["text_cfg"]["hf_model_pretrained"] = False
    return config
