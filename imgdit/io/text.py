"""Text that people bring: UTF-8 or UTF-16, with or without a byte-order mark, with line ends of any system."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte-order marks and what follows them."""


def read_text(path: str | Path) -> str:
    """A text file, without its mark.

    Raises:
        ValueError: see `decode_text`.
        OSError: the file cannot be read.
    """
    return decode_text(Path(path).read_bytes(), str(path))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, see `read_text` and `split_lines`."""
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    r"""The lines of a text. Only `\n` and `\r\n` end one: `str.splitlines` would also cut at U+2028, U+0085 and form
    feeds, which JSON and captions may hold."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def lines_or_errors(data: bytes, source: str) -> list[str | ValueError]:
    """The lines of a text; of one that is no text the error, so that a wrong byte costs its own line only."""
    encoding, mark = encoding_of(data)
    if encoding != "utf-8":
        return list(split_lines(decode_text(data, source)))
    found: list[str | ValueError] = []
    start = mark
    for line in data[mark:].split(b"\n"):
        try:
            found.append(_decoded(line, encoding, source, start).removesuffix("\r"))
        except ValueError as error:
            found.append(error)
        start += len(line) + 1
    return found[:-1] if found[-1] == "" else found


def decode_text(data: bytes, source: str) -> str:
    """The text that bytes stand for, without its mark.

    Args:
        source: file, for the message.

    Raises:
        ValueError: neither UTF-8 nor UTF-16; names the first byte that is not.
    """
    encoding, mark = encoding_of(data)
    return _decoded(data[mark:], encoding, source, mark)


def encoding_of(data: bytes) -> tuple[str, int]:
    """How a text is encoded, and the bytes of its mark.

    A mark decides. Without one, a text in UTF-16 is known by its zero bytes, one in each ASCII character: no text in
    UTF-8 has any. Everything else is taken for UTF-8.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return encoding, len(mark)
    return (_byte_order(data) if b"\0" in data else None) or "utf-8", 0


def _byte_order(data: bytes) -> str | None:
    """The UTF-16 that a text with zero bytes is; `None`: it is none.

    The order in which every character is assigned, and of two such orders the one with more ASCII.
    """
    if 4 * data.count(0) < len(data) and _plausible(data.replace(b"\0", b""), "utf-8") is not None:
        return None  # a text in UTF-8 with some zero bytes in it, as a disk that failed leaves them
    ascii_in = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        text = _plausible(data, encoding)
        if text is not None:
            ascii_in[encoding] = sum(character < "\x80" for character in text)
    counts = sorted(ascii_in.values())
    return None if not counts or counts[-1] in counts[:-1] else max(ascii_in, key=ascii_in.__getitem__)


def _plausible(data: bytes, encoding: str) -> str | None:
    """The text, if all its characters are assigned and none is a control character but white space."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    strange = ("Cn", "Co", "Cs", "Cc")
    return None if any(unicodedata.category(c) in strange and c not in "\t\n\r\f\v\x85" for c in set(text)) else text


def _decoded(data: bytes, encoding: str, source: str, start: int) -> str:
    """`data`, which stands at byte `start` of `source`."""
    try:
        text = data.decode(encoding)
        place = data.find(0) if encoding == "utf-8" else -1
        why = "a zero byte, which no text has"
    except UnicodeDecodeError as error:
        place, why = error.start, f"0x{data[error.start]:02x}: {error.reason}"
    if place >= 0:
        raise ValueError(f"{source} is no text in UTF-8 or UTF-16: byte {start + place:,} is {why}. Save it as UTF-8")
    return text
