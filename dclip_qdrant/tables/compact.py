"""Few large parts instead of many small ones: stages write a part for each batch, so that a killed job loses
little, and end with parts that millions of rows can be read from."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dclip_qdrant.tables import storage
from dclip_qdrant.tables.contracts import Contract
from dclip_qdrant.tables.stages import part_files

ROWS = 10_000  # of a part, at least, but for the last one
GROUP_ROWS = 512  # of a row group, at least, but for the last one: what a reader holds at a time


def compact(folder: UPath, contract: Contract, *, rows: int = ROWS) -> None:
    """Merges the parts of a stage, in order of name, into parts of at least `rows` rows.

    Killed at any moment it loses nothing and doubles nothing once it is called again: a note says which
    parts go into which, before the new one appears and until the old ones are gone.
    """
    for note in sorted(folder.glob("merge-*.json"), key=str):
        _finish(folder, note)
    group: list[UPath] = []
    count = 0
    for file in part_files(folder):
        with storage.open_for_arrow(file) as f:
            own = pq.ParquetFile(f).metadata.num_rows
        if own >= rows:
            continue
        group.append(file)
        count += own
        if count >= rows:
            _merge(folder, contract, group)
            group, count = [], 0
    if len(group) > 1:
        _merge(folder, contract, group)


def _merge(folder: UPath, contract: Contract, files: list[UPath]) -> None:
    names = [file.name for file in files]
    mark = hashlib.sha256("\n".join(names).encode()).hexdigest()[:20]
    note, target = folder / f"merge-{mark}.json", folder / f"part-{mark}.parquet"
    storage.write_json(note, {"target": target.name, "parts": names})
    with storage.writing(target) as sink:
        writer = pq.ParquetWriter(sink, contract.schema, compression="zstd")
        # whole parts go into a row group, so that it holds all views of its pictures
        group: list[pa.Table] = []
        for file in files:
            with storage.open_for_arrow(file) as f:
                group.append(pq.read_table(f).cast(contract.schema))
            if sum(table.num_rows for table in group) >= GROUP_ROWS or file is files[-1]:
                table = pa.concat_tables(group)
                writer.write_table(table, row_group_size=table.num_rows)
                group = []
        writer.close()
    _finish(folder, note)


def _finish(folder: UPath, note: UPath) -> None:
    """Removes what was merged, where the merged part is there; the note last."""
    facts = json.loads(note.read_text())
    if (folder / facts["target"]).exists():
        for name in facts["parts"]:
            (folder / name).unlink(missing_ok=True)
    note.unlink()
