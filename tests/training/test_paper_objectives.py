"""The objectives of ConaCLIP, ComKD-CLIP and CLIP-TD: numbers by hand, a naive transcription of each
equation. What holds for every objective is in test_objectives.py."""

import pytest
import torch
import torch.nn.functional as F
from batches import encoded

from dclip_qdrant.training.encoded import Encoded
from dclip_qdrant.training.objectives import build


def naive_edge(a, b, c, d, loss, tau):
    """One side of one edge of ConaCLIP's graph, by loops."""
    n = len(a)
    p = [[(a[i] * b[j]).sum() for j in range(n)] for i in range(n)]
    t = [[(c[i] * d[j]).sum() for j in range(n)] for i in range(n)]
    soft = lambda row: [x / sum((y / tau).exp() for y in row) for x in ((y / tau).exp() for y in row)]
    if loss == "info_nce":
        return -sum(soft(p[i])[i].log() for i in range(n)) / n
    if loss == "fd":
        return sum(((a[i] - b[i]) ** 2).sum() for i in range(n)) / n
    if loss == "mse":
        return sum(((a[i] - b[i]) ** 2).mean() for i in range(n)) / n
    if loss == "sd":
        return sum((p[i][j] - t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2
    # kl
    return (
        sum(soft(t[i])[j] * (soft(t[i])[j].log() - soft(p[i])[j].log()) for i in range(n) for j in range(n))
        / n
    )


EDGES = [
    (k, v)
    for k in ("intra_ts", "intra_ss", "inter_ts", "inter_ss")
    for v in ("info_nce", "fd", "mse", "sd", "kl")
]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [e for e in EDGES if e not in {("intra_ss", "info_nce"), ("intra_ss", "fd"), ("intra_ss", "mse")}],
)
def test_every_edge_of_the_relation_graph_against_loops(kind, loss):
    s, t, unit = encoded(4), encoded(4, seed=1), lambda x: F.normalize(x, dim=-1)
    i_s, t_s, i_t, t_t = unit(s.image), unit(s.text), unit(t.image), unit(t.text)
    sides = {
        "intra_ts": [(i_s, i_t, i_t, i_t), (t_s, t_t, t_t, t_t)],
        "intra_ss": [(i_s, i_s, i_t, i_t), (t_s, t_s, t_t, t_t)],
        "inter_ts": [(i_s, t_t, i_t, t_t), (t_s, i_t, t_t, i_t)],
        "inter_ss": [(i_s, t_s, i_t, t_t), (t_s, i_s, t_t, i_t)],
    }[kind]
    objective = build(
        "relation_graph",
        student_dim=5,
        teacher_dim=5,
        edges=({"type": kind, "loss": loss, "weight": 2.0, "temperature": 0.3},),
    )
    torch.testing.assert_close(objective(s, t), 2 * sum(naive_edge(*side, loss, 0.3) for side in sides))


def test_the_symmetric_losses_compare_the_two_sides_of_an_edge():
    s, t, unit = encoded(4), encoded(4, seed=1), lambda x: F.normalize(x, dim=-1)
    i_s, t_s, i_t, t_t = unit(s.image), unit(s.text), unit(t.image), unit(t.text)
    edge = lambda kind, loss: build(
        "relation_graph",
        student_dim=5,
        teacher_dim=5,
        edges=({"type": kind, "loss": loss, "temperature": 0.5},),
    )(s, t)
    # docs/papers.md 3.1
    torch.testing.assert_close(edge("intra_ts", "sym_sd"), ((t_s @ t_t.T - i_s @ i_t.T) ** 2).mean())
    a, b = (i_s @ t_t.T / 0.5).log_softmax(1), (t_s @ i_t.T / 0.5).log_softmax(1)
    both = (a.exp() * (a - b)).sum(1).mean() + (b.exp() * (b - a)).sum(1).mean()
    torch.testing.assert_close(edge("inter_ts", "sym_kl"), both)


def test_relation_graph_by_hand_and_zero_at_equality():
    # one pair at right angles in the student, along each other in the teacher: S(I^s, T^s) = 0 against 1,
    # both sides: 1 + 1
    s = Encoded(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.arange(1), torch.tensor(1.0))
    t = s.with_vectors(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]]))
    graph = lambda *edges: build("relation_graph", student_dim=2, teacher_dim=2, edges=edges)
    assert graph({"type": "inter_ss", "loss": "sd"})(s, t).item() == pytest.approx(2.0)
    e = encoded()
    for kind in ("intra_ts", "intra_ss", "inter_ts", "inter_ss"):
        for loss in ("sd", "kl"):
            assert build(
                "relation_graph", student_dim=5, teacher_dim=5, edges=({"type": kind, "loss": loss},)
            )(e, e).item() == pytest.approx(0, abs=1e-6)


def test_the_papers_chosen_set_is_the_default():
    """docs/papers.md 3.1: intra TS InfoNCE + SD + Sym-SD, intra SS SD, inter TS InfoNCE + Sym-KL, inter SS
    InfoNCE + SD."""
    s, t = encoded(), encoded(seed=1)
    chosen = [
        ("intra_ts", "info_nce"),
        ("intra_ts", "sd"),
        ("intra_ts", "sym_sd"),
        ("intra_ss", "sd"),
        ("inter_ts", "info_nce"),
        ("inter_ts", "sym_kl"),
        ("inter_ss", "info_nce"),
        ("inter_ss", "sd"),
    ]
    each = [
        build("relation_graph", student_dim=5, teacher_dim=5, edges=({"type": k, "loss": v},))(s, t)
        for k, v in chosen
    ]
    torch.testing.assert_close(build("relation_graph", student_dim=5, teacher_dim=5)(s, t), sum(each))


@pytest.mark.parametrize("axis", ["batch", "feature"])
def test_moment_alignment_against_the_equation_and_zero_at_equality(axis):
    s, t = encoded(), encoded(seed=1)
    u_s, u_t = s.image / s.image.norm(dim=1, keepdim=True), t.image / t.image.norm(dim=1, keepdim=True)
    if axis == "feature":
        u_s, u_t = u_s.T, u_t.T
    n = len(u_s)
    mu_s, mu_t = sum(u_s) / n, sum(u_t) / n
    var_s, var_t = sum((x - mu_s) ** 2 for x in u_s) / n, sum((x - mu_t) ** 2 for x in u_t) / n
    each = (mu_s - mu_t).abs() + (var_s - var_t).abs()
    wanted = each.sum() if axis == "batch" else each.mean()
    objective = build("moment_alignment", student_dim=5, teacher_dim=5, axis=axis)
    torch.testing.assert_close(objective(s, t), wanted)
    assert objective(s, s).item() == 0


def test_moment_alignment_by_hand():
    # means (1, 0) and (0, 0): 1; variances (1, 0) and (4, 0): 3
    s = Encoded(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.eye(2), torch.arange(2), torch.tensor(1.0))
    t = s.with_vectors(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.eye(2))
    assert build("moment_alignment", student_dim=2, teacher_dim=2, normalise=False)(
        s, t
    ).item() == pytest.approx(4.0)


def test_edu_attention_starts_as_plain_kl_and_follows_the_equation_after():
    s, t = encoded(4), encoded(4, seed=1)
    objective = build("edu_attention", student_dim=5, teacher_dim=5, temperature=0.2, distill_temperature=2.0)
    unit = lambda x: F.normalize(x, dim=-1)

    def equation(f_e):
        q_t, q_s = (
            (unit(t.image) @ unit(t.text).T / 0.2 / 2).softmax(1),
            (f_e @ unit(t.text).T / 0.2 / 2).softmax(1),
        )
        return (
            sum(q_t[i, j] * (q_t[i, j].log() - q_s[i, j].log()) for i in range(4) for j in range(4)) / 4 * 4
        )

    torch.testing.assert_close(objective(s, t), equation(unit(s.image)))
    assert build("edu_attention", student_dim=5, teacher_dim=5)(t, t).item() == pytest.approx(0, abs=1e-6)
    a = objective.attention
    with torch.no_grad():
        a.alpha.fill_(0.7)
    att = torch.stack(
        [
            sum(
                w * v
                for w, v in zip(
                    (a.query(u) @ a.key(unit(t.text)).T / 5**0.5).softmax(0),
                    a.value(unit(t.text)),
                    strict=True,
                )
            )
            for u in unit(s.image)
        ]
    )
    torch.testing.assert_close(objective(s, t), equation(unit(s.image) + 0.7 * att))


def test_edu_attention_learns_alpha_from_zero():
    s, t = encoded(4), encoded(4, seed=1)
    objective = build("edu_attention", student_dim=5, teacher_dim=5)
    objective(s, t).backward()
    assert objective.attention.alpha.grad.abs() > 0


@pytest.mark.parametrize("weighting", ["teacher", "relative", "none"])
def test_targeted_tokens_against_loops(weighting):
    s, t = encoded(3, c=2), encoded(3, c=2, seed=1)
    objective = build(
        "targeted_tokens",
        student_dim=5,
        teacher_dim=5,
        regions=2,
        words=1,
        weighting=weighting,
        temperature=0.3,
    )
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)

    def part(own, target, mask, query, top):
        score = {k: (unit(target[k]) * unit(query)).sum().item() for k in range(len(mask)) if mask[k]}
        best = sorted(score, key=score.get, reverse=True)[:top]
        return sum((unit(own[k]) - unit(target[k])).abs().sum() for k in best) / len(best)

    def sure(e, m):
        i, sim = m // 2, unit(e.image) @ unit(e.text).T / 0.3
        return (sim[:, m].softmax(0)[i] + sim[i].softmax(0)[2 * i : 2 * i + 2].sum()) / 2

    total = weight = 0.0
    for m in range(6):
        i = m // 2
        value = part(s.rois[i], t.rois[i], s.roi_mask[i], t.text[m], 2) + part(
            s.words[m], t.words[m], s.word_mask[m], t.text[m], 1
        )
        w = {"none": 1.0, "teacher": sure(t, m), "relative": sure(t, m) / (sure(t, m) + sure(s, m))}[
            weighting
        ]
        total, weight = total + w * value, weight + w
    torch.testing.assert_close(objective(s, t), total / weight)
    assert objective(t, t).item() == pytest.approx(0, abs=1e-6)


def test_targeted_tokens_by_hand():
    # one region along the caption, one across: the first is chosen; student at right angles to it: |(1,0) -
    # (0,1)|_1 = 2; its word agrees: 0
    e = {
        "owner": torch.arange(1),
        "logit_scale": torch.tensor(1.0),
        "roi_mask": torch.tensor([[True, True]]),
        "word_mask": torch.tensor([[True]]),
    }
    s = Encoded(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0]]),
        rois=torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]),
        words=torch.tensor([[[1.0, 0.0]]]),
        **e,
    )
    t = Encoded(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0]]),
        rois=torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]),
        words=torch.tensor([[[5.0, 0.0]]]),
        **e,
    )
    assert build("targeted_tokens", student_dim=2, teacher_dim=2, regions=1, words=1)(
        s, t
    ).item() == pytest.approx(2.0)
