"""What our settings for CPU workers are worth: pictures a second of the same towers in fresh processes, with
each setting and without.

    python benchmarks/cpu.py --base FOLDER

Memory: glibc told to keep large blocks, one process; of that, one arena for all threads. Threads: idle OpenMP
threads told to sleep soon, one process and two at the same time, each with all cores. Everything runs in a
thread that isn't the main one, as in workers of Ray Train. One run, one machine: quote the ratios.
"""

import argparse
import os
import subprocess
import sys

CODE = """
import sys, threading, time, torch
from dclip_qdrant.training.models.two_tower import load
model = load(sys.argv[1])
x = torch.randn(64, 3, model.preprocess.size, model.preprocess.size)

@torch.no_grad()
def measure():
    model.encode_image(x)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < 5:
        model.encode_image(x)
        n += len(x)
    print(n / (time.perf_counter() - began))

thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


def speed(base: str, env: dict[str, str], processes: int) -> float:
    """Pictures a second of all processes together."""
    running = [
        subprocess.Popen([sys.executable, "-c", CODE, base], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    said = [p.communicate()[0] for p in running]
    if any(p.returncode for p in running):
        sys.exit("a process failed")
    return sum(float(s.split()[-1]) for s in said)


def main() -> None:
    from dclip_qdrant.jobs.cluster import CPU_SETTINGS, KEEP_MEMORY, SLEEP_SOON

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    args = parser.parse_args()
    plain = {k: v for k, v in os.environ.items() if k not in CPU_SETTINGS}
    one_arena = {"MALLOC_ARENA_MAX": "1"}
    arenas = plain | {k: v for k, v in KEEP_MEMORY.items() if k not in one_arena}
    for what, before, more, processes in (
        ("keeping memory, one process", plain, KEEP_MEMORY, 1),
        ("of that one arena, one process", arenas, one_arena, 1),
        ("sleeping soon, one process", plain | KEEP_MEMORY, SLEEP_SOON, 1),
        ("sleeping soon, two processes", plain | KEEP_MEMORY, SLEEP_SOON, 2),
    ):
        without, with_it = speed(args.base, before, processes), speed(args.base, before | more, processes)
        print(f"{what}: {without:.1f} -> {with_it:.1f} pictures a second, ratio {with_it / without:.2f}")


if __name__ == "__main__":
    main()
