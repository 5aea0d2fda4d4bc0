"""Captions and queries become tokens without torch: open_clip's cleaning, then a Hugging Face `tokenizers`
file."""

import html
import re
import string
from collections.abc import Callable
from pathlib import Path

from dclip_qdrant.errors import StudentError


def clean_basic(text: str) -> str:
    """open_clip's basic_clean + whitespace_clean: mend broken Unicode, undo HTML entities twice, single
    spaces.

    Lower-casing is the tokenizer's.
    """
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def clean_canonical(text: str) -> str:
    """SigLIP's, after clean_basic: no punctuation, lower case (big_vision's canonicalize_text)."""
    text = clean_basic(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANERS: dict[str, Callable[[str], str]] = {
    "basic": clean_basic,
    "lower": lambda text: clean_basic(text).lower(),
    "canonicalize": clean_canonical,
    "none": lambda text: text,
}


class Tokenizer:
    """`tokenizer.json` with its cleaning and length; no torch, no transformers."""

    def __init__(
        self, folder: Path, *, clean: str, context_length: int, pad_id: int, pad_to_full: bool
    ) -> None:
        from tokenizers import Tokenizer as Fast

        if clean not in CLEANERS:
            expected = "one of " + ", ".join(CLEANERS)
            raise StudentError(folder, f"text cleaning {clean!r}", expected, "upgrade dclip-qdrant")
        self._fast = Fast.from_file(str(folder / "tokenizer.json"))
        self._fast.enable_truncation(context_length)
        self._fast.enable_padding(pad_id=pad_id, length=context_length if pad_to_full else None)
        self._clean = CLEANERS[clean]

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Rows of one length; truncated rows keep their end token."""
        return [e.ids for e in self._fast.encode_batch([self._clean(t) for t in texts])]

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text without padding."""
        return [sum(e.attention_mask) for e in self._fast.encode_batch([self._clean(t) for t in texts])]
