"""`dclip-qdrant adapt` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/adapt.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.tasks import adapt_command

if __name__ == "__main__":
    front.run(adapt_command)
