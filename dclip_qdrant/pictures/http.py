"""Pictures over HTTP: one request, bounded in time and bytes; redirects are never followed by themselves."""

import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Answer:
    """`data` of a 200; of a redirect the `location`. Other answers are HttpRefused."""

    data: bytes = b""
    status: int = 200
    location: str | None = None


class HttpRefused(Exception):
    """Why there is no picture: the answer's status, or what went wrong on the way; one line."""


class HttpTooLarge(HttpRefused):
    """More bytes than are allowed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever asked looks at the new host first, or gives up."""

    def redirect_request(self, *_: Any) -> None:
        return None


def get(url: str, *, agent: str, timeout: float, most_bytes: int, proxies: bool) -> Answer:
    """One request for a picture. `proxies`: whether the environment's proxies are used.

    Raises:
        HttpTooLarge: more than `most_bytes`. HttpRefused: any other answer, or none.
    """
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if not proxies:
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"User-Agent": agent, "Accept": "image/*"})
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
            data = answer.read(most_bytes + 1)
    except urllib.error.HTTPError as e:
        location = e.headers.get("Location")
        if e.code in REDIRECTS and location:
            return Answer(status=e.code, location=location)
        raise HttpRefused(f"answered {e.code}") from None
    except (OSError, ValueError) as e:
        raise HttpRefused(f"can't be reached ({type(e).__name__})") from None
    if len(data) > most_bytes:
        raise HttpTooLarge(f"more than {most_bytes:,} bytes")
    return Answer(data)
