"""A client that won't embed with one student in a collection that another one filled: the mistake that no
engine can see, because the widths agree."""

import functools
import inspect
import re
import time
from collections.abc import Iterator
from typing import Any

from dclip_qdrant.apps.registration import fingerprint_of
from dclip_qdrant.errors import MismatchError
from dclip_qdrant.serving.collection import META
from dclip_qdrant.serving.student import REGIONS_SUFFIX

GUARDED = (
    "query_points",
    "query_batch_points",
    "query_points_groups",
    "upsert",
    "upload_points",
    "upload_collection",
    "update_vectors",
    "batch_update_points",
)


def guard(client: Any, *, remember_s: float = 30.0) -> Any:
    """The same QdrantClient (or AsyncQdrantClient), which from now on raises MismatchError where
    `models.Document`, `models.Image` or `models.InferenceObject` name a student that didn't fill the
    collection.

    A collection's student is asked for once and remembered for `remember_s` seconds; before refusing it is
    asked again, because an alias may have moved. Collections that hold nothing of ours pass, as do models
    that aren't students.
    """
    if getattr(client, "_dclip_guard", None) is None:
        client._dclip_guard = _Guard(client, remember_s)
        for name in GUARDED:
            if hasattr(client, name):
                setattr(client, name, client._dclip_guard.wrap(getattr(client, name)))
    return client


class _Guard:
    def __init__(self, client: Any, remember_s: float) -> None:
        self.client, self.remember_s = client, remember_s
        self.known: dict[str, tuple[float, dict[str, Any]]] = {}

    def wrap(self, method: Any) -> Any:
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def guarded_async(collection_name: str, *args: Any, **kwargs: Any) -> Any:
                models = set(_models((args, kwargs)))
                if models and self._wrong(collection_name, models, self._remembered(collection_name)):
                    self._refuse(
                        collection_name,
                        models,
                        _remembered_by(await self.client.get_collection(collection_name)),
                    )
                return await method(collection_name, *args, **kwargs)

            return guarded_async

        @functools.wraps(method)
        def guarded(collection_name: str, *args: Any, **kwargs: Any) -> Any:
            check = lambda models: self._check(collection_name, models)
            args = tuple(_watched(a, check) for a in args)
            kwargs = {k: _watched(v, check) for k, v in kwargs.items()}
            check(set(_models((args, kwargs))))
            return method(collection_name, *args, **kwargs)

        return guarded

    def _check(self, collection: str, models: set[str]) -> None:
        if models and self._wrong(collection, models, self._remembered(collection)):
            self._refuse(collection, models, _remembered_by(self.client.get_collection(collection)))

    def _remembered(self, collection: str) -> dict[str, Any] | None:
        at, remembered = self.known.get(collection, (0.0, None))
        return remembered if time.monotonic() - at < self.remember_s else None

    def _wrong(self, collection: str, models: set[str], remembered: dict[str, Any] | None) -> list[str]:
        """The models that another student than the collection's answers for; all of them while the collection
        isn't known."""
        if remembered is None:
            return sorted(models)
        mine = remembered.get("fingerprint", "")
        return sorted(
            m
            for m in models
            if mine
            and (theirs := _fingerprint(m))
            and not (mine.startswith(theirs) or theirs.startswith(mine))
        )

    def _refuse(self, collection: str, models: set[str], remembered: dict[str, Any]) -> None:
        """Raises if the models are wrong by what the collection says now."""
        self.known[collection] = (time.monotonic(), remembered)
        if wrong := self._wrong(collection, models, remembered):
            raise MismatchError(
                collection,
                f"filled by {remembered.get('student')}",
                f"{wrong[0]} was asked to embed",
                f"query with {remembered.get('student')}, or dclip-qdrant reindex",
            )


def _remembered_by(info: Any) -> dict[str, Any]:
    return (info.config.metadata or {}).get(META, {})


def _fingerprint(model: str) -> str | None:
    """Of a student's name: from its version, else what this process registered under it; None where nobody
    here knows."""
    name = model.removesuffix(REGIONS_SUFFIX)
    match = re.search(r"@([0-9a-f]{8})$", name)
    return fingerprint_of(name) or (match.group(1) if match else None)


def _models(value: Any) -> Iterator[str]:
    """Names of students in anything that a client's method takes."""
    model = getattr(value, "model", None)
    if isinstance(model, str) and any(hasattr(value, kind) for kind in ("text", "image", "object")):
        if model.lower().startswith("dclip/"):
            yield model.lower()
    elif isinstance(value, dict):
        for v in value.values():
            yield from _models(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _models(v)
    elif hasattr(type(value), "model_fields"):
        for field in type(value).model_fields:
            yield from _models(getattr(value, field))


def _watched(value: Any, check: Any) -> Any:
    """Points that come one by one are looked at as they pass."""
    if not isinstance(value, Iterator):
        return value

    def passing() -> Iterator[Any]:
        for item in value:
            check(set(_models(item)))
            yield item

    return passing()
