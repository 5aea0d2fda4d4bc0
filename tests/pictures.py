"""Pictures of noise for tests of the service."""

import base64
import io

import numpy as np
from PIL import Image


def png(size=(40, 30), seed=0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
