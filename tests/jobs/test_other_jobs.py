"""The Ray jobs beside distillation, on a head of their own."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from processes import python
from ray_jobs_here import ROOT, job
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def test_extract_regions_with_yolo_previews_and_resumes(on_head, pairs_folder, tmp_path):
    args = (
        "--pairs",
        pairs_folder,
        "--out",
        tmp_path,
        "--weights",
        ROOT / "examples/demo/detector.pt",
        "--set",
        "regions.options.image_size=128",
        "--preview",
        3,
    )
    done = job("extract_regions", *args, env=on_head)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["pictures"] == 60
    assert "won't fully utilize" not in done.stderr  # Ray Data, when there are fewer blocks than actors
    # the detector's mAP50 is 0.99 on such scenes, which hold 2 to 4 things
    assert 2 * 60 <= facts["boxes"] <= 5 * 60
    stage = Path(facts["stage"])
    assert len(list((stage / "preview").glob("*.jpg"))) == 3
    # half of it lost: only that half is done again
    (part,) = stage.glob("part-*.parquet")  # the parts of a stage end as one
    (stage / "manifest.json").unlink()
    pq.write_table(pq.read_table(part).slice(0, 30), part)
    again = job("extract_regions", *args, env=on_head)
    assert "30 of 60 pictures are there already" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["boxes"] == facts["boxes"]


@pytest.mark.long
def test_adapt_job_ends_with_its_table(on_head, tiny_base, tmp_path):
    import scenes

    scenes.write_labelled(tmp_path / "labelled", 120)
    arguments = (
        "--labelled",
        tmp_path / "labelled",
        "--teacher",
        tiny_base,
        "--student",
        tiny_base,
        "--out",
        tmp_path / "out",
    )
    wrong = job("adapt", *arguments, "--set", "shot=3", env=on_head)
    assert wrong.returncode == 2
    assert "did you mean 'shots'?" in wrong.stderr
    done = job(
        "adapt",
        *arguments,
        *(f for s in ("shots=2", "teacher_epochs=1", "student_epochs=1", "depth=1") for f in ("--set", s)),
        env=on_head,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| comkd_clip |" in done.stdout


@pytest.mark.long
def test_clip_td_job_ends_with_its_table(on_head, tiny_base, tmp_path):
    import questions

    for subset, count, start in (("train", 40, 0), ("test", 10, 5000)):
        questions.write(tmp_path, count, start=start, subset=subset)
    arguments = (
        "--task",
        "snli_ve",
        "--train",
        tmp_path / "snli_ve_train.jsonl",
        "--test",
        tmp_path / "snli_ve_test.jsonl",
        "--images",
        tmp_path / "images",
        "--teacher",
        tiny_base,
        "--out",
        tmp_path / "out",
        "--part",
        "0.5",
        *(
            f
            for s in ("unlabelled=true", "batch_size=8", "adapt_epochs=1", "finetune_epochs=1", "width=32")
            for f in ("--set", s)
        ),
    )
    done = job("clip_td", *arguments, env=on_head)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "clip_td.json").read_text())
    assert [r["method"] for r in rows] == ["task alone", "naive distillation", "clip_td"]
    assert (
        f"| {rows[2]['examples']} | clip_td | {100 * rows[2]['figures']['snli_ve'][0]:.1f} |" in done.stdout
    )
    refused = job("clip_td", "--task", "vcr", *arguments[2:], env=on_head)
    assert refused.returncode == 2
    assert "--set unlabelled: true with --task vcr" in refused.stderr


def test_a_command_is_submitted_and_its_output_and_exit_code_come_back(on_head, pairs_folder, tmp_path):
    cli = ("-m", "dclip_qdrant.cli", "extract-regions", "--submit", on_head["DASHBOARD"])
    where = ("--pairs", pairs_folder, "--out", tmp_path)
    done = python(*cli, *where, "--recipe", "tiny", env=on_head, cwd=ROOT, code=0)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["pictures"] == 60
    assert list(Path(facts["stage"]).glob("part-*.parquet"))
    wrong = python(*cli, *where, "--recipe", "dclpi", env=on_head, cwd=ROOT, code=2)
    assert "did you mean 'dclip'" in wrong.stdout + wrong.stderr
    away = list(cli)
    away[-1] = "http://127.0.0.1:9"
    lost = python(*away, *where, env=on_head, cwd=ROOT, code=2)
    assert "--submit: http://127.0.0.1:9" in lost.stderr


def test_ingest_job_and_cli_agree(on_head, student_folder, scenes_folder, tmp_path):
    from dclip_qdrant.serving.ingest import ingest
    from dclip_qdrant.serving.stores import open_store
    from dclip_qdrant.serving.student import Student

    (tmp_path / "src").mkdir()
    for i in range(12):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(
            (scenes_folder / "images" / f"train-{i:05d}.jpg").read_bytes()
        )
    (tmp_path / "src" / "bad.jpg").write_text("text")
    # two pictures under one id are one picture and one reject, whichever actor sees it first
    names = [*(f"{i}.jpg" for i in range(12)), "bad.jpg", "copy/0.jpg"]
    (tmp_path / "src" / "copy").mkdir()
    shutil.copy(tmp_path / "src" / "0.jpg", tmp_path / "src" / "copy" / "0.jpg")
    rows = [{"file_name": name, "id": Path(name).name, "caption": "a"} for name in names]
    source = tmp_path / "src" / "catalogue.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = (
        source,
        "--student",
        student_folder,
        "--collection",
        "c",
        "--edge",
        tmp_path / "job",
        "--rejects",
        tmp_path / "r.jsonl",
    )
    done = job("ingest", *args, env=on_head)
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
    assert '"seen": 14, "embedded": 12, "updated": 0, "unchanged": 0, "rejected": 2}' in done.stdout
    rejects = (tmp_path / "r.jsonl").read_text()
    assert "looks like text" in rejects
    assert "a second picture named '0.jpg'" in rejects
    again = job("ingest", *args, env=on_head)
    assert '"seen": 14, "embedded": 0, "updated": 0, "unchanged": 12, "rejected": 2}' in again.stdout
    ours, theirs = open_store("c", edge=str(tmp_path / "cli")), open_store("c", edge=str(tmp_path / "job"))
    report = ingest(str(source), Student.load(student_folder), ours)
    assert (report.seen, report.embedded, report.rejected) == (14, 12, 2)
    snapshot = lambda s: {
        p.id: (p.payload, p.image.round(4).tolist(), p.regions.round(4).tolist())
        for p in s.scroll(with_vectors=True)
    }
    assert snapshot(ours) == snapshot(theirs)
    ours.close()
    theirs.close()


def test_a_large_teacher_is_taught_and_teaches_a_light_student(
    on_head, tiny_base, pairs_folder, scenes_folder, tmp_path
):
    """Each with its own pixels: what the table says of the student and of where it started is what the
    exported folders say of themselves."""
    from model_folders import LIGHT, model_folder

    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.pairs.build import build
    from dclip_qdrant.serving.evaluation import evaluate
    from dclip_qdrant.serving.student import Student

    light = model_folder(tmp_path / "light", LIGHT, 5)
    out, more = tmp_path / "out", tmp_path / "more"
    build(str(scenes_folder), str(more), captions=False)  # the same scenes: 20 of them are held out
    done = job(
        "distill",
        *("--teacher", tiny_base, "--student", light, "--teacher-recipe", "projections"),
        *("--recipe", "pictures", "--pictures", more, "--no-compare", "--allow-no-gain"),
        *("--pairs", pairs_folder, "--out", out),
        *("--set", "train.epochs=2", "--set", "train.batch_size=8"),
        env=on_head,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Verdict: " in done.stdout
    assert "40 pictures without captions, 20 left out: in val or test" in done.stdout + done.stderr
    table = json.loads((out / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows)[:2] == ["teacher's model", "base"]
    for name, folder in (("base", "base"), ("pictures", "student")):
        figures = evaluate(Student.load(out / folder), Pairs.open(str(pairs_folder)))
        for way in ("t2i", "i2t"):
            assert figures[way]["mrr"] == pytest.approx(rows[name][way]["mrr"], abs=0.02)
    (taught,) = (out / "stages").glob("teacher-model-*/open_clip_model.safetensors")
    before = load_file(str(Path(tiny_base) / "open_clip_model.safetensors"))
    after = load_file(str(taught))
    changed = {k for k in after if not torch.equal(before[k].float(), after[k].float())}
    assert changed == {"visual.proj", "text_projection"}
