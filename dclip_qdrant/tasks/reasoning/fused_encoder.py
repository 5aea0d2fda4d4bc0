"""A compact fused vision-language encoder: patches and words read each other in cross-attention (the kind of
student that CLIP-TD distils into).

CLIP-TD takes existing encoders (large ones, pretrained) and leaves them unchanged at inference. This one is
small enough to train anywhere and has what its method needs: a state for each patch, one for each word, one
for the whole of each, and heads for the tasks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fused:
    """image [B, W] and text [B, W]: the states of the whole; patches [B, W, h, w]; words [B, L, W]."""

    image: Tensor
    text: Tensor
    patches: Tensor
    words: Tensor


class FusedEncoder(nn.Module):
    """`alone` self-attention layers for each side, then `together` layers of self- and cross-attention,
    pre-norm, width W."""

    def __init__(
        self,
        *,
        vocabulary: int,
        image_size: int,
        patch: int = 8,
        length: int = 40,
        width: int = 128,
        heads: int = 4,
        alone: int = 2,
        together: int = 2,
        dropout: float = 0.1,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch {patch}, width {width} of heads {heads}"
            )
        self.side = image_size // patch
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.word = nn.Embedding(vocabulary, width, padding_idx=pad_id)
        self.image_whole = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.image_place = nn.Parameter(torch.randn(1, self.side**2 + 1, width) * 0.02)
        self.text_place = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = lambda: nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        cross = lambda: nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.image_alone, self.text_alone = (nn.ModuleList(layer() for _ in range(alone)) for _ in range(2))
        self.image_together, self.text_together = (
            nn.ModuleList(cross() for _ in range(together)) for _ in range(2)
        )
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.width, self.pad_id = width, pad_id

    def forward(self, pixels: Tensor, ids: Tensor) -> Fused:
        """pixels [B, 3, S, S], ids [B, L] with `pad_id` behind the shorter ones; the first token stands for
        the whole sentence."""
        v = self.patch(pixels).flatten(2).mT
        v = torch.cat([self.image_whole.expand(len(v), -1, -1), v], 1) + self.image_place
        t = self.word(ids) + self.text_place[:, : ids.shape[1]]
        padding = ids == self.pad_id
        padding[:, 0] = False
        for iv, it in zip(self.image_alone, self.text_alone, strict=True):
            v, t = iv(v), it(t, src_key_padding_mask=padding)
        for iv, it in zip(self.image_together, self.text_together, strict=True):
            v, t = iv(v, t, memory_key_padding_mask=padding), it(t, v, tgt_key_padding_mask=padding)
        v, t = self.image_norm(v), self.text_norm(t)
        return Fused(v[:, 0], t[:, 0], v[:, 1:].mT.unflatten(2, (self.side, self.side)), t)


class Head(nn.Module):
    """Fused states -> scores [B, A]: answers of a task, or one score for a choice (A = 1)."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, answers)
        )

    def forward(self, fused: Fused) -> Tensor:
        return self.layers(torch.cat([fused.image, fused.text, fused.image * fused.text], 1))
