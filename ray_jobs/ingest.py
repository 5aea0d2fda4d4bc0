"""`dclip-qdrant ingest-on-ray` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/ingest.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.ingest import ingest_on_ray_command

if __name__ == "__main__":
    front.run(ingest_on_ray_command)
