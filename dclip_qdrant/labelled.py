"""Labelled pictures for zero-shot accuracy: a folder per class, or a Parquet file with `image` and `label_name` (or `label`)."""

from dataclasses import dataclass

import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant import images
from dclip_qdrant.arrow_file import opened
from dclip_qdrant.errors import InputError, UsageError

PROMPT = "a photo of a {}."  # CLIP's single prompt; DCLIP's evaluation uses it too (docs/papers.md 1.4)


@dataclass(frozen=True)
class Labelled:
    names: tuple[str, ...]  # [C]
    labels: tuple[int, ...]  # [N]
    pictures: tuple[bytes | str, ...]  # encoded bytes, or a path
    fingerprint: str

    @classmethod
    def open(cls, path: str) -> "Labelled":
        """Raises UsageError (nothing there) or InputError (no classes, no columns)."""
        root = UPath(path)
        if root.is_dir():
            rows = [
                (str(f), d.name)
                for d in sorted(root.iterdir(), key=str)
                if d.is_dir()
                for f in sorted(d.iterdir(), key=str)
                if f.suffix.lower() in images.SUFFIXES
            ]
        elif root.is_file():
            with opened(root) as f:
                try:
                    table = pq.read_table(f)
                except Exception as e:
                    raise InputError(path, f"can't be read as Parquet: {str(e)[:80]}", "a folder per class, or Parquet") from e
            name = next((c for c in ("label_name", "class", "label") if c in table.column_names), None)
            if name is None or "image" not in table.column_names:
                raise InputError(path, f"columns {', '.join(table.column_names)}", "image and label_name (or label)")
            pictures = [v["bytes"] if isinstance(v, dict) else v for v in table["image"].to_pylist()]
            rows = list(zip(pictures, map(str, table[name].to_pylist()), strict=True))
        else:
            raise UsageError(path, "no such file or folder", "labelled pictures: a folder per class, or Parquet")
        names = sorted({n for _, n in rows})
        if len(names) < 2:
            raise InputError(path, f"{len(rows)} pictures in {len(names)} classes", "two classes or more")
        index = {n: i for i, n in enumerate(names)}
        import hashlib

        digest = hashlib.sha256()
        for picture, n in rows:
            digest.update(n.encode() + (picture if isinstance(picture, bytes) else picture.encode()))
        return cls(tuple(names), tuple(index[n] for _, n in rows), tuple(p for p, _ in rows), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prompts(self) -> list[str]:
        return [PROMPT.format(n.replace("_", " ")) for n in self.names]

    def load(self, i: int):  # PIL.Image.Image
        p = self.pictures[i]
        return images.open_rgb(p if isinstance(p, bytes) else images.read(p), p if isinstance(p, str) else f"labelled picture {i}")
