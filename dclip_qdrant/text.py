"""Captions and queries become tokens without torch: open_clip's cleaning, then a Hugging Face `tokenizers` file."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import StudentError


def clean_basic(text: str) -> str:
    """open_clip's basic_clean + whitespace_clean: mend broken Unicode, undo HTML entities twice, single spaces. Lower-casing is the tokenizer's."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


CLEANERS: dict[str, Callable[[str], str]] = {"basic": clean_basic, "none": lambda text: text}


class Tokenizer:
    """`tokenizer.json` with its cleaning and length; no torch, no transformers."""

    def __init__(self, folder: Path, *, clean: str, context_length: int, pad_id: int, pad_to_full: bool) -> None:
        from tokenizers import Tokenizer as Fast

        if clean not in CLEANERS:
            raise StudentError(folder, f"text cleaning {clean!r}", "one of " + ", ".join(CLEANERS), "upgrade dclip-qdrant")
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


def write_tokenizer(model: Any, folder: Path) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json` (fastembed's dialect) for an open_clip model; what a Tokenizer must know of it."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    tokenizer = model.tokenizer
    if isinstance(tokenizer, SimpleTokenizer):
        _clip_bpe(tokenizer).save(str(folder / "tokenizer.json"))
        clean, pad_id, pad = "basic", 0, "!"
    elif isinstance(tokenizer, HFTokenizer) and hasattr(tokenizer.tokenizer, "backend_tokenizer"):
        inner = tokenizer.tokenizer
        inner.backend_tokenizer.save(str(folder / "tokenizer.json"))
        clean, pad_id, pad = "basic", inner.pad_token_id or 0, inner.pad_token
    else:
        raise StudentError(
            model.name, f"a tokenizer of type {type(tokenizer).__name__}", "open_clip's SimpleTokenizer or a fast Hugging Face tokenizer"
        )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": model.context_length, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}, indent=1) + "\n"
    )
    return {"clean": clean, "pad_id": pad_id, "pad_to_full": not model.dynamic_text}


def _clip_bpe(simple: Any) -> Any:
    """open_clip's SimpleTokenizer as a `tokenizers` BPE: the same ids for the same cleaned text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merges = [tuple(pair) for pair in simple.bpe_ranks]
    names = {v: k for k, v in simple.encoder.items()}
    sot, eot = simple.sot_token_id, simple.eot_token_id
    fast = Tokenizer(
        models.BPE(
            vocab=dict(simple.encoder),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=names[eot],
            fuse_unk=False,
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()])
    words = Regex(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # CLIP's pattern
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    fast.post_processor = processors.TemplateProcessing(
        single=f"{names[sot]} $A {names[eot]}", special_tokens=[(names[sot], sot), (names[eot], eot)]
    )
    fast.decoder = decoders.ByteLevel()
    return fast
