"""Pictures with their boxes drawn, to look at what a detector found."""

from PIL import Image, ImageDraw

from dclip_qdrant.pictures.regions import Regions

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
LEAST_WIDTH = 400  # pixels; smaller pictures are enlarged so that labels can be read


def draw(image: Image.Image, regions: Regions) -> Image.Image:
    """A copy of the picture, at least `LEAST_WIDTH` wide, with boxes and labels."""
    scale = max(1, -(-LEAST_WIDTH // image.width))
    canvas = image.resize((image.width * scale, image.height * scale))
    pen = ImageDraw.Draw(canvas)
    rows = zip(regions.boxes.tolist(), regions.scores.tolist(), regions.labels, strict=True)
    for number, (box, score, label) in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=3)
        text = f"{label} {score:.2f}"
        left, top, right, bottom = pen.textbbox((x0 + 3, max(0, y0 - 13)), text)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        pen.text((x0 + 3, max(0, y0 - 13)), text, fill="white")
    return canvas
