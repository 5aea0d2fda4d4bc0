"""`dclip-qdrant extract-regions` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/extract_regions.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.train import extract_regions_command

if __name__ == "__main__":
    front.run(extract_regions_command)
