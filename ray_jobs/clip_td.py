"""`dclip-qdrant clip-td` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/clip_td.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.tasks import clip_td_command

if __name__ == "__main__":
    front.run(clip_td_command)
