"""Renders captioned scenes: several objects with attributes and spatial relations, five wordings each, true
boxes known.

Two domains, as in life. `general` is what a pretrained CLIP has seen: one or two plain objects with short
captions. `team` is what a team brings: two to four objects, patterns, relations, captions that each tell only
a part of the picture. Everything follows from the seed.
"""

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "moon",
    "ring",
    "diamond",
    "arrow",
    "hexagon",
    "house",
)
COLOURS = {
    "red": (215, 40, 40),
    "blue": (45, 80, 215),
    "green": (40, 160, 60),
    "yellow": (240, 210, 40),
    "purple": (135, 50, 170),
    "orange": (245, 140, 30),
    "pink": (245, 130, 180),
    "brown": (125, 75, 40),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZE = 128  # pixels a side; the demo's student sees 64, so crops show what the whole picture hides


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    pattern: str
    large: bool
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels

    def words(self, *, size: bool = False, pattern: bool = True) -> str:
        words = [
            ("large" if self.large else "small") if size else "",
            self.pattern if pattern and self.pattern != "plain" else "",
            self.colour,
            self.shape,
        ]
        return " ".join(w for w in words if w)


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    things: tuple[Thing, ...]
    captions: tuple[str, ...]


def _mask(shape: str, n: int) -> Image.Image:
    """The shape as a white-on-black mask of n x n pixels."""
    m = Image.new("L", (n, n))
    d = ImageDraw.Draw(m)
    at = lambda *xy: [(x * (n - 1), y * (n - 1)) for x, y in xy]
    if shape == "circle":
        d.ellipse((0, 0, n - 1, n - 1), 255)
    elif shape == "square":
        d.rectangle((n * 0.06, n * 0.06, n * 0.94, n * 0.94), 255)
    elif shape == "triangle":
        d.polygon(at((0.5, 0), (1, 1), (0, 1)), 255)
    elif shape == "star":
        r = [0.5 if k % 2 == 0 else 0.2 for k in range(10)]
        d.polygon(
            at(
                *((0.5 + r[k] * np.sin(np.pi * k / 5), 0.5 - r[k] * np.cos(np.pi * k / 5)) for k in range(10))
            ),
            255,
        )
    elif shape == "heart":
        d.ellipse((0, 0, n * 0.54, n * 0.54), 255)
        d.ellipse((n * 0.46, 0, n - 1, n * 0.54), 255)
        d.polygon(at((0.04, 0.38), (0.96, 0.38), (0.5, 1)), 255)
    elif shape == "cross":
        d.rectangle((n * 0.34, 0, n * 0.66, n), 255)
        d.rectangle((0, n * 0.34, n, n * 0.66), 255)
    elif shape == "moon":
        d.ellipse((0, 0, n - 1, n - 1), 255)
        d.ellipse((n * 0.35, -n * 0.1, n * 1.25, n * 0.85), 0)
    elif shape == "ring":
        d.ellipse((0, 0, n - 1, n - 1), 255)
        d.ellipse((n * 0.3, n * 0.3, n * 0.7, n * 0.7), 0)
    elif shape == "diamond":
        d.polygon(at((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)), 255)
    elif shape == "arrow":
        d.polygon(at((0, 0.36), (0.5, 0.36), (0.5, 0.08), (1, 0.5), (0.5, 0.92), (0.5, 0.64), (0, 0.64)), 255)
    elif shape == "hexagon":
        d.polygon(at((0.25, 0.07), (0.75, 0.07), (1, 0.5), (0.75, 0.93), (0.25, 0.93), (0, 0.5)), 255)
    else:  # house
        d.polygon(at((0.5, 0), (1, 0.45), (0, 0.45)), 255)
        d.rectangle((n * 0.14, n * 0.45, n * 0.86, n), 255)
    return m


def _fill(colour: str, pattern: str, n: int) -> Image.Image:
    """The colour, with the pattern in a lighter or darker shade of it."""
    base = np.array(COLOURS[colour], float)
    other = base * 0.45 if base.mean() > 110 else base * 0.4 + 150
    y, x = np.mgrid[:n, :n]
    step = max(6, n // 7)
    on = {
        "plain": np.zeros((n, n), bool),
        "striped": (x + y) // (step // 2) % 2 == 0,
        "dotted": ((x % step - step / 2) ** 2 + (y % step - step / 2) ** 2) < (step * 0.3) ** 2,
        "checked": ((x // step) + (y // step)) % 2 == 0,
    }[pattern]
    return Image.fromarray(np.where(on[..., None], other, base).clip(0, 255).astype(np.uint8))


def _background(rng: random.Random) -> Image.Image:
    """A soft gradient with grain: no two alike, none in an object's colours."""
    g = np.random.default_rng(rng.getrandbits(32))
    corners = g.uniform(150, 225, (2, 2, 1)) + g.uniform(-12, 12, (2, 2, 3))
    soft = np.array(
        Image.fromarray(corners.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC), float
    )
    return Image.fromarray((soft + g.normal(0, 6, (SIZE, SIZE, 1))).clip(0, 255).astype(np.uint8))


def _place(rng: random.Random, count: int, patterns: tuple[str, ...], grow: float) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(200):
        if len(things) == count:
            break
        large = rng.random() < 0.5
        n = int((rng.uniform(40, 50) if large else rng.uniform(22, 29)) * grow)
        x, y = rng.randint(2, SIZE - n - 2), rng.randint(2, SIZE - n - 2)
        box = (x, y, x + n, y + n)
        if any(
            box[0] < t.box[2] + 3
            and t.box[0] < box[2] + 3
            and box[1] < t.box[3] + 3
            and t.box[1] < box[3] + 3
            for t in things
        ):
            continue
        thing = Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(patterns), large, box)
        if not any((t.shape, t.colour) == (thing.shape, thing.colour) for t in things):
            things.append(thing)
    return things


def _draw(rng: random.Random, things: list[Thing]) -> Image.Image:
    canvas = _background(rng)
    for t in things:
        n = t.box[2] - t.box[0]
        mask = _mask(t.shape, n * 3).resize((n, n), Image.Resampling.LANCZOS)  # drawn at 3x: smooth edges
        canvas.paste(_fill(t.colour, t.pattern, n), t.box[:2], mask)
    return canvas


def relation(a: Thing, b: Thing) -> str:
    dx = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
    dy = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def a_or_an(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _team_captions(rng: random.Random, things: list[Thing]) -> tuple[str, ...]:
    def some(k: int) -> list[Thing]:
        return rng.sample(things, min(k, len(things)))

    a, b = some(2)
    c, d = some(2)
    e, f = some(2)
    one = some(1)[0]
    number = {2: "two", 3: "three", 4: "four"}[len(things)]
    return (
        _listed([a_or_an(t.words()) for t in some(max(2, len(things) - 1))]),
        f"the {a.words()} is {relation(a, b)} the {b.words(pattern=False)}",
        f"a photo of {a_or_an(c.words(size=True))} with {a_or_an(d.words(pattern=False))}",
        f"a drawing of {number} things, one of them {a_or_an(one.words(size=True))}",
        f"{a_or_an(e.colour + ' ' + e.shape)} {relation(e, f)} {a_or_an(f.words())}",
    )


def _general_captions(rng: random.Random, things: list[Thing]) -> tuple[str, ...]:
    t = things[0]
    if len(things) == 1:
        choices = [
            f"a photo of {a_or_an(t.shape)}.",
            a_or_an(t.words(pattern=False)),
            f"a photo of {a_or_an(t.words(size=True, pattern=False))}.",
            f"{a_or_an(t.colour)} thing",
            a_or_an(t.words()),
            f"a drawing of {a_or_an(t.shape)}",
        ]
    else:
        u = things[1]
        choices = [
            f"{a_or_an(t.shape)} and {a_or_an(u.shape)}",
            f"{a_or_an(t.words(pattern=False))} and {a_or_an(u.words(pattern=False))}",
            f"{a_or_an(t.colour)} thing and {a_or_an(u.colour)} thing",
            f"a photo of {a_or_an(t.words())} with {a_or_an(u.shape)}",
        ]
    return (rng.choice(choices),)


def scene(seed: int, *, domain: str = "team") -> Scene:
    """One scene. `team`: 2-4 objects and five captions; `general`: 1-2 objects and one caption."""
    rng = random.Random(f"{domain}-{seed}")
    if domain == "team":
        things = _place(rng, rng.choice((2, 3, 3, 4)), PATTERNS, 1.0)
        return Scene(_draw(rng, things), tuple(things), _team_captions(rng, things))
    things = _place(rng, rng.choice((1, 1, 2)), ("plain", "plain", *PATTERNS), 1.25)
    return Scene(_draw(rng, things), tuple(things), _general_captions(rng, things))


def labelled(seed: int) -> tuple[Image.Image, str]:
    """One object of the general domain and its shape: the zero-shot set that retention is measured on."""
    rng = random.Random(f"labelled-{seed}")
    (t,) = _place(rng, 1, ("plain", "plain", *PATTERNS), 1.1)
    return _draw(rng, [t]), t.shape


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_team(folder: Path, *, train: int, val: int, test: int, seed: int = 0) -> None:
    """A folder as a team would bring it: `images/*.jpg` and `captions.jsonl` (file, captions, split, true
    boxes)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for split, count, start in (("train", train, 0), ("val", val, 1_000_000), ("test", test, 2_000_000)):
        for i in range(count):
            s = scene(start + i + seed * 10_000_000)
            name = f"images/{split}-{i:05d}.jpg"
            (folder / name).write_bytes(jpeg(s.image))
            rows.append(
                {
                    "file_name": name,
                    "captions": s.captions,
                    "split": split,
                    "boxes": [t.box for t in s.things],
                    "labels": [t.shape for t in s.things],
                }
            )
    (folder / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_labelled(folder: Path, count: int) -> None:
    """`<folder>/<class>/*.jpg`: an ordinary image folder."""
    for i in range(count):
        image, name = labelled(i)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{i:05d}.jpg").write_bytes(jpeg(image))
