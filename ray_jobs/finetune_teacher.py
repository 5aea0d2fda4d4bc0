"""`dclip-qdrant finetune-teacher` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/finetune_teacher.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.train import finetune_teacher_command

if __name__ == "__main__":
    front.run(finetune_teacher_command)
