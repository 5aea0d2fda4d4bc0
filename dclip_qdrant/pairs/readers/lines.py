"""Lines of text files, one by one: a line that is no text costs itself alone."""

import codecs
from collections.abc import Iterator

from upath import UPath

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LOOKED_AT = 1 << 16  # bytes at the beginning that say how lines end


def text_lines(path: UPath) -> Iterator[tuple[int, str | None]]:
    r"""(number from 1, text without its end); the text is None where the bytes are not UTF-8.

    Lines end at \n or \r\n, in files without any \n at \r (old Macs): never at U+2028 and the like, which
    stand inside of captions. A byte order mark is taken away; UTF-16 (Excel's "Unicode text") is read by its
    mark.
    """
    with path.open("rb") as file:
        head = file.read(LOOKED_AT)
        file.seek(0)
        if head.startswith(UTF16):
            yield from enumerate(_split(file.read().decode("utf-16")), 1)
            return
        if b"\n" not in head and b"\r" in head:
            lines = iter(file.read().split(b"\r"))
        else:
            lines = iter(file)
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None


def _split(text: str) -> list[str]:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
