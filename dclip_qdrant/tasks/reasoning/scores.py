"""The three tasks' figures, as their makers define them."""

import re
from collections.abc import Sequence

import numpy as np


def soft_accuracy(answer: str, people_answers: Sequence[str]) -> float:
    """VQA's accuracy of one answer against what people said: min(how many of the others said it / 3, 1), the
    mean over leaving each of them out.

    (visualqa.org/evaluation.) Both sides are normalised.
    """
    people = [normalise_answer(a) for a in people_answers]
    mine = normalise_answer(answer)
    each = [min(sum(a == mine for j, a in enumerate(people) if j != i) / 3, 1.0) for i in range(len(people))]
    return sum(each) / len(each) if each else 0.0


def soft_scores(people_answers: Sequence[str]) -> dict[str, float]:
    """The soft accuracy of every answer that somebody gave."""
    return {
        a: soft_accuracy(a, people_answers)
        for a in dict.fromkeys(normalise_answer(a) for a in people_answers)
    }


# visualqa.org's evaluation: what it takes for the same answer
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = {
    c.replace("'", ""): c
    for c in (
        "ain't",
        "aren't",
        "can't",
        "could've",
        "couldn't",
        "didn't",
        "doesn't",
        "don't",
        "hadn't",
        "hasn't",
        "haven't",
        "he'd",
        "he's",
        "how'd",
        "how'll",
        "how's",
        "i'd've",
        "i'm",
        "i've",
        "isn't",
        "it'd",
        "it'll",
        "let's",
        "ma'am",
        "mightn't",
        "might've",
        "mustn't",
        "must've",
        "needn't",
        "o'clock",
        "oughtn't",
        "shan't",
        "she'd've",
        "should've",
        "shouldn't",
        "somebody's",
        "someone's",
        "something's",
        "that's",
        "there'd",
        "there's",
        "they'd",
        "they'll",
        "they're",
        "they've",
        "'twas",
        "wasn't",
        "we've",
        "weren't",
        "what'll",
        "what're",
        "what's",
        "what've",
        "when's",
        "where'd",
        "where's",
        "where've",
        "who'd",
        "who'll",
        "who's",
        "who've",
        "why'll",
        "why're",
        "why's",
        "won't",
        "would've",
        "wouldn't",
        "y'all",
        "you'd",
        "you'll",
        "you're",
        "you've",
    )
}


def normalise_answer(answer: str) -> str:
    """Lower case, no articles, digits for number words, apostrophes of contractions, no punctuation (kept
    apart as a space between letters)."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    for p in _PUNCTUATION:
        if f"{p} " in text or f" {p}" in text or re.search(r"(\d)(,)(\d)", text):
            text = text.replace(p, "")
        else:
            text = text.replace(p, " ")
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text)
    words = [_NUMBERS.get(w, w) for w in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def vcr(
    answer: np.ndarray, rationale: np.ndarray, answer_label: np.ndarray, rationale_label: np.ndarray
) -> dict[str, np.ndarray]:
    """Picks [N] and right ones [N] -> which examples [N] are right in Q->A, in QA->R (the right answer
    given), and in Q->AR, where both must be. Figures are means."""
    a, r = (
        np.asarray(answer) == np.asarray(answer_label),
        np.asarray(rationale) == np.asarray(rationale_label),
    )
    return {"q->a": a, "qa->r": r, "q->ar": a & r}
