"""Students by name, and what turns inputs into vectors."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dclip_qdrant.errors import UsageError
from dclip_qdrant.lookup import did_you_mean
from dclip_qdrant.metrics import shorten
from dclip_qdrant.service.batcher import Batcher, Line
from dclip_qdrant.service.inputs import Input, picture
from dclip_qdrant.service.limits import Limits, Refused
from dclip_qdrant.serving.student import REGIONS_SUFFIX, TOP_K, Student

MOST = {"text": 64, "image": 32}  # a batch; as `Student` runs them


class Figures:
    """What /metrics says. A registry of its own, so that several services can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("dclip_requests", "Requests.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "dclip_request_seconds",
            "Seconds a request.",
            ["route"],
            registry=self.registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
        )
        self.inputs = Counter("dclip_inputs", "Things embedded.", ["model", "kind"], registry=self.registry)
        self.batch = Histogram(
            "dclip_batch_size",
            "Inputs embedded in one go.",
            ["model", "tower"],
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        self.waiting = Gauge("dclip_waiting_inputs", "Inputs in line.", registry=self.registry)


class Engine:
    """Every student that the service answers for."""

    def __init__(
        self,
        students: list[Student],
        *,
        limits: Limits,
        figures: Figures | None = None,
        detector: Any = None,
        context: float = 0.1,
    ) -> None:
        self.limits, self.figures, self.detector, self.context = (
            limits,
            figures or Figures(),
            detector,
            context,
        )
        self.students = {s.model_name: s for s in students}
        self._names: dict[str, Student] = {s.model_name.lower(): s for s in students}
        for s in students:
            short = f"dclip/{s.name}".lower()
            if short in self._names and self._names[short].fingerprint != s.fingerprint:
                raise UsageError(
                    "`students`",
                    f"two students named {s.name!r}",
                    "different names",
                    "export one with another name",
                )
            self._names[short] = s
        self.line = Line(limits.waiting)
        self.figures.waiting.set_function(lambda: self.line.now)
        self.decoders = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="decode")
        self._runners = {
            (name, tower): ThreadPoolExecutor(1, thread_name_prefix=f"{tower}-tower")
            for name in self.students
            for tower in MOST
        }
        self._batchers: dict[tuple[str, str], Batcher] = {}
        for name, s in self.students.items():
            for tower, embed in (("text", s.embed_texts), ("image", s.embed_pixels)):
                seen = self.figures.batch.labels(name, tower).observe
                self._batchers[name, tower] = Batcher(
                    embed, self._runners[name, tower], most=MOST[tower], seen=seen
                )

    def warm(self) -> None:
        """Opens every session, so that the first request isn't the slow one."""
        for s in self.students.values():
            s.embed_texts(["warm"])
            s.embed_images([Image.new("RGB", (s.preprocess.size, s.preprocess.size))])

    def student(self, model: str, where: str = "model") -> tuple[Student, bool]:
        """The student behind a name, and whether its regions are meant. Raises Refused."""
        name, regions = model.lower(), False
        if name.endswith(REGIONS_SUFFIX):
            name, regions = name.removesuffix(REGIONS_SUFFIX), True
        if name not in self._names:
            raise Refused(
                400, f"{where}: no model {model[:80]!r} here; {did_you_mean(name, list(self._names))}"
            )
        return self._names[name], regions

    async def embed(self, inputs: list[Input]) -> list[np.ndarray]:
        """A vector [D] an input, or [R, D] for "/regions" models; in order. Raises Refused."""
        who = [
            self.student(i.model, f"{i.where}.model") for i in inputs
        ]  # every name is right before anything is decoded
        for i, (s, _) in zip(inputs, who, strict=True):
            if i.dim is not None and i.dim > s.dim:
                raise Refused(400, f"{i.where}.options.dim: {i.dim}; {s.model_name} has {s.dim}")
        self.line.enter(len(inputs))
        try:
            vectors = await asyncio.gather(
                *(self._one(i, s, regions) for i, (s, regions) in zip(inputs, who, strict=True))
            )
            return [shorten(v, i.dim) for v, i in zip(vectors, inputs, strict=True)]
        finally:
            self.line.leave(len(inputs))

    async def _one(self, given: Input, student: Student, regions: bool) -> np.ndarray:
        name = student.model_name
        self.figures.inputs.labels(name, given.kind).inc()
        if given.kind == "text":
            (vector,) = await self._batchers[name, "text"]([given.data])
            return vector[None] if regions else vector
        pixels = await asyncio.get_running_loop().run_in_executor(
            self.decoders, self._pixels, given, student, regions
        )
        vectors = await self._batchers[name, "image"](pixels)
        return np.stack(vectors) if regions else vectors[0]

    def _pixels(self, given: Input, student: Student, regions: bool) -> list[np.ndarray]:
        image = picture(given, self.limits)
        if not regions:
            return [student.preprocess.pixels(image)]
        (regions_found,) = self.detector([image])
        return student.region_pixels(image, regions_found.top(TOP_K), context=self.context)

    def close(self) -> None:
        for pool in (self.decoders, *self._runners.values()):
            pool.shutdown(wait=False, cancel_futures=True)
