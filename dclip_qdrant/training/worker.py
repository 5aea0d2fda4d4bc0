"""Does runs: a base model's figures, a teacher, a student. Each writes its stage folder and can be
killed at any moment."""

import json
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.errors import InputError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe, TeacherSettings
from dclip_qdrant.tables import storage
from dclip_qdrant.training import fitted_start, joint_target, rotation, sweep
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.choice import choose_alpha, in_doubt
from dclip_qdrant.training.data import REGION_COLUMNS, TEXT_COLUMNS, Cache, Pictures, load_cache
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.evaluate import LabelledSet, spread
from dclip_qdrant.training.figures import Figures, RunFigures, SweepPoint, save_ranks
from dclip_qdrant.training.loop import Log, fit
from dclip_qdrant.training.measuring import Measures
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.region_teacher import RegionTeacher
from dclip_qdrant.training.node_cache import NodeCaches
from dclip_qdrant.training.reading import InMemory, Reader, Rows
from dclip_qdrant.training.run import Run, needs
from dclip_qdrant.training.streaming import OpenStream, Streamed, first_rows
from dclip_qdrant.training.student_batch import KeptPictures, Uncaptioned
from dclip_qdrant.training.student_task import StudentTask
from dclip_qdrant.training.sweep import Trained
from dclip_qdrant.training.teacher_task import TeacherTask, fuse
from dclip_qdrant.training.trackers import Report

# of a streamed run, where not all pictures of train are in memory
PHRASES_FROM = 20_000  # pictures whose captions phrases are taken from
TURNED_ON = 20_000  # pictures that the rotation for an index is learned on


class Worker:
    """Does runs one after another and keeps what they share: evaluation sets and what frozen towers say of
    them."""

    def __init__(
        self, comm: Comm, device: str, log: Log, open_stream: Callable[[Run], OpenStream] | None = None
    ) -> None:
        """`open_stream`: this rank's share of what a run streams."""
        self.comm = comm
        self._open_stream = open_stream
        self.device = device
        self.log = log
        self.measures = Measures(device)
        self._node_caches = NodeCaches()
        self._kept = KeptPictures()

    def do(self, run: Run) -> None:
        """Does the run unless it is done. All ranks must call it."""
        self.comm.barrier()  # no rank may finish the run (and make it look done) before every rank has looked
        done = run.stage.done
        self.comm.barrier()
        if done:
            self.log(f"{run.label}: done before, reused")
            return
        do = {
            "base": self._base,
            "teacher_model": self._teacher_model,
            "teacher": self._teacher,
            "student": self._student,
        }
        do[run.kind](run, lambda line: self.log(f"{run.label}: {line}"))
        self.comm.barrier()

    @property
    def _cache(self) -> Callable[..., Cache]:
        """What reads cached vectors: into this process, or once a node where there are several ranks."""
        return self._node_caches.load if self.comm.world > 1 else load_cache

    def _report(self, run: Run) -> Report:
        """What a run's epochs are told to."""
        tracker = run.tracker if self.comm.rank == 0 else None
        return Report(run.label, run.stage.path, run.recipe, tracker)

    def close(self) -> None:
        """Removes the files that this process mapped."""
        self._node_caches.remove()

    def _base(self, run: Run, log: Log) -> None:
        if self.comm.rank:
            return
        model = two_tower.load(run.reference or run.student).to(self.device)
        labelled = self.measures.labelled(run)
        accuracy = float(labelled.right(model)[labelled.reported].mean()) if labelled else None
        # cached trunk features are the student's
        ranks = self.measures.reported(run).ranks(model, cached_trunks=run.reference is None)
        self._finish_untrained(run, ranks, accuracy, 1.0 if labelled else None, log)

    def _teacher_model(self, run: Run, log: Log) -> None:
        """What the model that teaches is worth by itself, where it isn't the student's own."""
        if self.comm.rank:
            return
        ranks = self.measures.reported(run).teacher_ranks()
        accuracy = None
        if run.labelled is not None:
            model = two_tower.load(run.base).to(self.device)
            labelled = LabelledSet(run.labelled, self.device)
            accuracy = float(labelled.right(model)[labelled.reported].mean())
        self._finish_untrained(run, ranks, accuracy, None, log)

    def _finish_untrained(
        self, run: Run, ranks: metrics.Ranks, zero_shot: float | None, retention: float | None, log: Log
    ) -> None:
        save_ranks(run.stage.path, "chosen", ranks)
        figures = Figures(metrics.retrieval(ranks), zero_shot, retention)
        labelled = self.measures.labelled(run)
        n_labelled = len(labelled.reported) if labelled else 0
        run.stage.finish(metrics=RunFigures(run.label, figures, n_labelled=n_labelled).as_dict())
        log(_line(figures))

    def _teacher(self, run: Run, log: Log) -> None:
        cfg = TeacherSettings(**run.recipe["teacher"])
        base = two_tower.load(run.base)
        rows, reader = self._train_rows(run)
        task = TeacherTask(cfg, base, rows.captions, rows.cache, seed=run.seed, device=self.device)
        checkpoints, report = Checkpoints(run.stage.path / "checkpoints"), self._report(run)
        began = time.monotonic()
        history = fit(
            task,
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            chunk_size=cfg.batch_size,
            warmup=0.1 if cfg.schedule == "cosine" else 0.0,
            schedule=cfg.schedule,
            clip_norm=1.0,
            checkpoint_s=60.0,
            seed=run.seed,
            reader=reader,
            optimizer=cfg.optimizer,
            comm=self.comm,
            checkpoints=checkpoints,
            device=self.device,
            log=log,
            after_epoch=self._teacher_check(run, task),
            report=report,
        )
        report.close()
        if self.comm.rank:
            return
        state = {key: value.detach().cpu() for key, value in task.modules.state_dict().items()}
        _save_tensors(run.stage.path / "teacher.safetensors", state)
        gate = task.modules.gate
        run.stage.finish(
            config=run.recipe["teacher"],
            dim=rows.cache.image.shape[-1],
            history=history,
            seconds=round(time.monotonic() - began, 1),
            gate=None if gate is None else gate.item(),
            parameters=sum(p.numel() for p in task.modules.parameters()),
        )
        checkpoints.clear()

    def _teacher_check(self, run: Run, task: TeacherTask) -> Callable[[int], dict[str, float]]:
        """Retrieval on val with the fused vectors: caption 1 inside, caption 0 as the query (the same one
        where it is to be copied)."""
        table = Pairs.open(run.pairs).table(["key", "captions"], ("val",))
        lists = table["captions"].to_pylist()
        if not lists:
            return lambda epoch: {}
        cache = load_cache(table["key"].to_pylist(), [len(c) for c in lists], UPath(run.features))
        same = task.cfg.caption == "same"
        inside = [c[0] if same else c[1] if len(c) > 1 else "" for c in lists]

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(self.device)

        @torch.no_grad()
        def check(epoch: int) -> dict[str, float]:
            fused = []
            for start in range(0, len(lists), 256):
                at = slice(start, start + 256)
                image, regions = (
                    tensor(x.astype(np.float32)) for x in (cache.image[at, 0], cache.regions[at])
                )
                mask = tensor(cache.region_mask[at])
                vectors = fuse(task.modules, task.spans, image, regions, mask, inside[at])
                fused.append(vectors.cpu().numpy())
            target = metrics.normalise(cache.texts[cache.first[:-1]])
            ranks = metrics.ranks(np.concatenate(fused), target, np.arange(len(lists)))
            return {"val_mean_r@1": metrics.retrieval(ranks, bootstrap=0)["mean_r@1"]}

        return check

    def _student(self, run: Run, log: Log) -> None:
        trained = self._train_student(run, log)
        points = self._sweep(run, trained)
        if self.comm.rank:
            return
        best = choose_alpha(points, run.min_retention)
        if best.retention is not None and best.retention < run.min_retention:
            log(in_doubt(best, run.min_retention))
        as_trained = None
        if best.alpha != 1.0 or best.fine_tuned:
            end = replace(best, alpha=1.0, fine_tuned=0.0)
            as_trained, _ = self.measures.measure(run, trained, end, "as_trained")
        # the chosen weights are measured last: the model then holds what is written
        chosen, text_map = self.measures.measure(run, trained, best, "chosen")
        turned = self._turn_for_index(run, trained, text_map, log)
        _save_tensors(run.stage.path / "weights.safetensors", trained.model.weights())
        labelled = self.measures.labelled(run)
        figures = RunFigures(
            name=trained.recipe.name,
            chosen=chosen,
            as_trained=as_trained or chosen,
            seed=run.seed,
            alpha=best.alpha,
            hubness=best.hubness,
            fine_tuned=best.fine_tuned,
            sweep=points,
            history=trained.history,
            seconds=round(trained.seconds, 1),
            trained_parameters=trained.learning,
            n_labelled=len(labelled.reported) if labelled else 0,
            rotation=turned,
        )
        run.stage.finish(metrics=figures.as_dict(), recipe=run.recipe)
        trained.checkpoints.clear()
        strength = f"hubness {best.hubness:g} " if trained.recipe.hubness.on else ""
        share = f"fine-tuned {best.fine_tuned:g} " if best.fine_tuned else ""
        log(f"alpha {best.alpha} {share}{strength}{_line(chosen)}")

    def _train_student(self, run: Run, log: Log) -> Trained:
        recipe = Recipe(**run.recipe)
        model = two_tower.load(run.student)
        pairs = Pairs.open(run.pairs)
        rows, reader = self._train_rows(run)

        def all_captions() -> list[list[str]]:
            some = spread(pairs.splits()["train"], PHRASES_FROM)
            return pairs.table(["captions"], ("train",), rows=some)["captions"].to_pylist()

        start = model.weights()
        cache = rows.cache
        if recipe.ensemble.joint:
            cache = self._with_joint_target(run, recipe, cache, model.dim, log)
            if recipe.student.start == "fitted":
                fitted_start.fit(model, _of_student(recipe, rows.cache), cache, log)
        task = StudentTask(
            model,
            recipe,
            rows.pictures,
            rows.captions,
            cache,
            seed=run.seed,
            same_base=run.student == run.base and not recipe.ensemble.joint,
            base=lambda: two_tower.load(run.base),
            uncaptioned=self._uncaptioned(run, pairs, log) if recipe.train.picture_share else None,
            device=self.device,
            all_captions=all_captions if run.streams else None,
            kept=self._kept,
            source=f"{run.features} {run.picture_features}",
        )
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.comm.rank == 0:
            resting = [
                name
                for name, rests in (("image", task.resting.image), ("text", task.resting.text_trunk))
                if rests
            ]
            frozen = f", trunks that are frozen and cached: {', '.join(resting)}" if resting else ""
            log(f"{learning:,} parameters learn{frozen}")
        val = self.measures.choosing(run) if pairs.splits().get("val") else None

        def after_epoch(epoch: int) -> dict[str, float]:
            if val is None or not task.resting.image:
                return {}
            ranks = val.ranks(model, cached_text=task.cached_text)
            return {"val_mean_r@1": metrics.retrieval(ranks, bootstrap=0)["mean_r@1"]}

        checkpoints, report = Checkpoints(run.stage.path / "checkpoints"), self._report(run)
        settings, began = recipe.train, time.monotonic()
        history = fit(
            task,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            chunk_size=settings.chunk_size,
            warmup=settings.warmup,
            schedule=settings.schedule,
            clip_norm=settings.clip_norm,
            checkpoint_s=settings.checkpoint_s,
            seed=run.seed,
            reader=reader,
            l2_sp=recipe.keep.l2_sp,
            ema=recipe.keep.ema,
            comm=self.comm,
            checkpoints=checkpoints,
            device=self.device,
            log=log,
            after_epoch=after_epoch,
            report=report,
        )
        report.close()
        seconds, cached_text = time.monotonic() - began, task.cached_text
        model.merge_lora()
        return Trained(
            recipe=recipe,
            model=model,
            start=start,
            end=model.weights(),
            fine_tuned=two_tower.load(run.fine_tuned).weights() if run.fine_tuned else None,
            cached_text=cached_text,
            history=history,
            seconds=seconds,
            learning=learning,
            val=val,
            checkpoints=checkpoints,
        )

    def _train_rows(self, run: Run) -> tuple[Rows, Reader]:
        """The pictures of train with what is cached of them, and what gives batches of them; where they are
        streamed, a few of them."""
        need = needs(run)
        # the best boxes, and the whole picture
        regions = run.recipe["regions"]["top_k"] + 1 if set(need) & set(REGION_COLUMNS) else 0
        pairs = Pairs.open(run.pairs)
        features, teacher = UPath(run.features), UPath(run.teacher) if run.teacher else None
        if run.streams:
            if self._open_stream is None:
                raise ValueError("no stream to read from")
            rows = first_rows(features, teacher, need=need, regions=regions)
            size = pairs.splits()["train"]
            stream = self._open_stream(run)
            return rows, Streamed(stream, size, need=need, regions=regions, where=run.features)
        pictures = Pictures(pairs, "train")
        captions = pairs.table(["captions"], ("train",))["captions"].to_pylist()
        counts = [len(c) for c in captions]
        cache = self._cache(pictures.keys, counts, features, teacher, need=need)
        cache.others = tuple(
            cache if other == "base" else self._cache(pictures.keys, counts, UPath(other), need=TEXT_COLUMNS)
            for other in run.others
        )
        rows = Rows(cache, captions, pictures, np.arange(len(captions)))
        return rows, InMemory(len(captions), run.seed)

    def _with_joint_target(self, run: Run, recipe: Recipe, cache: Cache, width: int, log: Log) -> Cache:
        """The cache with one target of all teachers in the place of the teacher's vectors."""
        members = [joint_target.Member(c.image, c.texts) for c in (cache, *cache.others)]
        weight = self._joint_weight(run, recipe, log)
        own = _of_student(recipe, cache)
        start = joint_target.Member(own.image, own.texts)
        joint = joint_target.learn(members, joint_target.weights_of(len(members), weight), start, width)
        return replace(
            cache,
            teacher=joint([m.image for m in members])[:, :, None],
            texts=joint([m.text for m in members]),
            text_trunk=None,
            others=(),
        )

    def _joint_weight(self, run: Run, recipe: Recipe, log: Log) -> float:
        """Of every teacher but the first, chosen on validation."""
        candidates = recipe.ensemble.weights
        if len(candidates) == 1:
            return candidates[0]
        if not Pairs.open(run.pairs).splits().get("val"):
            log(f"no val split: further teachers get the middle weight, {candidates[len(candidates) // 2]:g}")
            return candidates[len(candidates) // 2]
        features = [run.features, *(run.features if o == "base" else o for o in run.others)]
        sets = [self.measures.choosing(replace(run, features=of_teacher)) for of_teacher in features]
        members = [joint_target.Member(s.cache.image, s.cache.texts) for s in sets if s.cache is not None]
        weight, found = joint_target.choose_weight(members, candidates, sets[0].owner)
        tried = ", ".join(f"{c:g}: {f:.3f}" for c, f in zip(candidates, found, strict=True))
        log(f"further teachers' weight {weight:g} (mean recall on val: {tried})")
        return weight

    def _uncaptioned(self, run: Run, pairs: Pairs, log: Log) -> Uncaptioned | None:
        """The pictures without captions, less those that also stand in val or test."""
        if run.pictures is None or run.picture_features is None:
            return None
        pictures = Pictures(Pairs.open(run.pictures), "train")
        held_out = set(pairs.table(["pixel_hash"], ("val", "test"))["pixel_hash"].to_pylist())
        hashes = Pairs.open(run.pictures).table(["pixel_hash"], ("train",))["pixel_hash"].to_pylist()
        pictures.keep([i for i, own in enumerate(hashes) if own not in held_out])
        left_out = len(hashes) - len(pictures)
        if self.comm.rank == 0:
            log(f"{len(pictures):,} pictures without captions, {left_out:,} left out: in val or test")
        if not len(pictures):
            came = f"all {len(hashes):,} pictures stand in val or test"
            raise InputError(run.pictures, came, "other pictures")
        cache = self._cache(pictures.keys, [0] * len(pictures), UPath(run.picture_features), need=())
        return Uncaptioned(pictures, cache)

    def _sweep(self, run: Run, trained: Trained) -> list[SweepPoint]:
        # first: it puts the starting weights into the model
        kept = self.measures.kept_of_base(run, trained)
        return sweep.sweep(trained, kept, self.measures.telling_hubs(run, trained), self.comm)

    def _turn_for_index(
        self, run: Run, trained: Trained, text_map: np.ndarray | None, log: Log
    ) -> dict[str, float] | None:
        """Turns both towers so that short and quantised vectors lose less, where the recipe says so."""
        cfg = trained.recipe.index
        if not cfg.objectives:
            return None
        train = self.measures.eval_set(run, "train", TURNED_ON if run.streams else None)
        image, text = train.vectors(trained.model, cached_text=trained.cached_text, text_map=text_map)
        turn, figures = rotation.learn(image, text, train.owner, cfg, seed=run.seed)
        trained.model.map_outputs(turn.to(self.device), turn.to(self.device))
        log("rotated for the index, loss {loss_before:.4f} -> {loss_after:.4f}".format(**figures))
        return figures


def _of_student(recipe: Recipe, cache: Cache) -> Cache:
    """What the student's model says before it learns, among a joint recipe's further teachers."""
    return cache.others[recipe.ensemble.models.index("student")]


def load_teacher(stage: UPath) -> RegionTeacher:
    """A trained teacher from its stage folder."""
    manifest = json.loads((stage / "manifest.json").read_text())
    teacher = RegionTeacher(manifest["dim"], TeacherSettings(**manifest["config"]))
    teacher.load_state_dict(safetensors.torch.load((stage / "teacher.safetensors").read_bytes()))
    return teacher.eval().requires_grad_(False)


def _save_tensors(path: UPath, tensors: dict[str, Tensor]) -> None:
    storage.write_bytes(path, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}))


def _line(figures: Figures) -> str:
    """Recall both ways, and zero-shot accuracy where it was measured."""

    def recalls(way: metrics.DirectionFigures) -> str:
        return " ".join(f"{way[f'r@{k}']:.3f}" for k in metrics.KS)

    line = f"t2i R@1/5/10 {recalls(figures.test['t2i'])}  i2t {recalls(figures.test['i2t'])}"
    return line + (f"  zero-shot {figures.zero_shot:.3f}" if figures.zero_shot is not None else "")
