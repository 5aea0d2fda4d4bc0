"""`dclip-qdrant distill` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/distill.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.train import distill_command

if __name__ == "__main__":
    front.run(distill_command)
