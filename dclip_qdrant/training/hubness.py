"""Hubs turned down, in the weights: pictures and captions that are near to everything stop crowding out the
right answer.

In a joint space a few vectors (hubs: Radovanović et al., JMLR 2010) are among the nearest of very many
queries. Querybank normalisation (Bogolin et al., CVPR 2022) and nearest neighbour normalisation (Chowdhury et
al., EMNLP 2024) correct a candidate's scores by how near it is to a bank of queries, at search time. Ours
asks for nothing at search time. What makes a picture a hub is, for the most part, that it lies along the
directions in which captions have their power. So each tower gets k further components: the picture's hold its
power along the captions' k strongest directions, the caption's its power along the pictures', and each tower
has zeros where the other's are. They add nothing to a dot product and lengthen hubs, whose cosines therefore
shrink:

    cos'(i, t) = i P t / (sqrt(|P i|^2 + b sum_j e_j (u_j i)^2) sqrt(|P t|^2 + b sum_j f_j (v_j t)^2))

e, u: the k largest eigenvalues and -vectors of mean(t t'); f, v: of mean(i i'). P leaves out the 2k
directions of least power of both sides, which makes
room: the width stays what it was. Both maps are linear and are folded into the output projections. b is the
strength.

The new components could stand in any order and basis that both sides share. The one that turns vectors least
is taken: with the eigenvectors as they come the first half of a vector held its least power, and the signs
next to nothing (recall@10 of binary vectors 0.05, of the first half 0.01; docs/results.md).
"""

import numpy as np
import torch
from torch import Tensor

from dclip_qdrant.errors import RecipeError


def maps(image: np.ndarray, text: np.ndarray, share: float, strength: float) -> tuple[Tensor, Tensor]:
    """image [N, D], text [M, D] unit rows of pictures and captions like those to come -> what to multiply
    image and text embeddings by, [D, D] each, float64.

    Raises:
        RecipeError: no room: 2k components of D would be all of them.
    """
    i, t = torch.from_numpy(image).double(), torch.from_numpy(text).double()
    dim = i.shape[1]
    k = room(dim, share)
    images, texts = i.T @ i / len(i), t.T @ t / len(t)
    keep = torch.linalg.eigh(images + texts)[1][:, 2 * k :]
    none = torch.zeros(dim, k, dtype=torch.float64)
    a, b = (
        torch.cat([keep, _strongest(texts, k, strength), none], 1),
        torch.cat([keep, none, _strongest(images, k, strength)], 1),
    )
    left, _, right = torch.linalg.svd(
        (a + b).T
        # orthogonal Procrustes (Schönemann 1966): a turn and b turn are as near to the identity as one turn
        # can make them
    )
    turn = left @ right
    return a @ turn, b @ turn


def room(dim: int, share: float) -> int:
    """How many components of `dim` each side gives.

    Raises:
        RecipeError: all of them.
    """
    k = max(1, round(share * dim))
    if 2 * k >= dim:
        raise RecipeError(
            "hubness.share", f"{share:g}: {k} of {dim} components on each side", "less than half of them"
        )
    return k


def _strongest(moment: Tensor, k: int, strength: float) -> Tensor:
    """[D, D] -> its k strongest directions, each as long as the root of strength x its power, [D, k]."""
    power, directions = torch.linalg.eigh(moment)
    return directions[:, -k:] * (strength * power[-k:]).sqrt()
