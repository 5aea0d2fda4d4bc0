"""The weights that a trained student could be written with, and what each is worth on validation: between
its start and its end (WiSE-FT), averaged with the plainly fine-tuned student, hubs turned down."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dclip_qdrant import metrics
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.training import hubness
from dclip_qdrant.training.checkpoint import Checkpoints
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.evaluate import EvalSet, LabelledSet
from dclip_qdrant.training.figures import SweepPoint
from dclip_qdrant.training.models.two_tower import TwoTower, interpolate


@dataclass(frozen=True)
class Trained:
    """A student at the end of its training, and what its figures are made of."""

    recipe: Recipe
    model: TwoTower
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    fine_tuned: dict[str, Tensor] | None  # the student after plain fine-tuning, where it is averaged in
    cached_text: bool  # the text tower is the teacher's own and never ran
    history: list[dict[str, float]]
    seconds: float
    learning: int
    val: EvalSet | None
    checkpoints: Checkpoints

    def mix(self, alpha: float, share: float) -> None:
        """Puts weights into the model: `share` of the plainly fine-tuned student's and the rest of those at
        the end of the training (a model soup, Wortsman et al., ICML 2022), then `alpha` of that and the rest
        of those at the start (WiSE-FT)."""
        weights = self.end
        if share:
            if self.fine_tuned is None:
                raise ValueError("no plainly fine-tuned student to average with")
            weights = interpolate(weights, self.fine_tuned, share)
        if alpha != 1.0:
            weights = interpolate(self.start, weights, alpha)
        self.model.load_weights(weights)

    def place(self, point: SweepPoint, train: EvalSet | None) -> np.ndarray | None:
        """Puts a point's weights into the model, their hubs turned down as pictures and captions of `train`
        tell; the text side's map [D, D], which cached text vectors lack."""
        self.mix(point.alpha, point.fine_tuned)
        if not point.hubness or train is None:
            return None
        vectors = train.vectors(self.model, cached_text=self.cached_text)
        image_map, text_map = hubness.maps(*vectors, self.recipe.hubness.share, point.hubness)
        device = next(self.model.parameters()).device
        self.model.map_outputs(image_map.to(device), text_map.to(device))
        return text_map.float().numpy()


@dataclass(frozen=True)
class Kept:
    """Labelled pictures, and which of them [N] the reference gets right."""

    labelled: LabelledSet
    right_of_base: np.ndarray

    def of_choosing(self, right: np.ndarray) -> tuple[float, float, float]:
        """Right or wrong [N] -> zero-shot accuracy, retention and its standard error on the half that
        chooses."""
        own, base = right[self.labelled.choosing], self.right_of_base[self.labelled.choosing]
        return float(own.mean()), ratio(own, base), metrics.ratio_error(base, own)


def sweep(trained: Trained, kept: Kept | None, train: EvalSet | None, comm: Comm) -> list[SweepPoint]:
    """Every alpha of WiSE-FT with every share of the plainly fine-tuned student and every strength against
    hubs, on validation; each rank has its share of the weights. `train`: of hubs."""
    keep = trained.recipe.keep
    weights = [(alpha, share) for share in keep.fine_tuned for alpha in keep.wise_ft]
    points = comm.spread(weights, lambda mix: _sweep_strengths(trained, kept, train, *mix))
    return [point for of_weights in points for point in of_weights]


def _sweep_strengths(
    trained: Trained, kept: Kept | None, train: EvalSet | None, alpha: float, share: float
) -> list[SweepPoint]:
    """The same weights with every strength: what is against hubs is linear behind the towers, so that these
    see each picture and caption once."""
    model, cfg = trained.model, trained.recipe.hubness
    trained.mix(alpha, share)
    val = trained.val.vectors(model, cached_text=trained.cached_text) if trained.val else None
    classes = kept.labelled.vectors(model) if kept else None
    powers = train.vectors(model, cached_text=trained.cached_text) if train else None
    points = []
    for strength in cfg.strengths:
        image_map = text_map = np.eye(model.dim, dtype=np.float32)
        if strength and powers is not None:
            image_map, text_map = (m.float().numpy() for m in hubness.maps(*powers, cfg.share, strength))
        val_recall = val_mean_r1 = zero_shot = retention = error = None
        if trained.val is not None and val is not None:
            vectors = (metrics.normalise(val[0] @ image_map), metrics.normalise(val[1] @ text_map))
            figures = metrics.retrieval(metrics.ranks(*vectors, trained.val.owner), bootstrap=0)
            val_recall, val_mean_r1 = metrics.mean_recall(figures), figures["mean_r@1"]
        if kept and classes is not None:
            right = kept.labelled.right_by(classes[0] @ image_map, classes[1] @ text_map)
            zero_shot, retention, error = kept.of_choosing(right)
        points.append(
            SweepPoint(alpha, strength, val_recall, val_mean_r1, zero_shot, retention, error, share)
        )
    return points


def ratio(own: np.ndarray, base: np.ndarray) -> float:
    """Retention: accuracy over the base's, right or wrong [N] each."""
    return float(own.mean()) / max(float(base.mean()), 1e-9)
