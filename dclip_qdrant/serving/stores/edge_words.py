"""How qdrant-edge is told to cut texts into words, in its text indexes and in its BM25 vectors."""

from typing import Any

import qdrant_edge as E

from dclip_qdrant.serving.collection import TextSpec


def words_options(text: TextSpec) -> dict[str, Any]:
    """Arguments of `TextIndexParams` and of `Bm25Config`; both have them."""
    options: dict[str, Any] = {
        "tokenizer": getattr(E.TokenizerType, text.tokenizer.capitalize()),
        "lowercase": True,
        "ascii_folding": text.ascii_folding,
    }
    if text.language:
        name = text.language.capitalize()
        return options | {
            "stemmer": E.SnowballParams(getattr(E.SnowballLanguage, name)),
            "stopwords": getattr(E.Language, name),
        }
    return options | {"stemmer": E.DisabledStemmer(), "stopwords": E.StopwordsSet()}
