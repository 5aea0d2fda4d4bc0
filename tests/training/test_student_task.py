"""What a student's run trains: what objectives read is there, draws repeat, phases let towers rest, chunks
give the whole batch's gradient."""

import numpy as np
import pytest
import torch

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.recipe import InheritSettings, Recipe
from dclip_qdrant.training.data import Cache, in_view
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.loop import fit, gradients
from dclip_qdrant.training.models import inherit
from dclip_qdrant.training.models.two_tower import load
from dclip_qdrant.training.student_task import StudentTask, Uncaptioned

N, CAPTIONS = (
    8,
    [["a red star", "the red star is left of the moon"], ["a blue moon", "a photo of a moon"]] * 4,
)


class Fake:
    """Pictures by index, without files."""

    def load(self, i):
        from PIL import Image

        return Image.fromarray(np.random.default_rng(int(i)).integers(0, 255, (40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def cache(tiny_base):
    from dclip_qdrant.training.evaluate import encode_texts

    rng = np.random.default_rng(0)
    texts = encode_texts(load(str(tiny_base)), [c for cs in CAPTIONS for c in cs])
    boxes = np.tile(np.array([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32), (N, 1, 1))
    mask = np.ones((N, 3), bool)
    mask[::2, 2] = False
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)
    return Cache(
        [str(i) for i in range(N)],
        np.tile(np.array([0, 0, 1, 1], np.float32), (N, 1, 1)),
        np.zeros((N, 1), bool),
        np.zeros((N, 1, 0), np.float16),
        draw(N, 1, 32),
        draw(N, 3, 32),
        mask,
        boxes,
        texts=texts,
        first=np.arange(0, 2 * N + 1, 2),
    )


def recipe(*settings, objectives=({"name": "info_nce"},), **train):
    raw = Recipe.load("tiny", settings).as_dict()
    return Recipe(**(raw | {"objectives": list(objectives), "train": raw["train"] | train}))


def task(tiny_base, cache, r, **more):
    return StudentTask(
        load(str(tiny_base)),
        r,
        Fake(),
        CAPTIONS,
        cache,
        seed=3,
        same_base=True,
        base=lambda: load(str(tiny_base)),
        **more,
    )


EVERYTHING = (
    {"name": "info_nce"},
    {"name": "targeted_tokens"},
    {"name": "random_alignment"},
    {"name": "cosine", "of": "rois"},
    {"name": "cosine", "of": "spans"},
    {"name": "cosine", "of": "regions"},
)


@pytest.fixture
def full(tiny_base, cache):
    return task(
        tiny_base,
        cache,
        recipe("student.text=attn_proj", objectives=EVERYTHING, captions=2, region_share=0.5, span_share=0.5),
    )


def test_what_objectives_read_is_there(full):
    batch = full.batch(np.arange(4), 0)
    live, fixed = full.encode(batch), full.fixed(batch)
    assert live["rois"].shape == fixed["rois"].shape == (4, 3, 32)
    assert live["words"].shape == fixed["words"].shape == (8, 24, 32)
    assert live["regions"].shape == fixed["regions"].shape == (2, 32)
    assert live["spans"].shape == fixed["spans"].shape == (2, 32)
    assert fixed["noise"].shape == (8, 32)
    loss, terms = full.loss(live, fixed)
    assert torch.isfinite(loss)
    assert set(terms) == {
        "info_nce",
        "targeted_tokens",
        "random_alignment",
        "cosine.rois",
        "cosine.spans",
        "cosine.regions",
    }


def test_draws_follow_from_seed_epoch_and_picture(full):
    a, b, other = full.batch(np.arange(4), 1), full.batch(np.arange(4), 1), full.batch(np.arange(4), 2)
    for name in a.fixed:
        torch.testing.assert_close(a.fixed[name], b.fixed[name])
    assert not torch.equal(a.fixed["noise"], other.fixed["noise"])
    some = full.batch(np.array([2, 3]), 1)
    torch.testing.assert_close(some.fixed["noise"], a.fixed["noise"][4:])  # whatever else is in the batch


def test_spans_are_anchored_to_what_the_base_said_at_the_start(full):
    batch = full.batch(np.arange(8), 0)
    torch.testing.assert_close(full.encode(batch)["spans"], batch.fixed["spans"], atol=1e-5, rtol=1e-4)
    assert any(t.startswith("a photo of a ") for t in full.bank.texts)
    assert any(not t.startswith("a photo of a ") for t in full.bank.texts)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_whole_batchs_gradient(tiny_base, cache, chunk):
    r = recipe("student.text=attn_proj", objectives=EVERYTHING, captions=2, region_share=0.5, span_share=0.5)
    out = []
    for size in (100, chunk):
        t = task(tiny_base, cache, r)
        value, _ = gradients(t, t.batch(np.arange(8), 0), 8, size, Comm(), "cpu")
        out.append((value, [p.grad.clone() for p in t.modules.parameters() if p.requires_grad]))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-5)
    for a, b in zip(out[0][1], out[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_phases_let_a_tower_rest(tiny_base, cache):
    r = recipe(
        "student.text=attn_proj",
        epochs=3,
        batch_size=8,
        phases=[
            {"towers": "image", "epochs": 1},
            {"towers": "text", "epochs": 1},
            {"towers": "both", "epochs": 1},
        ],
        lr=1e-2,
    )
    t = task(tiny_base, cache, r)
    moved = []

    def after(epoch):
        now = t.model.weights()
        changed = {n for n in now if not torch.equal(now[n], before[-1][n])}
        moved.append(
            (any(n.startswith("visual.") for n in changed), any(not n.startswith("visual.") for n in changed))
        )
        before.append(now)
        return {}

    before = [t.model.weights()]
    fit(
        t,
        epochs=3,
        batch_size=8,
        chunk_size=8,
        warmup=0.0,
        schedule="constant",
        clip_norm=None,
        checkpoint_s=1e9,
        seed=0,
        after_epoch=after,
    )
    assert moved == [(True, False), (False, True), (True, True)]


def test_spans_without_a_learning_text_tower_are_refused(tiny_base, cache):
    with pytest.raises(RecipeError, match="a text tower that learns"):
        task(tiny_base, cache, recipe(objectives=({"name": "cosine", "of": "spans"},), span_share=0.5))


def test_regions_without_any_box_are_refused(tiny_base, cache):
    from dataclasses import replace

    with pytest.raises(RecipeError, match="objectives of regions without any region"):
        task(tiny_base, replace(cache, regions=None), recipe(objectives=({"name": "cosine", "of": "rois"},)))


def test_which_recipes_need_the_cached_regions():
    from dclip_qdrant.training.student_task import reads_regions

    assert {n for n in names() if reads_regions(Recipe.load(n))} == {
        "best",
        "clip_td",
        "dclip",
        "dclip_index",
        "demo",
    }  # clip_td has no teacher and no crops: regions of patch features alone


def test_phases_must_sum_to_the_epochs():
    with pytest.raises(RecipeError, match="train.phases have 2 epochs, train.epochs says 5"):
        Recipe.load("tiny", ["train.epochs=5", 'train.phases=[{towers="image", epochs=2}]'])


def test_boxes_in_a_view_by_hand():
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]], np.float32)
    crop = np.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.75, 0.75]], np.float32)
    shown, part = in_view(boxes, crop, np.array([False, True]))
    # the first box is the view; of the second a quarter is left, at the far corner, which a mirror brings to
    # the left
    np.testing.assert_allclose(shown, [[0, 0, 1, 1], [0, 2 / 3, 1 / 3, 1]], atol=1e-6)
    np.testing.assert_allclose(part, [1.0, 0.25], atol=1e-6)


# --- cuts


def test_which_layers_stay():
    assert inherit.kept(12, 6) == [0, 2, 4, 7, 9, 11]
    assert inherit.kept(4, 2) == [0, 3]
    assert inherit.kept(2, 1) == [0]


def test_a_cut_keeps_whole_layers_and_loads_as_a_model(tiny_base, tmp_path):
    whole = load(str(tiny_base))
    folder = str(tmp_path / "cut")
    inherit.write(whole, folder, InheritSettings(image_layers=1, text_layers=1))
    small = load(folder)
    assert small.config["vision_cfg"]["layers"] == small.config["text_cfg"]["layers"] == 1
    a, b = whole.weights(), small.weights()
    # the first layers, and everything outside of layers
    assert all(torch.equal(v, a[n]) for n, v in b.items())
    assert sum(v.numel() for v in b.values()) < sum(v.numel() for v in a.values())
    assert small.encode_text(small.tokens(["a red star"])).shape == (1, 32)


def test_a_cut_of_everything_is_no_cut(tiny_base, tmp_path):
    with pytest.raises(RecipeError, match="fewer than the 2"):
        inherit.write(load(str(tiny_base)), str(tmp_path / "cut"), InheritSettings(text_layers=2))


def test_patch_features_average_to_regions_and_the_embedding_is_the_models(tiny_base):
    model = load(str(tiny_base))
    pixels = torch.randn(2, 3, 32, 32)
    image, patches = model.encode_patches(pixels)
    torch.testing.assert_close(image, model.encode_image(pixels))
    assert patches.shape == (2, 32, 4, 4)
    _, rois = model.encode_rois(pixels, torch.tensor([[[0, 0, 1, 1], [0.5, 0, 1, 0.5]]] * 2))
    torch.testing.assert_close(rois[:, 0], patches.mean((2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rois[:, 1], patches[:, :, :2, 2:].mean((2, 3)), atol=1e-5, rtol=1e-4)


# --- every recipe


def names():
    from dclip_qdrant.recipe import recipe_names

    found = recipe_names()
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("name", names())
def test_every_recipe_trains_a_step_and_the_student_changes(tiny_base, cache, tmp_path, name):
    """The whole recipe but its size: its objectives, trainable set, cut and phases."""
    from dataclasses import replace

    from dclip_qdrant.jobs.comparison import same_budget

    own = Recipe.load(name)
    # its own phases, in its own epochs
    small = same_budget(own, own.with_settings("train.batch_size=4", "train.chunk_size=4"))
    raw = small.as_dict()
    if small.train.phases:
        raw["train"] |= {
            "epochs": 3,
            "phases": [{"towers": t, "epochs": 1} for t in ("image", "text", "both")],
        }
    else:
        raw["train"]["epochs"] = 1
    small = Recipe(**raw)
    cut = small.student.inherit
    start = str(tiny_base)
    if cut:
        start = str(tmp_path / "cut")
        inherit.write(
            load(str(tiny_base)),
            start,
            InheritSettings(
                image_layers=1 if cut.image_layers else None,
                text_layers=1 if cut.text_layers else None,
                vocabulary=cut.vocabulary,
            ),
        )
    own_cache = (
        replace(cache, teacher=np.random.default_rng(1).standard_normal((N, 1, 2, 32)).astype(np.float16))
        if small.teacher
        else cache
    )
    own_cache.others = tuple(cache for _ in small.ensemble.models)
    t = StudentTask(
        load(start),
        small,
        Fake(),
        CAPTIONS,
        own_cache,
        seed=0,
        same_base=not cut,
        base=lambda: load(str(tiny_base)),
        uncaptioned=Uncaptioned(Fake(), cache) if small.train.picture_share else None,
    )
    before = t.model.weights()
    history = fit(
        t,
        epochs=small.train.epochs,
        batch_size=4,
        chunk_size=4,
        warmup=0.0,
        schedule="constant",
        clip_norm=1.0,
        checkpoint_s=1e9,
        seed=0,
    )
    assert all(np.isfinite(h["loss"]) for h in history)
    t.model.merge_lora()
    after = t.model.weights()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert any(n.startswith("visual.") for n in moved)
    assert any(not n.startswith("visual.") for n in moved) == (small.student.text != "frozen")


@pytest.mark.parametrize("name", [n for n in names() if Recipe.load(n).index.objectives])
def test_a_recipes_rotation_is_learned_at_any_width(name, rng):
    from dclip_qdrant.training import rotation

    cfg = Recipe.load(name).index.model_copy(update={"steps": 2, "batch_size": 16})
    for width in (6, 32):
        image, text = rng.normal(size=(2, 20, width)).astype(np.float32)
        turn, _said = rotation.learn(image, text, np.arange(20), cfg, seed=0)
        torch.testing.assert_close(turn @ turn.T, torch.eye(width).double(), atol=1e-5, rtol=0)
