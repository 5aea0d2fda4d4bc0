"""Questions and statements about the demo's scenes, in VQA v2's and SNLI-VE's published formats: what
CLIP-TD's protocol is shown on, because the real sets can't be shipped. Everything follows from the seed.

Questions: what colour a thing is, how many things there are, where one is from another, whether there is one.
Statements: true, false (an attribute or a relation swapped), or not to be known from the picture. Ten people
answer; one or two of them are wrong, as in life.
"""

import json
import random
from pathlib import Path

from scenes import COLOURS, SHAPES, Scene, a_or_an, jpeg, relation, scene

FOLK = 10


def question(s: Scene, rng: random.Random) -> tuple[str, str, str, list[str]]:
    """(type, question, answer, answers that a hasty person might give)."""
    t = rng.choice(s.things)
    kind = rng.choice(("what colour", "how many", "where", "is there"))
    alone = [x for x in s.things if sum(y.shape == x.shape for y in s.things) == 1]
    if kind == "what colour" and alone:
        t = rng.choice(alone)
        return (
            kind,
            f"What colour is the {t.shape}?",
            t.colour,
            [x.colour for x in s.things if x.colour != t.colour] or ["grey"],
        )
    if kind == "where" and len(alone) >= 2:
        a, b = rng.sample(alone, 2)
        right = relation(a, b)
        return (
            kind,
            f"Where is the {a.shape} from the {b.shape}?",
            right,
            [r for r in ("left of", "right of", "above", "below") if r != right],
        )
    if kind == "is there":
        there = rng.random() < 0.5
        shape = t.shape if there else rng.choice([x for x in SHAPES if x not in {y.shape for y in s.things}])
        return kind, f"Is there {a_or_an(shape)}?", "yes" if there else "no", ["no" if there else "yes"]
    number = len(s.things)
    return "how many", "How many things are there?", str(number), [str(number + 1), str(number - 1)]


def statement(s: Scene, rng: random.Random) -> tuple[str, str]:
    """(gold label, hypothesis)."""
    label = rng.choice(("entailment", "neutral", "contradiction"))
    t = rng.choice(s.things)
    if label == "neutral":
        return (
            label,
            f"the {t.shape} is "
            f"{rng.choice(('old', 'heavy', 'expensive', 'made of wood', 'from far away', 'soft'))}",
        )
    others = [c for c in COLOURS if c not in {x.colour for x in s.things if x.shape == t.shape}]
    alone = [x for x in s.things if sum(y.shape == x.shape for y in s.things) == 1]
    if len(alone) >= 2 and rng.random() < 0.4:
        a, b = rng.sample(alone, 2)
        right = relation(a, b)
        wrong = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[right]
        return label, f"the {a.shape} is {right if label == 'entailment' else wrong} the {b.shape}"
    return (
        label,
        f"there is {a_or_an((t.colour if label == 'entailment' else rng.choice(others)) + ' ' + t.shape)}",
    )


def write(folder: Path, count: int, *, start: int, subset: str) -> None:
    """`images/`, VQA v2's two files and `snli_ve_<subset>.jsonl`: one question and one statement for each of
    `count` scenes."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions, annotations, lines = [], [], []
    for i in range(count):
        s, rng = scene(start + i), random.Random(f"questions-{start + i}")
        name = f"COCO_{subset}_{start + i:012d}"
        (folder / "images" / f"{name}.jpg").write_bytes(jpeg(s.image))
        kind, text, right, wrong = question(s, rng)
        hasty = rng.choice((0, 0, 1, 2))
        answers = [right] * (FOLK - hasty) + [rng.choice(wrong) for _ in range(hasty)]
        rng.shuffle(answers)
        questions.append({"image_id": start + i, "question": text, "question_id": (start + i) * 1000})
        annotations.append(
            {
                "question_id": (start + i) * 1000,
                "image_id": start + i,
                "question_type": kind,
                "answer_type": "other",
                "multiple_choice_answer": right,
                "answers": [
                    {"answer": a, "answer_confidence": "yes", "answer_id": n + 1}
                    for n, a in enumerate(answers)
                ],
            }
        )
        label, sentence = statement(s, rng)
        lines.append(
            {
                "Flickr30K_ID": name,
                "pairID": f"{name}.jpg#0r1",
                "gold_label": label,
                "sentence1": s.captions[0],
                "sentence2": sentence,
            }
        )
    kinds = {"data_type": "mscoco", "data_subtype": subset, "task_type": "Open-Ended"}
    (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(
        json.dumps(kinds | {"questions": questions})
    )
    (folder / f"v2_mscoco_{subset}_annotations.json").write_text(
        json.dumps(kinds | {"annotations": annotations})
    )
    (folder / f"snli_ve_{subset}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
