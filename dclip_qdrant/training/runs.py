"""Runs: a base model's figures, a teacher, a student. Each takes a `Run`, writes its stage folder and can be killed at any moment."""

import io
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.data import Pictures, load_cache
from dclip_qdrant.models import two_tower
from dclip_qdrant.models.region_teacher import RegionTeacher
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe, Teacher
from dclip_qdrant.stages import Stage
from dclip_qdrant.training import hubness, rotation
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.evaluate import EvalSet, LabelledSet
from dclip_qdrant.training.loop import fit
from dclip_qdrant.training.student_task import StudentTask, reads_regions
from dclip_qdrant.training.teacher_task import Spans, TeacherTask, fuse

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """Plain values alone: it travels to workers as it is."""

    kind: str  # base | teacher | student
    root: str  # where the stage folder goes
    inputs: dict[str, Any]  # what names it
    recipe: dict[str, Any]
    seed: int
    base: str  # the teacher's model
    student: str
    pairs: str
    features: str
    teacher: str | None = None  # teacher cache
    others: tuple[str, ...] = ()  # features of the recipe's further teachers, or "base"
    reference: str | None = None  # the model that retention is measured against; None: the student as it starts
    labelled: str | None = None
    min_retention: float = 1.0
    split: str = "test"

    @property
    def stage(self) -> Stage:
        return Stage(self.root, self.kind, self.inputs)

    @property
    def label(self) -> str:
        return f"{self.kind} {self.recipe['name']} seed {self.seed}" if self.kind != "base" else "base"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Worker:
    """Does runs one after another and keeps what they share: evaluation sets and what frozen towers say of them."""

    def __init__(self, comm: Comm, device: str, say: Say) -> None:
        self.comm, self.device, self.say = comm, device, say
        self._sets: dict[Any, Any] = {}

    def do(self, run: Run) -> None:
        """Does the run unless it is done. All ranks must call it."""
        self.comm.barrier()  # no rank may finish the run (and so make it look done) before every rank has looked
        done = run.stage.done
        self.comm.barrier()
        if done:
            self.say(f"{run.label}: done before, reused")
            return
        say = lambda line: self.say(f"{run.label}: {line}")
        {"base": self._base, "teacher": self._teacher, "student": self._student}[run.kind](run, say)
        self.comm.barrier()

    def _set(self, run: Run, split: str, most: int | None = None) -> EvalSet:
        key = (run.pairs, run.features, split, most)
        if key not in self._sets:
            self._sets[key] = EvalSet(Pairs.open(run.pairs), split, UPath(run.features), self.device, most=most)
        return self._sets[key]

    def _place(self, run: Run, model: two_tower.TwoTower, weights: dict[str, torch.Tensor], strength: float, *, cached_text: bool) -> np.ndarray | None:
        """Loads weights and turns their hubs down; the text side's map, which cached text vectors lack."""
        model.load_weights(weights)
        if not strength:
            return None
        cfg = Recipe(**run.recipe).hubness
        image_map, text_map = hubness.maps(*self._set(run, "train", cfg.pictures).vectors(model, cached_text=cached_text), cfg.share, strength)
        model.map_outputs(image_map.to(self.device), text_map.to(self.device))
        return text_map.float().numpy()

    def _labelled(self, run: Run) -> LabelledSet | None:
        if run.labelled and ("labelled", run.labelled) not in self._sets:
            self._sets["labelled", run.labelled] = LabelledSet(run.labelled, self.device)
        return self._sets.get(("labelled", run.labelled))

    def _base_accuracy(self, run: Run, model: two_tower.TwoTower, start: dict[str, torch.Tensor]) -> float:
        """Zero-shot accuracy of the reference, or of the weights that every run of this model starts from; measured once."""
        key = ("base accuracy", run.labelled, run.reference or run.student)
        if key not in self._sets:
            if run.reference:
                model = two_tower.load(run.reference).to(self.device)
            else:
                model.load_weights(start)
            self._sets[key] = self._labelled(run).accuracy(model)
        return self._sets[key]

    def _base(self, run: Run, say: Say) -> None:
        if self.comm.rank:
            return
        model = two_tower.load(run.reference or run.student).to(self.device)
        labelled = self._labelled(run)
        accuracy = labelled.accuracy(model) if labelled else None
        figures = {
            "name": "base",
            "zero_shot": accuracy,
            "retention": 1.0 if labelled else None,
            "n_labelled": len(labelled.data) if labelled else 0,
        }
        r = self._set(run, run.split).ranks(model, cached_text=False)
        figures["test"] = metrics.retrieval(r)
        _save_ranks(run.stage.path, "test", r)
        run.stage.finish(metrics=figures)
        say(_line(figures["test"], accuracy))

    def _teacher(self, run: Run, say: Say) -> None:
        cfg = Teacher(**run.recipe["teacher"])
        base = two_tower.load(run.base)
        pairs = Pairs.open(run.pairs)
        captions = pairs.table(["key", "captions"], ("train",))
        lists = captions["captions"].to_pylist()
        cache = load_cache(captions["key"].to_pylist(), [len(c) for c in lists], UPath(run.features))
        task = TeacherTask(cfg, base, lists, cache, seed=run.seed, device=self.device)
        check = self._teacher_check(run, task)
        began = time.monotonic()
        history = fit(
            task, epochs=cfg.epochs, batch_size=cfg.batch_size, chunk_size=cfg.batch_size, warmup=0.1 if cfg.schedule == "cosine" else 0.0, schedule=cfg.schedule,
            clip_norm=1.0, checkpoint_s=60.0, seed=run.seed, optimizer=cfg.optimizer, comm=self.comm, checkpoints=Checkpoints(run.stage.path / "checkpoints"),
            device=self.device, say=say, after_epoch=check,
        )  # fmt: skip
        if self.comm.rank == 0:
            _save_tensors(run.stage.path / "teacher.safetensors", {k: v.detach().cpu() for k, v in task.modules.state_dict().items()})
            gate = task.modules.gate
            run.stage.finish(config=run.recipe["teacher"], dim=cache.image.shape[-1], history=history, seconds=round(time.monotonic() - began, 1),
                             gate=None if gate is None else gate.item(), parameters=sum(p.numel() for p in task.modules.parameters()))  # fmt: skip
            Checkpoints(run.stage.path / "checkpoints").clear()

    def _teacher_check(self, run: Run, task: TeacherTask) -> Callable[[int], dict[str, float]]:
        """Retrieval on val with the fused vectors: caption 1 inside, caption 0 as the query (the same one where it is to be copied)."""
        pairs = Pairs.open(run.pairs)
        table = pairs.table(["key", "captions"], ("val",))
        lists = table["captions"].to_pylist()
        if not lists:
            return lambda epoch: {}
        cache = load_cache(table["key"].to_pylist(), [len(c) for c in lists], UPath(run.features))
        same = task.cfg.caption == "same"
        inside = [c[0] if same else c[1] if len(c) > 1 else "" for c in lists]

        @torch.no_grad()
        def check(epoch: int) -> dict[str, float]:
            out = []
            for s in range(0, len(lists), 256):
                at = slice(s, s + 256)
                image, regions = (torch.from_numpy(x.astype(np.float32)).to(self.device) for x in (cache.image[at, 0], cache.regions[at]))
                out.append(
                    fuse(task.modules, task.spans, image, regions, torch.from_numpy(cache.region_mask[at]).to(self.device), inside[at])
                    .cpu()
                    .numpy()
                )
            target = metrics.normalise(cache.texts[cache.first[:-1]])
            figures = metrics.retrieval(metrics.ranks(np.concatenate(out), target, np.arange(len(lists))), bootstrap=0)
            return {"val_mean_r@1": figures["mean_r@1"]}

        return check

    def _student(self, run: Run, say: Say) -> None:
        recipe = Recipe(**run.recipe)
        model = two_tower.load(run.student)
        same_base = run.student == run.base
        pairs = Pairs.open(run.pairs)
        pictures = Pictures(pairs, "train")
        captions = pairs.table(["captions"], ("train",))["captions"].to_pylist()
        cache = load_cache(pictures.keys, [len(c) for c in captions], UPath(run.features), UPath(run.teacher) if run.teacher else None,
                           need=("texts", "regions", "region_boxes", "region_trunk") if reads_regions(recipe) else ("texts",))  # fmt: skip
        cache.others = tuple(
            cache if o == "base" else load_cache(pictures.keys, [len(c) for c in captions], UPath(o), need=("texts",)) for o in run.others
        )
        start = model.weights()
        task = StudentTask(model, recipe, pictures, captions, cache, seed=run.seed, same_base=same_base, base=lambda: two_tower.load(run.base), device=self.device)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.comm.rank == 0:
            say(f"{learning:,} parameters learn" + (", the image trunk is frozen and cached" if task.use_trunk else ""))
        t, began = recipe.train, time.monotonic()
        val = self._set(run, "val") if self.comm.rank == 0 and pairs.splits().get("val") else None

        def after_epoch(epoch: int) -> dict[str, float]:
            figures = (
                metrics.retrieval(val.ranks(model, cached_text=task.cached_text), bootstrap=0)
                if val is not None and task.use_trunk
                else None
            )
            return {"val_mean_r@1": figures["mean_r@1"]} if figures else {}

        checkpoints = Checkpoints(run.stage.path / "checkpoints")
        history = fit(
            task, epochs=t.epochs, batch_size=t.batch_size, chunk_size=t.chunk_size, warmup=t.warmup, schedule=t.schedule, clip_norm=t.clip_norm,
            checkpoint_s=t.checkpoint_s, seed=run.seed, l2_sp=recipe.keep.l2_sp, ema=recipe.keep.ema, comm=self.comm, checkpoints=checkpoints,
            device=self.device, say=say, after_epoch=after_epoch,
        )  # fmt: skip
        if self.comm.rank:
            return
        seconds = time.monotonic() - began
        frozen_text = task.cached_text
        model.merge_lora()
        end = model.weights()
        labelled = self._labelled(run)
        base_accuracy = self._base_accuracy(run, model, start) if labelled else None
        sweep = []
        for alpha, strength in itertools.product(recipe.keep.wise_ft, recipe.hubness.strengths):
            text_map = self._place(run, model, interpolate_to(start, end, alpha), strength, cached_text=frozen_text)
            point: dict[str, Any] = {"alpha": alpha, "hubness": strength}
            if val is not None:
                figures = metrics.retrieval(val.ranks(model, cached_text=frozen_text, text_map=text_map), bootstrap=0)
                # R@1 alone is one picture in a hundred of noise on small splits: R@1, 5 and 10 of both directions choose together
                point["val"] = float(np.mean([figures[w][f"r@{k}"] for w in ("t2i", "i2t") for k in metrics.KS]))
                point["val_mean_r@1"] = figures["mean_r@1"]
            if labelled:
                point["zero_shot"] = labelled.accuracy(model)
                point["retention"] = point["zero_shot"] / max(base_accuracy, 1e-9)
            sweep.append(point)
        best = choose_alpha(sweep, run.min_retention)
        figures = {"name": recipe.name, "seed": run.seed, "alpha": best["alpha"], "hubness": best["hubness"], "sweep": sweep, "history": history, "seconds": round(seconds, 1),
                   "trained_parameters": learning}  # fmt: skip
        test = self._set(run, run.split)
        # the chosen alpha comes last: its weights are then those that are written
        for suffix, alpha in (("_at_1", 1.0), ("", best["alpha"]))[best["alpha"] == 1.0 :]:
            text_map = self._place(run, model, interpolate_to(start, end, alpha), best["hubness"], cached_text=frozen_text)
            r = test.ranks(model, cached_text=frozen_text, text_map=text_map)
            figures["test" + suffix] = metrics.retrieval(r)
            if labelled:
                known = next((p["zero_shot"] for p in sweep if p["alpha"] == alpha and p["hubness"] == best["hubness"]), None)
                figures["zero_shot" + suffix] = labelled.accuracy(model) if known is None else known
                figures["retention" + suffix] = figures["zero_shot" + suffix] / max(base_accuracy, 1e-9)
            _save_ranks(run.stage.path, "test" + suffix, r)
        if best["alpha"] == 1.0:
            figures["test_at_1"], figures["retention_at_1"] = figures["test"], figures.get("retention")
        if recipe.index.objectives:
            train = self._set(run, "train")
            vectors = train.vectors(model, cached_text=frozen_text, text_map=text_map)
            turn, figures["rotation"] = rotation.learn(*vectors, train.owner, recipe.index, seed=run.seed)
            model.map_outputs(turn.to(self.device), turn.to(self.device))
            say("rotated for the index, loss {loss_before:.4f} -> {loss_after:.4f}".format(**figures["rotation"]))
        _save_tensors(run.stage.path / "weights.safetensors", model.weights())
        run.stage.finish(metrics=figures, recipe=run.recipe)
        checkpoints.clear()
        say(f"alpha {best['alpha']} " + (f"hubness {best['hubness']:g} " if recipe.hubness.on else "") + _line(figures["test"], figures.get("zero_shot")))


def interpolate_to(start: dict, end: dict, alpha: float) -> dict:
    return end if alpha == 1.0 else two_tower.interpolate(start, end, alpha)


def choose_alpha(sweep: list[dict[str, Any]], min_retention: float) -> dict[str, Any]:
    """The point with the best validation retrieval among those that keep `min_retention`; if none does, the one that keeps most."""
    keeps = [p for p in sweep if p.get("retention") is None or p["retention"] >= min_retention]
    if keeps:
        return max(keeps, key=lambda p: (p.get("val", 0.0), p["alpha"]))
    return max(sweep, key=lambda p: p["retention"])


def load_teacher(stage: UPath) -> RegionTeacher:
    """A trained teacher from its stage folder."""
    manifest = json.loads((stage / "manifest.json").read_text())
    teacher = RegionTeacher(manifest["dim"], Teacher(**manifest["config"]))
    teacher.load_state_dict(safetensors.torch.load((stage / "teacher.safetensors").read_bytes()))
    return teacher.eval().requires_grad_(False)


def load_ranks(stage: UPath, name: str) -> metrics.Ranks:
    with np.load(io.BytesIO((stage / f"ranks-{name}.npz").read_bytes()), allow_pickle=False) as f:
        cuts = np.cumsum(f["counts"])[:-1]
        return metrics.Ranks(f["t2i"], np.split(f["i2t"], cuts), f["owner"])


def _save_ranks(folder: UPath, name: str, r: metrics.Ranks) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, t2i=r.t2i, i2t=np.concatenate(r.i2t), counts=[len(x) for x in r.i2t], owner=r.owner)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"ranks-{name}.npz").write_bytes(buffer.getvalue())


def _save_tensors(path: UPath, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))


def _line(figures: dict[str, Any], accuracy: float | None) -> str:
    t, i = figures["t2i"], figures["i2t"]
    return (f"t2i R@1/5/10 {t['r@1']:.3f} {t['r@5']:.3f} {t['r@10']:.3f}  i2t {i['r@1']:.3f} {i['r@5']:.3f} {i['r@10']:.3f}"
            + (f"  zero-shot {accuracy:.3f}" if accuracy is not None else ""))  # fmt: skip


__all__ = ["Run", "Spans", "Worker", "choose_alpha", "load_ranks", "load_teacher"]
