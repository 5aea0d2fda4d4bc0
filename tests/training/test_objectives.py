"""Every objective: numbers by hand, a naive transcription of its equation, invariants, gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from batches import encoded

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import names
from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.objectives import build

ALL = [n for n in names("training.objectives") if n != "__init__"]
# rounding has no derivative: what is passed on instead has tests of its own
STRAIGHT_THROUGH = {"quantised"}


def made(name, dim):
    return build(name, student_dim=dim, teacher_dim=dim)


def test_there_are_objectives():
    assert set(ALL) >= {"info_nce", "cosine", "soft_targets"}


def shuffled(e, p):
    """The batch (one caption a picture) in another order."""
    take = lambda x: None if x is None else x[p]
    return Encoded(
        take(e.image),
        take(e.text),
        e.owner,
        e.logit_scale,
        rois=take(e.rois),
        roi_mask=take(e.roi_mask),
        words=take(e.words),
        word_mask=take(e.word_mask),
        noise=take(e.noise),
        others=tuple(shuffled(o, p) for o in e.others),
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("captions", [1, 3])
def test_contract_scalar_finite_differentiable(name, captions):
    objective = made(name, 5)
    student = encoded(c=captions, grad=True)
    value = objective(student, encoded(c=captions, seed=1))
    assert value.shape == ()
    assert torch.isfinite(value)
    value.backward()
    reached = [
        v.grad for v in (student.image, student.text, student.rois, student.words) if v.grad is not None
    ]
    assert sum(g.abs().sum() for g in reached) > 0
    assert all(torch.isfinite(g).all() for g in reached)


@pytest.mark.parametrize("name", ALL)
def test_permutation_of_the_batch_changes_nothing(name):
    objective = made(name, 5)
    s, t, p = encoded(), encoded(seed=1), torch.randperm(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(objective(s, t), objective(shuffled(s, p), shuffled(t, p)))


@pytest.mark.parametrize("name", [n for n in ALL if n not in STRAIGHT_THROUGH])
def test_gradcheck(name):
    objective = made(name, 4).double()
    t = encoded(4, d=4, seed=1, dtype=torch.float64)

    s = encoded(4, d=4, dtype=torch.float64)

    def f(image, text):
        return objective(s.with_vectors(image, text), t)

    assert torch.autograd.gradcheck(f, (s.image.requires_grad_(), s.text.requires_grad_()))


def test_info_nce_by_hand():
    # two orthogonal pairs at temperature 1: logits [[1, 0], [0, 1]], loss = log(1 + e^-1) both ways
    e = Encoded(torch.eye(2) * 3, torch.eye(2) * 7, torch.arange(2), torch.tensor(1.0))
    value = build("info_nce", student_dim=2, teacher_dim=2, temperature=1.0)(e, e)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_info_nce_takes_the_models_own_scale():
    e = encoded()
    own = build("info_nce", student_dim=5, teacher_dim=5, temperature=None)(e, e)
    fixed = build("info_nce", student_dim=5, teacher_dim=5, temperature=0.1)(e, e)
    torch.testing.assert_close(own, fixed)


def test_info_nce_with_several_captions_against_loops():
    e, tau = encoded(4, c=3), 0.05
    s = F.normalize(e.image, dim=-1) @ F.normalize(e.text, dim=-1).T / tau
    by_image = (
        -sum(sum(s[i, 3 * i + k] - torch.logsumexp(s[i], 0) for k in range(3)) / 3 for i in range(4)) / 4
    )
    by_text = -sum(s[m // 3, m] - torch.logsumexp(s[:, m], 0) for m in range(12)) / 12
    torch.testing.assert_close(
        build("info_nce", student_dim=5, teacher_dim=5)(e, e), (by_image + by_text) / 2
    )


def test_cosine_by_hand_and_zero_at_equality():
    s = Encoded(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2), torch.arange(2), torch.tensor(1.0))
    t = s.with_vectors(torch.tensor([[0.0, 2.0], [3.0, 3.0]]), torch.eye(2) * 5)
    # (1 - 0 + 1 - 1) / 2
    assert build("cosine", student_dim=2, teacher_dim=2)(s, t).item() == pytest.approx(0.5)
    assert build("cosine", student_dim=2, teacher_dim=2, of="text")(s, t).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_cosine_bridges_widths_with_a_learned_projection():
    objective = build("cosine", student_dim=3, teacher_dim=5)
    s, t = encoded(d=3), encoded(d=5, seed=1)
    expected = (1 - F.cosine_similarity(s.image @ objective.project.weight.T, t.image)).mean()
    torch.testing.assert_close(objective(s, t), expected)
    assert sum(p.numel() for p in objective.parameters()) == 15


def test_soft_targets_are_zero_where_student_is_teacher_and_labels_are_off():
    e = encoded()
    value = build("soft_targets", student_dim=5, teacher_dim=5, labels=0.0)(e, e)
    assert value.item() == pytest.approx(0.0, abs=1e-6)


def test_soft_targets_against_the_equation():
    s, t = encoded(), encoded(seed=1)
    objective = build(
        "soft_targets", student_dim=5, teacher_dim=5, temperature=0.1, teacher_temperature=0.2, labels=0.3
    )
    a = F.normalize(s.image, dim=-1) @ F.normalize(s.text, dim=-1).T / 0.1
    b = F.normalize(t.image, dim=-1) @ F.normalize(t.text, dim=-1).T / 0.2

    def kl(a, b):
        total = 0.0
        for i in range(6):
            q = 0.3 * torch.eye(6)[i] + 0.7 * b[i].softmax(0)
            total = total + sum(q[j] * (q[j].log() - a[i].log_softmax(0)[j]) for j in range(6))
        return total / 6

    torch.testing.assert_close(objective(s, t), (kl(a, b) + kl(a.T, b.T)) / 2)


def test_soft_targets_with_labels_alone_is_info_nce():
    e = encoded()
    soft = build("soft_targets", student_dim=5, teacher_dim=5, labels=1.0, temperature=0.05)(
        e, encoded(seed=1)
    )
    torch.testing.assert_close(soft, build("info_nce", student_dim=5, teacher_dim=5, temperature=0.05)(e, e))


def naive_divergence(a, b, labels):
    """KL(labels * I + (1 - labels) * softmax(b) || softmax(a)), one caption a picture, both ways."""

    def one(a, b):
        total = 0.0
        for i in range(len(a)):
            q = labels * torch.eye(len(a))[i] + (1 - labels) * b[i].softmax(0)
            total = total + sum(
                x * (x.log() - y) for x, y in zip(q, a[i].log_softmax(0), strict=True) if x > 0
            )
        return total / len(a)

    return (one(a, b) + one(a.T, b.T)) / 2


def logits(image, text, tau=0.05):
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T / tau


@pytest.mark.parametrize("labels", [1.0, 0.0, 0.4])
def test_matryoshka_is_the_mean_over_prefixes(labels):
    e = encoded()
    value = build("matryoshka", student_dim=5, teacher_dim=5, dims=(2, 3), labels=labels)(e, e)
    whole = logits(e.image, e.text)
    by_prefix = [naive_divergence(logits(e.image[:, :d], e.text[:, :d]), whole, labels) for d in (2, 3)]
    torch.testing.assert_close(value, sum(by_prefix) / 2)


def test_a_prefix_is_a_number_of_components_or_a_part_of_them():
    from dclip_qdrant.training.contrast import prefix

    assert [prefix(d, 256) for d in (128, 0.5, 0.25, 256, 1, 0.001)] == [128, 128, 64, 256, 1, 1]


def test_matryoshka_by_hand():
    # first components alone: cosines are 1 or -1; second pair's sign is flipped, so S_1 = [[1, 1], [1, 1]]:
    # log 2 both ways
    e = Encoded(
        torch.tensor([[1.0, 9.0], [2.0, -9.0]]),
        torch.tensor([[3.0, 9.0], [4.0, -9.0]]),
        torch.arange(2),
        torch.tensor(1.0),
    )
    value = build("matryoshka", student_dim=2, teacher_dim=2, dims=(1,), temperature=1.0)(e, e)
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)


def test_matryoshka_at_full_length_asks_for_nothing_more():
    e = encoded()
    assert build("matryoshka", student_dim=5, teacher_dim=5, dims=(5,), labels=0.0)(
        e, e
    ).item() == pytest.approx(0.0, abs=1e-6)


def test_int8_has_128_levels_between_the_quantiles_and_passes_the_gradient_where_it_did_not_clip():
    from dclip_qdrant.training.objectives.quantised import int8

    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = int8(x)
    ordered = x.detach().flatten().sort().values
    low, high = ordered[15], ordered[-16]  # half a percent of 3,200 on each side
    step = (high - low) / 127
    assert len(((out - low) / step).round().unique()) <= 128
    inside = ((x > low) & (x < high)).detach()
    outside = ((x < low) | (x > high)).detach()
    assert (out - x).abs()[inside].max() <= step / 2 + 1e-6
    assert out.min().item() == pytest.approx(low.item())
    out.sum().backward()
    assert (x.grad[inside] == 1).all()
    assert (x.grad[outside] == 0).all()


def test_sign_and_its_straight_through_gradient():
    from dclip_qdrant.training.objectives.quantised import sign

    x = torch.tensor([[0.5, -0.1, 0.0, 0.8]]).requires_grad_()
    out = sign(x, 0.7)
    assert out.tolist() == [[1, -1, -1, 1]]  # Qdrant's bit is x > 0
    out.sum().backward()
    torch.testing.assert_close(x.grad, 1.4 * (1 - torch.tanh(1.4 * x.detach()) ** 2))  # 0.7 * sqrt(4)


@pytest.mark.parametrize("query", ["same", "float"])
def test_quantised_binary_against_the_equation(query):
    e = encoded()
    value = build("quantised", student_dim=5, teacher_dim=5, level="binary", dim=4, query=query, labels=0.3)(
        e, e
    )
    bits = lambda x: torch.where(x[:, :4] > 0, 1.0, -1.0)
    text = e.text[:, :4] if query == "float" else bits(e.text)
    torch.testing.assert_close(
        value, naive_divergence(logits(bits(e.image), text), logits(e.image, e.text), 0.3)
    )


def test_quantised_at_int8_is_near_nothing():
    e = encoded(32, d=64)
    coarse = build("quantised", student_dim=64, teacher_dim=64, level="binary")(e, e)
    fine = build("quantised", student_dim=64, teacher_dim=64, level="int8")(e, e)
    assert 0 < fine < 0.05 * coarse


def test_dclip_hybrid_loss_is_the_sum_of_its_terms():
    """docs/papers.md 1.1: [1 - cos(f_s, e)] + [1 - cos(g_s, s)] + InfoNCE at 0.05, weights 1 : 1 : 1."""
    from dclip_qdrant.recipe import Recipe
    from dclip_qdrant.training.student_task import Weighted

    s, t = encoded(8), encoded(8, seed=1)
    total, terms = Weighted(Recipe.load("dclip_as_released").objectives, 5, 5)(s, t)
    logits = F.normalize(s.image, dim=-1) @ F.normalize(s.text, dim=-1).T / 0.05
    nce = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    naive = (
        (1 - F.cosine_similarity(s.image, t.image)).mean()
        + (1 - F.cosine_similarity(s.text, t.text)).mean()
        + nce
    )
    torch.testing.assert_close(total, naive)
    assert set(terms) == {"cosine.image", "cosine.text", "info_nce"}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("info_nce", {"temprature": 1}, "did you mean 'temperature'"),
        ("info_nce", {"temperature": 0}, "must be > 0"),
        ("cosine", {"of": "sound"}, "must be one of image, text, regions, rois, spans"),
        ("matryoshka", {"dims": (2, 9)}, "more than the student's 5"),
        ("matryoshka", {"dims": (2.5,)}, "whole number of components, or a part"),
        ("matryoshka", {"dims": ()}, "dims are empty"),
        ("quantised", {"level": "int7"}, "must be int8 or binary"),
        ("quantised", {"query": "text"}, "must be same or float"),
        ("quantised", {"dim": 9}, "more than the student's 5"),
        ("cosin", {}, "did you mean 'cosine'"),
        ("no.such.module:Thing", {}, "no module"),
    ],
)
def test_wrong_names_and_options_get_one_clear_line(name, options, says):
    with pytest.raises(RecipeError, match=says) as e:
        build(name, student_dim=5, teacher_dim=5, **options)
    assert "\n" not in str(e.value)


def test_several_teachers_are_averaged_after_their_softmax():
    from dataclasses import replace

    s, a, b = encoded(), encoded(seed=1), encoded(d=3, seed=2)
    t = replace(a, others=(b,))
    objective = build(
        "soft_targets",
        student_dim=5,
        teacher_dim=5,
        temperature=0.1,
        teacher_temperature=[0.2, 0.5],
        labels=0.0,
    )
    la, lb, ls = (F.normalize(e.image, dim=-1) @ F.normalize(e.text, dim=-1).T for e in (a, b, s))

    def one_way(la, lb, ls):
        q = ((la / 0.2).softmax(1) + (lb / 0.5).softmax(1)) / 2
        return (
            sum(
                q[i, j] * (q[i, j].log() - (ls / 0.1).log_softmax(1)[i, j])
                for i in range(6)
                for j in range(6)
            )
            / 6
        )

    torch.testing.assert_close(objective(s, t), (one_way(la, lb, ls) + one_way(la.T, lb.T, ls.T)) / 2)
    only = build("soft_targets", student_dim=5, teacher_dim=5, labels=0.0, members=[1])
    torch.testing.assert_close(
        only(s, t), build("soft_targets", student_dim=5, teacher_dim=5, labels=0.0)(s, b)
    )
    with pytest.raises(ValueError, match="of 1 teachers"):
        only(s, a)


def test_random_alignment_by_hand_and_zero_where_both_meet_the_noise():
    e = Encoded(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[0.0, 0.0], [3.0, 2.0]]),
        torch.tensor([0, 0]),
        torch.tensor(1.0),
        noise=torch.tensor([[1.0, 0.0], [1.0, 2.0]]),
    )
    # images: (0 + 4 + 0 + 0) / 4, texts: (1 + 0 + 4 + 0) / 4
    assert build("random_alignment", student_dim=2, teacher_dim=2)(e, e).item() == pytest.approx(
        (1.0 + 1.25) / 2
    )
    met = Encoded(e.noise[:1], e.noise[:1], torch.tensor([0]), torch.tensor(1.0), noise=e.noise[:1])
    assert build("random_alignment", student_dim=2, teacher_dim=2)(met, met).item() == 0
    assert build("random_alignment", student_dim=2, teacher_dim=2, normalise=True)(
        met, met
    ).item() == pytest.approx(0, abs=1e-6)


def test_cosine_of_rois_counts_only_regions_that_are_there():
    e = {
        "image": torch.eye(2),
        "text": torch.eye(2),
        "owner": torch.arange(2),
        "logit_scale": torch.tensor(1.0),
        "roi_mask": torch.tensor([[True, False], [True, True]]),
    }
    s = Encoded(rois=torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [1.0, 0.0]]]), **e)
    t = Encoded(rois=torch.tensor([[[0.0, 1.0], [-9.0, 0.0]], [[0.0, 2.0], [3.0, 0.0]]]), **e)
    assert build("cosine", student_dim=2, teacher_dim=2, of="rois")(s, t).item() == pytest.approx(1 / 3)


def test_info_nce_in_blocks_of_rows_is_the_whole_matrix(monkeypatch):
    from dclip_qdrant.training import contrast

    torch.manual_seed(0)
    owner = torch.arange(7).repeat_interleave(2)

    def value_and_gradients():
        torch.manual_seed(1)
        image, text = torch.randn(7, 5, requires_grad=True), torch.randn(14, 5, requires_grad=True)
        temperature = torch.tensor(0.3, requires_grad=True)
        loss = contrast.info_nce_of(image, text, owner, temperature)
        loss.backward()
        return loss.detach(), image.grad, text.grad, temperature.grad

    whole = value_and_gradients()
    monkeypatch.setattr(contrast, "WHOLE", 10)
    monkeypatch.setattr(contrast, "BLOCK", 3)
    for got, wanted in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
