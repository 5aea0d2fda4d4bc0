"""What students are measured on: evaluation sets, labelled pictures, and what the model that they are held
against gets right of these. Kept from run to run of one process."""

import numpy as np
from upath import UPath

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.training.evaluate import EvalSet, LabelledSet
from dclip_qdrant.training.figures import Figures, SweepPoint, save_ranks
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.run import Run
from dclip_qdrant.training.sweep import Kept, Trained, ratio


class Measures:
    """Opens what a run is measured on, once, and measures."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._eval_sets: dict[tuple[str, str, str, int | None, int | None], EvalSet] = {}
        self._labelled_sets: dict[str, LabelledSet] = {}
        self._base_right: dict[tuple[str, str], np.ndarray] = {}

    def eval_set(self, run: Run, split: str, most: int | None = None, half: int | None = None) -> EvalSet:
        key = (run.pairs, run.features, split, most, half)
        if key not in self._eval_sets:
            pairs = Pairs.open(run.pairs)
            self._eval_sets[key] = EvalSet(
                pairs, split, UPath(run.features), self.device, most=most, half=half
            )
        return self._eval_sets[key]

    def choosing(self, run: Run) -> EvalSet:
        """What chooses alpha and strengths: val, or the half of it that the table isn't measured on."""
        return self.eval_set(run, "val", half=0 if run.split == "val" else None)

    def reported(self, run: Run) -> EvalSet:
        """What the table is measured on; where there is no test split, the half of val that chose nothing."""
        return self.eval_set(run, run.split, half=1 if run.split == "val" else None)

    def labelled(self, run: Run) -> LabelledSet | None:
        if run.labelled is None:
            return None
        if run.labelled not in self._labelled_sets:
            self._labelled_sets[run.labelled] = LabelledSet(run.labelled, self.device)
        return self._labelled_sets[run.labelled]

    def kept_of_base(self, run: Run, trained: Trained) -> Kept | None:
        """Which labelled pictures the reference gets right, or the weights that every run of this model
        starts from; measured once."""
        labelled = self.labelled(run)
        if labelled is None:
            return None
        key = (run.labelled or "", run.reference or run.student)
        if key not in self._base_right:
            model = trained.model
            if run.reference:
                model = two_tower.load(run.reference).to(self.device)
            else:
                model.load_weights(trained.start)
            self._base_right[key] = labelled.right(model)
        return Kept(labelled, self._base_right[key])

    def measure(
        self, run: Run, trained: Trained, point: SweepPoint, name: str
    ) -> tuple[Figures, np.ndarray | None]:
        """Puts a point's weights into the model and measures them on the split of the table; the text side's
        map."""
        text_map = trained.place(point, self.telling_hubs(run, trained))
        ranks = self.reported(run).ranks(trained.model, cached_text=trained.cached_text, text_map=text_map)
        save_ranks(run.stage.path, name, ranks)
        retrieval = metrics.retrieval(ranks)
        kept = self.kept_of_base(run, trained)
        if kept is None:
            return Figures(retrieval), text_map
        rights = (kept.labelled.right(trained.model), kept.right_of_base)
        own, base = (right[kept.labelled.reported] for right in rights)
        interval = list(metrics.ratio_interval(base, own))
        return Figures(retrieval, float(own.mean()), ratio(own, base), interval), text_map

    def telling_hubs(self, run: Run, trained: Trained) -> EvalSet | None:
        """Training pictures and captions, which tell where the power lies."""
        cfg = trained.recipe.hubness
        return self.eval_set(run, "train", cfg.pictures) if cfg.on else None
