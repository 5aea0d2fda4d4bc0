"""The demo, start to end: renders scenes, makes pairs, starts a Ray head of its own, submits the job, ingests, searches, writes demo/report.html.

    make demo            # or: python examples/demo/run.py [--fresh] [--seeds 0,1,2] [--long]

Everything lands in demo/. A second run reuses what is there; --fresh starts over.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import questions
import report
import scenes
from ray_head import RayHead

from dclip_qdrant.cluster import CPU_SETTINGS

OUT = ROOT / "demo"
SIZES = {"train": 1000, "val": 300, "test": 600}
BIN = Path(sys.executable).parent
ENV = {**CPU_SETTINGS, **os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "YOLO_OFFLINE": "true",
       "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
LOW_SHOT = ("unlabelled=true", "weight=1", "batch_size=32", "adapt_epochs=5", "finetune_epochs=20")  # docs/results.md
BEGAN = time.monotonic()


def step(text: str) -> None:
    print(f"\n[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)


def call(*command: str | Path, env: dict[str, str] = ENV, show: bool = False, ok: tuple[int, ...] = (0,)) -> str:
    """Runs a command as a user would, shows it, and hands back its stdout (or shows that too, as it comes)."""
    shown = " ".join(str(c) if str(c).isprintable() and " " not in str(c) else f'"{c}"' for c in command)
    print(f"  $ {shown.replace(str(ROOT) + '/', '').replace(str(BIN) + '/', '')}", flush=True)
    done = subprocess.run([str(c) for c in command], env=env, cwd=ROOT, stdout=None if show else subprocess.PIPE, text=True)
    if done.returncode not in ok:
        print(done.stdout or "")
        sys.exit(f"that command ended with {done.returncode}")
    return done.stdout or ""


def render() -> None:
    """The team's pictures and captions, the labelled pictures, and a catalogue of the test pictures with one caption each."""
    if (OUT / "data" / "catalogue.jsonl").exists():
        return
    scenes.write_team(OUT / "data", **SIZES)
    scenes.write_labelled(OUT / "labelled", 1200)
    rows = [json.loads(line) for line in (OUT / "data" / "captions.jsonl").read_text().splitlines()]
    # a picture is indexed with one caption and queried with its others: BM25 must not find its own words
    catalogue = [{"file_name": r["file_name"], "caption": r["captions"][0], "split": r["split"]} for r in rows if r["split"] == "test"]
    (OUT / "data" / "catalogue.jsonl").write_text("".join(json.dumps(r) + "\n" for r in catalogue))


def long_form(head: RayHead, detector: Path) -> None:
    """Every recipe beside the others (demo/compare.md); ComKD-CLIP's and CLIP-TD's own tasks."""
    submit = (BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python")
    step("Every recipe at the same budget")
    call(*submit, "ray_jobs/compare.py", "--suite", "demo", "--parallel", "2", "--base", HERE / "base", "--weights", detector, "--pairs", OUT / "pairs", "--labelled", OUT / "labelled", "--out", OUT,
         "--report", OUT / "compare.md", show=True, ok=(0, 3))  # fmt: skip
    step("ComKD-CLIP's own task: half of the shapes labelled, the others new")
    call(*submit, "ray_jobs/adapt.py", "--labelled", OUT / "labelled", "--teacher", HERE / "base", "--student", HERE / "base", "--out", OUT / "adapted", "--set", "depth=4", show=True)
    step("CLIP-TD's own task: 200 answered statements and questions about scenes, 1,800 without answers")
    for subset, count, start in (("train", 2000, 3_000_000), ("test", 1000, 4_000_000)):
        if not (OUT / "questions" / f"snli_ve_{subset}.jsonl").exists():
            questions.write(OUT / "questions", count, start=start, subset=subset)
    files = lambda subset: ",".join(str(OUT / "questions" / f"v2_{kind}_{subset}_{what}.json") for kind, what in (("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")))
    for task, train, test in (("vqa", files("train"), files("test")), ("snli_ve", *(OUT / "questions" / f"snli_ve_{s}.jsonl" for s in ("train", "test")))):
        call(*submit, "ray_jobs/clip_td.py", "--task", task, "--train", train, "--test", test, "--images", OUT / "questions" / "images", "--teacher", HERE / "base", "--detector", "yolo",
             "--weights", detector, "--out", OUT / f"clip_td-{task}", "--part", "0.1", *(f for s in LOW_SHOT for f in ("--set", s)), show=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--long", action="store_true", help="also compare every recipe, and the papers' own tasks, on scenes")
    args = parser.parse_args()
    if args.fresh and OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(exist_ok=True)
    cli, detector = BIN / "dclip-qdrant", HERE / "detector.pt"

    step(f"Rendering {sum(SIZES.values()):,} scenes with five captions each")
    render()
    step("Pairs")
    call(cli, "pairs", OUT / "data", "-o", OUT / "pairs", "--overwrite", "--quiet")
    step("The one job: regions, teacher, cache, students, export, table")
    with RayHead(OUT / "ray-head.log", ENV) as head:
        call(BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--",
             "python", "ray_jobs/distill.py", "--recipe", "demo", "--base", HERE / "base", "--weights", detector, "--pairs", OUT / "pairs",
             "--labelled", OUT / "labelled", "--out", OUT, "--seeds", args.seeds, show=True, ok=(0, 3))  # fmt: skip
        if args.long:
            long_form(head, detector)
    print((OUT / "table.md").read_text())
    step("Ingesting the test scenes, one caption each, with the student and with the base it came from")
    (regions,) = (p.parent for p in (OUT / "stages").glob("regions-*/manifest.json"))  # found once, by the job
    how = ("--edge", OUT / "edge", "--regions", regions, "--quiet", "--images", OUT / "data")
    for collection, student in (("scenes", "student"), ("scenes-before", "base")):
        call(
            cli,
            "ingest",
            OUT / "data" / "catalogue.jsonl",
            "--student",
            OUT / student,
            "--collection",
            collection,
            "--rejects",
            OUT / f"{collection}-rejects.jsonl",
            *how,
        )
    step("Searching: text, hybrid, regions, picture")
    where = ("--student", OUT / "student", "--collection", "scenes", "--edge", OUT / "edge", "-n", "3")
    shown = scenes.scene(2_000_000).things[0].words()
    print(call(cli, "search", f"a {shown}", *where))
    print(call(cli, "search", f"a {shown}", "--mode", "hybrid", *where))
    print(call(cli, "search", f"a {shown}", "--mode", "regions", *where))
    print(call(cli, "search", "--image", OUT / "data" / "images" / "test-00000.jpg", *where))
    step("The report")
    report.write(OUT)
    print("""
Look at   demo/report.html
Student   demo/student/       Collection   demo/edge/scenes       Table   demo/table.json

Your own pictures, in three commands:

  dclip-qdrant pairs /your/pictures -o /data/pairs
  ray job submit --working-dir . -- python ray_jobs/distill.py --pairs /data/pairs --base ViT-B-32/openai --out /data/run
  dclip-qdrant ingest /your/pictures --student /data/run/student --collection pictures
""")
    step("Done")


if __name__ == "__main__":
    main()
