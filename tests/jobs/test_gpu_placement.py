"""Where a cluster has GPUs, models get one each and pictures are decoded on CPUs before them. Ray is told of
a GPU that isn't there: placement is what can be seen without one."""

import json

import pyarrow.parquet as pq
import pytest
from processes import python
from ray_jobs_here import ENV, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long]

SCRIPT = """
import json, sys
import ray
from dclip_qdrant.jobs import cluster, features
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.recipe import Recipe

ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=100_000_000)
pairs, base, out = sys.argv[1:]

seen = {}
finished = cluster.finished

def watched(dataset):
    seen["plan"] = str(dataset)
    for done in finished(dataset):
        seen["free"] = min(seen.get("free", 1), ray.available_resources().get("GPU", 0))
        yield done

cluster.finished = watched
request = features.FeatureRequest(out, Pairs.open(pairs), Recipe.load("sft"), base, "base")
stage = features.extract_features(request, actors=None)
print(json.dumps({"path": str(stage.path), "plan": seen["plan"], "free": seen["free"]}))
"""


def test_models_get_the_gpus_and_decoding_stays_on_cpus(tiny_base, pairs_folder, tmp_path):
    done = python("-c", SCRIPT, pairs_folder, tiny_base, tmp_path, cwd=ROOT, env=ENV)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["plan"].index("Guarded") < said["plan"].index("Decode")  # the last operator stands first
    assert said["free"] == 0  # the model held it
    parts = sorted((tmp_path).glob("features-*/part-*.parquet"))
    keys = [key for part in parts for key in pq.read_table(part, columns=["key"])["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 60
