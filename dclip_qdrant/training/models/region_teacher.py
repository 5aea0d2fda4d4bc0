"""The teacher: bidirectional cross-attention between a picture's regions and a caption's spans (DCLIP;
docs/papers.md 1.1), on frozen CLIP features.

As released (code ChuckDanz/DCLIP at ed9a11f), from un-updated inputs r (regions) and t (spans):

    A_T = LN_t(t + MHA_1(t, r, r))        A_I = LN_i(r + MHA_2(r, t, t))
    P(a) = sum_k w_k a_k,   w = softmax_k(cos(a_k, mean(a)) / T_pool)
    e = P(A_T) / 2 + P(A_I) / 2

Ours, by options: padding is masked, the whole picture is a region, and a learned gate adds the fused vector
to the image's own, e = n(n(f(I)) + gate * n(fused)), so that the teacher starts as the model it is to
improve. `regions_only` leaves the caption out: A = LN_i(f(I) + MHA_2(f(I), r, r)), fused = A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclip_qdrant.recipe import TeacherSettings


class RegionTeacher(nn.Module):
    """Trained on top of a frozen CLIP of width D; see the module's text for the formulas."""

    def __init__(self, dim: int, cfg: TeacherSettings) -> None:
        super().__init__()
        if dim % cfg.heads:
            from dclip_qdrant.errors import RecipeError

            raise RecipeError("teacher.heads", f"{cfg.heads} heads for width {dim}", "a divisor of the width")
        self.cfg = cfg
        self.norm_image = nn.LayerNorm(dim)
        # regions ask text (or the picture asks its regions)
        self.attend_image = nn.MultiheadAttention(dim, cfg.heads, batch_first=True)
        if cfg.fusion == "bidirectional":
            self.norm_text = nn.LayerNorm(dim)
            self.attend_text = nn.MultiheadAttention(dim, cfg.heads, batch_first=True)  # text asks regions
        self.gate = nn.Parameter(torch.tensor(float(cfg.gate))) if cfg.gate != "none" else None

    def forward(
        self, image: Tensor, regions: Tensor, region_mask: Tensor, spans: Tensor, span_mask: Tensor
    ) -> Tensor:
        """image [B, D], regions [B, R, D] with mask [B, R], spans [B, S, D] with mask [B, S] -> unit vectors
        [B, D].

        Padded rows must be zero where the mask is False.
        """
        if not self.cfg.mask_padding:  # as released: zeros are tokens like any other
            region_mask, span_mask = torch.ones_like(region_mask), torch.ones_like(span_mask)
        if self.cfg.fusion == "regions_only":
            asked = image[:, None]
            fused = self.norm_image(asked + _attend(self.attend_image, asked, regions, region_mask))[:, 0]
        else:
            a_t = self.norm_text(spans + _attend(self.attend_text, spans, regions, region_mask))
            a_i = self.norm_image(regions + _attend(self.attend_image, regions, spans, span_mask))
            fused = (
                pool(a_t, span_mask, self.cfg.pool_temperature)
                + pool(a_i, region_mask, self.cfg.pool_temperature)
            ) / 2
        if self.gate is None:
            return F.normalize(fused, dim=-1)
        return F.normalize(F.normalize(image, dim=-1) + self.gate * F.normalize(fused, dim=-1), dim=-1)


def _attend(attention: nn.MultiheadAttention, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """query [B, Q, D] over keys [B, K, D] where mask [B, K]; a row without any key gets zeros."""
    if keys.shape[1] == 0:
        return torch.zeros_like(query)
    some = mask.any(1)
    # softmax over nothing is NaN: let empty rows see all, then throw that away
    open_mask = mask | ~some[:, None]
    out, _ = attention(query, keys, keys, key_padding_mask=~open_mask, need_weights=False)
    return out * some[:, None, None]


def pool(a: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Pools tokens [B, K, D] where mask [B, K] by likeness to their mean -> [B, D]; a row without any token
    gives zeros."""
    m = mask[..., None].to(a.dtype)
    mean = (a * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
    score = F.cosine_similarity(a, mean, dim=-1) / temperature
    w = score.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (w[..., None] * a).sum(1)
