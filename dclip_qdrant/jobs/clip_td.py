"""CLIP-TD's own task as one Ray task: published files in, tables out."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dclip_qdrant.errors import UsageError
from dclip_qdrant.jobs.cluster import as_one_task
from dclip_qdrant.settings import checked, options
from dclip_qdrant.tables import storage
from dclip_qdrant.tasks.reasoning import readers
from dclip_qdrant.tasks.reasoning.examples import Example
from dclip_qdrant.tasks.reasoning.run import compared, protocol, table
from dclip_qdrant.tasks.reasoning.task import Config

FILES = {
    "vqa": "questions.json,annotations.json",
    "snli_ve": "examples.jsonl",
    "vcr": "examples.jsonl",
}


@dataclass(frozen=True)
class ClipTdRequest:
    """Paths are absolute; `settings` are `key=value` of the task's Config."""

    task: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    images: str
    test_images: str
    teacher: str
    out: str
    detector: tuple[str, dict[str, Any]] = ("grid", {})
    parts: tuple[float, ...] = (0.1, 1.0)
    shift: bool = False
    seeds: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = ()


def clip_td_as_task(request: ClipTdRequest) -> list[dict[str, Any]]:
    """The rows of `tasks.reasoning.run.protocol`, also written to `clip_td.json` under `out`.

    Raises:
        RecipeError: a setting that isn't there. UsageError: files of another task. InputError: a broken file.
    """
    config = checked(Config, options(request.settings, "`settings`"), "`settings`")
    if config.unlabelled and request.task == "vcr":
        expected = "false: which of an example's texts is distilled is its answer"
        raise UsageError("`settings` unlabelled", "true with `task` vcr", expected)
    results = as_one_task(
        protocol,
        read_examples(request.task, request.train, request.images),
        read_examples(request.task, request.test, request.test_images),
        teacher=request.teacher,
        detector=request.detector,
        out=request.out,
        config=config,
        parts=request.parts,
        shift=request.shift,
        seeds=request.seeds,
    )
    storage.write_json(storage.as_path(request.out) / "clip_td.json", results)
    return results


def read_examples(task: str, files: Sequence[str], images: str) -> dict[str, list[Example]]:
    """The sub-tasks of a task: {"vqa": examples}, {"snli_ve": examples}, or {"q->a": …, "qa->r": …}."""
    if len(files) != len(FILES[task].split(",")):
        raise UsageError("`train` or `test`", f"{len(files)} files for {task}", FILES[task])
    if task == "vcr":
        answers, rationales = readers.vcr(files[0], images)
        return {"q->a": answers, "qa->r": rationales}
    if task == "vqa":
        return {task: readers.vqa(files[0], files[1], images)}
    return {task: readers.snli_ve(files[0], images)}


def tables(results: list[dict[str, Any]]) -> str:
    """Means over seeds with their spread, and the differences, as Markdown."""
    rows = []
    for result in results:
        figures = {}
        for name, values in result["figures"].items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            figures[name] = (statistics.mean(values), spread)
        rows.append({"method": result["method"], "examples": result["examples"], **figures})
    return "\n".join([table(rows), "", *compared(results)])
