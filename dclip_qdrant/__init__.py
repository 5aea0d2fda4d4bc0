"""A team's own light CLIP: distilled from image-caption pairs, served to Qdrant.

The names below load on first use: importing this package loads neither torch nor ray nor qdrant_client.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Student": "student", "Recipe": "recipe", "Regions": "regions", "Pairs": "pairs", "CollectionSpec": "collection",
    "open_store": "stores", "register": "registration", "guard": "client_guard", "DclipError": "errors",
}  # fmt: skip
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dclip_qdrant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dclip_qdrant.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
