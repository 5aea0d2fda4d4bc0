"""What a request may ask for, and how it is refused."""

from dataclasses import dataclass, field


class Refused(Exception):
    """An answer that isn't 200: its status, its one line, its headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


@dataclass(frozen=True)
class Limits:
    """Generous for an application, small for an attacker; every one is a flag of `dclip-qdrant serve`."""

    body_bytes: int = 32 << 20  # Qdrant's own default for a request
    picture_bytes: int = 20 << 20
    picture_pixels: int = 50_000_000  # 150 MB of RGB
    inputs: int = 256  # a request
    texts: int = 2048  # a request that holds texts alone, as OpenAI's service takes them
    text_chars: int = 20_000  # CLIP reads some 300; the tokenizer's work is linear in this
    waiting: int = 4096  # inputs in line, all requests together; beyond it 429
    fetch_hosts: tuple[str, ...] = field(default=())  # hosts that picture URLs may name; none: no URLs
    fetch_seconds: float = 10.0
