"""A leak on purpose: some test pictures put into train, to measure what a leak is worth.

DCLIP's own data had about a third of COCO's test pictures and two fifths of Flickr30k's in its training pool
(docs/papers.md 1.2).
"""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq

from dclip_qdrant.errors import UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.splits import unit_hash
from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import PAIRS


def leak(source: str, out: str, *, share: float) -> int:
    """Writes the pairs of `source` to `out` with `share` of the test pictures in train besides, under keys of
    their own; how many those are.

    Which ones follows from their keys. A finished folder is left as it is.
    """
    if not 0 < share <= 1:
        expected = "a part of the test pictures above 0, at most 1, e.g. 0.33"
        raise UsageError("`reproduce_leak`", f"{share:g}", expected)
    pairs, target = Pairs.open(source), storage.as_path(out)
    if (target / "manifest.json").exists():
        return json.loads((target / "manifest.json").read_text())["leaked"]
    count = 0
    with storage.new_folder(target, storage.PAIRS_FOLDER, overwrite=False) as folder:
        for number, file in enumerate(pairs.files):
            with storage.open_for_arrow(file) as f:
                table = pq.read_table(f)
            splits, keys = table["split"].to_pylist(), table["key"].to_pylist()
            chosen = [
                split == "test" and unit_hash(key, "leak") < share
                for split, key in zip(splits, keys, strict=True)
            ]
            rows = table.filter(pa.array(chosen)).to_pylist()
            count += len(rows)
            moved = PAIRS.table([r | {"key": f"leak/{r['key']}", "split": "train"} for r in rows])
            with (folder / f"pairs-{number:05d}.parquet").open("wb") as f:
                pq.write_table(pa.concat_tables([table.cast(PAIRS.schema), moved]), f, row_group_size=256)
        fingerprint = hashlib.sha256(f"{pairs.fingerprint} leak {share}".encode()).hexdigest()
        facts = {"fingerprint": fingerprint, "leaked": count, "source": str(source)}
        storage.write_json(folder / "manifest.json", {**pairs.manifest, **facts})
    return count
