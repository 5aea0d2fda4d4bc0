"""Random open_clip models in folders."""

import json

import open_clip
import torch
from safetensors.torch import save_file

LIGHT = {  # another size, resize mode, mean, width and context than TINY; a convolutional trunk
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_050",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 48,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.3, 0.4, 0.5],
        "std": [0.25, 0.2, 0.3],
        "size": 48,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


def model_folder(folder, config, seed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, folder / "open_clip_model.safetensors")
    return str(folder)
