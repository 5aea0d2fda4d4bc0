"""A smaller vocabulary for a text tower that reads CLIP's tokens.

CLIP's byte pair encoding has its merges in order of how common they were. Its tokens are 256 bytes, the same
at a word's end, one for each merge in that order, and begin and end. The first n merges alone are therefore a
tokenizer by themselves whose tokens have the numbers that they had; a word that needs a later merge is read
in more pieces.
"""

import gzip
import tempfile
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from dclip_qdrant.tables.student_folder import MERGES

BYTES, SPECIAL = 512, 2  # tokens that are no merges: bytes, within a word and at its end; begin and end
WHOLE = 49_408  # CLIP's


def cut_tokenizer(tokenizer: SimpleTokenizer, size: int) -> SimpleTokenizer:
    """The same tokenizer with its first `size` tokens, begin and end among them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MERGES
        write_merges(tokenizer, path, size - BYTES - SPECIAL)
        return read_merges(path, tokenizer.context_length)


def cut_embedding(embedding: Tensor, size: int) -> Tensor:
    """Token vectors [V, W] -> those of the cut tokenizer [size, W]; begin and end stand last."""
    return torch.cat([embedding[: size - SPECIAL], embedding[-SPECIAL:]])


def is_cut(tokenizer: object) -> bool:
    return isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size < WHOLE


def write_merges(tokenizer: SimpleTokenizer, path: Path, count: int | None = None) -> None:
    """The tokenizer's merges, or its first `count`, in the form that SimpleTokenizer reads; the same bytes
    each time."""
    lines = [" ".join(pair) for pair in list(tokenizer.bpe_ranks)[:count]]
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *lines]).encode(), mtime=0))


def read_merges(path: Path, context_length: int | None) -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(path), context_length=context_length)
