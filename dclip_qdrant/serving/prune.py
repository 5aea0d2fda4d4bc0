"""Points whose picture is gone from the folder that it was read from."""

import os
from collections.abc import Iterator

from upath import UPath

from dclip_qdrant.errors import UsageError
from dclip_qdrant.serving.items import Report
from dclip_qdrant.serving.stores import Store
from dclip_qdrant.tables import storage

TOGETHER = 1000  # points a request
COUNT_GONE = 100_000  # points of a collection that is looked through without being asked


def local_root(top: str | UPath, images_root: str | None, *, must: bool) -> str | None:
    """The folder below which the pictures of a source at `top` lie; None where it is not on this machine:
    whether a picture is still in a bucket takes a request each.

    Raises:
        UsageError: it isn't, and `must` be.
    """
    root = storage.as_path(images_root or top)
    if not storage.is_uri(root):
        root = root.parent if root.is_file() else root  # of a list or an archive: where it lies
        if root.is_dir():
            return os.path.abspath(str(root))
    if must:
        raise UsageError("`prune`", str(root), "pictures in a folder of this machine")
    return None


def note_gone(report: Report, store: Store, root: str, *, delete: bool) -> None:
    """Counts the points whose picture is gone, and deletes them. Without `delete` a large collection isn't
    looked through, nor one that holds nothing but what was just seen."""
    count = store.count()
    if delete or report.seen - report.rejected < count <= COUNT_GONE:
        ids = list(gone(store, root))
        if not delete:
            report.gone = len(ids)
            return
        for start in range(0, len(ids), TOGETHER):
            store.delete(ids[start : start + TOGETHER])
            report.deleted += len(ids[start : start + TOGETHER])


def gone(store: Store, root: str) -> Iterator[str]:
    """Ids of points whose picture lay below `root` and isn't there any more. A picture inside a tar or a
    Parquet file is there while that file is."""
    below = root.rstrip(os.sep) + os.sep
    for point in store.scroll():
        path = _file_of(str(point.payload.get("uri") or ""))
        if path.startswith(below) and not os.path.lexists(path):
            yield point.id


def _file_of(uri: str) -> str:
    """The file that a picture is, or is inside of: archives' members stand behind `#`."""
    path = uri.removeprefix("file://")
    file, found, _ = path.rpartition("#")
    return file if found and not os.path.lexists(path) and os.path.isfile(file) else path
