"""CLIP-TD's own task: readers and figures against numbers worked out by hand, the loss against its formula,
runs that learn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dclip_qdrant.errors import InputError
from dclip_qdrant.tasks.reasoning import readers, scores
from dclip_qdrant.tasks.reasoning.examples import Example, domain_shift, low_shot, targets, vocabulary


def jpeg(path, colour=(200, 30, 30)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), colour).save(path)


# --- figures


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        # visualqa.org: each of ten left out in turn; n others said it -> min(n / 3, 1)
        (["red"] * 1 + ["blue"] * 9, 0.3),
        (["red"] * 2 + ["blue"] * 8, 0.6),
        (["red"] * 3 + ["blue"] * 7, 0.9),
        (["red"] * 4 + ["blue"] * 6, 1.0),
        (["blue"] * 10, 0.0),
    ],
)
def test_vqa_soft_accuracy_by_hand(answers, wanted):
    assert scores.soft_accuracy("red", answers) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("The Red Ball!", "red ball"),
        ("two dogs", "2 dogs"),
        ("isnt", "isn't"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("on the table.", "on table"),
        ("black/white", "black white"),
        ("a  an the", ""),
        ("none", "0"),
    ],
)
def test_vqa_answers_are_normalised_as_the_evaluation_does(answer, wanted):
    assert scores.normalise_answer(answer) == wanted


def test_soft_scores_are_by_normalised_answer():
    assert scores.soft_scores(["A dog", "dog", "dog", "cat", *["bird"] * 6]) == pytest.approx(
        {"dog": 0.9, "cat": 0.3, "bird": 1.0}
    )


def test_vcr_figures_by_hand():
    # right answers: 1st, 2nd, 4th of four; right rationales: 1st, 3rd, 4th; both: 1st, 4th
    out = scores.vcr(
        np.array([0, 1, 2, 3]), np.array([1, 1, 1, 1]), np.array([0, 1, 3, 3]), np.array([1, 0, 1, 1])
    )
    assert {k: v.tolist() for k, v in out.items()} == {
        "q->a": [True, True, False, True],
        "qa->r": [True, False, True, True],
        "q->ar": [True, False, False, True],
    }


# --- readers


def vqa_files(folder, extra_question=False):
    jpeg(folder / "images" / "COCO_val2014_000000000042.jpg")
    questions = [{"image_id": 42, "question": "What colour is it?", "question_id": 420}]
    if extra_question:
        questions.append({"image_id": 42, "question": "Why?", "question_id": 421})
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    answers = [{"answer": a} for a in ["red"] * 7 + ["dark red"] * 2 + ["pink"]]
    (folder / "a.json").write_text(
        json.dumps({"annotations": [{"question_id": 420, "question_type": "what color", "answers": answers}]})
    )
    return str(folder / "q.json"), str(folder / "a.json"), str(folder / "images")


def test_vqa_v2_as_published(tmp_path):
    (e,) = readers.vqa(*vqa_files(tmp_path))
    assert (e.id, e.text, e.group, e.statement) == (
        "420",
        "What colour is it?",
        "what color",
        "What colour is it: red",
    )
    assert e.picture.endswith("COCO_val2014_000000000042.jpg")
    assert e.soft == pytest.approx({"red": 1.0, "dark red": 0.6, "pink": 0.3})


def test_vqa_a_question_without_an_annotation_is_named(tmp_path):
    with pytest.raises(InputError, match="question 421 without an annotation"):
        readers.vqa(*vqa_files(tmp_path, extra_question=True))


def test_vqa_a_lost_picture_is_named(tmp_path):
    files = vqa_files(tmp_path)
    (tmp_path / "images" / "COCO_val2014_000000000042.jpg").unlink()
    with pytest.raises(InputError, match="question 420: no picture .*000000000042"):
        readers.vqa(*files)


def test_snli_ve_as_published(tmp_path):
    jpeg(tmp_path / "images" / "3416050480.jpg")
    row = {
        "Flickr30K_ID": "3416050480",
        "pairID": "3416050480.jpg#4r1n",
        "gold_label": "neutral",
        "sentence1": "Two men stand.",
        "sentence2": "Two men are brothers.",
    }
    (tmp_path / "x.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"pairID": "p2", "gold_label": "contradiction"}) + "\n"
    )
    a, b = readers.snli_ve(str(tmp_path / "x.jsonl"), str(tmp_path / "images"))
    assert (a.text, a.soft, a.truth, b.truth) == ("Two men are brothers.", {"neutral": 1.0}, None, False)
    (tmp_path / "y.jsonl").write_text(json.dumps(row | {"gold_label": "-"}) + "\n")
    with pytest.raises(InputError, match="y.jsonl, line 1: gold_label '-'"):
        readers.snli_ve(str(tmp_path / "y.jsonl"), str(tmp_path / "images"))


def vcr_row(**more):
    return {
        "movie": "m1",
        "img_fn": "m1/1.jpg",
        "objects": ["person", "person", "dog"],
        "question": ["Why", "is", [0], "looking", "at", [1, 2], "?"],
        "answer_label": 1,
        "annot_id": "t-0",
        "answer_choices": [["No", "."], [[0], "is", "afraid", "."], ["Hm"], ["Oh"]],
        "rationale_label": 2,
        "rationale_choices": [["A"], ["B"], [[2], "barks"], ["D"]],
    } | more


def test_vcr_as_published(tmp_path):
    jpeg(tmp_path / "images" / "m1" / "1.jpg")
    (tmp_path / "val.jsonl").write_text(json.dumps(vcr_row()) + "\n")
    (answers,), (rationales,) = readers.vcr(str(tmp_path / "val.jsonl"), str(tmp_path / "images"))
    assert answers.text == "Why is person1 looking at person2 and dog3 ?"
    assert (answers.choices[1], answers.label, answers.group) == ("person1 is afraid .", 1, "m1")
    assert rationales.text == "Why is person1 looking at person2 and dog3 ? person1 is afraid ."
    assert (rationales.choices[rationales.label], rationales.statement) == ("dog3 barks", "dog3 barks")
    (tmp_path / "bad.jsonl").write_text(json.dumps(vcr_row(question=["Who", "is", [7]])) + "\n")
    with pytest.raises(InputError, match=r"bad.jsonl, line 1: a reference to \[7\]"):
        readers.vcr(str(tmp_path / "bad.jsonl"), str(tmp_path / "images"))


# --- splits


def some(n):
    return [
        Example(str(i), "p", "q", soft={"yes" if i % 3 else "no": 1.0}, group=f"g{i % 7}") for i in range(n)
    ]


def test_low_shot_parts_are_nested_and_of_their_size():
    examples = some(2000)
    ten, one = low_shot(examples, 0.1), low_shot(examples, 0.01)
    assert {e.id for e in one} <= {e.id for e in ten}
    assert 150 < len(ten) < 250
    assert low_shot(examples, 1.0) == examples
    assert {e.id for e in low_shot(examples, 0.1, seed=1)} != {e.id for e in ten}


def test_domain_shift_holds_whole_groups_out():
    stay, away = domain_shift(some(70), held_out=0.3)
    assert {e.group for e in stay} & {e.group for e in away} == set()
    assert len(stay) + len(away) == 70
    assert len({e.group for e in away}) == 2  # 0.3 of 7
    with pytest.raises(ValueError, match="one group"):
        domain_shift([replace(e, group="x") for e in some(5)])


def test_vocabulary_and_targets_by_hand():
    examples = [
        Example("1", "p", "q", soft={"red": 1.0, "pink": 0.3}),
        Example("2", "p", "q", soft={"blue": 0.9}),
        Example("3", "p", "q", soft={"red": 0.6}),
    ]
    answers = vocabulary(examples, 2)
    assert answers == ["red", "blue"]
    assert targets(examples, answers) == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.9], [0.6, 0.0]]))


# --- the encoder and the loss


@pytest.mark.parametrize("pad_id", [0, 1])  # a CLIP's or a BERT's; a RoBERTa's
def test_padding_changes_nothing(pad_id):
    from dclip_qdrant.tasks.reasoning.fused_encoder import FusedEncoder

    torch.manual_seed(0)
    encoder = FusedEncoder(
        vocabulary=50,
        image_size=16,
        patch=8,
        length=12,
        width=16,
        heads=2,
        alone=1,
        together=1,
        pad_id=pad_id,
    ).eval()
    ids, pixels = torch.randint(2, 50, (3, 7)), torch.randn(3, 3, 16, 16)
    a, b = encoder(pixels, ids), encoder(pixels, F.pad(ids, (0, 5), value=pad_id))
    for x, y in ((a.image, b.image), (a.text, b.text), (a.words, b.words[:, :7])):
        torch.testing.assert_close(x, y)
    assert a.patches.shape == (3, 16, 2, 2)


def test_each_side_hears_the_other():
    from dclip_qdrant.tasks.reasoning.fused_encoder import FusedEncoder

    torch.manual_seed(0)
    encoder = FusedEncoder(
        vocabulary=50, image_size=16, patch=8, length=12, width=16, heads=2, alone=1, together=1
    ).eval()
    ids, pixels = torch.randint(1, 50, (2, 7)), torch.randn(2, 3, 16, 16)
    before = encoder(pixels, ids)
    assert not torch.allclose(before.text, encoder(pixels + 1, ids).text)
    assert not torch.allclose(before.image, encoder(pixels, ids.flip(1)).image)


def test_task_losses_by_hand():
    from dclip_qdrant.tasks.reasoning.task import task_loss

    # softmax over (0, log 3): 1/4 and 3/4
    assert task_loss(
        torch.tensor([[0.0, np.log(3.0)]]), torch.tensor([[0.0, 1.0]]), False
    ).item() == pytest.approx(-np.log(0.75), abs=1e-6)
    # sigmoid(0) = 1/2 twice: 2 log 2 whatever the targets
    assert task_loss(torch.zeros(1, 2), torch.tensor([[0.3, 1.0]]), True).item() == pytest.approx(
        2 * np.log(2), abs=1e-6
    )


def test_l1_and_chosen_mean_by_hand():
    from dclip_qdrant.tasks.reasoning.task import chosen_mean, l1

    assert l1(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])).item() == pytest.approx(2.0)
    d, chosen = (
        torch.tensor([[1.0, 3.0, 9.0], [4.0, 4.0, 4.0]]),
        torch.tensor([[True, True, False], [False, False, False]]),
    )
    assert chosen_mean(d, chosen).tolist() == [2.0, 0.0]


def test_select_takes_the_best_of_those_that_are_there():
    from dclip_qdrant.training.token_selection import select

    score, mask = (
        torch.tensor([[0.9, 0.5, 0.7], [0.1, 0.2, 0.3]]),
        torch.tensor([[False, True, True], [True, False, False]]),
    )
    assert select(score, mask, 1).tolist() == [[False, False, True], [True, False, False]]
    assert select(score, mask, 5).tolist() == mask.tolist()


def test_confidence_by_hand():
    from dclip_qdrant.training.token_selection import confidence

    # cosines [[1, 0], [0, 1]] at temperature 1: e / (e + 1) both ways
    sure = confidence(torch.eye(2), torch.eye(2) * 3, torch.arange(2), 1.0)
    assert sure.tolist() == pytest.approx([np.e / (np.e + 1)] * 2)


# --- runs


@pytest.fixture(scope="module")
def questions_folder(tmp_path_factory):
    import questions

    folder = tmp_path_factory.mktemp("questions")
    questions.write(folder, 60, start=0, subset="train")
    questions.write(folder, 30, start=5000, subset="test")
    return folder


def read(folder, subset):
    return readers.vqa(
        str(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"),
        str(folder / f"v2_mscoco_{subset}_annotations.json"),
        str(folder / "images"),
    )


SMALL = {
    "adapt_epochs": 1,
    "finetune_epochs": 1,
    "image_size": 32,
    "patch": 8,
    "width": 32,
    "heads": 2,
    "alone": 1,
    "together": 1,
    "batch_size": 16,
}


def test_the_made_questions_are_in_the_published_formats(questions_folder):
    examples = read(questions_folder, "train")
    assert len(examples) == 60
    assert {e.group for e in examples} == {"what colour", "how many", "where", "is there"}
    assert all(max(e.soft.values()) == 1.0 for e in examples)
    statements = readers.snli_ve(
        str(questions_folder / "snli_ve_test.jsonl"), str(questions_folder / "images")
    )
    assert {next(iter(e.soft)) for e in statements} == set(readers.ENTAILMENT)


@pytest.fixture(scope="module")
def detector():
    from dclip_qdrant.detectors import build

    return build("grid", {"rows": 2, "columns": 2, "overlap": 0.0})


@pytest.mark.parametrize("distill", ["none", "naive", "targeted"])
def test_a_run_of_each_method_ends_with_figures_and_is_reused(
    questions_folder, tiny_base, detector, distill, tmp_path
):
    from dclip_qdrant.tasks.reasoning.run import run
    from dclip_qdrant.tasks.reasoning.task import Config

    arguments = {
        "teacher": str(tiny_base),
        "detector": detector,
        "out": str(tmp_path),
        "config": Config(distill=distill, **SMALL),
    }
    out = run("vqa", read(questions_folder, "train"), {"test": read(questions_folder, "test")}, **arguments)
    assert 0 <= out["figures"]["test"] <= 1
    assert len(out["picked"]["test"]) == 30
    assert ("distill" in out["history"][0]) == (distill != "none")
    lines = []
    assert (
        run(
            "vqa",
            read(questions_folder, "train"),
            {"test": read(questions_folder, "test")},
            log=lines.append,
            **arguments,
        )
        == out
    )
    assert lines == ["reused"]


def test_unlabelled_examples_are_seen_and_their_answers_are_not(
    questions_folder, tiny_base, detector, tmp_path
):
    """Other answers of the unlabelled examples change nothing; other pictures of them do."""
    from dclip_qdrant.tasks.reasoning.run import run
    from dclip_qdrant.tasks.reasoning.task import Config

    train, test = read(questions_folder, "train"), {"test": read(questions_folder, "test")}
    few, rest = train[:20], train[20:]
    wrong = [replace(e, soft={"nonsense": 1.0}, statement="nonsense", answers=("nonsense",)) for e in rest]
    moved = [replace(e, picture=few[0].picture) for e in rest]
    go = lambda name, unlabelled: run(
        "vqa",
        few,
        test,
        teacher=str(tiny_base),
        detector=detector,
        out=str(tmp_path / name),
        config=Config(**SMALL),
        unlabelled=unlabelled,
    )["history"]
    losses = {
        name: [h["loss"] for h in go(name, sets)]
        for name, sets in (("right", rest), ("wrong", wrong), ("moved", moved), ("none", []))
    }
    assert losses["wrong"] == losses["right"]
    assert len({tuple(v) for v in losses.values()}) == 3
    with pytest.raises(ValueError, match="unlabelled examples of VCR"):
        run("vcr", few, test, teacher=str(tiny_base), detector=detector, out=str(tmp_path), unlabelled=rest)


def test_the_task_is_lost_over_labelled_examples_only(questions_folder, tiny_base, detector):
    """Two of four are labelled: half of the mean of their losses, so that each counts as it would in a batch
    of its own kind."""
    from dclip_qdrant.tasks.reasoning.task import Config, Reasoning
    from dclip_qdrant.tasks.reasoning.teacher import look
    from dclip_qdrant.training.models.two_tower import load

    examples, tower = read(questions_folder, "train")[:4], load(str(tiny_base))
    seen = look(tower, [e.picture for e in examples], detector, size=32, top_k=4)
    task = Reasoning(
        examples,
        seen,
        tower,
        Config(adapt_task=3.0, **SMALL),
        target=np.array([[1.0, 0.0], [0.0, 1.0]], np.float32),
        confidence=None,
        soft=True,
        adapting=True,
    )
    batch = task.batch(np.arange(4), 0)
    scores = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, -9.0], [-9.0, 9.0]])
    total, terms = task.loss(
        {"scores": scores, "distance": torch.tensor([1.0, 2.0, 3.0, 6.0])}, task.fixed(batch)
    )
    # two answers at probability one half
    assert terms == pytest.approx({"task": 2 * np.log(2), "distill": 3.0})
    assert total.item() == pytest.approx(3.0 * 0.5 * 2 * np.log(2) + 0.2 * 3.0)


def test_only_what_is_learned_from_is_looked_at(questions_folder, tiny_base, detector):
    from dclip_qdrant.tasks.reasoning.teacher import look
    from dclip_qdrant.training.models.two_tower import load

    pictures = [e.picture for e in read(questions_folder, "train")]
    asked = []
    watched = lambda loaded: (asked.append(len(loaded)), detector(loaded))[1]
    tower = load(str(tiny_base))
    seen = look(tower, pictures[:3], watched, size=32, plain=pictures[2:6])
    assert (sum(asked), len(seen.number), len(seen.pixels)) == (3, 6, 6)
    whole = look(tower, pictures[:6], detector, size=32)
    assert (seen.pixels == whole.pixels).all()
    assert seen.image[:3] == pytest.approx(whole.image[:3], abs=1e-6)
    assert not seen.image[3:].any()
    assert seen.mask.any(1).tolist() == [True] * 3 + [False] * 3


def test_the_distance_is_the_papers_sum_by_loops(questions_folder, tiny_base, detector):
    from dclip_qdrant.tasks.reasoning.task import Config, Reasoning
    from dclip_qdrant.tasks.reasoning.teacher import look
    from dclip_qdrant.training.models.two_tower import load

    examples, tower = read(questions_folder, "train")[:3], load(str(tiny_base))
    seen = look(tower, [e.picture for e in examples], detector, size=32, top_k=4)
    answers = vocabulary(examples)
    task = Reasoning(
        examples,
        seen,
        tower,
        Config(regions=2, words=2, **SMALL),
        target=targets(examples, answers),
        confidence=None,
        soft=True,
    )
    task.begin(0)
    task.student.eval()
    batch = task.batch(np.arange(3), 0)
    got = task.encode(batch)["distance"]
    unit = lambda x: x / x.norm()
    ids = batch.ids[:, 0]
    with torch.no_grad():
        h = task.student.encoder(tower.normalised(batch.pixels), ids)
        sentence, tokens, is_word = tower.encode_words(ids)
        for i in range(3):
            f = {k: batch.fixed[k][i] for k in ("image", "crops", "boxes")}
            total = (unit(task.student.to_image(h.image[i])) - unit(f["image"])).abs().sum() + (
                unit(task.student.to_text(h.text[i])) - unit(sentence[i])
            ).abs().sum()
            best = sorted(range(4), key=lambda k: -(unit(f["crops"][k]) @ unit(sentence[i])).item())[:2]
            for k in (
                best
            ):  # the grid's boxes are quarters: RoIAlign over 2 x 2 of the 4 x 4 patches is their mean
                x0, y0, x1, y1 = (round(4 * v) for v in f["boxes"][k].tolist())
                region = h.patches[i, :, y0:y1, x0:x1].mean((1, 2))
                total = total + (unit(task.student.to_region(region)) - unit(f["crops"][k])).abs().sum() / 2
            word = [k for k in range(len(ids[i])) if is_word[i, k]]
            for k in sorted(word, key=lambda k: -(unit(tokens[i, k]) @ unit(sentence[i])).item())[:2]:
                total = (
                    total + (unit(task.student.to_word(h.words[i, k])) - unit(tokens[i, k])).abs().sum() / 2
                )
            assert got[i].item() == pytest.approx(total.item(), abs=1e-4)


def test_confidences_by_hand(tiny_base):
    """Two choices that say the same: one half each. A contradiction is as sure as its statement is
    unlikely."""
    from dclip_qdrant.metrics import normalise
    from dclip_qdrant.tasks.reasoning.teacher import Seen, confidences
    from dclip_qdrant.training.evaluate import encode_texts
    from dclip_qdrant.training.models.two_tower import load

    tower = load(str(tiny_base))
    image = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    seen = Seen(
        {"p": 0},
        np.zeros((1, 32, 32, 3), np.uint8),
        image,
        np.zeros((1, 1, 32), np.float32),
        np.zeros((1, 1, 4), np.float32),
        np.zeros((1, 1), bool),
    )
    same = Example("1", "p", "q", choices=("a red star", "a red star"), label=0)
    assert confidences(tower, [same], seen) == pytest.approx([0.5])
    yes, no, maybe = (
        Example(str(t), "p", "x", statement=s, truth=t)
        for t, s in ((True, "a red star"), (False, "a blue moon"), (None, "a ring"))
    )
    got = confidences(tower, [yes, no, maybe], seen)
    # a new open_clip model's temperature
    logits = (
        normalise(image) @ normalise(encode_texts(tower, ["a red star", "a blue moon", "a ring"])).T / 0.07
    )
    p = np.exp(logits[0] - logits.max()) / np.exp(logits[0] - logits.max()).sum()
    assert got == pytest.approx([p[0], 1 - p[1], 0.5], abs=1e-5)


def test_vcr_runs_and_is_scored_together(tiny_base, tmp_path, rng):
    from dclip_qdrant.tasks.reasoning.run import compared, protocol
    from dclip_qdrant.tasks.reasoning.task import Config

    rows = []
    for i in range(20):
        jpeg(tmp_path / "images" / "m" / f"{i}.jpg", tuple(int(v) for v in rng.integers(0, 255, 3)))
        rows.append(
            vcr_row(
                img_fn=f"m/{i}.jpg",
                movie=f"m{i % 4}",
                annot_id=f"a-{i}",
                answer_label=i % 4,
                rationale_label=(i + 1) % 4,
            )
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    answers, rationales = readers.vcr(str(tmp_path / "train.jsonl"), str(tmp_path / "images"))
    sets = {"q->a": answers, "qa->r": rationales}
    out = protocol(
        sets,
        sets,
        teacher=str(tiny_base),
        detector=("grid", {"rows": 1, "columns": 2}),
        out=str(tmp_path / "out"),
        config=Config(**SMALL),
        shift=True,
    )
    assert [r["method"] for r in out] == ["task alone", "naive distillation", "clip_td"]
    assert set(out[0]["figures"]) == {
        "q->a",
        "qa->r",
        "q->ar",
        "q->a, shifted",
        "qa->r, shifted",
        "q->ar, shifted",
    }
    assert out[0]["figures"]["q->ar"][0] <= min(out[0]["figures"]["q->a"][0], out[0]["figures"]["qa->r"][0])
    assert "differences" not in out[0]
    for name, found in out[2]["differences"].items():
        assert found["difference"] == pytest.approx(out[2]["figures"][name][0] - out[0]["figures"][name][0])
        assert found["ci"][0] <= found["difference"] <= found["ci"][1]
    assert compared(
        [
            {
                "method": "clip_td",
                "examples": 1200,
                "differences": {"vqa": {"difference": 0.0421, "ci": [0.011, 0.07]}},
            }
        ]
    ) == ["clip_td minus task alone, 1,200 examples, vqa: +4.2 points, 95% [+1.1, +7.0]"]
