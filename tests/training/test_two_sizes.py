"""A teacher and a student of different models: each sees its own pixels and reads its own tokens, and what is
cached of the student is what the student itself would say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from model_folders import LIGHT, model_folder

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.jobs.features import Decode, FeatureRequest, Featurise
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.tables.contracts import REGIONS
from dclip_qdrant.tables.stages import matrix, nested, write_part
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.evaluate import LabelledSet, encode_texts
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.student_task import StudentTask, Uncaptioned


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "light", LIGHT, 5)


def own_trunk(student, image, preprocess):
    pixels = preprocess.normalise(preprocess.pixels(image)[None])
    with torch.no_grad():
        return student.trunk(torch.from_numpy(pixels))[0].numpy()


@pytest.mark.parametrize("decoded_apart", [False, True])
def test_cached_trunks_are_what_the_student_sees_by_itself(
    tiny_base, light, pairs_folder, tmp_path, decoded_apart
):
    recipe = Recipe.load("tiny")
    box = {"key": None, "boxes": [[4.0, 6.0, 50.0, 40.0]], "scores": [0.9], "labels": ["thing"]}
    pairs = Pairs.open(str(pairs_folder))
    table = pq.read_table(pairs.files[0]).slice(0, 3)
    rows = table.to_pylist()
    (tmp_path / "regions").mkdir()

    boxed = [box | {name: row[name] for name in ("key", "width", "height")} for row in rows]
    write_part(tmp_path / "regions", REGIONS, boxed)
    (tmp_path / "out").mkdir()
    actor = Featurise(
        base=str(tiny_base),
        student=light,
        student_image=True,
        student_text=True,
        recipe=recipe.as_dict(),
        regions=str(tmp_path / "regions"),
        seed=0,
        pictures=False,
        out=str(tmp_path / "out"),
        threads=1,
    )
    if decoded_apart:  # by CPU actors, as where models have GPUs
        request = FeatureRequest(
            root=str(tmp_path),
            pairs=pairs,
            recipe=recipe,
            base=str(tiny_base),
            base_fingerprint="",
            student=light,
            regions=SimpleNamespace(path=tmp_path / "regions"),
        )
        table = Decode(**request.decoding(), threads=1)(table)
    actor(table)
    (part,) = (tmp_path / "out").glob("*.parquet")
    cached = pq.read_table(part).filter(pq.read_table(part)["view"].to_numpy() == 0)
    student, base = two_tower.load(light), two_tower.load(str(tiny_base))
    squash = replace(student.preprocess, resize_mode="squash")
    region_trunks, counts = nested(cached["region_trunk"])
    text_trunks, _ = nested(cached["text_trunk"])
    assert region_trunks.shape[1] == student.trunk(torch.zeros(1, 3, 48, 48)).shape[1]
    at = said = 0
    for i, row in enumerate(rows):
        image = load_image(row)
        want = own_trunk(student, image, student.preprocess)
        np.testing.assert_allclose(matrix(cached["trunk"])[i], want, atol=1e-5)
        np.testing.assert_allclose(region_trunks[at], want, atol=1e-5)  # the whole picture stands first
        fractions = cached["region_boxes"].to_pylist()[i][1]
        x0, y0, x1, y1 = (f * s for f, s in zip(fractions, image.size * 2, strict=True))
        crop = image.crop((round(x0), round(y0), round(x1), round(y1)))
        np.testing.assert_allclose(region_trunks[at + 1], own_trunk(student, crop, squash), atol=1e-5)
        at += counts[i]
        own = torch.from_numpy(text_trunks[said : said + len(row["captions"])])
        with torch.no_grad():
            texts = student.text_head(own)
            stock = student.model.encode_text(
                student.tokenizer(row["captions"], context_length=student.context_length)
            )
        torch.testing.assert_close(texts, stock, atol=1e-5, rtol=1e-4)
        said += len(row["captions"])
        vector = base.preprocess.normalise(base.preprocess.pixels(image)[None])
        with torch.no_grad():
            image_vector = base.model.encode_image(torch.from_numpy(vector))[0].numpy()
        np.testing.assert_allclose(matrix(cached["image"])[i], image_vector, atol=1e-5)


def test_a_base_that_is_its_own_student_reads_each_caption_once(tiny_base, tmp_path, monkeypatch):
    captions = ["a red dog", "two blue cats that run", "a"]
    recipe = Recipe.load("tiny").as_dict()
    actor = Featurise(
        str(tiny_base), str(tiny_base), True, True, recipe, None, 0, False, str(tmp_path), threads=1
    )
    model = two_tower.load(str(tiny_base))
    monkeypatch.setattr(actor.base, "encode_text", None)  # one pass of the trunk is enough
    vectors, trunks = actor._encode_texts(captions)
    with torch.no_grad():
        ids = model.tokenizer(captions, context_length=model.context_length)
        torch.testing.assert_close(torch.from_numpy(vectors), model.model.encode_text(ids), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            model.text_head(torch.from_numpy(np.stack(trunks))), torch.from_numpy(vectors)
        )


OTHER_TEXTS = {
    "causal": {},
    "not causal": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "without a projection": {"proj_type": "none", "width": 32, "heads": 2},
}


@pytest.mark.parametrize("kind", OTHER_TEXTS)
def test_text_head_of_text_trunk_is_encode_text(tmp_path, kind):
    config = json.loads(json.dumps(TINY))
    config["model_cfg"]["text_cfg"] |= OTHER_TEXTS[kind]
    config["model_cfg"]["custom_text"] = True
    model = two_tower.load(model_folder(tmp_path / "m", config, 0))
    assert model.text_trunk_frozen == (kind != "without a projection")
    ids = model.tokens(["a red dog", "two blue cats that run"])
    if model.text_trunk_frozen:
        with torch.no_grad():
            torch.testing.assert_close(
                model.text_head(model.text_trunk(ids)),
                model.model.encode_text(
                    model.tokenizer(
                        ["a red dog", "two blue cats that run"], context_length=model.context_length
                    )
                ),
            )
    before = {n: p.shape for n, p in model.model.named_parameters()}
    assert {n: p.shape for n, p in two_tower.load(str(tmp_path / "m")).model.named_parameters()} == before


def test_projections_alone_learn_and_their_trunks_are_not_run(tiny_base, light, monkeypatch):
    student = two_tower.load(light)
    captions = [["a red dog", "a dog"], ["two cats"], ["a bird in a tree", "a bird"]]
    counts = [len(c) for c in captions]
    rng = np.random.default_rng(0)
    width = student.trunk(torch.zeros(1, 3, 48, 48)).shape[1]
    flat = [caption for own in captions for caption in own]
    cache = Cache(
        keys=["a", "b", "c"],
        crop=np.tile(np.array([0, 0, 1, 1], np.float32), (3, 1, 1)),
        flip=np.zeros((3, 1), bool),
        trunk=rng.normal(size=(3, 1, width)).astype(np.float16),
        image=rng.normal(size=(3, 1, 32)).astype(np.float16),
        texts=rng.normal(size=(5, 32)).astype(np.float16),
        text_trunk=encode_texts(student, flat, trunk=True).astype(np.float16),
        first=np.concatenate([[0], np.cumsum(counts)]),
    )
    recipe = Recipe.load("projections", ["train.batch_size=3"])
    task = StudentTask(student, recipe, None, captions, cache, seed=0, same_base=False)
    assert set(task.image_names) == {"visual.head.proj.weight"}
    assert task.text_names == ["text_projection"]
    assert task.resting.image
    assert task.resting.text_trunk
    live = task.encode(task.batch(np.arange(3), 0))
    drawn = task.batch(np.arange(3), 0)
    with torch.no_grad():  # one caption a picture, as drawn: it is one of the picture's own
        own = [student.encode_text(student.tokens(c)) for c in captions]
    for row, vectors in zip(live["text"], own, strict=True):
        assert min((row - v).abs().max().item() for v in vectors) < 2e-2  # float16 in the cache
    assert drawn.texts.shape == (3, cache.text_trunk.shape[1])
    loss, _ = task.loss(live, task.fixed(drawn))
    loss.backward()
    assert student.model.text_projection.grad.abs().max() > 0


def test_a_labelled_set_keeps_no_other_models_trunk(tiny_base, light, labelled_folder, tmp_path):
    """Two models, or one whose trunk was changed in between: each gets its own features."""
    labelled = LabelledSet(str(labelled_folder))
    student = two_tower.load(light)
    first = labelled.right(student).tolist()
    changed = two_tower.load(model_folder(tmp_path / "changed", LIGHT, 6))
    fresh = LabelledSet(str(labelled_folder)).right(changed).tolist()
    assert labelled.right(changed).tolist() == fresh
    assert labelled.right(student).tolist() == first
    before = student.trunk_mark()
    student.choose("image", "lora", rank=2)
    for name, p in student.model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(p)
    student.merge_lora()
    assert student.trunk_frozen
    assert student.trunk_mark() != before
    assert labelled.right(student).tolist() == LabelledSet(str(labelled_folder)).right(student).tolist()


def test_pictures_without_captions_are_drawn_and_learned_from(tiny_base, light):
    student = two_tower.load(light)
    width = student.trunk(torch.zeros(1, 3, 48, 48)).shape[1]
    rng = np.random.default_rng(0)

    def cache(count, texts):
        return Cache(
            keys=[str(i) for i in range(count)],
            crop=np.tile(np.array([0, 0, 1, 1], np.float32), (count, 1, 1)),
            flip=np.zeros((count, 1), bool),
            trunk=rng.normal(size=(count, 1, width)).astype(np.float16),
            image=rng.normal(size=(count, 1, 32)).astype(np.float16),
            texts=rng.normal(size=(texts, 32)).astype(np.float16) if texts else None,
            first=np.arange(count + 1) if texts else np.zeros(count + 1, np.int64),
        )

    captions, more = [["a"], ["b c"], ["d"], ["e"]], cache(7, 0)
    settings = ["train.captions=1", "train.picture_share=0.5", 'student.train="proj"']
    recipe = Recipe.load("pictures", settings)
    uncaptioned = Uncaptioned(None, more)
    task = StudentTask(
        student, recipe, None, captions, cache(4, 4), seed=3, same_base=False, uncaptioned=uncaptioned
    )
    batch = task.batch(np.arange(4), 1)
    assert batch.pictures.shape == (2, width)
    again = task.batch(np.arange(4), 1)
    torch.testing.assert_close(batch.pictures, again.pictures)  # follows from (seed, epoch, picture)
    for shown, said in zip(batch.pictures.numpy(), batch.fixed["pictures"].numpy(), strict=True):
        row = int(np.flatnonzero((more.trunk[:, 0] == shown).all(1))[0])
        np.testing.assert_array_equal(more.image[row, 0].astype(np.float32), said)
    live, fixed = task.encode(batch), task.fixed(batch)
    loss, terms = task.loss(live, fixed)
    assert np.isfinite(loss.item())
    # KL(softmax(teacher / 0.05) || softmax(student / 0.05)) by hand
    unit = lambda x: x / x.norm(dim=1, keepdim=True)
    p = (unit(fixed["pictures"]) @ unit(fixed["text"]).T / 0.05).softmax(1)
    q = (unit(live["pictures"]) @ unit(live["text"]).T / 0.05).softmax(1)
    assert terms["soft_targets.pictures"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), abs=1e-4)
    with pytest.raises(RecipeError, match="pictures without captions are asked for"):
        StudentTask(student, recipe, None, captions, cache(4, 4), seed=3, same_base=False)
