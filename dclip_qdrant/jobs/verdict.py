"""What a job ends with: whether the student is better, by how much, how sure that is, and what to do next."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dclip_qdrant.jobs.comparison import AFTER_WISE_FT, Difference

Word = Literal["better", "worse", "can't tell"]
WORDS: dict[str, Word] = {"better": "better", "worse": "worse", "inside the noise": "can't tell"}
RIVAL = "sft"  # plain fine-tuning: what every method has to beat


@dataclass(frozen=True)
class Verdict:
    """against_base: what decides. against_plain: the same against plain fine-tuning at the same budget, after
    WiSE-FT where it has that; None where it wasn't trained, or is the recipe itself."""

    against_base: Word
    against_plain: Word | None
    sentences: list[str]  # against the base, then against plain fine-tuning
    next: str  # what to do

    @property
    def is_success(self) -> bool:
        return self.against_base == "better" and self.against_plain != "worse"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"success": self.is_success}

    def text(self) -> str:
        first, *others = self.sentences
        lines = [f"Verdict: {first}", *(f"         {sentence}" for sentence in others)]
        return "\n".join([*lines, f"Next: {self.next}"])


def judge(recipe: str, differences: list[Difference], *, split: str) -> Verdict:
    """The verdict on a recipe's student from its differences to the base and to other recipes."""
    by_rival = {d.than: d for d in differences if d.of == recipe}
    base = by_rival["base"]
    plain = by_rival.get(RIVAL + AFTER_WISE_FT) or by_rival.get(RIVAL)
    against_base = WORDS[base.verdict]
    against_plain = WORDS[plain.verdict] if plain else None
    sentences = [_sentence(base, "the base", split)]
    if plain:
        sentences.append(_sentence(plain, "plain fine-tuning", split))
    elif recipe != RIVAL:
        sentences.append(f"not held against plain fine-tuning (the recipe {RIVAL!r})")
    return Verdict(against_base, against_plain, sentences, _next(against_base, against_plain, base))


def _sentence(difference: Difference, rival: str, split: str) -> str:
    """One comparison for a person."""
    low, high = difference.ci
    word = WORDS[difference.verdict]
    than = f"{word} than {rival}" if word != "can't tell" else f"can't tell from {rival}"
    line = (
        f"{than}: {difference.difference * 100:+.1f} points of mean R@1, 95% [{low * 100:+.1f}, "
        f"{high * 100:+.1f}], on {difference.n:,} pictures of {split}"
    )
    if difference.seeds > 1:
        line += f" and {difference.seeds} seeds"
    if word == "can't tell":
        if difference.needed is None:
            return f"{line}; there is no difference at all"
        if _is_close(difference):
            more = "a few more seeds" if difference.seeds > 1 else "a few more"
            return f"{line}; it is close, {more} would tell"
        line += f"; a difference of this size takes about {difference.needed:,}"
    return line


def _is_close(difference: Difference) -> bool:
    """Whether there are pictures enough for a difference of this size: two ways to reckon that meet at the
    border, or seeds that differ."""
    return difference.needed is not None and difference.needed <= difference.n


def _next(against_base: Word, against_plain: Word | None, base: Difference) -> str:
    if against_base == "worse":
        return "keep the base; lower train.lr, or train on more of your own captioned pictures"
    if against_base == "can't tell":
        if _is_close(base) and base.seeds > 1:
            return "keep the base for now; train more seeds, or on more pairs"
        count = f" (about {base.needed:,})" if base.needed and not _is_close(base) else ""
        return f"keep the base for now; measure on more test pictures{count}, or train on more pairs"
    if against_plain == "worse":
        return f"train the recipe {RIVAL!r}: on these pairs plain fine-tuning is better"
    if against_plain == "can't tell":
        return f"ingest your pictures with it (the recipe {RIVAL!r} may be as good)"
    return "ingest your pictures with it"
