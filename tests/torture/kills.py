"""Kills `ingest`, `push`, `reindex` and `promote` at random moments (SIGKILL), on embedded collections and on
the tests' stand-in of a server, and keeps an exact account: after each kill the collection still opens and
answers, and after the run that is left alone nothing is lost, doubled or stale.

    python tests/torture/kills.py [--kills 100] [--seed 0] [--pictures 600] [--url http://localhost:6333]

With --url a real server takes the stand-in's place. Exit code 1: something was lost.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import conftest
import qdrant_standin

from dclip_qdrant.errors import DclipError
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import place
from dclip_qdrant.serving.student import Student

CLI = [sys.executable, "-m", "dclip_qdrant.cli"]
LIMIT = 600.0  # seconds that a command may take on a slow machine
KILLS_A_ROUND = 3


@dataclass
class World:
    """What all rounds share: pictures, two students and what each says of the pictures."""

    root: Path
    pictures: Path
    students: list[Student]
    wanted: list[dict[str, np.ndarray]]  # of each student: key -> vector [D]
    random: random.Random
    url: str
    faults: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)

    def check(self, right: bool, what: str) -> None:
        if not right:
            print("FAULT:", what, flush=True)
            self.faults.append(what)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--url")
    args = parser.parse_args()
    standin, tag = None, f"dclip-kills-{time.time_ns()}"
    if args.url is None:
        standin = qdrant_standin.Standin("http://127.0.0.1:9/")
        threading.Thread(target=standin.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="dclip-kills-") as root:
        world = make_world(Path(root), args.url or standin.url, args.pictures, args.seed)
        rounds = 0
        while sum(world.kills.values()) < args.kills:
            for engine in ("edge", "server"):
                for act in (one_ingest, one_push, one_reindex, one_promote):
                    if sum(world.kills.values()) < args.kills:
                        act(world, engine, f"{tag}-{rounds}")
                        rounds += 1
    if args.url:
        qdrant_standin.clear(args.url, tag)
    if standin is not None:
        standin.shutdown()
    counts = ", ".join(f"{name} {count}" for name, count in sorted(world.kills.items()))
    print(f"{sum(world.kills.values())} kills in {rounds} rounds ({counts}): {len(world.faults)} faults")
    sys.exit(1 if world.faults else 0)


def make_world(root: Path, url: str, count: int, seed: int) -> World:
    pictures = root / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        values = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((40, 40)).save(pictures / f"{number:04d}.png")
    students = []
    for number in range(2):
        folder = root / f"student-{number}"
        folder.mkdir()
        students.append(Student.load(conftest.exported(conftest.write_base(folder, number), folder)))
    files = sorted(pictures.glob("*.png"))
    vectors = [student.embed_images(files) for student in students]
    wanted = [dict(zip((f.name for f in files), of_student, strict=True)) for of_student in vectors]
    return World(root, pictures, students, wanted, random.Random(seed), url)


def until_done(
    world: World, name: str, command: list[str], sure: float, opens: Callable[[], None]
) -> subprocess.CompletedProcess[str]:
    """Runs the command and kills it KILLS_A_ROUND times, somewhere in the `sure` seconds that it takes; then
    leaves it alone. `opens` looks at what is there after each kill."""
    for _ in range(KILLS_A_ROUND):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(world.random.uniform(0.25 * sure, 1.1 * sure))
        except subprocess.TimeoutExpired:
            process.kill()
            world.kills[name] += 1
        finally:
            process.kill()
            process.wait(60)
        try:
            opens()
        except Exception as e:  # whatever it is: this is what is looked for
            world.check(False, f"{name}: after a kill: {type(e).__name__}: {e}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    world.check(done.returncode == 0, f"{name}: exit {done.returncode}: {done.stderr[-500:]}")
    return done


def how_long(world: World, name: str, command: list[str]) -> float:
    """Seconds that the command takes here when nobody disturbs it."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    world.check(done.returncode == 0, f"{name}: exit {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - began


def where(world: World, engine: str, name: str) -> tuple[dict[str, str], list[str]]:
    """A place of this round's own, for Python and for the command line."""
    if engine == "server":
        return {"url": world.url}, ["--url", world.url]
    folder = str(world.root / f"edge-{name}")
    return {"edge": folder}, ["--edge", folder]


def can_be_asked(world: World, options: dict[str, str], collection: str, student: int) -> None:
    """Raises where a collection that is there can't be opened, counted and searched."""
    try:
        here = place(**options)
        if collection in here.collections():
            store = here.open(collection)
            world.check(store.count() <= len(world.wanted[0]), f"{collection}: too many points")
            if store.count():
                search(store, world.students[student], text="a red square", limit=3)
        here.close()
    except DclipError as e:
        world.check(False, f"{collection}: {e}")


def account(world: World, options: dict[str, str], collection: str, student: int) -> None:
    """Each picture once, with the vector that the student gives it."""
    here = place(**options)
    points = list(here.open(collection).scroll(with_vectors=True))
    here.close()
    keys = Counter(point.payload["key"] for point in points)
    wanted = world.wanted[student]
    world.check(not wanted.keys() - keys.keys(), f"{collection}: lost {len(wanted.keys() - keys.keys())}")
    world.check(
        not keys.keys() - wanted.keys(), f"{collection}: {len(keys.keys() - wanted.keys())} strangers"
    )
    doubled = [key for key, count in keys.items() if count > 1]
    world.check(not doubled, f"{collection}: doubled {doubled[:3]}")
    stale = [p for p in points if float(p.image @ wanted[p.payload["key"]]) < 0.999]
    world.check(not stale, f"{collection}: {len(stale)} vectors of another picture")


def ingest_command(world: World, collection: str, flags: list[str], student: int = 0) -> list[str]:
    folder = str(world.students[student].folder)
    own = ["ingest", str(world.pictures), "--student", folder, "--collection", collection, "--quiet"]
    return [*CLI, *own, *flags]


def one_ingest(world: World, engine: str, name: str) -> None:
    _, flags = where(world, engine, name + "-timed")
    sure = how_long(world, "ingest", ingest_command(world, name + "-timed", flags))
    options, flags = where(world, engine, name)
    command = ingest_command(world, name, flags)
    until_done(world, f"ingest {engine}", command, sure, lambda: can_be_asked(world, options, name, 0))
    account(world, options, name, 0)


def filled(world: World, options: dict[str, str], collection: str, student: int = 0) -> None:
    here = place(**options)
    ingest(world.pictures, world.students[student], here.open(collection))
    here.close()


def one_push(world: World, engine: str, name: str) -> None:
    """From an embedded collection to the server; `engine` says which of the two is looked at."""
    source, flags = where(world, "edge", name)
    filled(world, source, name)
    command = [*CLI, "push", "--collection", name, *flags, "--url", world.url, "--quiet"]
    sure = how_long(world, "push", [*command, "--to", name + "-timed"])
    looked_at = source if engine == "edge" else {"url": world.url}
    until_done(world, f"push {engine}", command, sure, lambda: can_be_asked(world, looked_at, name, 0))
    account(world, source, name, 0)
    account(world, {"url": world.url}, name, 0)


def one_reindex(world: World, engine: str, name: str) -> None:
    options, flags = where(world, engine, name)
    filled(world, options, name)
    common = [*CLI, "reindex", "--from", name, "--student", str(world.students[1].folder), *flags, "--quiet"]
    common += ["--rejects", str(world.root / "rejects.jsonl")]
    sure = how_long(world, "reindex", [*common, "--to", name + "-timed"])
    command = [*common, "--to", name + "-next"]

    def opens() -> None:
        can_be_asked(world, options, name, 0)
        can_be_asked(world, options, name + "-next", 1)

    until_done(world, f"reindex {engine}", command, sure, opens)
    account(world, options, name, 0)
    account(world, options, name + "-next", 1)


def one_promote(world: World, engine: str, name: str) -> None:
    options, flags = where(world, engine, name)
    filled(world, options, name)
    filled(world, options, name + "-next", 1)
    here = place(**options)
    here.point(name + "-live", name)
    here.point(name + "-timed", name)
    here.close()
    common = [*CLI, "promote", "--to", name + "-next", "--force", *flags]
    sure = how_long(world, "promote", [*common, "--alias", name + "-timed"])

    def opens() -> None:
        here = place(**options)
        meant = here.aliases().get(name + "-live")
        world.check(meant in (name, name + "-next"), f"promote: the alias means {meant}")
        here.close()
        can_be_asked(world, options, str(meant), int(meant != name))

    until_done(world, f"promote {engine}", [*common, "--alias", name + "-live"], sure, opens)
    here = place(**options)
    world.check(here.aliases()[name + "-live"] == name + "-next", "promote: the alias stayed behind")
    here.close()
    account(world, options, name, 0)
    account(world, options, name + "-next", 1)


if __name__ == "__main__":
    main()
