"""What a run says of itself in its manifest: figures of the weights as trained and as chosen, and the sweep
between them."""

import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.stages import Stage


@dataclass(frozen=True)
class Figures:
    """One set of weights on the split of the table, and on the labelled pictures that chose nothing."""

    test: metrics.RetrievalFigures
    zero_shot: float | None = None
    retention: float | None = None  # zero-shot accuracy over the base's
    retention_ci: list[float] | None = None  # its 95% interval


@dataclass(frozen=True)
class SweepPoint:
    """One alpha of WiSE-FT, one strength against hubs and one share of the plainly fine-tuned student, on
    validation.

    `val` is what chooses: the mean of R@1, 5 and 10 of both directions. Zero-shot accuracy is that on the
    half of the labelled pictures that chooses; retention has its standard error beside it.
    """

    alpha: float
    hubness: float
    val: float | None = None
    val_mean_r1: float | None = None
    zero_shot: float | None = None
    retention: float | None = None
    retention_error: float | None = None
    fine_tuned: float = 0.0


@dataclass(frozen=True)
class RunFigures:
    """Figures of a finished run. A base has neither sweep nor history, and was chosen as it is."""

    name: str
    chosen: Figures
    as_trained: Figures | None = None  # before WiSE-FT and averaging
    seed: int = 0
    alpha: float = 1.0
    hubness: float = 0.0
    fine_tuned: float = 0.0  # share of the plainly fine-tuned student's weights
    sweep: list[SweepPoint] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    trained_parameters: int = 0
    n_labelled: int = 0
    rotation: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_dict(cls, raw: dict[str, Any]) -> "RunFigures":
        parts = {
            "chosen": Figures(**raw["chosen"]),
            "as_trained": Figures(**raw["as_trained"]) if raw.get("as_trained") else None,
            "sweep": [SweepPoint(**point) for point in raw.get("sweep", [])],
        }
        return cls(**(raw | parts))

    @classmethod
    def of_stage(cls, stage: Stage) -> "RunFigures":
        return cls.of_dict(stage.manifest()["metrics"])


def save_ranks(folder: UPath, name: str, ranks: metrics.Ranks) -> None:
    """Where every right item came out, for differences that are paired over pictures."""
    buffer = io.BytesIO()
    counts = [len(x) for x in ranks.i2t]
    np.savez_compressed(
        buffer, t2i=ranks.t2i, i2t=np.concatenate(ranks.i2t), counts=counts, owner=ranks.owner
    )
    storage.write_bytes(folder / f"ranks-{name}.npz", buffer.getvalue())


def load_ranks(folder: UPath, name: str) -> metrics.Ranks:
    with np.load(io.BytesIO((folder / f"ranks-{name}.npz").read_bytes()), allow_pickle=False) as f:
        cuts = np.cumsum(f["counts"])[:-1]
        return metrics.Ranks(f["t2i"], np.split(f["i2t"], cuts), f["owner"])
