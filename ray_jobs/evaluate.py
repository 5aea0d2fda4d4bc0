"""`dclip-qdrant evaluate` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/evaluate.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.students import evaluate_command

if __name__ == "__main__":
    front.run(evaluate_command)
