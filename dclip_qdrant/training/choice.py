"""Which point of a sweep becomes the student: as much retrieval as keeps what the base knew."""

from dclip_qdrant.training.figures import SweepPoint

WORTH_A_DOUBT = 0.02  # of mean recall on validation


def choose_alpha(sweep: list[SweepPoint], min_retention: float) -> SweepPoint:
    """The point with the best validation retrieval among those that keep `min_retention`; if none does, the
    one that keeps most.

    A few hundred labelled pictures tell retention to some hundredths. Where points that are below
    `min_retention` by less than a standard error find more than `WORTH_A_DOUBT` above that one, the best of
    them is taken: retrieval that is sure isn't given up for retention that isn't.
    """
    found = lambda p: (p.val or 0.0, p.alpha)
    keeps = [p for p in sweep if p.retention is None or p.retention >= min_retention]
    careful = max(keeps, key=found) if keeps else max(sweep, key=lambda p: p.retention or 0.0)
    perhaps = [p for p in sweep if p.retention and p.retention + (p.retention_error or 0.0) >= min_retention]
    best = max([careful, *perhaps], key=found)
    return best if (best.val or 0.0) - (careful.val or 0.0) > WORTH_A_DOUBT else careful


def in_doubt(chosen: SweepPoint, min_retention: float) -> str:
    """What is said of a choice that keeps less than was asked for."""
    return (
        f"alpha {chosen.alpha:g} keeps {chosen.retention:.3f} of the base's zero-shot accuracy on the "
        f"labelled pictures that choose, standard error {chosen.retention_error or 0.0:.3f}, "
        f"{min_retention:.3f} wanted"
    )
