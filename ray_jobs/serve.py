"""`dclip-qdrant serve-on-ray` as a script for Ray's job API; `--help` says the rest.

ray job submit --working-dir . -- python ray_jobs/serve.py ...
"""

from dclip_qdrant.cli import front
from dclip_qdrant.cli.serving_apps import serve_on_ray_command

if __name__ == "__main__":
    front.run(serve_on_ray_command)
