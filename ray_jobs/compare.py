"""`dclip-qdrant compare` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/compare.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.train import compare_command

if __name__ == "__main__":
    front.run(compare_command)
