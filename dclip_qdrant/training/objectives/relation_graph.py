"""ConaCLIP's fully connected knowledge interaction graph (Wang et al., ACL 2023; docs/papers.md 3.1): every
pair of the four encoders is an edge, each edge a loss.

The paper's text could not be read in full: the losses follow its names and an independent re-implementation,
with the latter's slips put right (teachers are targets, never predictions; KL is KL(target || student)). The
paper's weights are unknown; they are data in the recipe.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.training.encoded import Encoded

TYPES = ("intra_ts", "intra_ss", "inter_ts", "inter_ss")
LOSSES = ("info_nce", "fd", "mse", "sd", "kl", "sym_sd", "sym_kl")
CHOSEN = (  # the set that the paper ends with, as far as it is known (docs/papers.md 3.1)
    {"type": "intra_ts", "loss": "info_nce"},
    {"type": "intra_ts", "loss": "sd"},
    {"type": "intra_ts", "loss": "sym_sd"},
    {"type": "intra_ss", "loss": "sd"},
    {"type": "inter_ts", "loss": "info_nce"},
    {"type": "inter_ts", "loss": "sym_kl"},
    {"type": "inter_ss", "loss": "info_nce"},
    {"type": "inter_ss", "loss": "sd"},
)


class RelationGraph(nn.Module):
    """Sum over `edges` of weight x loss; each edge is {type, loss, weight = 1, temperature}.

    With I, T unit image and text vectors [M, D] (a picture once for each of its captions), ^s student, ^t
    teacher and S(A, B) = A B^T, an edge has two sides:

        intra_ts  S(I^s, I^t) -> S(I^t, I^t)    S(T^s, T^t) -> S(T^t, T^t)
        intra_ss  S(I^s, I^s) -> S(I^t, I^t)    S(T^s, T^s) -> S(T^t, T^t)
        inter_ts  S(I^s, T^t) -> S(I^t, T^t)    S(T^s, I^t) -> S(T^t, I^t)
        inter_ss  S(I^s, T^s) -> S(I^t, T^t)    S(T^s, I^s) -> S(T^t, I^t)

    and sums over both: `info_nce` CE(S / temperature, same picture), rows being the student's; `fd` |A -
    B|^2; `mse` its mean over the D components (CLIP-KD's FD); `sd` mean (S - target)^2; `kl`
    KL(softmax(target / temperature) || softmax(S / temperature)). `sym_sd` and `sym_kl` compare the two sides
    with each other (KL both ways). Where widths differ the student's vectors pass a learned projection on
    edges that touch the teacher.
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        edges: tuple[dict[str, Any], ...] = CHOSEN,
        task_temperature: float = 0.05,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        if not edges:
            raise ValueError("edges is empty")
        if not (task_temperature > 0 and temperature > 0):
            raise ValueError(f"task_temperature {task_temperature}, temperature {temperature} must be > 0")
        self.edges = []
        for edge in edges:
            wrong = set(edge) - {"type", "loss", "weight", "temperature"}
            if wrong or edge.get("type") not in TYPES or edge.get("loss") not in LOSSES:
                raise ValueError(
                    f"edge {edge}: type is one of {', '.join(TYPES)}, loss one of "
                    f"{', '.join(LOSSES)}; weight and temperature are optional"
                )
            if edge["type"] == "intra_ss" and edge["loss"] in ("info_nce", "fd", "mse"):
                raise ValueError(f"edge {edge}: a vector is always nearest to itself")
            default = task_temperature if edge["loss"] == "info_nce" else temperature
            self.edges.append(
                (
                    edge["type"],
                    edge["loss"],
                    float(edge.get("weight", 1.0)),
                    float(edge.get("temperature", default)),
                )
            )
        same = student_dim == teacher_dim
        self.image = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)
        self.text = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)

    def forward(self, student: Encoded, teacher: Encoded) -> Tensor:
        own = student.owner
        unit = lambda x: F.normalize(x, dim=-1)
        i_s, t_s = unit(student.image)[own], unit(student.text)
        p_i, p_t = unit(self.image(student.image))[own], unit(self.text(student.text))
        i_t, t_t = unit(teacher.image)[own], unit(teacher.text)
        sides = {
            "intra_ts": ((p_i, i_t, i_t, i_t), (p_t, t_t, t_t, t_t)),
            "intra_ss": ((i_s, i_s, i_t, i_t), (t_s, t_s, t_t, t_t)),
            "inter_ts": ((p_i, t_t, i_t, t_t), (p_t, i_t, t_t, i_t)),
            "inter_ss": ((i_s, t_s, i_t, t_t), (t_s, i_s, t_t, i_t)),
        }
        same = (own[:, None] == own[None]).float()
        same = same / same.sum(1, keepdim=True)
        return _total(
            weight * self._edge(sides[kind], loss, temperature, same)
            for kind, loss, weight, temperature in self.edges
        )

    def _edge(self, sides: tuple, loss: str, temperature: float, same: Tensor) -> Tensor:
        predicted = [a @ b.T for a, b, _, _ in sides]
        if loss == "sym_sd":
            return F.mse_loss(*predicted)
        if loss == "sym_kl":
            a, b = (p / temperature for p in predicted)
            return _kl(a, b) + _kl(b, a)
        if loss == "info_nce":
            return _total(F.cross_entropy(p / temperature, same) for p in predicted)
        if loss == "fd":
            return _total((a - b).square().sum(1).mean() for a, b, _, _ in sides)
        if loss == "mse":
            return _total(F.mse_loss(a, b) for a, b, _, _ in sides)
        targets = [c @ d.T for _, _, c, d in sides]
        compare = F.mse_loss if loss == "sd" else lambda p, t: _kl(t / temperature, p / temperature)
        return _total(compare(p, t) for p, t in zip(predicted, targets, strict=True))


def _kl(target: Tensor, predicted: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(predicted)), the mean over rows."""
    return F.kl_div(
        predicted.log_softmax(-1), torch.log_softmax(target, -1), log_target=True, reduction="batchmean"
    )


def _total(values: Iterable[Tensor]) -> Tensor:
    return sum(values, torch.zeros(()))
