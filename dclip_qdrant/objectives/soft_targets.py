"""Contrast against the teacher's soft labels: HyCD (CLIP-Refine, CVPR 2025) and affinity mimicking (TinyCLIP, ICCV 2023, eq. 1-2)."""

from torch import Tensor, nn

from dclip_qdrant.contrast import cosine_logits, divergence, positives
from dclip_qdrant.encoded import Encoded


class SoftTargets(nn.Module):
    """Q = labels * Y + (1 - labels) * softmax(S_teacher / teacher_temperature);  L = mean of KL(Q || softmax(S / temperature)) both ways.

    S = cos(image, text) [N, M]. labels = 0.5 is HyCD's mix; 0 is affinity mimicking; 1 is InfoNCE up to a constant.
    """

    def __init__(
        self, *, student_dim: int, teacher_dim: int, temperature: float = 0.05, teacher_temperature: float = 0.05, labels: float = 0.5
    ) -> None:
        super().__init__()
        if not (temperature > 0 and teacher_temperature > 0 and 0 <= labels <= 1):
            raise ValueError(f"temperature {temperature}, teacher_temperature {teacher_temperature} must be > 0, labels {labels} in 0..1")
        self.temperature, self.teacher_temperature, self.labels = temperature, teacher_temperature, labels

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        s = cosine_logits(student.image, student.text, self.temperature)
        t = cosine_logits(teacher.image, teacher.text, self.teacher_temperature)
        y = positives(student.owner, len(student.image))
        return divergence(s, t, y, self.labels)
