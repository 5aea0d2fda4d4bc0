"""Contrast against teachers' soft labels: HyCD (CLIP-Refine, CVPR 2025), affinity mimicking (TinyCLIP, ICCV
2023, eq. 1-2), and the ensemble of dataset reinforcement (MobileCLIP, CVPR 2024)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.contrast import cosine_logits, divergence, positives
from dclip_qdrant.training.encoded import Encoded


class SoftTargets(nn.Module):
    """Q = labels * Y + (1 - labels) * mean_m softmax(S_m / tau_m);  L = mean of KL(Q || softmax(S /
    temperature)) both ways.

    S = cos(image, text) [N, M]. The members m are the teacher and the recipe's further ones ([ensemble]).
    labels = 0.5 is HyCD's mix; 0 with one teacher is affinity mimicking, with several MobileCLIP's; 1 is
    InfoNCE up to a constant. `teacher_temperature`: tau for all members, or a list. `members`: which of them,
    by number (0 is the teacher, or the base where the recipe has none); all, if left out.

    `of` = "pictures": pictures without captions [E, D] against the batch's captions, KL(softmax(S_t / tau) ||
    softmax(S / temperature)) by picture alone (ours; affinity mimicking without positives; needs
    train.picture_share).
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        temperature: float = 0.05,
        teacher_temperature: float | list[float] = 0.05,
        labels: float = 0.5,
        members: list[int] | None = None,
        of: str = "pairs",
    ) -> None:
        super().__init__()
        if of not in ("pairs", "pictures"):
            raise ValueError(f"of = {of!r} must be pairs or pictures")
        self.of, self.reads = of, ("pictures",) if of == "pictures" else ()
        each = (
            list(teacher_temperature)
            if isinstance(teacher_temperature, list | tuple)
            else [teacher_temperature]
        )
        if not (temperature > 0 and each and min(each) > 0 and 0 <= labels <= 1):
            raise ValueError(
                f"temperature {temperature}, teacher_temperature {teacher_temperature} must "
                f"be > 0, labels {labels} in 0..1"
            )
        self.temperature, self.each, self.labels, self.members = temperature, each, labels, members

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        if self.of == "pictures":
            return self._of_pictures(student, teacher)
        there = (teacher, *teacher.others)
        numbers = range(len(there)) if self.members is None else self.members
        if not numbers or max(numbers) >= len(there) or len(self.each) not in (1, len(numbers)):
            raise ValueError(
                f"members {list(numbers)} with {len(self.each)} teacher_temperature of "
                f"{len(there)} teachers (the teacher and [ensemble])"
            )
        taus = self.each * len(numbers) if len(self.each) == 1 else self.each
        t = [cosine_logits(there[m].image, there[m].text, tau) for m, tau in zip(numbers, taus, strict=True)]
        s = cosine_logits(student.image, student.text, self.temperature)
        y = positives(student.owner, len(student.image), student.blend)
        return divergence(s, t, y, self.labels)

    def _of_pictures(self, student: Encoded, teacher: Encoded) -> Tensor:
        if student.pictures is None or teacher.pictures is None:
            raise ValueError("the batch has no pictures without captions: set train.picture_share")
        wanted = cosine_logits(teacher.pictures, teacher.text, self.each[0]).softmax(-1)
        own = cosine_logits(student.pictures, student.text, self.temperature)
        return F.kl_div(own.log_softmax(-1), wanted, reduction="batchmean")
