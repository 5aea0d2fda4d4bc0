"""Learned prompts in front of frozen towers: context tokens in the text, prompt tokens or a pixel frame in
the picture (ComKD-CLIP's lineage: MaPLe, PromptSRC, PromptKD; docs/papers.md 2)."""

import torch
from torch import Tensor, nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.training.models.two_tower import TwoTower, special_ids

INIT = "a photo of a"  # the lineage's start of the context


class TextPrompts(nn.Module):
    """Context tokens in the place of "a photo of a" before each class name, of their own for each of the
    first `depth` layers.

    The tower stays frozen; `forward` gives class vectors [C, D], not normalised.
    """

    ids: Tensor  # [C, L]

    def __init__(self, tower: TwoTower, names: list[str], *, depth: int = 9) -> None:
        """Raises: RecipeError: a text tower whose layers aren't known."""
        super().__init__()
        self.tower = [tower]  # in a list: its parameters are not ours
        embedding, layers = _text_parts(tower)
        start = tower.tokens([INIT])[0]
        start = start[[int(i) not in special_ids(tower.tokenizer) for i in start]]
        self.count = len(start)
        self.register_buffer(
            "ids", tower.tokens([f"{INIT} {n.replace('_', ' ')}." for n in names]), persistent=False
        )
        with torch.no_grad():
            words = embedding(start).clone()
        self.context = nn.Parameter(torch.randn(min(depth, len(layers)), *words.shape) * 0.02)
        self.context.data[0] = words

    def with_names(self, names: list[str]) -> "TextPrompts":
        """The same learned context before other names."""
        other = TextPrompts(self.tower[0], names, depth=len(self.context))
        other.load_state_dict(self.state_dict())
        return other.to(self.context.device)

    def forward(self) -> Tensor:
        tower = self.tower[0]
        embedding, layers = _text_parts(tower)

        def put(x: Tensor, i: int) -> Tensor:
            return torch.cat([x[:, :1], self.context[i].expand(len(x), -1, -1), x[:, 1 + self.count :]], 1)

        def behind(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return put(out, 0)

        # the first layer's context takes its tokens' places before positions are added, as words do
        hooks = [embedding.register_forward_hook(behind)]
        for i in range(1, len(self.context)):

            def before(module: nn.Module, args: tuple[Tensor, ...], i: int = i) -> tuple[Tensor, ...]:
                return (put(args[0], i), *args[1:])

            hooks.append(layers[i].register_forward_pre_hook(before))
        try:
            return tower.encode_text(self.ids)
        finally:
            for hook in hooks:
                hook.remove()


def _text_parts(tower: TwoTower) -> tuple[nn.Module, nn.ModuleList]:
    """What turns tokens into vectors, and the layers above it.

    Raises:
        RecipeError: a text tower whose layers aren't known.
    """
    text = tower._text
    if tower.dynamic_text:
        return text.token_embedding, text.transformer.resblocks
    reader = getattr(text, "transformer", None)  # BERT's and RoBERTa's as Hugging Face names them
    layers = getattr(getattr(reader, "encoder", None), "layer", None)
    if reader is None or layers is None:
        came, expected = (
            f"the text tower of {tower.name}",
            "a causal text tower of open_clip, BERT or RoBERTa",
        )
        raise RecipeError("prompts", came, expected)
    return reader.get_input_embeddings(), layers


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
