"""Pictures with their boxes drawn, to look at what a detector found."""

from upath import UPath

from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.regions import Regions, load_regions

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


def draw(image, regions: Regions):  # PIL.Image.Image
    """A copy of the picture, at least 400 pixels wide, with boxes and labels."""
    from PIL import ImageDraw

    scale = max(1, -(-400 // image.width))
    out = image.resize((image.width * scale, image.height * scale))
    pen = ImageDraw.Draw(out)
    for i, (box, score, label) in enumerate(zip(regions.boxes.tolist(), regions.scores.tolist(), regions.labels, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=3)
        said = f"{label} {score:.2f}"
        left, top, right, bottom = pen.textbbox((x0 + 3, max(0, y0 - 13)), said)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        pen.text((x0 + 3, max(0, y0 - 13)), said, fill="white")
    return out


def write_preview(stage: UPath, pairs: str, count: int) -> UPath:
    """Draws the first `count` pictures of the pairs into <stage>/preview; the folder."""
    found = load_regions(stage)
    folder = stage / "preview"
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for rows in Pairs.open(pairs).rows(["key", "uri", "image"]):
        for row in rows:
            if done == count:
                return folder
            with (folder / f"{done:04d}.jpg").open("wb") as f:
                draw(load_image(row), found.get(row["key"], Regions())).save(f, "JPEG", quality=90)
            done += 1
    return folder
