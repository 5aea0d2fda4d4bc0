"""What one model says about one batch: the one type that objectives see."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """Pictures that were blended in pairs (train.mixup). partner [N]: the position of the other picture;
    share [N]: the picture's own part, the other one's is 1 - share."""

    partner: Tensor
    share: Tensor


@dataclass(frozen=True)
class Encoded:
    """The whole (gathered) batch. Vectors are as the tower gave them; objectives normalise.

    image [N, D]; text [M, D]; owner [M]: the picture each caption belongs to; logit_scale: the model's own
    1/temperature.

    The rest is there for objectives that say so in their `reads`, else None:
    regions [R, D]: crops drawn from the pictures (train.region_share), each seen by itself; the teacher's are
    the frozen base's. rois [N, R, D], roi_mask [N, R]: each picture's regions, pooled from its patch
    features; the teacher's are the frozen base's of the crops. words [M, L, D], word_mask [M, L]: projected
    features of each caption's tokens; the teacher's are the frozen base's. spans [P, D]: phrases drawn from
    all captions (train.span_share); the teacher's are the frozen base's. noise [M, D]: a standard normal draw
    for each caption, which follows from (seed, epoch, picture) as all draws do.
    pictures [E, D]: pictures without captions (train.picture_share), as the student sees them; the teacher's
    are its model's own.
    others: what further teachers (the recipe's [ensemble]) say of images and texts, each of its own width.
    blend: how the pictures were blended; the teachers' images are blended alike, and a caption belongs to
    both pictures (see `contrast.positives`).
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    logit_scale: Tensor
    regions: Tensor | None = None
    rois: Tensor | None = None
    roi_mask: Tensor | None = None
    words: Tensor | None = None
    word_mask: Tensor | None = None
    spans: Tensor | None = None
    noise: Tensor | None = None
    pictures: Tensor | None = None
    others: tuple["Encoded", ...] = ()
    blend: Blend | None = None

    def with_vectors(self, image: Tensor, text: Tensor, **more: Tensor | None) -> "Encoded":
        """The same batch as another model sees it."""
        return replace(self, image=image, text=text, **more)
