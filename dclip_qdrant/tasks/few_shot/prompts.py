"""Learned prompts in front of frozen towers: context tokens in the text, prompt tokens or a pixel frame in
the picture (ComKD-CLIP's lineage: MaPLe, PromptSRC, PromptKD; docs/papers.md 2)."""

import torch
from torch import Tensor, nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.training.models.two_tower import TwoTower

INIT = "a photo of a"  # the lineage's start of the context


class TextPrompts(nn.Module):
    """Context tokens in the place of "a photo of a" before each class name, of their own for each of the
    first `depth` layers.

    The tower stays frozen; `forward` gives class vectors [C, D], not normalised.
    """

    ids: Tensor  # [C, L]

    def __init__(self, tower: TwoTower, names: list[str], *, depth: int = 9) -> None:
        super().__init__()
        if not tower.dynamic_text:
            raise RecipeError(
                "prompts", f"the text tower of {tower.name}", "a causal text tower of open_clip"
            )
        self.tower = [tower]  # in a list: its parameters are not ours
        self.count = len(INIT.split())
        text = tower._text
        self.register_buffer(
            "ids", tower.tokens([f"{INIT} {n.replace('_', ' ')}." for n in names]), persistent=False
        )
        layers = len(text.transformer.resblocks)
        with torch.no_grad():
            start = text.token_embedding(self.ids[0, 1 : 1 + self.count]).clone()
        self.context = nn.Parameter(torch.randn(min(depth, layers), self.count, start.shape[1]) * 0.02)
        self.context.data[0] = start

    def with_names(self, names: list[str]) -> "TextPrompts":
        """The same learned context before other names."""
        other = TextPrompts(self.tower[0], names, depth=len(self.context))
        other.load_state_dict(self.state_dict())
        return other.to(self.context.device)

    def forward(self) -> Tensor:
        tower, n = self.tower[0], self.ids.shape[1]
        text = tower._text
        x = text.token_embedding(self.ids) + text.positional_embedding[:n]
        at = slice(1, 1 + self.count)
        position = text.positional_embedding[at]
        for i, block in enumerate(text.transformer.resblocks):
            if i < len(self.context):
                own = self.context[i] + position if i == 0 else self.context[i]
                x = torch.cat([x[:, :1], own.expand(len(x), -1, -1), x[:, 1 + self.count :]], 1)
            x = block(x, attn_mask=text.attn_mask[:n, :n])
        x = text.ln_final(x)
        return tower._project(x[torch.arange(len(x), device=x.device), tower._end(self.ids)])


class ImagePrompts(nn.Module):
    """Prompt tokens beside the patches of a ViT, of their own for each of the first `depth` layers; where the
    tower has no tokens, a learned frame of pixels around the picture (visual prompting, Bahng et al. 2022),
    `frame` pixels wide. Embeddings [B, D], not normalised."""

    mask: Tensor  # [1, S, S]

    def __init__(self, tower: TwoTower, *, count: int = 4, depth: int = 9, frame: int = 16) -> None:
        super().__init__()
        self.tower = [tower]
        visual = tower.model.visual
        self.has_tokens = hasattr(visual, "_embeds") and getattr(visual, "attn_pool", None) is None
        if self.has_tokens:
            layers, width = len(visual.transformer.resblocks), visual.conv1.out_channels
            self.tokens = nn.Parameter(torch.randn(min(depth, layers), count, width) * 0.02)
        else:
            size = tower.preprocess.size
            self.pixels = nn.Parameter(torch.zeros(3, size, size))
            mask = torch.ones(1, size, size)
            mask[:, frame : size - frame, frame : size - frame] = 0
            self.register_buffer("mask", mask, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.tower[0]
        if not self.has_tokens:
            return tower.encode_image(pixels + self.pixels * self.mask)
        visual = tower.model.visual
        x = visual._embeds(pixels)
        length = x.shape[1]
        for i, block in enumerate(visual.transformer.resblocks):
            if i < len(self.tokens):
                x = torch.cat([x[:, :length], self.tokens[i].expand(len(x), -1, -1)], 1)
            x = block(x)
        pooled, _ = visual._pool(x[:, :length])
        return pooled if visual.proj is None else pooled @ visual.proj
