"""The demo, start to end: renders scenes, makes pairs, starts a Ray head of its own, submits the job,
ingests, searches, writes demo/report.html.

    make demo            # or: python examples/demo/run.py [--fresh] [--seeds 0,1,2] [--long]

Everything lands in demo/. A second run reuses what is there; --fresh starts over.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import questions
import report
import scenes
from ray_head import RayHead

from dclip_qdrant.jobs.cluster import CPU_SETTINGS

OUT = ROOT / "demo"
SIZES = {"train": 1000, "val": 300, "test": 600}
BIN = Path(sys.executable).parent
ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray prefers these to the address that it is given
ENV = {
    **CPU_SETTINGS,
    **{name: value for name, value in os.environ.items() if name not in ELSEWHERE},
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "YOLO_OFFLINE": "true",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# docs/results.md
LOW_SHOT = (
    "--set unlabelled=true --set weight=1 --set batch_size=32 --set adapt_epochs=5 --set finetune_epochs=20"
)
# absolute: a submitted job runs in a folder of Ray's; quoted: a checkout's path may have spaces
DEMO, BASE = shlex.quote(str(OUT)), shlex.quote(str(HERE / "base"))
DETECTOR = f"--detector-weights {shlex.quote(str(HERE / 'detector.pt'))}"
BEGAN = time.monotonic()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def step(text: str) -> None:
    say(f"\n[{time.monotonic() - BEGAN:5.0f} s] {text}")


def call(command: str, *, show: bool = False, ok: tuple[int, ...] = (0,)) -> str:
    """Runs a command as a user would, prints it, and returns its stdout (or prints that too, as it comes)."""
    say(f"  $ {command.replace(f'{ROOT}/', '')}")
    out = None if show else subprocess.PIPE
    done = subprocess.run(shlex.split(command), env=ENV, cwd=ROOT, stdout=out, text=True)
    if done.returncode not in ok:
        sys.exit(f"{done.stdout or ''}\nthat command ended with {done.returncode}")
    return done.stdout or ""


def render() -> None:
    """The team's pictures and captions, the labelled pictures, and a catalogue of the test pictures with one
    caption each."""
    if (OUT / "data" / "catalogue.jsonl").exists():
        return
    scenes.write_team(OUT / "data", **SIZES)
    scenes.write_labelled(OUT / "labelled", 1200)
    rows = [json.loads(line) for line in (OUT / "data" / "captions.jsonl").read_text().splitlines()]
    # a picture is indexed with one caption and queried with its others: BM25 must not find its own words
    catalogue = [
        {"file_name": r["file_name"], "caption": r["captions"][0], "split": r["split"]}
        for r in rows
        if r["split"] == "test"
    ]
    (OUT / "data" / "catalogue.jsonl").write_text("".join(json.dumps(r) + "\n" for r in catalogue))


def long_form(submit: str) -> None:
    """Every recipe beside the others (demo/compare.md); ComKD-CLIP's and CLIP-TD's own tasks."""
    step("Every recipe at the same budget")
    call(
        f"{submit} ray_jobs/compare.py --suite demo --parallel 2 --base {BASE} {DETECTOR} "
        f"--pairs {DEMO}/pairs --labelled {DEMO}/labelled --out {DEMO} --report {DEMO}/compare.md",
        show=True,
        ok=(0, 3),
    )
    step("ComKD-CLIP's own task: half of the shapes labelled, the others new")
    call(
        f"{submit} ray_jobs/adapt.py --labelled {DEMO}/labelled --teacher {BASE} --base {BASE} "
        f"--out {DEMO}/adapted --set depth=4",
        show=True,
    )
    step("CLIP-TD's own task: 200 answered statements and questions about scenes, 1,800 without answers")
    for subset, count, start in (("train", 2000, 3_000_000), ("test", 1000, 4_000_000)):
        if not (OUT / "questions" / f"snli_ve_{subset}.jsonl").exists():
            questions.write(OUT / "questions", count, start=start, subset=subset)
    asked = f"{DEMO}/questions"
    vqa = "{0}/v2_OpenEnded_mscoco_{1}_questions.json,{0}/v2_mscoco_{1}_annotations.json"
    snli_ve = "{0}/snli_ve_{1}.jsonl"
    for task, files in (("vqa", vqa), ("snli_ve", snli_ve)):
        call(
            f"{submit} ray_jobs/clip_td.py --task {task} --train {files.format(asked, 'train')} "
            f"--test {files.format(asked, 'test')} --images {asked}/images --teacher {BASE} "
            f"--detector yolo {DETECTOR} --out {DEMO}/clip_td-{task} --part 0.1 {LOW_SHOT}",
            show=True,
        )


def ingest_scenes() -> None:
    # regions were found once, by the job
    (regions,) = (p.parent for p in (OUT / "stages").glob("regions-*/manifest.json"))
    shared = f"--edge {DEMO}/edge --regions {shlex.quote(str(regions))} --quiet --images {DEMO}/data"
    for collection, student in (("scenes", "student"), ("scenes-before", "base")):
        call(
            f"dclip-qdrant ingest {DEMO}/data/catalogue.jsonl --student {DEMO}/{student} "
            f"--collection {collection} --rejects {DEMO}/{collection}-rejects.jsonl {shared}"
        )


def search_scenes() -> None:
    words = f"a {scenes.scene(2_000_000).things[0].words()}"
    where = f"--student {DEMO}/student --collection scenes --edge {DEMO}/edge -n 3"
    for query in (f"'{words}'", f"'{words}' --mode hybrid", f"'{words}' --mode regions"):
        say(call(f"dclip-qdrant search {query} {where}"))
    say(call(f"dclip-qdrant search --image {DEMO}/data/images/test-00000.jpg {where}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--long", action="store_true", help="also compare every recipe, and the papers' own tasks, on scenes"
    )
    args = parser.parse_args()
    if args.fresh and OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(exist_ok=True)
    step(f"Rendering {sum(SIZES.values()):,} scenes with five captions each")
    render()
    step("Pairs")
    call(f"dclip-qdrant pairs {DEMO}/data -o {DEMO}/pairs --overwrite --quiet")
    step("The one job: regions, teacher, cache, students, export, table")
    # the job writes beside the demo's own files, which it does in no folder that isn't that of an earlier run
    (OUT / "stages").mkdir(exist_ok=True)
    with RayHead(OUT / "ray-head.log", ENV) as head:
        submit = f"ray job submit --address {head.address} --working-dir . -- python"
        call(
            f"{submit} ray_jobs/distill.py --recipe demo --base {BASE} {DETECTOR} --pairs {DEMO}/pairs "
            f"--labelled {DEMO}/labelled --out {DEMO} --seeds {args.seeds}",
            show=True,
            # ray job submit ends with 1 also where the job ended with 3: no better student
            ok=(0, 1),
        )
        if not (OUT / "table.md").exists():
            sys.exit("the job ended without a table")
        if args.long:
            long_form(submit)
    say((OUT / "table.md").read_text())
    step("Ingesting the test scenes, one caption each, with the student and with the base it came from")
    ingest_scenes()
    step("Searching: text, hybrid, regions, picture")
    search_scenes()
    step("The report")
    report.write(OUT)
    say(f"""
Look at   demo/report.html
Student   demo/student/       Collection   demo/edge/scenes       Table   demo/table.json

Your own pictures:

{textwrap.indent(report.YOUR_OWN, "  ")}
""")
    step("Done")


if __name__ == "__main__":
    main()
