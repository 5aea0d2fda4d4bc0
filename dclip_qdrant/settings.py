"""TOML files and `key.key=value` settings, read one way everywhere, with complaints that name key and
value."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dclip_qdrant.errors import RecipeError, UsageError
from dclip_qdrant.lookup import did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UsageError: no such file. RecipeError: not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise UsageError(path, f"can't be read: {e.strerror}", "a TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(path, f"not TOML: {e}") from e


def split_setting(text: str, where: str) -> tuple[str, Any]:
    """`key=value` -> the key and the value, which is TOML; a bare word is a string.

    Raises:
        RecipeError: no equals sign.
    """
    key, equals, value_text = text.partition("=")
    if not equals:
        raise RecipeError(where, repr(text), "key=value, e.g. train.lr=1e-5")
    try:
        return key.strip(), tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value_text


def options(settings: Iterable[str], where: str) -> dict[str, Any]:
    """`key=value` settings as a dictionary."""
    return dict(split_setting(text, where) for text in settings)


def apply_setting(raw: dict[str, Any], text: str, where: str = "`settings`") -> None:
    """Sets `a.b=value` in a nested dictionary; `objectives.0.weight=2` reaches into a list, `a.b=null`
    removes.

    Raises:
        RecipeError: a path that isn't there.
    """
    path, value = split_setting(text, where)
    *parents, last = path.split(".")
    at: Any = raw
    for part in parents:
        try:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        except (ValueError, IndexError):
            at = None
        if not isinstance(at, dict | list):
            expected = f"a key of the recipe, but there is no {part!r} to reach into"
            raise RecipeError(where, repr(text), expected)
    if isinstance(at, list):
        raise RecipeError(where, repr(text), "a key inside a list item, e.g. objectives.0.weight=2")
    if value == "null":
        at.pop(last, None)
    else:
        at[last] = value


def checked(model: type[Model], raw: dict[str, Any], where: object) -> Model:
    """The model of these values. Raises RecipeError with pydantic's first complaint as one line."""
    try:
        return model(**raw)
    except ValidationError as e:
        raise _readable(model, where, e) from e


def _readable(model: type[BaseModel], where: object, e: ValidationError) -> RecipeError:
    first = e.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = list(_model_at(model, first["loc"][:-1]).model_fields)
        return RecipeError(where, f"unknown key {key!r}", do=did_you_mean(str(first["loc"][-1]), known))
    if first["type"] == "value_error":
        return RecipeError(where, str(first.get("ctx", {}).get("error")))
    if first["type"] == "missing":
        return RecipeError(where, f"no {key!r}", "a value for it")
    expected = first["msg"][0].lower() + first["msg"][1:]
    return RecipeError(where, f"{key} = {json.dumps(first['input'], default=str)}", expected)


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The nested model that a path of keys leads to."""
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        kinds = getattr(field.annotation, "__args__", (field.annotation,))
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        model = nested[0] if nested else model
    return model
