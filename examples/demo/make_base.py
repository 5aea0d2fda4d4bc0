"""Makes the two small models that the demo starts from; run once, results are kept beside this file.

    python examples/demo/make_base.py clip       # base/: a 1.6 M parameter CLIP (without its word table), 20
    minutes on one core python examples/demo/make_base.py detector   # detector.pt: a very small YOLO, 15
    minutes on one core

The CLIP learns plain InfoNCE on `general` scenes only: one or two objects, short captions. It has never seen
a team scene. Rows of the word table that no caption uses are zero, so that the file packs well. `detector.pt`
is trained with Ultralytics and is AGPL-3.0 like that library.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import scenes

HERE = Path(__file__).parent
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "size": 64,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def clip(steps: int, batch: int) -> None:
    import open_clip
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = open_clip.CLIP(**CONFIG["model_cfg"], output_dict=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=40)
    pool = 16_384  # scenes; each is seen about steps * batch / pool times
    t = time.time()
    pixels = np.empty((pool, 64, 64, 3), np.uint8)
    captions = []
    for i in range(pool):
        s = scenes.scene(i, domain="general")
        pixels[i] = np.asarray(s.image.resize((64, 64), scenes.Image.Resampling.BICUBIC))
        captions.append(s.captions[0])
    tokens = tokenizer(captions)
    print(f"{pool} scenes rendered in {time.time() - t:.0f} s", flush=True)
    model.token_embedding.weight.data *= torch.zeros(49408, 1).index_fill(0, tokens.unique(), 1.0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, steps, pct_start=0.05)
    rng = np.random.default_rng(0)
    t = time.time()
    for step in range(steps):
        at = rng.integers(0, pool, batch)
        x = torch.from_numpy(pixels[at]).permute(0, 3, 1, 2).float() / 127.5 - 1
        image, text, scale = model(x, tokens[at])  # every caption is shorter than 24 tokens
        logits = scale * image @ text.T
        same = (tokens[at][:, None] == tokens[at][None]).all(-1).float()  # equal captions are equal positives
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=np.log(50))
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - t:.0f} s", flush=True)
    (HERE / "base").mkdir(exist_ok=True)
    model.token_embedding.weight.data *= torch.zeros(49408, 1).index_fill(0, tokens.unique(), 1.0)
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"},
        HERE / "base/open_clip_model.safetensors",
    )
    (HERE / "base/open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def detector(epochs: int) -> None:
    import shutil
    import tempfile

    import yaml
    from ultralytics import YOLO

    work = Path(tempfile.mkdtemp())
    for split, count, start in (("train", 3000, 5_000_000), ("val", 300, 6_000_000)):
        (work / split / "images").mkdir(parents=True)
        (work / split / "labels").mkdir()
        for i in range(count):
            s = scenes.scene(start + i, domain="team" if i % 3 else "general")
            s.image.save(work / split / "images" / f"{i}.png")
            lines = []
            for thing in s.things:
                x0, y0, x1, y1 = (v / scenes.SIZE for v in thing.box)
                lines.append(
                    f"{scenes.SHAPES.index(thing.shape)} {(x0 + x1) / 2} {(y0 + y1) / 2} {x1 - x0} {y1 - y0}"
                )
            (work / split / "labels" / f"{i}.txt").write_text("\n".join(lines))
    (work / "data.yaml").write_text(
        yaml.safe_dump(
            {"path": str(work), "train": "train/images", "val": "val/images", "names": list(scenes.SHAPES)}
        )
    )
    import ultralytics

    spec = yaml.safe_load((Path(ultralytics.__file__).parent / "cfg/models/11/yolo11.yaml").read_text())
    spec["scales"] = {"n": [0.50, 0.125, 1024]}  # half yolo11n's width
    spec["nc"] = len(scenes.SHAPES)
    (work / "yolo11n-half.yaml").write_text(yaml.safe_dump(spec))
    YOLO(work / "yolo11n-half.yaml").train(
        data=work / "data.yaml",
        imgsz=128,
        epochs=epochs,
        batch=32,
        device="cpu",
        workers=0,
        seed=0,
        project=work / "runs",
        fliplr=0.0,
        mosaic=0.5,
        plots=False,
        optimizer="AdamW",
        lr0=2e-3,
        amp=False,
    )
    (best,) = work.rglob("best.pt")
    shutil.copy(best, HERE / "detector.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("clip", "detector"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    clip(args.steps, 256) if args.what == "clip" else detector(args.epochs)
