"""What a bank against hubs would be worth: every picture's mean nearness to captions of train is taken off
its cosines, and every caption's to pictures of train (inverted softmax, Smith et al. 2017, eq. 3; Bogolin et
al. 2022 bank the queries likewise).

    python benchmarks/hub_bank.py STUDENT --pairs PAIRS

STUDENT: a student folder. With bank vectors b of the other side and a temperature tau,

    s(i, t) = cos(i, t) - b_i - b_t,   b_i = tau log mean_b exp(cos(i, b) / tau),   b_t likewise

Of each query one of the two is a constant, so that one score serves both directions.
"""

import argparse
from pathlib import Path

import numpy as np

from dclip_qdrant import metrics
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.serving.evaluation import embed
from dclip_qdrant.serving.student import Student
from dclip_qdrant.training.evaluate import spread

ROWS = 512  # of cosines to the bank that are held at once


def nearness(vectors: np.ndarray, bank: np.ndarray, tau: float) -> np.ndarray:
    """vectors [N, D], bank [B, D], unit rows -> tau log mean exp(cos / tau) [N]."""
    parts = [vectors[start : start + ROWS] @ bank.T for start in range(0, len(vectors), ROWS)]
    return np.concatenate([tau * np.log(np.exp(part / tau).mean(1)) for part in parts])


def line(name: str, image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> None:
    figures = metrics.retrieval(metrics.ranks(image, text, owner), bootstrap=0)
    t2i, i2t = figures["t2i"]["r@1"] * 100, figures["i2t"]["r@1"] * 100
    print(f"| {name} | {t2i:.1f} | {i2t:.1f} | {figures['mean_r@1'] * 100:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("student", type=Path, metavar="STUDENT")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--bank", type=int, default=1000, help="pictures of train, with two captions each")
    args = parser.parse_args()
    student, pairs = Student.load(args.student), Pairs.open(args.pairs)
    image, text, owner, _ = embed(student, pairs, args.split)
    bank_image, bank_text, bank_owner, _ = embed(student, pairs, "train")
    pictures = spread(len(bank_image), args.bank)
    captions = np.concatenate([np.flatnonzero(bank_owner == i)[:2] for i in pictures])
    bank_image, bank_text = bank_image[pictures], bank_text[captions]
    print(
        f"{len(image):,} pictures, {len(text):,} captions; bank: {len(bank_image):,} and {len(bank_text):,}"
    )
    print("| | t2i R@1 | i2t R@1 | mean |\n|---|---|---|---|")
    line("no bank", image, text, owner)
    for tau in (0.05, 0.07, 0.1, 0.15):
        of_image, of_text = nearness(image, bank_text, tau), nearness(text, bank_image, tau)
        # two more components, so that an inner product says s
        more_image = np.column_stack([image, -of_image, np.ones_like(of_image)])
        more_text = np.column_stack([text, np.ones_like(of_text), -of_text])
        line(f"bank, tau {tau:g}", more_image, more_text, owner)


if __name__ == "__main__":
    main()
