"""An open_clip model's tokenizer as the files of a student folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from dclip_qdrant.errors import StudentError
from dclip_qdrant.tables import storage

if TYPE_CHECKING:
    from dclip_qdrant.training.models.two_tower import TwoTower

CLEANING = {  # open_clip's functions -> our names
    "_clean_canonicalize": "canonicalize",
    "_clean_lower": "lower",
    "_clean_whitespace": "basic",
    "none": "none",
}
# CLIP's pattern of words
WORDS = (
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def write_tokenizer(model: "TwoTower", folder: Path) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json` (fastembed's dialect); what a Tokenizer must know of it.

    Raises:
        StudentError: a tokenizer that has no fast form.
    """
    tokenizer = model.tokenizer
    names: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer"}
    if isinstance(tokenizer, SimpleTokenizer):
        _clip_bpe(tokenizer).save(str(folder / "tokenizer.json"))
        pad_id, pad = 0, "!"
    elif isinstance(tokenizer, HFTokenizer) and hasattr(tokenizer.tokenizer, "backend_tokenizer"):
        inner = tokenizer.tokenizer
        facts = json.loads(inner.backend_tokenizer.to_str())
        if tokenizer.strip_sep_token:
            _blank_separator(facts, inner.sep_token, inner.sep_token_id)
        storage.write_text(folder / "tokenizer.json", json.dumps(facts, ensure_ascii=False))
        pad_id, pad = inner.pad_token_id or 0, inner.pad_token
        names = {**inner.special_tokens_map, "tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        came = f"a tokenizer of type {type(tokenizer).__name__}"
        raise StudentError(model.name, came, "open_clip's SimpleTokenizer or a fast Hugging Face tokenizer")
    config = {**names, "model_max_length": model.context_length, "pad_token": pad}
    storage.write_json(folder / "tokenizer_config.json", config)
    clean = _cleaning(model)
    return {"clean": clean, "pad_id": pad_id, "pad_to_full": not model.dynamic_text}


def _cleaning(model: "TwoTower") -> str:
    """What of `serving.tokenizer.CLEANERS` does the same as open_clip's tokenizer before its ids.

    Raises:
        StudentError: a cleaning of another name.
    """
    name = getattr(getattr(model.tokenizer, "clean_fn", None), "__name__", "none")
    if name not in CLEANING:
        raise StudentError(model.name, f"a tokenizer that cleans text by {name}", ", ".join(CLEANING))
    lowers_itself = isinstance(model.tokenizer, SimpleTokenizer)  # our copy of it has a Lowercase step
    return "basic" if CLEANING[name] == "lower" and lowers_itself else CLEANING[name]


def _blank_separator(facts: dict[str, Any], token: str, ident: int) -> None:
    """CLIPA puts 0 in the place of the separator that ends a text: the file's last step does so too."""
    step = facts.get("post_processor") or {}
    if step.get("type") in ("BertProcessing", "RobertaProcessing") and step["sep"][1] == ident:
        step["sep"][1] = 0
    special = step.get("special_tokens", {})
    if token in special:
        special[token]["ids"] = [0]


def _clip_bpe(simple: SimpleTokenizer) -> Any:
    """open_clip's SimpleTokenizer as a `tokenizers` BPE: the same ids for the same cleaned text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = {v: k for k, v in simple.encoder.items()}
    start, end = simple.sot_token_id, simple.eot_token_id
    fast = Tokenizer(
        models.BPE(
            vocab=dict(simple.encoder),
            merges=[(left, right) for left, right in simple.bpe_ranks],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=names[end],
            fuse_unk=False,
        )
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{names[start]} $A {names[end]}",
        special_tokens=[(names[start], start), (names[end], end)],
    )
    fast.decoder = decoders.ByteLevel()
    return fast
