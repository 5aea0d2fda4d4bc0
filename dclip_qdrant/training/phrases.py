"""Spans: the pieces of a caption that a region can be matched with."""

import re

# Words that join things rather than name them: a caption is cut at them. English; another language falls back
# to commas.
_JOINTS = (
    r"(?:and|with|in|on|at|by|of|from|to|near|next|beside|behind|under|over|above|below|left|right|while"
    r"|who|that|is|are|has|have|the|one)"
)
_CUT = re.compile(rf"(?:[,.;:!?]|\b{_JOINTS}\b)+", re.IGNORECASE)


def phrases(caption: str, *, at_most: int = 8) -> list[str]:
    """The caption's phrases, in order: "a dog on the red sofa, asleep" -> ["a dog", "red sofa", "asleep"].

    A caption that holds nothing but joints comes back whole.
    """
    pieces = [" ".join(piece.split()) for piece in _CUT.split(caption)]
    return [p for p in pieces if p and p.lower() not in ("a", "an")][:at_most] or [caption]
