"""The stages that Ray Data does: regions, features of the frozen base, the teacher's vectors."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from dclip_qdrant import contracts, metrics
from dclip_qdrant.arrow_file import opened
from dclip_qdrant.cluster import map_pairs
from dclip_qdrant.detectors import build
from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.regions import load_regions
from dclip_qdrant.stages import Stage, parts, write_part

Say = Callable[[str], None]


def _pool(threads: int):
    from concurrent.futures import ThreadPoolExecutor

    import torch

    torch.set_num_threads(threads)
    return ThreadPoolExecutor(max(2, threads))


# --- regions


class Detect:
    """Actor: pictures in, rows of the regions contract written."""

    def __init__(self, detector: str, options: dict[str, Any], out: str, threads: int) -> None:
        self.pool = _pool(threads)
        self.detector, self.out = build(detector, options), UPath(out)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        pictures = list(self.pool.map(load_image, rows))
        found = self.detector(pictures)
        write_part(
            self.out,
            contracts.REGIONS,
            [{"key": r["key"], "width": p.width, "height": p.height, **f.row()} for r, p, f in zip(rows, pictures, found, strict=True)],
        )
        return pa.table({"done": [len(rows)]})


def regions_stage(root: str, pairs: Pairs, recipe: Recipe) -> Stage:
    r = recipe.regions
    return Stage(root, "regions", {"pairs": pairs.fingerprint, "detector": r.detector, "options": _file_hashes(r.options)})


def _file_hashes(options: dict[str, Any]) -> dict[str, Any]:
    """Options with files replaced by their content's hash, so that new weights under an old name are new inputs."""
    from dclip_qdrant.images import content_hash, read

    return {k: content_hash(read(v)) if isinstance(v, str) and os.path.isfile(v) else v for k, v in options.items()}


def extract_regions(root: str, pairs: Pairs, recipe: Recipe, *, actors: int | None, say: Say) -> Stage:
    """Boxes of every picture; resumes."""
    stage = regions_stage(root, pairs, recipe)
    if stage.done:
        say(f"regions: reused {stage.path.name}")
        return stage
    build(recipe.regions.detector, recipe.regions.options)  # wrong options or missing weights: say so here, before a pool starts
    say(f"regions: {recipe.regions.detector} over {sum(pairs.splits().values()):,} pictures")
    map_pairs(pairs, Detect, {"detector": recipe.regions.detector, "options": recipe.regions.options}, out=stage.path, contract=contracts.REGIONS,
              actors=actors, batch=32, say=lambda line: say(f"regions: {line}"), columns=["key", "uri", "image"])  # fmt: skip
    counts = [n for t in parts(stage.path, contracts.REGIONS, ["labels"]) for n in pc.list_value_length(t["labels"]).to_pylist()]
    facts = stage.finish(pictures=len(counts), boxes=int(sum(counts)), without=int(sum(n == 0 for n in counts)))
    say(
        f"regions: {facts['boxes']:,} boxes, {facts['boxes'] / max(1, len(counts)):.1f} a picture, {facts['without']:,} pictures without any (that is fine)"
    )
    return stage


# --- features


class Featurise:
    """Actor: what the frozen base sees in each view and each region; the student's trunk features where its trunk is frozen."""

    def __init__(
        self, base: str, student: str | None, recipe: dict[str, Any], regions: str | None, seed: int, out: str, threads: int
    ) -> None:
        self.pool = _pool(threads)
        import torch

        from dclip_qdrant.models.two_tower import load

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.recipe, self.out, self.seed = Recipe(**recipe), UPath(out), seed
        self.base = load(base).to(self.device)
        self.student = None if student is None else self.base if student == base else load(student).to(self.device)
        self.regions = load_regions(UPath(regions)) if regions else None
        crops = self.base.preprocess
        self.crop_preprocess = replace(crops, resize_mode="squash")
        if self.recipe.teacher and not self.recipe.teacher.normalise_crops:  # as released: ToTensor alone, bilinear squash
            self.crop_preprocess = replace(crops, resize_mode="squash", interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        prepared = list(self.pool.map(self._prepare, rows))
        base, trunk = self._encode(np.stack([v for views, _, _, _ in prepared for v in views]), self.base.preprocess)
        crops = [c for _, cs, _, _ in prepared for c in cs]
        seen, seen_trunk = self._encode(np.stack(crops), self.crop_preprocess) if crops else ([], None)
        found, found_trunk = iter(seen), iter(seen_trunk if seen_trunk is not None else [])
        texts = iter(self._texts([c for r in rows for c in r["captions"]]))
        out, at = [], 0
        for row, (views, cs, boxes, cuts) in zip(rows, prepared, strict=True):
            own, own_trunk = [next(found) for _ in cs], [next(found_trunk) for _ in cs] if trunk is not None else []
            if self.regions is not None and (self.recipe.teacher is None or self.recipe.teacher.include_global):
                own, cuts = [base[at], *own], [(0.0, 0.0, 1.0, 1.0), *cuts]
                own_trunk = [trunk[at], *own_trunk] if trunk is not None else []
            said = [next(texts) for _ in row["captions"]]
            for v in range(len(views)):
                out.append({"key": row["key"], "view": v, "crop": boxes[v][0], "flip": boxes[v][1], "split": row["split"], "captions": row["captions"] if v == 0 else [],
                            "image": base[at], "trunk": trunk[at] if trunk is not None else [], "regions": own if v == 0 else [], "region_boxes": cuts if v == 0 else [], "region_trunk": own_trunk if v == 0 else [], "texts": said if v == 0 else []})  # fmt: skip
                at += 1
        write_part(self.out, contracts.FEATURES, out)
        return pa.table({"done": [len(rows)]})

    def _prepare(
        self, row: dict[str, Any]
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[tuple[tuple[float, ...], bool]], list[tuple[float, ...]]]:
        """Pixels of each view, pixels of each region, what the views are, what the crops are."""
        import hashlib

        from dclip_qdrant.data import apply_view, view_box

        t, r = self.recipe.train, self.recipe.regions
        image = load_image(row)
        rng = np.random.default_rng([self.seed, int.from_bytes(hashlib.sha256(row["key"].encode()).digest()[:8])])
        boxes: list[tuple[tuple[float, ...], bool]] = [((0.0, 0.0, 1.0, 1.0), False)]
        if row["split"] == "train":
            boxes += [(view_box(rng, t.crop_scale), t.flip and bool(rng.random() < 0.5)) for _ in range(t.views - 1)]
        views = [self.base.preprocess.pixels(apply_view(image, np.array(b), f)) for b, f in boxes]
        crops, cuts = [], []
        if self.regions is not None and row["key"] in self.regions:
            pixels = self.regions[row["key"]].top(r.top_k).cuts(image.width, image.height, context=r.context)
            crops = [self.crop_preprocess.pixels(image.crop(c)) for c in pixels]
            cuts = [(a / image.width, b / image.height, c / image.width, d / image.height) for a, b, c, d in pixels]
        return views, crops, boxes, cuts

    def _tensor(self, pixels: np.ndarray, preprocess: Any):
        import torch

        return torch.from_numpy(preprocess.normalise(pixels)).to(self.device)

    def _encode(self, pixels: np.ndarray, preprocess: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The base's features and, where a frozen trunk is cached, the student's trunk features."""
        import torch

        base, trunk = [], []
        with torch.no_grad():
            for s in range(0, len(pixels), 64):
                x = self._tensor(pixels[s : s + 64], preprocess)
                if self.student is self.base:
                    f = self.base.trunk(x)
                    trunk.append(f.float().cpu().numpy())
                    base.append(self.base.head(f).float().cpu().numpy())
                    continue
                base.append(self.base.encode_image(x).float().cpu().numpy())
                if self.student is not None:
                    trunk.append(self.student.trunk(self._tensor(pixels[s : s + 64], self.student.preprocess)).float().cpu().numpy())
        return np.concatenate(base), np.concatenate(trunk) if trunk else None

    def _texts(self, captions: list[str]) -> np.ndarray:
        from dclip_qdrant.training.evaluate import encode_texts

        return encode_texts(self.base, captions, self.device)


def features_stage(
    root: str,
    pairs: Pairs,
    recipe: Recipe,
    *,
    base: str,
    base_print: str,
    student: str,
    student_print: str,
    trunk: bool,
    regions: Stage | None,
    seed: int,
) -> Stage:
    t = recipe.teacher
    inputs = {
        "contract": contracts.FEATURES.version, "pairs": pairs.fingerprint, "base": base_print, "student": student_print if trunk else None, "regions": regions.path.name if regions else None,
        "top_k": recipe.regions.top_k if regions else None, "context": recipe.regions.context if regions else None,
        "views": recipe.train.views, "crop_scale": recipe.train.crop_scale if recipe.train.views > 1 else None, "flip": recipe.train.flip if recipe.train.views > 1 else None,
        "global": t.include_global if t else None, "normalise": t.normalise_crops if t else None, "seed": seed,
    }  # fmt: skip
    return Stage(root, "features", inputs)


def extract_features(
    stage: Stage,
    pairs: Pairs,
    recipe: Recipe,
    *,
    base: str,
    student: str | None,
    regions: Stage | None,
    seed: int,
    actors: int | None,
    say: Say,
) -> None:
    """The features stage; resumes. `student`: whose frozen trunk is cached, or None."""
    if stage.done:
        say(f"features: reused {stage.path.name}")
        return
    kwargs = {"base": base, "student": student, "recipe": recipe.as_dict(), "regions": str(regions.path) if regions else None, "seed": seed}
    map_pairs(
        pairs,
        Featurise,
        kwargs,
        out=stage.path,
        contract=contracts.FEATURES,
        actors=actors,
        batch=32,
        say=lambda line: say(f"features: {line}"),
    )
    count = sum(t.num_rows for t in parts(stage.path, contracts.FEATURES, ["key"]))
    stage.finish(rows=count)
    say(f"features: {count:,} views")


# --- the teacher's vectors


class Teach:
    """Actor: the trained teacher's vector of every view (and caption) of train, from cached features."""

    def __init__(self, base: str, teacher: str, out: str, threads: int) -> None:
        _pool(threads)
        import torch

        from dclip_qdrant.models.two_tower import load
        from dclip_qdrant.training.runs import Spans, load_teacher

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher = load_teacher(UPath(teacher)).to(self.device)
        self.spans = Spans(load(base).to(self.device), self.teacher.cfg.spans, self.device)
        self.out = UPath(out)

    def write(self, table: pa.Table) -> int:
        """Rows of one features part -> one part of the teacher's cache; how many views."""
        rows = [r for r in table.to_pylist() if r["split"] == "train"]
        if rows:
            write_part(self.out, contracts.TEACHER_CACHE, self._teach(rows))
        return len(rows)

    def _teach(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        plain = {r["key"]: r for r in rows if r["view"] == 0}
        lost = next((r["key"] for r in rows if r["key"] not in plain), None)
        if lost:
            raise InputError(lost, "a view without its plain picture in the same part", do="submit again with --from-scratch")
        inside = [self._inside(plain[r["key"]]["captions"]) for r in rows]
        vectors = self._fuse([(r, plain[r["key"]], c) for r, captions in zip(rows, inside, strict=True) for c in captions])
        out, at = [], 0
        for row, captions in zip(rows, inside, strict=True):
            e = vectors[at : at + len(captions)]
            at += len(captions)
            target = self._targets(e, len(plain[row["key"]]["captions"]))
            out.append({k: row[k] for k in ("key", "view", "crop", "flip", "trunk")} | {"teacher_image": list(target)})
        return out

    def _inside(self, captions: list[str]) -> list[str]:
        """The captions that are fused, one after another: none of them by regions_only, nor where a picture has no other."""
        cfg = self.teacher.cfg
        return captions if cfg.fusion == "bidirectional" and (cfg.caption == "same" or len(captions) > 1) else [""]

    def _targets(self, e: np.ndarray, captions: int) -> np.ndarray:
        """Vectors [I, D] with caption i inside -> the target for each caption [C, D], or [1, D] where captions don't matter."""
        cfg = self.teacher.cfg
        if cfg.fusion == "regions_only" or cfg.caption == "same":
            return e
        if len(e) == 1:
            return np.repeat(e, captions, 0)
        return metrics.normalise((e.sum(0, keepdims=True) - e) / (len(e) - 1))  # the target of caption c never holds caption c

    def _fuse(self, jobs: list[tuple[dict[str, Any], dict[str, Any], str]]) -> np.ndarray:
        """(view, its plain row, caption inside) -> unit vectors [J, D]."""
        import torch

        from dclip_qdrant.training.teacher_task import fuse

        width, out = len(jobs[0][0]["image"]), []
        for s in range(0, len(jobs), 256):
            part = jobs[s : s + 256]
            most = max(1, *(len(p["regions"]) for _, p, _ in part)) if part else 1
            regions, mask = np.zeros((len(part), most, width), np.float32), np.zeros((len(part), most), bool)
            for j, (_, p, _) in enumerate(part):
                if p["regions"]:
                    regions[j, : len(p["regions"])], mask[j, : len(p["regions"])] = p["regions"], True
            image = np.array([r["image"] for r, _, _ in part], np.float32)
            tensors = [torch.from_numpy(x).to(self.device) for x in (image, regions, mask)]
            with torch.no_grad():
                out.append(fuse(self.teacher, self.spans, *tensors, [c for _, _, c in part]).cpu().numpy())
        return np.concatenate(out)


def teacher_cache(stage: Stage, features: Stage, *, base: str, teacher: UPath, actors: int | None, say: Say) -> None:
    """The teacher-cache stage; resumes part by part."""
    if stage.done:
        say(f"teacher cache: reused {stage.path.name}")
        return
    import ray

    from dclip_qdrant.cluster import gpus, pool_size, threads_for

    stage.path.mkdir(parents=True, exist_ok=True)
    done = {p.name for p in stage.path.glob("part-*.done")}
    files = [f for f in sorted(features.path.glob("part-*.parquet"), key=str) if f.name + ".done" not in done]
    size = pool_size(actors)

    class TeachFiles(Teach):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            import pyarrow.parquet as pq

            counts = []
            for name in batch["file"]:
                with opened(UPath(str(name))) as f:
                    counts.append(
                        self.write(
                            pq.read_table(f, columns=["key", "view", "crop", "flip", "split", "captions", "image", "trunk", "regions"])
                        )
                    )
                (self.out / (UPath(str(name)).name + ".done")).write_bytes(b"")
            return {"done": np.array(counts)}

    if files:
        ray.data.DataContext.get_current().enable_progress_bars = False
        ds = ray.data.from_items([{"file": str(f)} for f in files])
        ds = ds.map_batches(TeachFiles, fn_constructor_kwargs={"base": base, "teacher": str(teacher), "out": str(stage.path), "threads": threads_for(size)}, batch_size=4, num_cpus=1,
                            num_gpus=1 if gpus() else None, compute=ray.data.ActorPoolStrategy(size=size))  # fmt: skip
        for _ in ds.iter_batches(batch_size=None):
            pass
    count = sum(t.num_rows for t in parts(stage.path, contracts.TEACHER_CACHE, ["key"]))
    stage.finish(rows=count)
    say(f"teacher cache: {count:,} views")
