"""CLIP-TD's protocol from examples to a table: the task alone, naive distillation and targeted distillation,
low-shot and under domain shift."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.detectors import build
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import digest
from dclip_qdrant.tasks.reasoning import scores
from dclip_qdrant.tasks.reasoning.examples import Example, domain_shift, low_shot, targets, vocabulary
from dclip_qdrant.tasks.reasoning.readers import ENTAILMENT
from dclip_qdrant.tasks.reasoning.task import Config, Reasoning
from dclip_qdrant.tasks.reasoning.teacher import Seen, confidences, look
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.loop import Log, fit
from dclip_qdrant.training.models import two_tower

logger = logging.getLogger(__name__)

METHODS = {"task alone": "none", "naive distillation": "naive", "clip_td": "targeted"}


def answers_of(task: str, train: Sequence[Example], size: int = 3129) -> list[str]:
    """The answers that a task is scored over; none for VCR, whose choices come with each example."""
    return {"vqa": lambda: vocabulary(train, size), "snli_ve": lambda: list(ENTAILMENT), "vcr": list}[task]()


def each(task: str, picked: np.ndarray, examples: Sequence[Example], answers: Sequence[str]) -> np.ndarray:
    """[N] how right each pick is: VQA's soft accuracy, else 0 or 1; a task's figure is the mean. picked [N]:
    numbers of answers or choices."""
    if task == "vqa":
        return np.array(
            [scores.soft_accuracy(str(answers[p]), e.answers) for p, e in zip(picked, examples, strict=True)]
        )
    if task == "snli_ve":
        return np.array([float(answers[p] in e.soft) for p, e in zip(picked, examples, strict=True)])
    return np.array([float(p == e.label) for p, e in zip(picked, examples, strict=True)])


def run(
    task: str,
    train: Sequence[Example],
    tests: dict[str, Sequence[Example]],
    *,
    teacher: str,
    detector: Any,
    out: str,
    config: Config | None = None,
    log: Log = logger.info,
    device: str = "cpu",
    unlabelled: Sequence[Example] = (),
    seen: Callable[[], Seen] | None = None,
) -> dict[str, Any]:
    """Trains one student and measures it on every test set; {"figures": {name: figure}, "picked": {name:
    [N]}, "right": {name: [N] 0..1}, "history": ...}.

    `detector`: pictures -> list of Regions. `unlabelled`: examples whose pictures and texts the first step
    sees too; their answers stay unread. A killed run resumes; a finished one under the same inputs is read
    back. `seen`: gives what the teacher saw of these pictures (and maybe of others), looked at once for
    several runs.

    Raises:
        ValueError: no training examples, or unlabelled ones of VCR (which of an example's texts is distilled
            is its answer).
    """
    config = config or Config()
    if not train:
        raise ValueError("no training examples")
    if unlabelled and task == "vcr":
        raise ValueError("unlabelled examples of VCR: which of an example's texts is distilled is its answer")
    answers = answers_of(task, train)
    folder = storage.as_path(out)
    mark = digest(
        {
            "task": task,
            "train": [e.id for e in train],
            "tests": {k: [e.id for e in v] for k, v in tests.items()},
            "teacher": teacher,
            "config": config.model_dump(),
            "answers": answers,
            "detector": getattr(detector, "fingerprint", ""),
            "unlabelled": [e.id for e in unlabelled],
        }
    )
    done = folder / f"{task}-{mark}.json"
    if done.exists():
        log("reused")
        return json.loads(done.read_text())
    tower = two_tower.load(teacher).to(device)
    pictures = lambda sets: [e.picture for examples in sets for e in examples]
    sight = (
        seen()
        if seen
        else look(
            tower,
            pictures([train, unlabelled]),
            detector,
            size=config.image_size,
            top_k=config.top_k,
            plain=pictures(tests.values()),
            device=device,
            log=log,
        )
    )
    make = lambda examples, target, **more: Reasoning(
        examples, sight, tower, config, target=target, soft=task == "vqa", device=device, **more
    )
    target = _targets(task, train, answers)
    points = folder / f"{task}-{mark}"
    batch = min(config.batch_size, len(train))
    learn = lambda learner, epochs, step: fit(
        learner,
        epochs=epochs,
        batch_size=batch,
        chunk_size=batch,
        warmup=0.1,
        schedule="cosine",
        clip_norm=1.0,
        checkpoint_s=30.0,
        seed=config.seed,
        checkpoints=Checkpoints(points / step),
        device=device,
        log=lambda text: log(f"{step}: {text}"),
    )
    adapt_steps = config.adapt_epochs * ((len(train) + len(unlabelled)) // batch)
    if (
        config.distill == "none"
    ):  # all methods make as many steps: the task alone has them as steps of the task
        learner = make(train, target, confidence=None)
        history = learn(learner, config.finetune_epochs + round(adapt_steps / (len(train) // batch)), "task")
    else:
        # of an example whose answer nobody knows, nobody knows whether its statement is true
        sure = (
            np.concatenate(
                [confidences(tower, train, sight, device=device), np.full(len(unlabelled), 0.5, np.float32)]
            )
            if config.confidence
            else None
        )
        first = make((*train, *unlabelled), target, confidence=sure, adapting=True)
        history = learn(first, config.adapt_epochs, "adapt")
        learner = make(train, target, confidence=None if sure is None else sure[: len(train)])
        learner.student.load_state_dict(first.student.state_dict())
        history += learn(learner, config.finetune_epochs, "finetune")
    result: dict[str, Any] = {
        "figures": {},
        "picked": {},
        "right": {},
        "history": history,
        "train": len(train),
    }
    for name, examples in tests.items():
        judge = make(examples, _targets(task, examples, answers), confidence=None)
        judge.student.load_state_dict(learner.student.state_dict())
        picked = judge.scores().argmax(1)
        right = each(task, picked, examples, answers)
        result["figures"][name] = float(right.mean())
        result["picked"][name] = picked.tolist()
        result["right"][name] = right.tolist()
    storage.write_text(done, json.dumps(result) + "\n")
    for step in ("task", "adapt", "finetune"):
        Checkpoints(points / step).clear()
    return result


def _targets(task: str, examples: Sequence[Example], answers: Sequence[str]) -> np.ndarray:
    if task == "vcr":
        choices = len(examples[0].choices)
        return np.eye(choices, dtype=np.float32)[np.array([e.label for e in examples])]
    return targets(examples, answers)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows {"method", "examples", figures by name: (mean, spread)} as Markdown."""
    names = [k for k in rows[0] if k not in ("method", "examples")]
    cell = lambda v: f"{100 * v[0]:.1f}" + (f" ± {100 * v[1]:.1f}" if v[1] is not None else "")
    lines = ["| examples | method | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    return "\n".join(
        [
            *lines,
            *(
                f"| {r['examples']:,} | {r['method']} | " + " | ".join(cell(r[n]) for n in names) + " |"
                for r in rows
            ),
        ]
    )


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each difference of `protocol`'s rows to the task alone."""
    return [
        f"{r['method']} minus task alone, {r['examples']:,} examples, {name}: "
        f"{100 * d['difference']:+.1f} points, 95% [{100 * d['ci'][0]:+.1f}, "
        f"{100 * d['ci'][1]:+.1f}]"
        for r in rows
        for name, d in r.get("differences", {}).items()
    ]


def protocol(
    train: dict[str, Sequence[Example]],
    test: dict[str, Sequence[Example]],
    *,
    teacher: str,
    detector: tuple[str, dict[str, Any]],
    out: str,
    config: Config,
    parts: Sequence[float] = (1.0,),
    shift: bool = False,
    seeds: Sequence[int] = (0,),
    log: Log = logger.info,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Every method at every part of the training examples: [{"method", "part", "examples", "figures": {name:
    [a figure a seed]}, "differences": {name: {"difference", "ci"}}}], the last against the task alone, paired
    over test examples with seeds averaged.

    `train` and `test` by sub-task: {"vqa": ...}, {"snli_ve": ...}, or VCR's {"q->a": ..., "qa->r": ...},
    which are trained apart and scored together (Q->AR). With `shift` whole groups are held out of training
    and measured as "shifted".
    """
    finder = build(*detector)
    kind = lambda name: name if name in ("vqa", "snli_ve") else "vcr"
    held = {
        name: domain_shift(examples, seed=0) if shift else (list(examples), [])
        for name, examples in train.items()
    }
    tests = {
        name: {"test": test[name]} | ({"shifted": away} if away else {}) for name, (_, away) in held.items()
    }
    few = {
        (part, seed): {name: low_shot(stay, part, seed=seed) for name, (stay, _) in held.items()}
        for part in parts
        for seed in seeds
    }

    @cache
    def seen() -> Seen:
        learned = [
            e.picture
            for sets in ([{n: stay for n, (stay, _) in held.items()}] if config.unlabelled else few.values())
            for examples in sets.values()
            for e in examples
        ]
        asked = [e.picture for sets in tests.values() for examples in sets.values() for e in examples]
        return look(
            two_tower.load(teacher).to(device),
            learned,
            finder,
            size=config.image_size,
            top_k=config.top_k,
            plain=asked,
            device=device,
            log=log,
        )

    rows = []
    for part in parts:
        for method, distill in METHODS.items():
            row: dict[str, Any] = {"method": method, "part": part, "examples": 0, "figures": {}}
            right: dict[str, list[np.ndarray]] = {}
            for seed in seeds:
                cfg = config.model_copy(update={"distill": distill, "seed": seed})
                picked: dict[str, dict[str, Any]] = {}
                for name, examples in few[part, seed].items():
                    line = lambda text, name=name, method=method, part=part, seed=seed: log(
                        f"{name}, {method}, part {part:g}, seed {seed}: {text}"
                    )
                    labelled = {e.id for e in examples}
                    others = [e for e in held[name][0] if e.id not in labelled] if config.unlabelled else []
                    picked[name] = run(
                        kind(name),
                        examples,
                        tests[name],
                        teacher=teacher,
                        detector=finder,
                        out=out,
                        config=cfg,
                        log=line,
                        device=device,
                        unlabelled=others,
                        seen=seen,
                    )
                    row["examples"] = len(examples)
                for where in next(iter(tests.values())):
                    for key, value in _together(picked, tests, where).items():
                        right.setdefault(key if where == "test" else f"{key}, {where}", []).append(value)
            row["figures"] = {key: [float(v.mean()) for v in values] for key, values in right.items()}
            if distill == "none":
                alone = right
            else:
                row["differences"] = {
                    key: metrics.paired_difference(np.array(alone[key]), np.array(values))
                    for key, values in right.items()
                }
            rows.append(row)
    return rows


def _together(
    picked: dict[str, dict[str, Any]], tests: dict[str, dict[str, Sequence[Example]]], where: str
) -> dict[str, np.ndarray]:
    """How right each example of one test set is, by figure; VCR's three from its two sub-tasks, whose
    examples stand in the same order."""
    if "q->a" not in picked:
        return {name: np.array(p["right"][where]) for name, p in picked.items()}
    label = lambda name: np.array([e.label for e in tests[name][where]])
    answers, reasons = (np.array(picked[n]["picked"][where]) for n in ("q->a", "qa->r"))
    return scores.vcr(answers, reasons, label("q->a"), label("qa->r"))
