"""What people have, as a stream of `SourcePicture`: one reader a format, each a generator. Nothing is decoded
or judged here.

layout.py finds out what a folder is; csv_file, json_file, flickr_token, tar_file, parquet_file and folder
read one format each. What can't be used (a line, a member, a whole shard) comes as a picture with an `error`:
one bad item costs itself, never the rest.
"""

from collections.abc import Iterator

from dclip_qdrant.pairs.readers.layout import Layout, open_source
from dclip_qdrant.pairs.readers.left_out import Account, left_out_line
from dclip_qdrant.pairs.readers.picture import SourcePicture

__all__ = ["Account", "Layout", "SourcePicture", "left_out_line", "open_source", "read_any"]


def read_any(
    source: str, *, images_root: str | None = None, captions: bool = True
) -> tuple[str, Iterator[SourcePicture]]:
    """The name of the format and the pictures of a source, as `open_source` finds them.

    Raises:
        UsageError: nothing there, or nothing that a reader knows.
    """
    layout = open_source(source, images_root=images_root, captions=captions)
    return layout.kind, layout.pictures()
