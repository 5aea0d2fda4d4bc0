"""JSON -> texts and pictures. A picture is base64 or a data: URI; a URL only of a host that the operator
allowed; a path never."""

import base64
import binascii
import json
import re
import urllib.parse
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from dclip_qdrant.errors import ImageError, ImageTooLarge
from dclip_qdrant.pictures import http, images
from dclip_qdrant.service.limits import Limits, Refused

Kind = Literal["text", "image"]


@dataclass(frozen=True)
class Input:
    """One thing to embed, checked but not yet decoded."""

    kind: Kind
    data: str
    model: str
    where: str  # for messages: inputs[3]
    dim: int | None = None  # how many components are wanted; None: all


def parse_json(body: bytes) -> Any:
    """Raises Refused(400) for what isn't JSON; NaN and Infinity aren't."""

    def no_constant(name: str) -> Any:
        raise Refused(400, f"body: {name} is not JSON")

    try:
        return json.loads(body, parse_constant=no_constant)
    except UnicodeDecodeError:
        raise Refused(400, "body: not UTF-8") from None
    except json.JSONDecodeError as e:
        raise Refused(400, f"body: not JSON ({e.msg} at character {e.pos})") from None
    except RecursionError:
        raise Refused(400, "body: nested too deeply") from None


def parse_inference(body: Any, limits: Limits) -> list[Input]:
    """The Qdrant server's request: {"inputs": [{"data", "data_type", "model", "options"}], "inference":
    "search" | "update", "token"}."""
    if not isinstance(body, dict):
        raise Refused(400, f'body: {_came(body)}; expected {{"inputs": [...]}}')
    inputs = body.get("inputs")
    if not isinstance(inputs, list):
        raise Refused(400, f"inputs: {_came(inputs)}; expected a list")
    if not inputs:
        raise Refused(400, "inputs: an empty list; expected at least one input")
    if len(inputs) > limits.inputs:
        raise Refused(413, f"inputs: {len(inputs):,}; at most {limits.inputs:,} a request")
    if body.get("inference") not in (None, "search", "update"):
        raise Refused(400, f'inference: {_came(body["inference"])}; expected "search" or "update"')
    return [_input(i, f"inputs[{n}]", limits) for n, i in enumerate(inputs)]


def _input(raw: Any, where: str, limits: Limits) -> Input:
    if not isinstance(raw, dict):
        raise Refused(400, f"{where}: {_came(raw)}; expected an object with data, data_type and model")
    model, kind, data, options = raw.get("model"), raw.get("data_type"), raw.get("data"), raw.get("options")
    if not isinstance(model, str) or not model:
        raise Refused(400, f"{where}.model: {_came(model)}; expected a student's name")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, f"{where}.options: {_came(options)}; expected an object or null")
    wrong = next((k for k in options or {} if k != "dim"), None)
    if wrong is not None:
        raise Refused(
            400,
            f"{where}.options: {wrong!r} is unknown; students take dim alone (regions are "
            "the model name + '/regions')",
        )
    dim = (options or {}).get("dim")
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        raise Refused(400, f"{where}.options.dim: {_came(dim)}; expected a whole number above 0")
    if kind == "object":  # arbitrary JSON: a text, or {"text": ...} / {"image": ...}
        if isinstance(data, dict) and len(data) == 1 and next(iter(data)) in ("text", "image"):
            ((kind, data),) = data.items()
        elif isinstance(data, str):
            kind = "text"
        else:
            raise Refused(
                400, f'{where}.data: {_came(data)}; expected a text, {{"text": ...}} or {{"image": ...}}'
            )
    if kind not in ("text", "image"):
        raise Refused(400, f"{where}.data_type: {_came(kind)}; expected text, image or object")
    given = (
        text_input(data, model, where, limits) if kind == "text" else image_input(data, model, where, limits)
    )
    return replace(given, dim=dim)


def text_input(data: Any, model: str, where: str, limits: Limits) -> Input:
    if not isinstance(data, str):
        raise Refused(400, f"{where}.data: {_came(data)}; expected a text")
    if not data.strip():
        raise Refused(400, f"{where}.data: an empty text; expected words")
    if len(data) > limits.text_chars:
        raise Refused(413, f"{where}.data: {len(data):,} characters; at most {limits.text_chars:,}")
    try:
        data.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"{where}.data: half a surrogate pair; expected Unicode text") from None
    return Input("text", data, model, where)


def image_input(data: Any, model: str, where: str, limits: Limits) -> Input:
    if not isinstance(data, str):
        raise Refused(400, f"{where}.data: {_came(data)}; expected a picture as base64 or a data: URI")
    if not data.strip():
        raise Refused(400, f"{where}.data: empty; expected a picture as base64 or a data: URI")
    if len(data) > limits.picture_bytes * 4 // 3 + 200:
        raise Refused(
            413, f"{where}.data: about {len(data) * 3 // 4:,} bytes; at most {limits.picture_bytes:,}"
        )
    return Input("image", data, model, where)


def picture(given: Input, limits: Limits) -> Image.Image:
    """The picture of an input, upright RGB. Blocking: call it on a thread. Raises Refused."""
    try:
        return images.open_rgb(_bytes(given, limits), given.where, max_pixels=limits.picture_pixels)
    except ImageError as e:
        raise Refused(413 if isinstance(e, ImageTooLarge) else 400, str(e)) from None


def _bytes(given: Input, limits: Limits) -> bytes:
    data, where = given.data.strip(), given.where
    if re.match(r"https?://", data, re.IGNORECASE):
        return _fetch(data, where, limits)
    if data[:5].lower() == "data:":
        head, comma, body = data.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Refused(
                400, f"{where}.data: a data: URI that isn't base64; expected data:image/...;base64,..."
            )
        data = urllib.parse.unquote(body)  # it is a URI: + and / may be percent-encoded
    elif re.match(r"[a-z][a-z0-9+.-]*:", data, re.IGNORECASE):
        raise Refused(400, f"{where}.data: a {data.split(':')[0][:20]}: URI; expected base64 or data:")
    try:
        out = _base64(data)
    except (binascii.Error, ValueError):
        raise Refused(
            400,
            f"{where}.data: neither base64 nor a data: URI; paths are never opened: send "
            "the picture as base64",
        ) from None
    if len(out) > limits.picture_bytes:
        raise Refused(413, f"{where}.data: {len(out):,} bytes; at most {limits.picture_bytes:,}")
    return out


def _base64(data: str) -> bytes:
    """Of either alphabet (RFC 4648, 4 and 5). Raises ValueError."""
    text = re.sub(r"\s+", "", data).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(text, validate=True)


def _fetch(url: str, where: str, limits: Limits) -> bytes:
    """A picture from an allowed host; no redirects, no credentials, no proxy, a time and a size."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise Refused(400, f"{where}.data: not a URL") from None
    allowed = {h.lower() for h in limits.fetch_hosts}
    if (
        parts.username
        or parts.password
        or not (host in allowed or f"{host}:{port}" in allowed)
        or (port is not None and f"{host}:{port}" not in allowed and port not in (80, 443))
    ):
        raise Refused(
            400,
            f"{where}.data: a URL of {host or 'no host'!r}, which is not allowed here; send "
            "the picture as base64, or start the service with --allow-host",
        )
    try:
        answer = http.get(
            url,
            agent="dclip-qdrant",
            timeout=limits.fetch_seconds,
            most_bytes=limits.picture_bytes,
            proxies=False,
        )
    except http.HttpTooLarge as e:
        raise Refused(413, f"{where}.data: {e}") from None
    except http.HttpRefused as e:
        raise Refused(400, f"{where}.data: {host} {e}") from None
    if answer.location is not None:
        raise Refused(400, f"{where}.data: {host} answered {answer.status}, which is not followed")
    return answer.data


def _came(value: Any) -> str:
    """A short, harmless name of what came."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value[:40])
    return {dict: "an object", list: "a list"}.get(type(value)) or f"the number {value}"[:40]
