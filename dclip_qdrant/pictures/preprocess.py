"""A picture becomes a tensor, once for both wings: PIL and numpy, the same numbers as open_clip's torchvision
pipeline."""

from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from dclip_qdrant.errors import StudentError

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_HF_RESAMPLE = {
    "bicubic": 3,
    "bilinear": 2,
    "lanczos": 1,
    "nearest": 0,
}  # the numbers of Hugging Face's image processors


@dataclass(frozen=True)
class Preprocess:
    """open_clip's `preprocess_cfg` for inference."""

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # shortest | longest | squash, as in open_clip
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.resize_mode not in ("shortest", "longest", "squash") or self.interpolation not in _FILTERS:
            raise StudentError(
                "preprocess_cfg",
                f"resize_mode {self.resize_mode!r}, interpolation {self.interpolation!r}",
                f"shortest | longest | squash and one of {', '.join(_FILTERS)}",
            )

    @classmethod
    def of_open_clip(cls, cfg: dict) -> "Preprocess":
        size = cfg.get("size", 224)
        if not isinstance(size, int):
            if len(set(size)) != 1:
                raise StudentError("preprocess_cfg", f"size {size}", "square pictures")
            size = size[0]
        known = {k: cfg[k] for k in ("interpolation", "resize_mode", "fill_color") if cfg.get(k) is not None}
        return cls(size, tuple(cfg.get("mean", cls.mean)), tuple(cfg.get("std", cls.std)), **known)

    def as_open_clip(self) -> dict:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "mode": "RGB"}

    def as_fastembed(self) -> dict:
        """`preprocessor_config.json` in the CLIPImageProcessor dialect. Squash and longest have no word in
        it; Student itself reads the manifest."""
        size = (
            {"shortest_edge": self.size}
            if self.resize_mode == "shortest"
            else {"height": self.size, "width": self.size}
        )
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": _HF_RESAMPLE[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def pixels(self, image: Image.Image) -> np.ndarray:
        """RGB image -> [S, S, 3] uint8, resized and cut."""
        size, resample = self.size, _FILTERS[self.interpolation]
        w, h = image.size
        if self.resize_mode == "squash":
            return np.asarray(image.resize((size, size), resample))
        if self.resize_mode == "shortest":  # torchvision's Resize(int) + CenterCrop
            w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
            image = image if image.size == (w, h) else image.resize((w, h), resample)
            left, top = round((w - size) / 2.0), round((h - size) / 2.0)
            return np.asarray(image.crop((left, top, left + size, top + size)))
        scale = size / max(w, h)  # longest: pad what is missing
        w, h = round(w * scale), round(h * scale)
        canvas = Image.new("RGB", (size, size), (self.fill_color,) * 3)
        canvas.paste(image.resize((w, h), resample), ((size - w) // 2, (size - h) // 2))
        return np.asarray(canvas)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """[B, S, S, 3] uint8 -> [B, 3, S, S] float32."""
        scale = 1.0 / (255.0 * np.asarray(self.std, np.float32))
        shift = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray((pixels.astype(np.float32) * scale - shift).transpose(0, 3, 1, 2))
