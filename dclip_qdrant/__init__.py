"""A team's own light CLIP: distilled from image-caption pairs, served to Qdrant.

The names below load on first use: importing this package loads neither torch nor ray nor qdrant_client.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; tests/test_house.py compares it with what loads
    from dclip_qdrant.apps.guard import guard
    from dclip_qdrant.apps.registration import register
    from dclip_qdrant.errors import DclipError
    from dclip_qdrant.pairs import Pairs
    from dclip_qdrant.pictures.regions import Regions
    from dclip_qdrant.recipe import Recipe
    from dclip_qdrant.serving.collection import CollectionSpec
    from dclip_qdrant.serving.evaluation import evaluate
    from dclip_qdrant.serving.ingest import ingest
    from dclip_qdrant.serving.search import Hit, search
    from dclip_qdrant.serving.stores import open_store
    from dclip_qdrant.serving.student import Student

_MODULE_OF = {
    "CollectionSpec": "serving.collection",
    "DclipError": "errors",
    "Hit": "serving.search",
    "Pairs": "pairs",
    "Recipe": "recipe",
    "Regions": "pictures.regions",
    "Student": "serving.student",
    "evaluate": "serving.evaluation",
    "guard": "apps.guard",
    "ingest": "serving.ingest",
    "open_store": "serving.stores",
    "register": "apps.registration",
    "search": "serving.search",
}
__all__ = [
    "CollectionSpec",
    "DclipError",
    "Hit",
    "Pairs",
    "Recipe",
    "Regions",
    "Student",
    "__version__",
    "evaluate",
    "guard",
    "ingest",
    "open_store",
    "register",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dclip_qdrant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dclip_qdrant.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
