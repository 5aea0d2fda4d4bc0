"""`dclip-qdrant ingest` for a cluster: a pool of embedders on Ray Data and a Datasink into Qdrant.

    ray job submit --working-dir . -- python ray_jobs/ingest.py /data/pictures --student /data/run/student --collection pictures --url http://qdrant:6333

Resumes: what is there already, unchanged, is not decoded. The key comes from QDRANT_API_KEY. Exit code 3: some pictures were rejected.
"""

import json
import os

import click

from dclip_qdrant import cluster, front
from dclip_qdrant.collection import CollectionSpec
from dclip_qdrant.errors import PartialError, UsageError


@click.command(help=__doc__)
@click.argument("source")
@click.option("--student", required=True, help="A student folder that every worker can read.")
@click.option("--collection", required=True, envvar="COLLECTION_NAME")
@click.option("--url", envvar="QDRANT_URL", help="A Qdrant server.")
@click.option("--edge", help="Folder of embedded collections; written by one task.")
@click.option("--detector", help="yolo, grid, or package.module:Class.")
@click.option("--weights", help="The detector's weights.")
@click.option("--top-k", default=4, show_default=True)
@click.option("--spec", default="default", show_default=True)
@click.option("--images", "images_root", help="Where the pictures are, when not beside the file that names them.")
@click.option("--prefix", default="")
@click.option("--replace", is_flag=True)
@click.option("--rejects", help="JSON lines of rejected pictures.")
@click.option("--actors", type=int)
def main(source, student, collection, url, edge, detector, weights, top_k, spec, images_root, prefix, replace, rejects, actors):
    cluster.connect()
    from dclip_qdrant.ray_ingest import ingest

    if bool(url) == bool(edge):
        raise UsageError("store", "both --url and --edge" if url else "neither --url nor --edge", "one of them")
    store = {"collection": collection, "url": url, "edge": cluster.absolute(edge, "--edge"), "api_key": os.environ.get("QDRANT_API_KEY")}
    options = {"weights": cluster.absolute(weights, "--weights")} if weights else {}
    report = ingest(
        cluster.absolute(source, "SOURCE"), cluster.absolute(student, "--student"), store, detector=(detector, options) if detector else None, top_k=top_k, spec=CollectionSpec.load(spec),
        images_root=cluster.absolute(images_root, "--images"), prefix=prefix, replace=replace, rejects=cluster.absolute(rejects, "--rejects"), actors=actors,
    )  # fmt: skip
    print(json.dumps(report.row()))
    if report.rejected:
        raise PartialError(source, f"{report.rejected:,} pictures rejected", do=f"the first: {report.reasons[0]}")


if __name__ == "__main__":
    front.run(main)
