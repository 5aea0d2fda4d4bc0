"""What it is worth on a CPU to let glibc keep large blocks, as our Ray workers do: the same towers in two fresh processes.

    python benchmarks/malloc.py --base FOLDER

Prints pictures a second both ways and their ratio; one run, one machine, quote the ratio.
"""

import argparse
import os
import subprocess
import sys

CODE = """
import sys, time, torch
from dclip_qdrant.models.two_tower import load
model = load(sys.argv[1])
x = torch.randn(64, 3, model.preprocess.size, model.preprocess.size)
with torch.no_grad():
    model.encode_image(x)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < 10:
        model.encode_image(x)
        n += len(x)
print(n / (time.perf_counter() - began))
"""


def main() -> None:
    from dclip_qdrant.cluster import KEEP_MEMORY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    args = parser.parse_args()
    speeds = {}
    for name, more in (("as it is", {}), ("keeping memory", KEEP_MEMORY)):
        env = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY} | more
        done = subprocess.run([sys.executable, "-c", CODE, args.base], env=env, capture_output=True, text=True, check=True)
        speeds[name] = float(done.stdout.split()[-1])
        print(f"{name}: {speeds[name]:.1f} pictures a second")
    print(f"ratio {speeds['keeping memory'] / speeds['as it is']:.2f}")


if __name__ == "__main__":
    main()
