"""A leak on purpose: some test pictures put into train, to measure what a leak is worth. DCLIP's own data had about a third of COCO's test pictures
and two fifths of Flickr30k's in its training pool (docs/papers.md 1.2)."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.arrow_file import opened
from dclip_qdrant.contracts import PAIRS
from dclip_qdrant.errors import UsageError
from dclip_qdrant.pairs import Pairs


def leak(source: str, out: str, *, share: float) -> int:
    """Writes the pairs of `source` to `out` with `share` of the test pictures in train besides (under keys of their own); how many those are.

    Which ones follows from their keys. A finished folder is left as it is.
    """
    pairs, target = Pairs.open(source), UPath(out)
    if not 0 < share <= 1:
        raise UsageError("--reproduce-leak", f"{share:g}", "a part of the test pictures above 0, at most 1, e.g. 0.33")
    if (target / "manifest.json").exists():
        return json.loads((target / "manifest.json").read_text())["leaked"]
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    for number, file in enumerate(pairs.files):
        with opened(file) as f:
            table = pq.read_table(f)
        chosen = [s == "test" and _unit(k) < share for s, k in zip(table["split"].to_pylist(), table["key"].to_pylist(), strict=True)]
        rows = table.filter(pa.array(chosen)).to_pylist()
        count += len(rows)
        moved = PAIRS.table([r | {"key": f"leak/{r['key']}", "split": "train"} for r in rows])
        with (target / f"pairs-{number:05d}.parquet").open("wb") as f:
            pq.write_table(pa.concat_tables([table.cast(PAIRS.schema), moved]), f, row_group_size=256)
    fingerprint = hashlib.sha256(f"{pairs.fingerprint} leak {share}".encode()).hexdigest()
    manifest = {**pairs.manifest, "fingerprint": fingerprint, "leaked": count, "source": str(source)}
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return count


def _unit(key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"leak-{key}".encode()).digest()[:8]) / 2**64
