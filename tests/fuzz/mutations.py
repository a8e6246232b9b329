"""Valid files made wrong: bytes, JSON, safetensors and text, each by a random generator that can be started again."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

from PIL import Image

HUGE = [-1, 0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**64, 10**30, -(10**12), 1e308, 0.5, float("nan"), float("inf")]
ODD = [None, True, "", "\0", "x" * 5000, "🙂" * 40, [], {}, [[]], {"a": {"b": []}}, "a.b", "nan", "1e-3", *HUGE]
PATHS = [
    "../secret.png", "../secret.safetensors", "../../etc/passwd", "/etc/passwd", "/proc/self/mem", "/dev/zero",
    "..", ".", "a/../../secret.png", "..\\secret.png", "file:///etc/passwd", "\0", "a" * 300, "~/x.png",
]  # fmt: skip


class Runs:
    """Calls a shell when it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch pickle-ran",)


PICKLE = pickle.dumps(Runs())


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, cut, doubled, moved, or filled with what programs stumble over."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        size = max(len(changed), 1)
        a, b = rng.randrange(size), rng.randrange(size)
        what = rng.randrange(7)
        if what == 0:
            changed[a : a + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            del changed[a:]
        elif what == 2:
            changed[a:a] = changed[min(a, b) : min(max(a, b), min(a, b) + 4096)]
        elif what == 3:
            del changed[min(a, b) : max(a, b)]
        elif what == 4:
            width = rng.choice((1, 2, 4, 8))
            changed[a : a + width] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width
        elif what == 5:
            changed[a:a] = rng.randbytes(rng.randrange(1, 40))
        else:
            changed[a : a + 1] = bytes([changed[a] ^ (1 << rng.randrange(8))]) if a < len(changed) else b""
    if rng.random() < 0.02:
        return rng.choice((b"", b"\0" * 64, PICKLE, b"PK\x03\x04" + bytes(60), rng.randbytes(200)))
    return bytes(changed)


IMAGE_VALUES = {
    "1": (0, 1), "L": (0, 1, 2, 254, 255), "LA": (0, 1, 255), "RGB": (0, 1, 255), "RGBA": (0, 1, 128, 255),
    "CMYK": (0, 255), "I;16": (0, 1, 255, 256, 65535), "I": (-(2**31), -1, 0, 1, 255, 256, 65535, 65536, 2**31 - 1),
    "F": (-1.0, 0.0, 1e-30, 1.0, 1.001, 255.0, 1e30, float("nan"), float("inf")),
}  # fmt: skip
"""Extreme values of Pillow's modes."""


def of_image(rng: random.Random, data: bytes) -> bytes:
    """An image of another mode, of extreme values, turned, with a transparent value or a profile; now and then
    damaged besides."""
    mode = rng.choice(list(IMAGE_VALUES))
    size = rng.choice(((1, 1), (1, 9), (7, 3), (16, 16)))
    values = rng.choices(IMAGE_VALUES[mode], k=rng.choice((1, 2, 4)))
    image = Image.new(mode, size)
    for x in range(size[0]):
        for y in range(size[1]):
            pixel = rng.choices(values, k=len(image.getbands()))
            image.putpixel((x, y), pixel[0] if len(pixel) == 1 else tuple(pixel))
    form = rng.choice(("TIFF", "PNG", "WEBP") if mode in ("L", "LA", "RGB", "RGBA") else ("TIFF", "PNG"))
    if form == "PNG" and mode in ("F", "CMYK"):
        form = "TIFF"
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))
        options["exif"] = exif
    if rng.random() < 0.3:
        options["icc_profile"] = rng.choice((b"", b"x", rng.randbytes(200)))
    if form == "PNG" and mode in ("1", "L", "I;16") and rng.random() < 0.5:
        options["transparency"] = rng.choice((0, 1, 255))
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return of_bytes(rng, stream.getvalue()) if rng.random() < 0.2 else stream.getvalue()


def of_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """One place of nested plain values changed: another type, a name gone, one too much, or values swapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        what = rng.randrange(8)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return {**value, rng.choice((key + "x", "unknown", "", "../" + key)): value[key]}
        if what == 2:
            return {
                (rng.choice((key.upper(), key[:-1], "__class__", "self")) if k == key else k): v
                for k, v in value.items()
            }
        if what == 3:
            other = rng.choice(list(value))
            return {**value, key: value[other], other: value[key]}
        return {**value, key: of_value(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        what = rng.randrange(4)
        if what == 0:
            return value[:place] + value[place + 1 :]
        if what == 1:
            return value[: place + 1] + value[place:]
        return value[:place] + [of_value(rng, value[place], depth + 1)] + value[place + 1 :]
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice(PATHS + [value + "x", value[:-1], value.upper(), value * 50])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((*HUGE, value + 1, value * 1000, -value, str(value)))
    return rng.choice(ODD)


def of_json(rng: random.Random, text: str) -> bytes:
    """JSON that says something else, or is none any more."""
    what = rng.random()
    if what < 0.2:
        return of_bytes(rng, text.encode())
    if what < 0.23:
        return rng.choice(
            (
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"NaN",
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"),
                b"1" * 6000,
            )
        )
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = of_value(rng, value)
    return json.dumps(value).encode()


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header changed with its length kept right, a length that lies, or plain damage."""
    what = rng.random()
    if what < 0.25:
        return of_bytes(rng, data)
    if what < 0.35:
        lies = rng.choice((0, 1, 2**63 - 1, 2**40, len(data), len(data) * 2, 100_000_001, 2**32))
        return struct.pack("<Q", lies) + data[8:]
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice((1, 1, 2, 4))):
        header = _of_header(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.02:
        text = b"[" * 50_000
    return struct.pack("<Q", len(text)) + text + body


def _of_header(rng: random.Random, header: Any) -> Any:
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    if not names or rng.random() < 0.3:
        told = header.get("__metadata__") if isinstance(header, dict) else None
        texts = [key for key, value in told.items() if isinstance(value, str)] if isinstance(told, dict) else []
        if texts and rng.random() < 0.7:  # JSON within the JSON
            key = rng.choice(texts)
            try:
                inner = of_json(rng, told[key]).decode(errors="replace")
            except (ValueError, RecursionError):
                inner = rng.choice(("{", "[]", "null", "1", "x"))
            return {**header, "__metadata__": {**told, key: inner}}
        return of_value(rng, header)
    name = rng.choice(names)
    entry = dict(header[name]) if isinstance(header[name], dict) else {}
    what = rng.randrange(6)
    if what == 0 and entry.get("shape"):  # another shape of as many values, which fits the file
        total = 1
        for side in entry["shape"]:
            total *= side if isinstance(side, int) else 1
        entry["shape"] = rng.choice(([total], [1, total], [total, 1], [2, total // 2], [], [0], [total, 1, 1, 1]))
    elif what == 1:
        entry["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "x"))
    elif what == 2:
        entry["data_offsets"] = [rng.choice(HUGE[:8]), rng.choice(HUGE[:8])]
    elif what == 3:
        other = rng.choice(names)
        return {**header, name: header[other], other: header[name]}
    elif what == 4:
        return {
            (rng.choice((name + ".x", name[:-1], "a", name.replace("0", "9"))) if k == name else k): v
            for k, v in header.items()
        }
    else:
        entry["shape"] = rng.choice(([2**40], [2**32, 2**32], [-1], [0], [2**62, 4], ["a"]))
    return {**header, name: entry}


def of_lines(rng: random.Random, text: str) -> bytes:
    """JSON lines with one changed, lost, doubled or torn."""
    if rng.random() < 0.15:
        return of_encoding(rng, text)
    lines = [line.encode() for line in text.splitlines()]
    place = rng.randrange(len(lines))
    what = rng.randrange(6)
    if what == 0:
        return of_bytes(rng, text.encode())
    if what == 1:
        lines.insert(place, lines[place])
    elif what == 2:
        lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)]
    else:
        lines[place] = of_json(rng, lines[place].decode())
    return b"\n".join(lines) + b"\n"


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-7")
SEPARATORS = ("\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\r", "\r\n", "\ufeff", "\0", "ü", "🙂")


def of_encoding(rng: random.Random, text: str) -> bytes:
    """The same text as another system writes it, now and then with what splits lines elsewhere, or torn."""
    place = rng.randrange(len(text) + 1)
    if rng.random() < 0.5:
        text = text[:place] + rng.choice(SEPARATORS) + text[place:]
    if rng.random() < 0.3:
        text = text.replace("\n", "\r\n")
    encoding = rng.choice(ENCODINGS)
    what = rng.random()
    if what < 0.1:
        return text.encode("latin-1", errors="replace") + b"\xfc\n"
    if what < 0.2:  # two programs wrote to one file
        return text[:place].encode(encoding) + text[place:].encode()
    data = text.encode(encoding)
    return data[: rng.randrange(len(data) + 1)] if what < 0.4 else data


BOMB = "[&a [x, x, x, x, x, x, x, x, x], " + ", ".join(
    f"&{name} [{', '.join(['*' + before] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")
)
"""Nine to the ninth: YAML's aliases, which take no memory until somebody prints them."""
SNIPPETS = [
    "!!python/object/apply:os.system ['touch yaml-ran']", "!!python/name:os.system ''", "!!binary x", "!!set {a, b}",
    "&a [*a]", "{? [1]: 2}", "2001-99-99", "0x", "1_0", ".inf", "~", "[" * 3000, "- " * 3000, "*none", "1e-3", "'",
    "!!timestamp x", "!!int x", "!!float x", "<<: 1", "9" * 5000, "0o9", "1:99:99", "? ?", "%YAML 9.9",
]  # fmt: skip


def of_yaml(rng: random.Random, text: str) -> bytes:
    """YAML with a line changed, tags that build objects, aliases that explode, nesting without end."""
    what = rng.random()
    if what < 0.15:
        return of_bytes(rng, text.encode())
    lines = text.splitlines()
    if what < 0.2:
        place = rng.randrange(len(lines))
        head = lines[place].partition(":")[0]
        bomb = rng.choice((f"{BOMB}, *i]", f"{{{BOMB[1:]}}}", f"{{x: {BOMB}, *i]}}"))
        return "\n".join([*lines[:place], f"{head}: {bomb}", *lines[place + 1 :]]).encode()
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(lines))
        change = rng.randrange(5)
        head, colon, tail = lines[place].partition(":")
        if change == 0:
            lines[place] = head + colon + " " + rng.choice(SNIPPETS)
        elif change == 1:
            lines[place] = head + colon + " " + json.dumps(rng.choice(ODD + PATHS), allow_nan=True)
        elif change == 2:
            del lines[place]
        elif change == 3:
            lines[place] = rng.choice((" ", "  ", "")) + lines[place] + rng.choice(("", "x", ":", " #"))
        else:
            lines[place] = head + rng.choice(("x", "", "_")) + colon + tail
        if not lines:
            return b""
    return "\n".join(lines).encode()


Mutation = Callable[[random.Random, bytes], bytes]


def by_name(name: str) -> Mutation:
    """The mutation that belongs to a file's ending."""
    if name.endswith(".safetensors"):
        return of_safetensors
    texts = {".json": of_json, ".jsonl": of_lines, ".yaml": of_yaml}
    for ending, mutate in texts.items():
        if name.endswith(ending):
            return lambda rng, data, mutate=mutate: rng.choice((*(mutate,) * 9, of_encoding))(rng, data.decode())
    return of_bytes
