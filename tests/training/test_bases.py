"""Bases as people have them: published tags, folders put together by hand, towers of other families."""

import json

import open_clip
import pytest
import torch
from conftest import TINY
from model_folders import model_folder
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file

from dclip_qdrant.errors import RecipeError, UsageError
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.serving.tokenizer import CLEANERS
from dclip_qdrant.training import tokenizer_files
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.trial import try_recipe, try_towers


def test_a_model_wanted_without_weights_is_no_warning_of_random_ones(tiny_base, caplog):
    two_tower.load(str(tiny_base), weights=False)
    assert "initialized randomly" not in caplog.text
    open_clip.create_model(f"local-dir:{tiny_base}", load_weights=False)  # open_clip still says it to others
    assert "initialized randomly" in caplog.text


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Published weights are a file without any: names and configs are what is looked at."""
    from open_clip import factory

    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, cache_dir=None: str(tmp_path / "none"))
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: {})


@pytest.mark.parametrize(
    ("name", "quick"),
    [("RN50/openai", True), ("MobileCLIP-S1/datacompdr", False), ("RN50-quickgelu/openai", True)],
)
def test_the_activation_is_the_one_that_the_weights_were_trained_with(no_network, name, quick):
    model = two_tower.load(name)
    kinds = {type(m).__name__ for m in model.model.modules() if "GELU" in type(m).__name__}
    assert kinds == {"QuickGELU" if quick else "GELU"}
    assert bool(model.config.get("quick_gelu")) is quick  # what an export says


def folder(path, config, state, weights="open_clip_model.safetensors"):
    path.mkdir()
    (path / "open_clip_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if isinstance(state, bytes):
        (path / weights).write_bytes(state)
    elif weights.endswith(".bin"):
        torch.save(state, path / weights)
    else:
        save_file(state, path / weights)
    return str(path)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY["model_cfg"])
    return {k: v.contiguous() for k, v in model.state_dict().items()}


def test_weights_as_bin_are_the_same_model(tmp_path, state):
    one = two_tower.load(folder(tmp_path / "a", TINY, state))
    two = two_tower.load(folder(tmp_path / "b", TINY, state, "open_clip_pytorch_model.bin"))
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one.encode_image(pixels), two.encode_image(pixels))


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        (TINY["model_cfg"], None, "no model_cfg .*one level deeper"),
        ("{oops", None, "not JSON"),
        (TINY, b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        (TINY, b"cut short", "can't be loaded.*config and weights"),
        ({**TINY, "model_cfg": {**TINY["model_cfg"], "embed_dim": 64}}, None, "size mismatch"),
    ],
)
def test_a_broken_folder_is_said_without_the_network(tmp_path, state, config, weights, says):
    with pytest.raises(UsageError, match=says) as e:
        two_tower.load(folder(tmp_path / "x", config, weights or state))
    assert "network" not in str(e.value)
    assert "\n" not in str(e.value)


def other_towers(tmp_path, **text):
    config = json.loads(json.dumps(TINY))
    config["model_cfg"]["text_cfg"] |= text
    config["model_cfg"]["custom_text"] = True
    return two_tower.load(model_folder(tmp_path / "base", config, 0))


def test_a_recipe_that_a_text_tower_can_not_serve_is_refused_before_any_work(tmp_path):
    model = other_towers(tmp_path, embed_cls=True)
    try_towers(model)
    with pytest.raises(RecipeError, match=r"a text tower that gives features of its tokens.*phrases"):
        try_recipe(Recipe.load("tiny"), set(), model, model)
    try_recipe(Recipe.load("sft"), set(), model, model)
    with pytest.raises(RecipeError, match="features of its tokens"):
        try_recipe(Recipe.load("sft"), {"words"}, model, model)


def test_towers_that_give_no_vectors_are_refused(tiny_base):
    model = two_tower.load(str(tiny_base))
    model.config = {**model.config, "embed_dim": 33}
    with pytest.raises(UsageError, match=r"image tower gives \(1, 32\); expected one vector of 33"):
        try_towers(model)


TEXTS = (
    "It's the BLUE_cat, isn't it?",
    "  two\n lines ",
    "caf\u00e9 &amp;amp; \u201cna\u00efve\u201d",
    "(a)... b!",
    "",
)


@pytest.mark.parametrize(("ours", "theirs"), [("canonicalize",) * 2, ("lower",) * 2, ("basic", "whitespace")])
def test_text_is_cleaned_as_open_clip_does(ours, theirs):
    assert [CLEANERS[ours](t) for t in TEXTS] == [get_clean_fn(theirs)(t) for t in TEXTS]
    assert tokenizer_files.CLEANING[get_clean_fn(theirs).__name__] == ours


@pytest.mark.parametrize("template", [True, False])
def test_a_separator_that_clipa_blanks_is_blank_in_the_file(template):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "cat": 4}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    fast.post_processor = (
        processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        if template
        else processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    )
    assert fast.encode("cat cat").ids == [2, 4, 4, 3]
    facts = json.loads(fast.to_str())
    tokenizer_files._blank_separator(facts, "[SEP]", 3)
    assert Tokenizer.from_str(json.dumps(facts)).encode("cat cat").ids == [2, 4, 4, 0]


def test_a_published_model_is_named_by_its_weights(monkeypatch, tmp_path):
    """The same name with other weights behind it is another model: no stage of the old one is used."""
    from open_clip import factory

    shift = [0.0]

    def load(model, *_, **__):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01 + shift[0])
        return {}

    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, cache_dir=None: str(tmp_path / "none"))
    monkeypatch.setattr(factory, "load_checkpoint", load)
    one, again = (two_tower.load("RN50/openai").fingerprint for _ in range(2))
    shift[0] = 1.0
    assert one == again != two_tower.load("RN50/openai").fingerprint
