"""The region teacher against naive transcriptions of the formulas in docs/papers.md 1.1, and the properties
that the sound variant claims."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dclip_qdrant.recipe import Recipe, TeacherSettings
from dclip_qdrant.training.models.region_teacher import RegionTeacher, pool

D, H = 16, 8


def naive_attention(mha, query, keys):
    """softmax(q k^T / sqrt(d)) v, head by head, one sample: query [Q, D], keys [K, D]."""
    wq, wk, wv = mha.in_proj_weight.split(D)
    bq, bk, bv = mha.in_proj_bias.split(D)
    q, k, v = query @ wq.T + bq, keys @ wk.T + bk, keys @ wv.T + bv
    size = D // mha.num_heads
    out = []
    for h in range(mha.num_heads):
        s = slice(h * size, (h + 1) * size)
        weight = (q[:, s] @ k[:, s].T / size**0.5).softmax(-1)
        out.append(weight @ v[:, s])
    return torch.cat(out, 1) @ mha.out_proj.weight.T + mha.out_proj.bias


def naive_pool(a, temperature):
    mean = a.mean(0)
    cos = torch.stack([F.cosine_similarity(row, mean, dim=0) for row in a])
    return ((cos / temperature).softmax(0)[:, None] * a).sum(0)


def released() -> TeacherSettings:
    return Recipe.load("dclip_as_released").teacher


def sample(seed=0, b=3, r=4, s=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in ((b, D), (b, r, D), (b, s, D))]


def test_the_released_settings_are_the_papers():
    t = released()
    assert (t.fusion, t.heads, t.pool_temperature, t.temperature, t.caption) == (
        "bidirectional",
        8,
        2.0,
        0.05,
        "same",
    )
    assert (
        t.mask_padding,
        t.normalise_crops,
        t.include_global,
        t.gate,
        t.lr,
        t.epochs,
        t.batch_size,
        t.optimizer,
    ) == (
        False,
        False,
        False,
        "none",
        1e-5,
        5,
        32,
        "adam",
    )


def test_released_teacher_has_the_released_number_of_parameters():
    """docs/papers.md 1.1: 2,103,296 at d = 512."""
    assert sum(p.numel() for p in RegionTeacher(512, released()).parameters()) == 2_103_296
    assert sum(p.numel() for p in RegionTeacher(768, released()).parameters()) == 4_727_808


def test_released_teacher_is_the_formula_with_padding_taking_part():
    torch.manual_seed(0)
    teacher = RegionTeacher(D, released())
    image, regions, spans = sample()
    regions[1, 2:] = 0  # padded rows are zero, and count
    mask_r, mask_s = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    mask_r[1, 2:] = False
    got = teacher(image, regions, mask_r, spans, mask_s)
    for i in range(3):
        t, r = spans[i], regions[i]
        a_t = teacher.norm_text(t + naive_attention(teacher.attend_text, t, r))
        a_i = teacher.norm_image(r + naive_attention(teacher.attend_image, r, t))
        e = 0.5 * naive_pool(a_t, 2.0) + 0.5 * naive_pool(a_i, 2.0)
        torch.testing.assert_close(got[i], F.normalize(e, dim=0), atol=1e-5, rtol=1e-5)


def test_sound_teacher_is_the_formula_on_the_tokens_that_are_there():
    torch.manual_seed(0)
    cfg = TeacherSettings(heads=8, gate=0.3)
    teacher = RegionTeacher(D, cfg)
    image, regions, spans = sample()
    mask_r, mask_s = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    mask_r[1, 2:] = False
    mask_s[2, 3:] = False
    got = teacher(image, regions * mask_r[..., None], mask_r, spans * mask_s[..., None], mask_s)
    for i in range(3):
        t, r = spans[i][mask_s[i]], regions[i][mask_r[i]]
        a_t = teacher.norm_text(t + naive_attention(teacher.attend_text, t, r))
        a_i = teacher.norm_image(r + naive_attention(teacher.attend_image, r, t))
        fused = (naive_pool(a_t, 2.0) + naive_pool(a_i, 2.0)) / 2
        e = F.normalize(image[i], dim=0) + 0.3 * F.normalize(fused, dim=0)
        torch.testing.assert_close(got[i], F.normalize(e, dim=0), atol=1e-5, rtol=1e-5)


def test_regions_only_is_the_formula_and_hears_no_caption():
    torch.manual_seed(0)
    teacher = RegionTeacher(D, TeacherSettings(heads=8, gate=0.5, fusion="regions_only"))
    image, regions, spans = sample()
    mask = torch.ones(3, 4, dtype=torch.bool)
    got = teacher(image, regions, mask, spans, torch.ones(3, 5, dtype=torch.bool))
    for i in range(3):
        a = teacher.norm_image(
            image[i][None] + naive_attention(teacher.attend_image, image[i][None], regions[i])
        )[0]
        torch.testing.assert_close(
            got[i],
            F.normalize(F.normalize(image[i], dim=0) + 0.5 * F.normalize(a, dim=0), dim=0),
            atol=1e-5,
            rtol=1e-5,
        )
    torch.testing.assert_close(
        got, teacher(image, regions, mask, spans * 9, torch.ones(3, 5, dtype=torch.bool))
    )


def test_masked_rows_change_nothing_whatever_they_hold():
    torch.manual_seed(0)
    teacher = RegionTeacher(D, TeacherSettings(heads=4))
    image, regions, spans = sample()
    mask = torch.tensor([[True, True, False, False]] * 3)
    full = torch.ones(3, 5, dtype=torch.bool)
    other = regions.clone()
    other[:, 2:] = 0
    a, b = teacher(image, regions, mask, spans, full), teacher(image, other[:, :2], mask[:, :2], spans, full)
    torch.testing.assert_close(a, b)


def test_no_regions_and_no_spans_leave_a_finite_unit_vector_with_gradient():
    teacher = RegionTeacher(D, TeacherSettings(heads=4))
    image, regions, spans = sample()
    none_r, none_s = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    out = teacher(image.requires_grad_(), regions * 0, none_r, spans * 0, none_s)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(3))
    out.sum().backward()
    assert torch.isfinite(image.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in teacher.parameters() if p.grad is not None)


def test_pooling_by_hand():
    a = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    mean = torch.tensor([1.5, 2.0])
    cos = torch.tensor([1.5 / 2.5, 2.0 / 2.5])
    w = (cos / 2).softmax(0)
    torch.testing.assert_close(
        pool(a, torch.ones(1, 2, dtype=torch.bool), 2.0)[0], torch.stack([3 * w[0], 4 * w[1]])
    )
    assert mean.norm() == 2.5


@pytest.fixture
def tiny(tiny_base):
    from dclip_qdrant.training.models.two_tower import load

    return load(str(tiny_base))


def cache(n, captions, d=32):
    from dclip_qdrant.training.data import Cache

    rng = np.random.default_rng(0)
    first = np.concatenate([[0], np.cumsum(captions)])
    return Cache(
        keys=[f"k{i}" for i in range(n)],
        crop=np.zeros((n, 1, 4), np.float32),
        flip=np.zeros((n, 1), bool),
        trunk=np.zeros((n, 1, 0), np.float16),
        image=rng.normal(size=(n, 1, d)).astype(np.float16),
        regions=rng.normal(size=(n, 2, d)).astype(np.float16),
        region_mask=np.ones((n, 2), bool),
        texts=rng.normal(size=(first[-1], d)).astype(np.float16),
        first=first,
    )


def test_the_sound_teacher_never_fuses_the_caption_it_is_scored_against(tiny):
    from dclip_qdrant.training.teacher_task import TeacherTask

    captions = [[f"picture {i} caption {k}" for k in range(1 + i % 3)] for i in range(12)]
    counts = [len(c) for c in captions]
    for caption_kind in ("other", "same"):
        task = TeacherTask(
            TeacherSettings(heads=4, caption=caption_kind), tiny, captions, cache(12, counts), seed=0
        )
        for epoch in range(5):
            index = np.arange(12)
            batch = task.batch(index, epoch)
            for i in range(12):
                (target,) = [
                    k
                    for k in range(counts[i])
                    if np.allclose(
                        task.rows.cache.texts[task.rows.cache.first[i] + k].astype(np.float32),
                        batch.target[i].numpy(),
                    )
                ]
                if caption_kind == "same":
                    assert batch.inside[i] == captions[i][target]
                else:
                    assert batch.inside[i] != captions[i][target]
                    assert batch.inside[i] in captions[i] if counts[i] > 1 else batch.inside[i] == ""


def test_cached_target_of_a_caption_does_not_depend_on_that_caption(tiny, tmp_path):
    """Leave-one-out: change caption 0's words, and the target for caption 0 stays; the others' targets
    move."""
    from dclip_qdrant.jobs.teacher_cache import TeachFiles
    from dclip_qdrant.training.teacher_task import Spans

    torch.manual_seed(0)
    teach = TeachFiles.__new__(TeachFiles)
    teach.device, teach.teacher = "cpu", RegionTeacher(32, TeacherSettings(heads=4)).eval()
    teach.spans = Spans(tiny, "tokens")
    rng = np.random.default_rng(0)
    row = {
        "key": "k",
        "view": 0,
        "crop": [0, 0, 1, 1],
        "flip": False,
        "trunk": [],
        "image": rng.normal(size=32).tolist(),
        "regions": rng.normal(size=(2, 32)).tolist(),
        "split": "train",
    }
    before = np.array(
        teach._teach([{**row, "captions": ["a red star", "a blue moon", "a ring"]}])[0]["teacher_image"]
    )
    after = np.array(
        teach._teach([{**row, "captions": ["something else entirely", "a blue moon", "a ring"]}])[0][
            "teacher_image"
        ]
    )
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    assert np.abs(before[1] - after[1]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-5)


def test_spans_drop_begin_end_and_padding(tiny):
    from dclip_qdrant.training.teacher_task import Spans

    vectors, mask = Spans(tiny, "tokens")(["red star", "a big red star over a house"])
    assert mask.sum(1).tolist() == [2, 7]
    assert vectors[0, 2:].abs().sum() == 0
    ids = tiny.tokenizer(["red star"], context_length=24)
    with torch.no_grad():
        hidden = tiny.model.ln_final(
            tiny.model.transformer(
                tiny.model.token_embedding(ids) + tiny.model.positional_embedding,
                attn_mask=tiny.model.attn_mask,
            )
        )
        expected = (hidden @ tiny.model.text_projection)[0, 1:3]
    torch.testing.assert_close(vectors[0, :2], expected, atol=1e-5, rtol=1e-5)


def test_phrases():
    from dclip_qdrant.training.phrases import phrases

    assert phrases("a dog on the red sofa, asleep") == ["a dog", "red sofa", "asleep"]
    assert phrases("and with of") == ["and with of"]


def test_a_part_is_cut_between_pictures_only():
    from dclip_qdrant.jobs.teacher_cache import pieces

    views = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1])
    assert list(pieces(views, 2)) == [(0, 3), (3, 6), (6, 9)]
    assert list(pieces(views, 4)) == [(0, 6), (6, 9)]
    assert list(pieces(views, 100)) == [(0, 9)]
    assert list(pieces(np.zeros(0, np.int64), 2)) == []
