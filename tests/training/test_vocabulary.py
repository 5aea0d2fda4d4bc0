"""A text tower with fewer tokens: the tokens that stay have their numbers and vectors, all texts can still be
read, and what is exported reads them as the tower does."""

import copy
import json

import open_clip
import pytest
import torch
from conftest import TINY
from model_folders import model_folder

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import InheritSettings
from dclip_qdrant.tables.student_folder import MERGES
from dclip_qdrant.training.models import inherit, two_tower, vocabulary

SIZE = 1200
TEXTS = [
    "a dog and the cat",
    "Ein Häuschen, 漢字 & 42 emojis 🦆!",
    "a photo of an extraordinarily photogenic axolotl",
    "",
]


@pytest.fixture(scope="module")
def whole():
    return open_clip.get_tokenizer("ViT-B-32")


def test_the_first_merges_keep_their_numbers_and_every_text_can_be_read_back(whole):
    cut = vocabulary.cut_tokenizer(whole, SIZE)
    assert cut.vocab_size == SIZE
    assert list(cut.encoder)[: SIZE - 2] == list(whole.encoder)[: SIZE - 2]
    assert (cut.sot_token_id, cut.eot_token_id) == (SIZE - 2, SIZE - 1)
    for text in TEXTS:
        ids = cut.encode(text)
        assert all(i < SIZE - 2 for i in ids)
        assert cut.decode(ids).strip() == whole.decode(whole.encode(text)).strip()
    # "the" and "a" are among the commonest: read as before
    assert cut.encode("a the") == whole.encode("a the")
    assert len(cut.encode("axolotl")) > len(whole.encode("axolotl"))


def test_the_cut_tower_says_what_the_whole_one_says_of_common_words(whole, tiny_base, tmp_path):
    base = two_tower.load(str(tiny_base))
    inherit.write(base, str(tmp_path / "cut"), InheritSettings(vocabulary=SIZE))
    cut = two_tower.load(str(tmp_path / "cut"))
    assert cut.tokenizer.vocab_size == SIZE
    assert cut.config["text_cfg"]["vocab_size"] == SIZE
    less = (base.config["text_cfg"]["vocab_size"] - SIZE) * base.config["text_cfg"]["width"]
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(base) - count(cut) == less
    common = ["a the", "the man", "in the man"]
    assert [cut.tokenizer.encode(t) for t in common] == [base.tokenizer.encode(t) for t in common]
    with torch.no_grad():
        torch.testing.assert_close(cut.encode_text(cut.tokens(common)), base.encode_text(base.tokens(common)))


def test_a_student_of_a_cut_reads_texts_as_its_tower_does(tiny_base, tmp_path):
    from dclip_qdrant.jobs.export import export
    from dclip_qdrant.serving.student import Student

    inherit.write(two_tower.load(str(tiny_base)), str(tmp_path / "cut"), InheritSettings(vocabulary=SIZE))
    model = two_tower.load(str(tmp_path / "cut"))
    folder = tmp_path / "student"
    export(model, folder, name="cut", metrics={}, recipe={"name": "cut"})
    assert (folder / MERGES).is_file()
    assert MERGES in json.loads((folder / "manifest.json").read_text())["files"]
    with torch.no_grad():
        want = torch.nn.functional.normalize(model.encode_text(model.tokens(TEXTS)), dim=-1)
    got = torch.from_numpy(Student.load(folder).embed_texts(TEXTS))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    # the student can be trained on: it is an open_clip folder too
    again = two_tower.load(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(
            again.encode_text(again.tokens(TEXTS)), model.encode_text(model.tokens(TEXTS))
        )


@pytest.mark.parametrize("size", [49_408, 60_000])
def test_no_more_tokens_than_there_are(tiny_base, tmp_path, size):
    with pytest.raises(RecipeError, match=r"student\.inherit\.vocabulary.*fewer than the 49408"):
        inherit.write(two_tower.load(str(tiny_base)), str(tmp_path / "c"), InheritSettings(vocabulary=size))


def test_other_tokenizers_are_refused(tmp_path):
    config = copy.deepcopy(TINY)
    config["model_cfg"]["custom_text"] = True
    model = two_tower.load(model_folder(tmp_path / "m", config, 0))
    model.tokenizer = object()
    with pytest.raises(RecipeError, match="doesn't read CLIP's tokens"):
        inherit.cut(model, InheritSettings(vocabulary=SIZE))
