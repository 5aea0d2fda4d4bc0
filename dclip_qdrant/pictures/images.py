"""The one door for pictures: bytes from anywhere become an upright 8-bit RGB image, or an ImageError that
says why not.

Training, ingestion and queries all come through here, so that the same file is the same pixels everywhere.
"""

import hashlib
import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import (
    AvifImagePlugin,  # noqa: F401  (plugins register themselves)
    ExifTags,
    Image,
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from dclip_qdrant.errors import ImageError, ImageTooLarge

# What Pillow may decode. EPS (runs ghostscript) and rarer formats stay outside: pictures come from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # JPEG includes the MPO of some cameras
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Pillow's own warning line (a quarter GiB of RGB): above it a picture counts as a bomb
MAX_PIXELS = 89_478_485

PNG = b"\x89PNG\r\n\x1a\n"
TURNS = {  # EXIF 2.3, table 6: how a stored picture becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Picture = str | Path | bytes | Image.Image | BinaryIO  # what a person passes as one


def open_rgb(data: bytes, where: object, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`data` as an upright RGB image: first frame, EXIF rotation applied, alpha laid on white, 16-bit scaled
    to 8.

    Raises:
        ImageTooLarge: more than `max_pixels`. ImageError: empty, not a picture, truncated.
    """
    if not data:
        raise ImageError(where, "an empty file", "a picture")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd EXIF and of bombs; we judge the size ourselves
            warnings.simplefilter("ignore")
            try:
                image = _loaded(data, where, max_pixels)
            except ValueError as e:
                if "text" not in str(e).lower():  # Pillow's limits on text and profiles, not on pixels
                    raise
                image = _loaded(_without_text(data), where, max_pixels)
            return upright(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as e:
        size = re.search(r"(\d+) pixels", str(e))
        came = f"a decompression bomb of {int(size.group(1)):,} pixels" if size else "a decompression bomb"
        raise ImageTooLarge(where, came, f"at most {max_pixels:,} pixels") from e
    except UnidentifiedImageError as e:
        raise ImageError(where, f"not a picture ({_looks_like(data)})", "one of " + ", ".join(FORMATS)) from e
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(where, f"can't be decoded: {str(e) or type(e).__name__}", "a whole picture") from e


def _loaded(data: bytes, where: object, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        came = f"{image.width} x {image.height} pixels"
        raise ImageTooLarge(where, came, f"at most {max_pixels:,} pixels")
    image.load()
    return image


def _without_text(data: bytes) -> bytes:
    """A PNG without the chunks that say things beside the pixels: workflows of a megabyte, huge profiles."""
    if not data.startswith(PNG):
        return data
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, content, checksum
        if data[at + 4 : at + 8] not in (b"zTXt", b"iTXt", b"tEXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def as_rgb(picture: Picture, where: object = "picture") -> Image.Image:
    """A path, URI, bytes, open file or PIL image as an upright RGB image. Raises ImageError."""
    if isinstance(picture, Image.Image):
        return upright(picture)
    if isinstance(picture, bytes):
        return open_rgb(picture, where)
    if isinstance(picture, str | Path):
        return open_rgb(read(picture), picture)
    return open_rgb(picture.read(), where)


def _looks_like(data: bytes) -> str:
    head = data[:64]
    return (
        "it looks like text"
        if all(32 <= b < 127 or b in (9, 10, 13) for b in head)
        else "begins with " + head[:8].hex(" ")
    )


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture as `open_rgb` gives it: EXIF rotation applied, RGB."""
    turn = TURNS.get(_orientation(image))
    return _to_rgb(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """What EXIF says, 1 to 8; 1 where it can't be read. (Pillow's own exif_transpose also writes EXIF anew,
    and fails where an entry that nobody needs is odd.)"""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # SyntaxError, struct.error, ValueError, ...: whatever the bytes lead to
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale: Pillow's own conversion would clip it to white
        deep = np.asarray(image).astype(np.int64)
        image = Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read(path: str | Path) -> bytes:
    """The bytes at a path or URI (fsspec). Raises ImageError when there is nothing to read."""
    try:
        if "://" in str(path):
            import fsspec

            with fsspec.open(str(path), "rb") as f:
                return cast(BinaryIO, f).read()
        # not waited for: a named pipe would never answer
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise ImageError(path, "a pipe, a device or a folder", "a file")
            return f.read()
    except OSError as e:
        raise ImageError(path, f"can't be read: {e.strerror or e}") from e


def content_hash(data: bytes) -> str:
    """sha256 of the file's bytes: says whether a picture has to be embedded again."""
    return hashlib.sha256(data).hexdigest()


def pixel_hash(image: Image.Image) -> str:
    """sha256 of size and decoded pixels: finds a picture again that was renamed, re-tagged or losslessly
    re-packed."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
