"""`dclip-qdrant evaluate` as a Ray job: the same figures of a student folder, computed where the data is.

ray job submit --working-dir . -- python ray_jobs/evaluate.py --student /data/run/student --pairs /data/pairs --format json
"""

import sys

from dclip_qdrant import front
from dclip_qdrant.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    front.run(main)
