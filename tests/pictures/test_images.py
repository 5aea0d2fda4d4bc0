"""The one door for pictures: what comes in right side up, what is refused and why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dclip_qdrant.errors import ImageError
from dclip_qdrant.pictures import images


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def corner():
    """Red in the upper left corner, blue elsewhere; 40 x 20."""
    a = np.zeros((20, 40, 3), np.uint8)
    a[..., 2] = 255
    a[:10, :20] = (255, 0, 0)
    return Image.fromarray(a)


def near(pixel, colour, slack=40):
    return all(abs(int(a) - b) <= slack for a, b in zip(pixel, colour, strict=True))


def test_exif_rotation_is_applied(corner):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 clockwise to show upright"
    data = encoded(corner, "JPEG", exif=exif, quality=95)
    out = images.open_rgb(data, "x")
    assert out.size == (20, 40)
    assert near(out.getpixel((17, 3)), (255, 0, 0))  # the corner has gone to the upper right
    assert near(out.getpixel((3, 35)), (0, 0, 255))


def test_cmyk(corner):
    out = images.open_rgb(encoded(corner.convert("CMYK"), "JPEG", quality=95), "x")
    assert out.mode == "RGB"
    assert near(out.getpixel((5, 3)), (255, 0, 0), 60)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = np.full((8, 8), 0x8000, np.uint16)
    deep[0, 0] = 0xFFFF
    out = images.open_rgb(encoded(Image.fromarray(deep), "PNG"), "x")
    assert out.getpixel((4, 4)) == (128, 128, 128)
    assert out.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("white", "byte_order"), [(0, "<"), (1, "<"), (1, ">")])
def test_sixteen_bit_grey_of_a_tiff_is_what_its_eight_bit_twin_is(white, byte_order):
    ramp = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)
    stored = ramp.astype(np.uint16) * 257
    data = tiff(stored if white else 65535 - stored, bits=16, photometric=white, byte_order=byte_order)
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data, "x"))[..., 0], ramp)


@pytest.mark.parametrize(("kind", "sample"), [(np.int32, 2), (np.uint32, 1), (np.float32, 3)])
def test_grey_whose_white_nobody_says_is_rejected(kind, sample):
    data = tiff(np.arange(32, dtype=kind).reshape(4, 8), bits=32, photometric=1, sample=sample)
    with pytest.raises(ImageError, match="^x: greyscale of 32 bits.*8 or 16 bits -> save it anew"):
        images.open_rgb(data, "x")


def tiff(values, *, bits, photometric, byte_order="<", sample=1):
    """A TIFF of one strip, written by hand (TIFF 6.0, sections 2 to 4)."""
    height, width = values.shape
    strip = values.astype(values.dtype.newbyteorder(byte_order)).tobytes()
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,  # where the strip begins
        277: 1,
        278: height,
        279: len(strip),
        339: sample,
    }
    entries = b"".join(struct.pack(byte_order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if byte_order == "<" else b"MM") + struct.pack(byte_order + "HI", 42, 8 + len(strip))
    return (
        head + strip + struct.pack(byte_order + "H", len(tags)) + entries + struct.pack(byte_order + "I", 0)
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, a phone's format"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "text"),
    ],
)
def test_what_is_no_picture_says_what_it_looks_like(data, says):
    with pytest.raises(ImageError, match=f"it looks like {says}"):
        images.open_rgb(data, "x")


def test_a_tiff_that_pillow_does_not_read_is_said_to_be_one():
    data = tiff(np.zeros((4, 8), np.uint16), bits=16, photometric=0, byte_order=">")
    with pytest.raises(ImageError, match="a TIFF of a kind that Pillow doesn't read"):
        images.open_rgb(data, "x")


def test_the_headers_size_needs_no_decoding(corner):
    data = encoded(corner, "PNG")
    assert images.pixels(data) == images.pixels(data[:60]) == 40 * 20
    assert images.pixels(b"no picture") == 0


def test_palette_with_alpha_is_laid_on_white(corner):
    rgba = corner.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(np.arange(40)[None] < 20, 255, 0).astype(np.uint8).repeat(20, 0)))
    out = images.open_rgb(encoded(rgba.quantize(8), "PNG"), "x")
    assert near(out.getpixel((5, 3)), (255, 0, 0))
    assert near(out.getpixel((35, 3)), (255, 255, 255))


def test_animation_gives_its_first_frame(corner):
    other = Image.new("RGB", corner.size, (0, 255, 0))
    out = images.open_rgb(encoded(corner, "GIF", save_all=True, append_images=[other]), "x")
    assert near(out.getpixel((5, 3)), (255, 0, 0))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGBA", "P"])
def test_every_common_mode_becomes_rgb(corner, mode):
    assert images.open_rgb(encoded(corner.convert(mode), "PNG"), "x").mode == "RGB"


def png_that_claims(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"this is a text file, named .jpg\n", "it looks like text"),
        (b"\x00\x01\x02\x03" * 20, "not a picture"),
        (png_that_claims(20_000, 20_000), "bomb of 400,000,000 pixels"),
        (png_that_claims(9_500, 9_500), "9500 x 9500 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
    ],
)
def test_bad_files_are_refused_with_a_reason(data, says):
    with pytest.raises(ImageError, match=says) as e:
        images.open_rgb(data, "some/where.jpg")
    assert str(e.value).startswith("some/where.jpg: ")
    assert "\n" not in str(e.value)


def test_truncated_jpeg_is_refused(corner):
    data = encoded(corner.resize((400, 200)), "JPEG")
    with pytest.raises(ImageError, match="can't be decoded"):
        images.open_rgb(data[: len(data) // 2], "x")


def test_pixel_hash_sees_through_names_and_lossless_packing(corner):
    a, b = images.open_rgb(encoded(corner, "PNG"), "a"), images.open_rgb(encoded(corner, "BMP"), "b")
    assert images.pixel_hash(a) == images.pixel_hash(b)
    assert images.pixel_hash(a) != images.pixel_hash(a.transpose(Image.Transpose.ROTATE_180))


def test_a_missing_file_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        images.read(tmp_path / "none.jpg")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_upright_is_what_pillow_makes_of_exif(turn, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.open_rgb(buffer.getvalue(), "x")), np.asarray(wanted))


def odd_exif(*entries):
    """A little-endian TIFF header with one directory: orientation 6, and these entries."""
    every = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in every)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(every)) + packed + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (odd_exif((0x011A, 2, 3, b"72\0\0")), (80, 120)),  # a resolution that is text
        (odd_exif((0x0128, 8, 1, struct.pack("<hh", -1, 0))), (80, 120)),
        (odd_exif((0x0100, 9, 1, struct.pack("<i", -5))), (80, 120)),
        (b"Exif\0\0not a TIFF header", (120, 80)),
    ],
    ids=["text", "signed", "negative", "junk"],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_odd_exif_costs_no_picture(exif, size, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (120, 80), "red").save(buffer, kind, exif=exif, lossless=True)
    image = images.open_rgb(buffer.getvalue(), "x")
    assert image.size == size
    assert image.getpixel((5, 5)) == (255, 0, 0)


def test_long_text_and_large_profiles_cost_no_picture():
    from PIL import PngImagePlugin

    said = PngImagePlugin.PngInfo()
    said.add_text("workflow", "node " * 300_000, zip=True)
    said.add_itxt("parameters", "é" * 1_200_000, zip=True)
    for more in ({"pnginfo": said}, {"icc_profile": bytes(1_500_000)}):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 8), "blue").save(buffer, "PNG", **more)
        image = images.open_rgb(buffer.getvalue(), "x")
        assert (image.size, image.getpixel((3, 3))) == ((12, 8), (0, 0, 255))
