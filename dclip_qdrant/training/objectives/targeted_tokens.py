"""CLIP-TD's idea for two towers: distil the tokens that matter, from pairs that the teacher is sure of.

CLIP-TD (Wang et al. 2022) distils into fused encoders (tasks/reasoning/task.py has that); its paper says that
distillation acts on adaptively selected tokens with a dynamic weight, and its text beyond the abstract could
not be read (docs/papers.md 4.1). Everything more precise than that here is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.token_selection import confidence, select


class TargetedTokens(nn.Module):
    """L = sum_i w_i (V_i + T_i) / sum_i w_i over captions i = 1..M with their pictures; n(x) = x / |x|.

    V_i = mean over the top `regions` of |n(W s_k) - n(t_k)|_1, s_k the student's patch features pooled in
    region k, t_k the base's vector of its crop, chosen by cos(t_k, caption vector of the base).
    T_i = mean over the top `words` of |n(W s_l) - n(t_l)|_1, s_l and t_l the token features of student and
    base, chosen by cos(t_l, caption vector). w_i, `weighting`: teacher = the base's softmax probability of
    the right pair (both ways' mean, at `temperature`); relative = p_t / (p_t + p_s), more where the base is
    surer than the student; none = 1. No gradient passes through choices and weights.
    """

    reads = ("rois", "roi_mask", "words", "word_mask")

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        regions: int = 2,
        words: int = 3,
        weighting: str = "teacher",
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        if not (regions > 0 and words > 0 and temperature > 0):
            raise ValueError(f"regions {regions}, words {words}, temperature {temperature} must be > 0")
        if weighting not in ("teacher", "relative", "none"):
            raise ValueError(f"weighting = {weighting!r} must be teacher, relative or none")
        self.regions, self.words, self.weighting, self.temperature = regions, words, weighting, temperature
        same = student_dim == teacher_dim
        self.image = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)
        self.text = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        if student.rois is None or student.words is None:
            raise ValueError("the batch has no regions pooled from patch features, or no words")
        assert teacher.rois is not None  # what comes with them
        assert teacher.words is not None
        assert student.roi_mask is not None
        assert student.word_mask is not None
        own = student.owner
        visual = self._part(
            self.image(student.rois)[own],
            teacher.rois[own],
            student.roi_mask[own],
            teacher.text,
            self.regions,
        )
        textual = self._part(
            self.text(student.words), teacher.words, student.word_mask, teacher.text, self.words
        )
        w = self._weights(student, teacher)
        return (w * (visual + textual)).sum() / w.sum().clamp(min=1e-9)

    def _part(self, s: Tensor, t: Tensor, mask: Tensor, query: Tensor, top: int) -> Tensor:
        """[M, K, D] tokens against their targets -> [M], the mean over those chosen; 0 where there is
        none."""
        score = F.cosine_similarity(t, query[:, None], dim=-1)
        chosen = select(score, mask, top).to(s.dtype)
        distance = (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).abs().sum(-1)
        return (distance * chosen).sum(1) / chosen.sum(1).clamp(min=1)

    @torch.no_grad()
    def _weights(self, student: Encoded, teacher: Encoded) -> Tensor:
        if self.weighting == "none":
            return torch.ones_like(student.owner, dtype=student.text.dtype)
        p_t = confidence(teacher.image, teacher.text, student.owner, self.temperature)
        if self.weighting == "teacher":
            return p_t
        p_s = confidence(student.image, student.text, student.owner, self.temperature)
        return p_t / (p_t + p_s).clamp(min=1e-9)
