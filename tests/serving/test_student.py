"""Export and the student folder: parity with torch and stock open_clip, refusal of half-written or altered
folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dclip_qdrant.errors import ParityError, StudentError
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.serving.student import Student

pytestmark = pytest.mark.slow
TEXTS = [
    "a red star",
    "it's John's 2nd   car &amp; more",
    "",
    "caf\u00e9 \u201cna\u00efve\u201d \u2014 dash\u2026",
    "word " * 100,
    "\u6771\u4eac\u30bf\u30ef\u30fc",
]


@pytest.fixture
def pictures(rng):
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((32, 32), (90, 41), (20, 64))
    ]


def test_stock_open_clip_loads_it_and_agrees(student_folder, pictures):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{student_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{student_folder}")
    student = Student.load(student_folder)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
        image = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True).numpy()
    np.testing.assert_allclose(student.embed_texts(TEXTS), text, atol=1e-4)
    np.testing.assert_allclose(student.embed_images(pictures), image, atol=1e-4)


def test_tokens_are_open_clips(student_folder):
    from open_clip.tokenizer import SimpleTokenizer

    student, theirs = Student.load(student_folder), SimpleTokenizer(context_length=24)
    rng = np.random.default_rng(0)
    words = [w.replace("</w>", "") for w in theirs.encoder if w.isascii()]
    texts = TEXTS + [" ".join(rng.choice(words, rng.integers(1, 15))) for _ in range(300)]
    for text, ids in zip(texts, theirs(texts).tolist(), strict=True):
        (got,) = student.tokens([text])
        assert got == ids[: len(got)], text
        assert not any(ids[len(got) :]), text


def test_special_tokens_in_a_query_are_just_text(student_folder):
    """Unlike open_clip, which takes them for the real thing: a stranger's query can't end its own text
    early."""
    (ids,) = Student.load(student_folder).tokens(["a <end_of_text> b"])
    assert ids.count(49407) == 1
    assert ids[-1] == 49407


def test_one_at_a_time_is_the_same_as_together(student_folder, pictures):
    student = Student.load(student_folder)
    np.testing.assert_allclose(
        np.concatenate([student.embed_texts([t]) for t in TEXTS]), student.embed_texts(TEXTS), atol=1e-5
    )
    np.testing.assert_allclose(
        np.concatenate([student.embed_images([p]) for p in pictures]),
        student.embed_images(pictures, batch=2),
        atol=1e-5,
    )
    np.testing.assert_allclose(np.linalg.norm(student.embed_texts(TEXTS), axis=1), 1, atol=1e-5)


def test_nothing_in_gives_nothing_out(student_folder):
    student = Student.load(student_folder)
    assert student.embed_texts([]).shape == (0, 32)
    assert student.embed_images([]).shape == (0, 32)
    with pytest.raises(TypeError, match="list of texts"):
        student.embed_texts("one string")


def test_regions_are_the_whole_picture_and_then_each_crop_squashed(student_folder, pictures):
    student = Student.load(student_folder)
    regions = Regions(np.array([[10, 5, 60, 30]], np.float32), np.ones(1, np.float32), ("x",))
    got = student.embed_regions(pictures[1], regions, context=0.1)
    crop = pictures[1].crop((5, 2, 65, 33)).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(got, student.embed_images([pictures[1], crop]), atol=1e-5)


def test_no_pickles_and_every_file_is_in_the_manifest(student_folder):
    manifest = json.loads((student_folder / "manifest.json").read_text())
    names = {p.name for p in student_folder.iterdir()}
    assert names == {*manifest["files"], "manifest.json"}
    assert not any(n.endswith((".pt", ".pth", ".bin", ".pkl")) for n in names)
    assert Student.load(student_folder).model_name == f"dclip/tiny@{manifest['fingerprint'][:8]}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: (d / "manifest.json").unlink(), "half-written"),
        (lambda d: (d / "text.onnx").unlink(), r"no text\.onnx"),
        (
            lambda d: (d / "image.onnx").write_bytes((d / "image.onnx").read_bytes()[:-1] + b"x"),
            "altered since",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "altered since"),
        (lambda d: (d / "manifest.json").write_text("{}"), "not a student's manifest"),
        (lambda d: (d / "manifest.json").write_text(json.dumps({"version": 99, "files": {}})), "format 99"),
    ],
)
def test_half_written_or_altered_folders_are_refused(change, says, student_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(student_folder, copy)
    change(copy)
    with pytest.raises(StudentError, match=says):
        Student.load(copy)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(StudentError, match="no such folder"):
        Student.load(tmp_path / "none")


def test_the_parity_gate_catches_another_models_weights(tiny_base, student_folder):
    from dclip_qdrant.jobs.export import check_parity
    from dclip_qdrant.training.models.two_tower import load

    model = load(str(tiny_base))
    assert check_parity(model, Student.load(student_folder)) < 1e-5
    model.model.visual.proj.data *= -1
    with pytest.raises(ParityError, match="embeddings differ"):
        check_parity(model, Student.load(student_folder))


def test_evaluation_figures_are_those_of_the_vectors(student_folder, pairs_folder, labelled_folder):
    from dclip_qdrant import metrics
    from dclip_qdrant.pairs import Pairs, load_image
    from dclip_qdrant.serving import evaluation

    student, pairs = Student.load(student_folder), Pairs.open(str(pairs_folder))
    out = evaluation.evaluate(student, pairs, labelled=str(labelled_folder), base=student, bootstrap=50)
    rows = [r for part in pairs.rows(["key", "uri", "image", "captions"], ("test",)) for r in part]
    image = student.embed_images([load_image(r) for r in rows])
    text = student.embed_texts([c for r in rows for c in r["captions"]])
    wanted = metrics.retrieval(metrics.ranks(image, text, np.repeat(np.arange(10), 5)), bootstrap=0)
    assert out["t2i"] == pytest.approx(wanted["t2i"])
    assert out["map"] == pytest.approx(wanted["map"])
    assert (out["split"], out["n_images"], out["n_texts"], out["n_labelled"]) == ("test", 10, 50, 24)
    assert out["retention"] == pytest.approx(1.0) or out["zero_shot"] == 0
    assert out["onnx_bytes"]["image"] == (student_folder / "image.onnx").stat().st_size
    assert set(out) == set(evaluation.KEYS)
    assert "text -> image" in evaluation.describe(out)
