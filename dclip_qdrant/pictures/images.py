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
    TiffImagePlugin,
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
OTHER_FORMATS = (  # by their first bytes, for those who wonder why
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIC, a phone's format: convert it to JPEG"),
    (rb"\xff\x0a|....JXL ", "JPEG XL"),
    (rb"....jP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"(II\x2a\x00|MM\x00\x2a)", "a TIFF of a kind that Pillow doesn't read"),
    (rb"%PDF", "a PDF"),
    (rb"8BPS", "a Photoshop file"),
    (rb"....ftyp", "a video"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
)
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
    except ImageError as e:
        if e.where != "picture":
            raise
        raise ImageError(where, e.came, e.expected, e.do) from e
    except Image.DecompressionBombError as e:
        size = re.search(r"(\d+) pixels", str(e))
        came = f"a decompression bomb of {int(size.group(1)):,} pixels" if size else "a decompression bomb"
        raise ImageTooLarge(where, came, f"at most {max_pixels:,} pixels") from e
    except UnidentifiedImageError as e:
        raise ImageError(where, f"not a picture ({_looks_like(data)})", "one of " + ", ".join(FORMATS)) from e
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(where, f"can't be decoded: {str(e) or type(e).__name__}", "a whole picture") from e


def allow(max_pixels: int | None) -> int:
    """What `open_rgb` is to be given so that pictures of so many pixels open; MAX_PIXELS for None. Pillow has
    a limit of its own, of twice MAX_PIXELS and for the whole process, which is raised where it must be."""
    if max_pixels is None:
        return MAX_PIXELS
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    return max_pixels


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
    kind = next((name for begins, name in OTHER_FORMATS if re.match(begins, head, re.DOTALL)), None)
    if kind is not None:
        return f"it looks like {kind}"
    text = all(32 <= b < 127 or b in (9, 10, 13) for b in head)
    return "it looks like text" if text else "begins with " + head[:8].hex(" ")


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
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 16-bit greyscale: Pillow's own conversion would clip it to white
        shades = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        image = Image.fromarray(255 - shades if _white_is_zero(image) else shades)
    elif image.mode in ("I", "F"):
        came = "greyscale of 32 bits, which doesn't say what its white is"
        raise ImageError("picture", came, "8 or 16 bits", "save it anew")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts from white to black (photometric interpretation 0); Pillow turns only 8 bits."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def pixels(data: bytes) -> int:
    """Width x height, out of the header alone; 0 where it can't be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.width * image.height
    except Exception:  # whatever the bytes lead to; decoding will say it
        return 0


def read(path: str | Path) -> bytes:
    """The bytes at a path or URI (fsspec). Raises ImageError when there is nothing to read."""
    if "://" in str(path):
        return _fetched(str(path))
    try:
        # not waited for: a named pipe would never answer
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise ImageError(path, "a pipe, a device or a folder", "a file")
            return f.read()
    except OSError as e:
        raise ImageError(path, f"can't be read: {e.strerror or e}") from e
    except ValueError as e:  # a NUL in the name
        raise ImageError(repr(str(path))[:200], f"can't be read: {e}") from e


def _fetched(uri: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(uri, "rb") as f:
            return cast(BinaryIO, f).read()
    except ImportError as e:
        raise ImageError(uri, f"needs a package: {e}", do="pip install it") from e
    except Exception as e:  # OSError, ValueError, aiohttp's, botocore's, ...: whatever reads this protocol
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ImageError(uri, f"can't be read: {reason}") from e


def content_hash(data: bytes) -> str:
    """sha256 of the file's bytes: says whether a picture has to be embedded again."""
    return hashlib.sha256(data).hexdigest()


def pixel_hash(image: Image.Image) -> str:
    """sha256 of size and decoded pixels: finds a picture again that was renamed, re-tagged or losslessly
    re-packed."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
