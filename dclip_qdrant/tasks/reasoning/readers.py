"""VQA v2, SNLI-VE and VCR as they are published: files in, examples out. Nothing is repaired: a row that
doesn't fit is an error that names it."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dclip_qdrant.errors import InputError
from dclip_qdrant.tasks.reasoning.examples import Example
from dclip_qdrant.tasks.reasoning.scores import soft_scores

ENTAILMENT = ("entailment", "neutral", "contradiction")


def vqa(
    questions: str, annotations: str, images: str, *, prefix: str = "COCO_{subset}_{id:012d}.jpg"
) -> list[Example]:
    """VQA v2: `v2_OpenEnded_mscoco_*_questions.json`, `v2_mscoco_*_annotations.json`, and the folder with
    COCO's pictures.

    Groups are the published question types ("what color is the", ...).

    Raises:
        InputError: a file without its list, a question without an annotation, a picture that isn't there.
    """
    asked, annotated = _json(questions), _json(annotations)
    if "questions" not in asked or "annotations" not in annotated:
        missing = questions if "questions" not in asked else annotations
        raise InputError(
            missing,
            f"keys {', '.join(sorted(asked if missing == questions else annotated))}",
            "VQA v2's 'questions' and 'annotations'",
        )
    subset = asked.get("data_subtype") or annotated.get("data_subtype") or ""
    by_id = {a["question_id"]: a for a in annotated["annotations"]}
    out = []
    for q in asked["questions"]:
        a = by_id.get(q["question_id"])
        if a is None:
            raise InputError(
                questions, f"question {q['question_id']} without an annotation", f"one in {annotations}"
            )
        people = tuple(x["answer"] for x in a["answers"])
        most = Counter(people).most_common(1)[0][0]
        picture = _picture(
            images, prefix.format(subset=subset, id=q["image_id"]), f"question {q['question_id']}"
        )
        out.append(
            Example(
                str(q["question_id"]),
                picture,
                q["question"],
                soft=soft_scores(people),
                group=a.get("question_type", ""),
                answers=people,
                statement=f"{q['question'].rstrip('?')}: {most}",
            )
        )
    return out


def snli_ve(file: str, images: str) -> list[Example]:
    """SNLI-VE: `snli_ve_*.jsonl` and the folder with Flickr30k's pictures. Examples without a gold label
    ("-") have no right answer and are left out by its makers; here they are an error, so that nobody wonders
    where they went: filter them from the file first. Groups are the pictures.

    Raises:
        InputError: a line that isn't JSON, a missing key, a label of none of the three.
    """
    out = []
    for where, row in _jsonl(file):
        for key in ("pairID", "gold_label", "sentence2"):
            if key not in row:
                raise InputError(where, f"no {key!r} (has: {', '.join(sorted(row))})", "SNLI-VE's jsonl")
        label = row["gold_label"]
        if label not in ENTAILMENT:
            raise InputError(where, f"gold_label {label!r}", f"one of {', '.join(ENTAILMENT)}")
        name = row.get("Flickr30K_ID") or row.get("Flikr30kID") or row.get("captionID", "").split(".jpg")[0]
        picture = _picture(images, f"{name}.jpg", where)
        truth = {"entailment": True, "contradiction": False, "neutral": None}[label]
        out.append(
            Example(
                str(row["pairID"]),
                picture,
                row["sentence2"],
                soft={label: 1.0},
                group=str(name),
                statement=row["sentence2"],
                truth=truth,
            )
        )
    return out


def vcr(file: str, images: str) -> tuple[list[Example], list[Example]]:
    """VCR: `train.jsonl` or `val.jsonl` and `vcr1images/` -> (Q->A examples, QA->R examples), in the same
    order. Groups are the movies.

    References to people and things ([0], [1, 2]) become their names with their number, "person1 and person2":
    detections are numbered from 1 in each picture.

    Raises:
        InputError: a line that isn't JSON, a missing key, a reference to nothing.
    """
    answers, rationales = [], []
    for where, row in _jsonl(file):
        for key in (
            "movie",
            "img_fn",
            "objects",
            "question",
            "answer_choices",
            "answer_label",
            "rationale_choices",
            "rationale_label",
            "annot_id",
        ):
            if key not in row:
                raise InputError(where, f"no {key!r} (has: {', '.join(sorted(row))})", "VCR's jsonl")
        say = lambda tokens, row=row, where=where: _vcr_text(tokens, row["objects"], where)
        question, choices = say(row["question"]), tuple(say(c) for c in row["answer_choices"])
        reasons = tuple(say(c) for c in row["rationale_choices"])
        picture = _picture(images, row["img_fn"], where)
        right = choices[row["answer_label"]]
        answers.append(
            Example(
                row["annot_id"],
                picture,
                question,
                choices,
                row["answer_label"],
                group=row["movie"],
                statement=right,
            )
        )
        rationales.append(
            Example(
                row["annot_id"] + ":rationale",
                picture,
                f"{question} {right}",
                reasons,
                row["rationale_label"],
                group=row["movie"],
                statement=reasons[row["rationale_label"]],
            )
        )
    return answers, rationales


def _vcr_text(tokens: list[Any], objects: list[str], where: str) -> str:
    out = []
    for t in tokens:
        if isinstance(t, list):
            if not all(isinstance(i, int) and 0 <= i < len(objects) for i in t):
                raise InputError(
                    where, f"a reference to {t}", f"numbers below {len(objects)}, the objects of the picture"
                )
            out.append(" and ".join(f"{objects[i]}{i + 1}" for i in t))
        else:
            out.append(str(t))
    return " ".join(out)


def _picture(folder: str, name: str, where: str) -> str:
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(where, f"no picture {path}", "every picture of the examples")
    return str(path)


def _json(file: str) -> Any:
    if not Path(file).is_file():
        raise InputError(file, "no such file")
    try:
        return json.loads(Path(file).read_text())
    except json.JSONDecodeError as e:
        raise InputError(file, f"not JSON ({e})") from e


def _jsonl(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not Path(file).is_file():
        raise InputError(file, "no such file")
    with Path(file).open() as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield f"{file}, line {n}", json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(f"{file}, line {n}", f"not JSON ({e})") from e
