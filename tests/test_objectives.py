"""Every objective: numbers by hand, a naive transcription of its equation, invariants, gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F

from dclip_qdrant.encoded import Encoded
from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import names
from dclip_qdrant.objectives import build

ALL = [n for n in names("objectives") if n != "__init__"]


def test_there_are_objectives():
    assert set(ALL) >= {"info_nce", "cosine", "soft_targets"}


def encoded(n=6, c=1, d=5, seed=0, dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(n * c, d, generator=g, dtype=dtype)
    return Encoded(
        image.requires_grad_(grad), text.requires_grad_(grad), torch.arange(n).repeat_interleave(c), torch.tensor(10.0, dtype=dtype)
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("captions", [1, 3])
def test_contract_scalar_finite_differentiable(name, captions):
    objective = build(name, student_dim=5, teacher_dim=5)
    student = encoded(c=captions, grad=True)
    value = objective(student, encoded(c=captions, seed=1))
    assert value.shape == ()
    assert torch.isfinite(value)
    value.backward()
    assert student.image.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_permutation_of_the_batch_changes_nothing(name):
    objective = build(name, student_dim=5, teacher_dim=5)
    s, t, p = encoded(), encoded(seed=1), torch.randperm(6, generator=torch.Generator().manual_seed(3))
    shuffled = [Encoded(e.image[p], e.text[p], e.owner, e.logit_scale) for e in (s, t)]
    torch.testing.assert_close(objective(s, t), objective(*shuffled))


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    objective = build(name, student_dim=4, teacher_dim=4).double()
    t = encoded(4, d=4, seed=1, dtype=torch.float64)

    def f(image, text):
        return objective(Encoded(image, text, torch.arange(4), torch.tensor(10.0).double()), t)

    s = encoded(4, d=4, dtype=torch.float64)
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
    by_image = -sum(sum(s[i, 3 * i + k] - torch.logsumexp(s[i], 0) for k in range(3)) / 3 for i in range(4)) / 4
    by_text = -sum(s[m // 3, m] - torch.logsumexp(s[:, m], 0) for m in range(12)) / 12
    torch.testing.assert_close(build("info_nce", student_dim=5, teacher_dim=5)(e, e), (by_image + by_text) / 2)


def test_cosine_by_hand_and_zero_at_equality():
    s = Encoded(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2), torch.arange(2), torch.tensor(1.0))
    t = s.with_vectors(torch.tensor([[0.0, 2.0], [3.0, 3.0]]), torch.eye(2) * 5)
    assert build("cosine", student_dim=2, teacher_dim=2)(s, t).item() == pytest.approx(0.5)  # (1 - 0 + 1 - 1) / 2
    assert build("cosine", student_dim=2, teacher_dim=2, of="text")(s, t).item() == pytest.approx(0.0, abs=1e-6)


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
    objective = build("soft_targets", student_dim=5, teacher_dim=5, temperature=0.1, teacher_temperature=0.2, labels=0.3)
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
    soft = build("soft_targets", student_dim=5, teacher_dim=5, labels=1.0, temperature=0.05)(e, encoded(seed=1))
    torch.testing.assert_close(soft, build("info_nce", student_dim=5, teacher_dim=5, temperature=0.05)(e, e))


def test_dclip_hybrid_loss_is_the_sum_of_its_terms():
    """papers.md 1.1: [1 - cos(f_s, e)] + [1 - cos(g_s, s)] + InfoNCE at 0.05, weights 1 : 1 : 1."""
    from dclip_qdrant.recipe import Recipe
    from dclip_qdrant.training.student_task import Weighted

    s, t = encoded(8), encoded(8, seed=1)
    total, terms = Weighted(Recipe.load("dclip_as_released"), 5, 5)(s, t)
    logits = F.normalize(s.image, dim=-1) @ F.normalize(s.text, dim=-1).T / 0.05
    nce = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    naive = (1 - F.cosine_similarity(s.image, t.image)).mean() + (1 - F.cosine_similarity(s.text, t.text)).mean() + nce
    torch.testing.assert_close(total, naive)
    assert set(terms) == {"cosine.image", "cosine.text", "info_nce"}


@pytest.mark.parametrize(("name", "options", "says"), [
    ("info_nce", {"temprature": 1}, "did you mean 'temperature'"),
    ("info_nce", {"temperature": 0}, "must be > 0"),
    ("cosine", {"of": "sound"}, "must be image, text or regions"),
    ("cosin", {}, "did you mean 'cosine'"),
    ("no.such.module:Thing", {}, "no module"),
])  # fmt: skip
def test_wrong_names_and_options_get_one_clear_line(name, options, says):
    with pytest.raises(RecipeError, match=says) as e:
        build(name, student_dim=5, teacher_dim=5, **options)
    assert "\n" not in str(e.value)
