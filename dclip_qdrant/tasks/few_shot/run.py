"""One few-shot protocol from labelled pictures to a table; stages are checkpointed, the result is written
last."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from upath import UPath

from dclip_qdrant.errors import InputError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.pairs.labelled import PROMPT, Labelled
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import digest
from dclip_qdrant.tasks.few_shot import comkd, protocol
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.evaluate import encode_texts
from dclip_qdrant.training.loop import Log, fit
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.two_tower import TwoTower

logger = logging.getLogger(__name__)


class Config(BaseModel):
    """Epochs, shots and what is switched off in ablations. Defaults: docs/papers.md 2.2 where they carry over
    (20 epochs, 16 shots, depth 9, 4 tokens)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shots: int = Field(default=16, gt=0)
    teacher_epochs: int = Field(default=20, gt=0)
    student_epochs: int = Field(default=20, gt=0)
    teacher_lr: float = Field(default=2e-3, gt=0, description="AdamW; the lineage's SGD has 5e-3")
    student_lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=32, gt=0)
    depth: int = Field(default=9, gt=0)
    axis: str = Field(default="batch", pattern="^(batch|feature)$", description="of IFAlign's moments")
    align: float = Field(default=1.0, ge=0, description="IFAlign's weight; 0 leaves it out")
    attention: bool = Field(default=True, description="EduAttention; off leaves alpha at 0")
    test: float = Field(default=0.5, gt=0, lt=1)
    seed: int = 0


def adapt(
    labelled: str,
    *,
    teacher: str,
    student: str,
    out: str,
    config: Config | None = None,
    cross: tuple[str, ...] = (),
    domains: tuple[str, ...] = (),
    log: Log = logger.info,
    device: str = "cpu",
) -> dict[str, Any]:
    """Base-to-novel on `labelled`; with `cross` or `domains`, all its classes are learned and those other
    sets are tested on besides.

    `domains` are pictures of the same classes from elsewhere; `cross` has classes of its own. Returns what it
    writes to `out/few_shot.json`.

    Raises:
        InputError: a class of `domains` that `labelled` doesn't have; too few pictures.
    """
    config = config or Config()
    data = Labelled.open(labelled)
    transfer = bool(cross or domains)
    split = (protocol.all_classes if transfer else protocol.base_to_novel)(
        data, shots=config.shots, test=config.test, seed=config.seed
    )
    others = {path: Labelled.open(path) for path in (*cross, *domains)}
    for path in domains:
        strange = sorted(set(others[path].names) - set(data.names))
        if strange:
            raise InputError(
                path, f"classes {', '.join(strange[:5])}", f"classes of {labelled}", "give it with `cross`"
            )
    folder = storage.as_path(out)
    t, s = two_tower.load(teacher).to(device), two_tower.load(student).to(device)
    mark = digest(
        {
            "data": data.fingerprint,
            "teacher": t.fingerprint,
            "student": s.fingerprint,
            "config": config.model_dump(),
            "transfer": transfer,
        }
    )
    torch.manual_seed(config.seed)
    labels = np.array(data.labels)
    names = list(data.names)

    few = _pixels(data, split.shots, t.preprocess)
    log(
        f"{len(split.base)} base and {len(split.novel)} novel classes; {len(few)} labelled, "
        f"{len(split.unlabelled)} unlabelled, {len(split.test)} test pictures"
    )
    first = comkd.PromptedTeacher(
        t,
        few,
        np.searchsorted(split.base, labels[split.shots]),
        [names[c] for c in split.base],
        lr=config.teacher_lr,
        depth=config.depth,
        device=device,
    )
    _train(first, config.teacher_epochs, config, folder / f"teacher-{mark}", log, "teacher")
    prompts = first.objectives
    texts = _texts(prompts, names)

    rest = {tower: _pixels(data, split.unlabelled, tower.preprocess) for tower in {t, s}}
    u_t = normalise(comkd.over(first.modules, rest[t], t, device))
    torch.manual_seed(config.seed)
    second = comkd.UnlabelledStudent(
        s,
        rest[s],
        u_t,
        texts,
        scale=t.logit_scale.item(),
        lr=config.student_lr,
        axis=config.axis,
        align=config.align,
        attention=config.attention,
        depth=config.depth,
        device=device,
    )
    _train(second, config.student_epochs, config, folder / f"student-{mark}", log, "student")

    def rows(
        of: Labelled, index: np.ndarray, judge: Callable[[np.ndarray], dict[str, float]], class_texts: Tensor
    ) -> list[dict[str, Any]]:
        seen = {tower: _pixels(of, index, tower.preprocess) for tower in {t, s}}
        plain = lambda tower: (
            normalise(comkd.plain_features(tower, seen[tower], device))
            @ _plain_texts(tower, list(of.names)).T
        )
        bank = class_texts.to(device)
        return [
            {"name": "student, zero-shot"} | judge(plain(s)),
            {"name": "teacher, zero-shot"} | judge(plain(t)),
            {"name": "teacher, prompted"}
            | judge(normalise(comkd.over(first.modules, seen[t], t, device)) @ bank.cpu().numpy().T),
            {"name": "comkd_clip"}
            | judge(
                comkd.over(
                    lambda x: second.student.logits(second.student.project(x), bank), seen[s], s, device
                )
            ),
        ]

    result: dict[str, Any] = {
        "labelled": labelled,
        "protocol": "transfer" if transfer else "base-to-novel",
        "classes": len(names),
        "shots": config.shots,
        "alpha": second.student.attention.alpha.item(),
        "config": config.model_dump(),
    }
    result["rows"] = rows(
        data, split.test, lambda logits: protocol.figures(logits, labels[split.test], split), texts
    )
    for kind, paths in (("cross", cross), ("domains", domains)):
        for path in paths:
            other = others[path]
            mine = np.array(other.labels)
            # a domain's classes keep the source's texts; another set's get texts with the same learned
            # context
            bank = (
                texts[[names.index(n) for n in other.names]]
                if kind == "domains"
                else _texts(prompts, list(other.names))
            )
            judge = lambda logits, mine=mine, other=other: {
                "accuracy": protocol.accuracy(logits, mine, np.arange(len(other.names)))
            }
            result.setdefault(kind, {})[path] = rows(other, np.arange(len(other)), judge, bank)
    weights = {f"student.{name}": value for name, value in second.student.state_dict().items()}
    _save(folder / "adapted.safetensors", {"texts": texts} | weights)
    storage.write_json(folder / "classes.json", names)
    storage.write_json(folder / "few_shot.json", result)
    return result


def _save(path: UPath, tensors: dict[str, Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    storage.write_bytes(path, safetensors.torch.save(plain))


def _train(task: Any, epochs: int, config: Config, folder: UPath, log: Log, name: str) -> None:
    """Trains, or loads what was trained before under the same inputs."""
    done = folder / "weights.safetensors"
    parts = {"modules": task.modules, "objectives": task.objectives}
    if done.exists():
        state = safetensors.torch.load(done.read_bytes())
        for k, m in parts.items():
            m.load_state_dict({n.removeprefix(k + "."): v for n, v in state.items() if n.startswith(k + ".")})
        log(f"{name}: reused")
        return
    points = Checkpoints(folder / "checkpoints")
    fit(
        task,
        epochs=epochs,
        batch_size=config.batch_size,
        chunk_size=64,
        warmup=0.05,
        schedule="cosine",
        clip_norm=1.0,
        checkpoint_s=30.0,
        seed=config.seed,
        checkpoints=points,
        log=lambda line: log(f"{name}: {line}"),
    )
    weights = {f"{k}.{n}": v for k, m in parts.items() for n, v in m.state_dict().items()}
    _save(done, weights)
    points.clear()


def _pixels(data: Labelled, index: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    with ThreadPoolExecutor(8) as pool:
        return np.stack(list(pool.map(lambda i: preprocess.pixels(data.load(int(i))), index)))


@torch.no_grad()
def _texts(prompts: Any, names: list[str]) -> Tensor:
    """Unit class vectors [C, D] with the learned context before the names."""
    return F.normalize(prompts.with_names(names)(), dim=-1)


@torch.no_grad()
def _plain_texts(tower: TwoTower, names: list[str]) -> np.ndarray:
    return normalise(encode_texts(tower, [PROMPT.format(n.replace("_", " ")) for n in names]))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    keys = [k for k in ("base", "novel", "harmonic_mean") if k in result["rows"][0]]
    out = [
        f"{result['protocol']}: {result['classes']} classes, {result['shots']} shots",
        "",
        "| | " + " | ".join(keys) + " |",
        "|" + "---|" * (len(keys) + 1),
    ]
    out += [
        "| " + " | ".join([r["name"], *(f"{100 * r[k]:.1f}" for k in keys)]) + " |" for r in result["rows"]
    ]
    for kind in ("cross", "domains"):
        for path, rows in result.get(kind, {}).items():
            out += [
                "",
                f"{kind}: {path}",
                "",
                "| | accuracy |",
                "|---|---|",
                *(f"| {r['name']} | {100 * r['accuracy']:.1f} |" for r in rows),
            ]
    return "\n".join(out)
