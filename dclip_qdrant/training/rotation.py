"""One rotation for both towers, after training: the same similarities, but short prefixes and quantised codes
lose less (ours; after ITQ, Gong & Lazebnik 2011, with the student's own objectives in place of the
quantisation error).

A rotation can't cost anything at full length, which is why it is learned last and by itself: the student's
own training, WiSE-FT and its figures don't know of it.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dclip_qdrant.recipe import IndexSettings
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.student_task import Weighted


def principal(x: Tensor) -> Tensor:
    """[N, D] -> the orthogonal matrix [D, D] whose columns are the directions of most power, the strongest
    first: the best start for prefixes."""
    _, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors.flip(1)


def learn(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, cfg: IndexSettings, *, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """image [N, D], text [M, D] unit rows, owner [M] -> the rotation [D, D] and the objectives' loss before
    and after it.

    Each step draws `batch_size` pictures and one caption of each.
    """
    image_, text_ = torch.from_numpy(image), torch.from_numpy(text)
    dim, rng = image.shape[1], np.random.default_rng([seed, 11])
    objective = Weighted(cfg.objectives, dim, dim)
    turn = nn.Linear(dim, dim, bias=False)
    torch.nn.utils.parametrizations.orthogonal(turn, orthogonal_map="cayley")
    turn.weight = principal(torch.cat([image_, text_])).T  # Linear multiplies by the transpose
    captions = np.split(
        np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=len(image)))[:-1]
    )
    some = np.array([i for i, c in enumerate(captions) if len(c)])
    batch = min(cfg.batch_size, len(some))

    def loss(f: nn.Module, pictures: np.ndarray, caption_rows: np.ndarray) -> Tensor:
        e = Encoded(
            f(image_[pictures]), f(text_[caption_rows]), torch.arange(len(pictures)), torch.tensor(1.0)
        )
        return objective(e, e)[0]

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pictures = rng.choice(some, batch, replace=False)
        return pictures, np.array([rng.choice(captions[i]) for i in pictures])

    fixed = draw(np.random.default_rng([seed, 12]))
    with torch.no_grad():
        figures = {"loss_before": loss(nn.Identity(), *fixed).item()}
    optimizer = torch.optim.Adam(turn.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    for _ in range(cfg.steps):
        optimizer.zero_grad()
        loss(turn, *draw(rng)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        figures["loss_after"] = loss(turn, *fixed).item()
        return turn.weight.T.double().clone(), figures
