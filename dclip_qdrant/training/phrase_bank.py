"""A bank of phrases with what a frozen text tower says of them: what holds a learning text tower to the words
that it knew (ours)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.pairs.labelled import PROMPT
from dclip_qdrant.training.evaluate import encode_texts
from dclip_qdrant.training.models.two_tower import TwoTower
from dclip_qdrant.training.phrases import phrases

LARGEST = 20_000  # phrases; the bank is a sample of what the captions say


class PhraseBank:
    """Phrases of the captions, every second one inside CLIP's prompt: zero-shot names are asked for in that
    form.

    ids [P, L] int32, padded; vectors [P, D], the tower's as it stands now.
    """

    def __init__(
        self, model: TwoTower, captions: Sequence[list[str]], *, seed: int, device: str = "cpu"
    ) -> None:
        distinct = sorted({p.lower() for cs in captions for c in cs for p in phrases(c)})
        chosen = np.random.default_rng([seed, 13]).permutation(len(distinct))[:LARGEST]
        texts = [PROMPT.format(distinct[i]) if n % 2 else distinct[i] for n, i in enumerate(chosen)]
        rows = [
            row for s in range(0, len(texts), 256) for row in model.tokens(texts[s : s + 256]).to(torch.int32)
        ]
        self.texts = texts
        self.ids: Tensor = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.pad_id)
        self.vectors: Tensor = torch.from_numpy(encode_texts(model, texts, device))

    def __len__(self) -> int:
        return len(self.texts)
