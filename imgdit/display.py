"""How notebooks show things: tables in HTML, whose text is escaped, and images as PNG."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

SIDE = 256
"""Pixels of an image's longer side, at most."""
LETTERS = 200
"""Of a value, at most."""
_STYLE = "text-align: left; white-space: pre-wrap"


class Shown:
    """A dataclass that notebooks show as a table of the fields that differ from their defaults, with its images."""

    def _repr_html_(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields}
        return table(type(self).__name__, {f.name: values[f.name] for f in fields if not _is_default(f, values)})

    def _repr_png_(self) -> bytes | None:
        """Its first image; `None`: it has none."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return next((png(value) for field in fields if _is_image(value := getattr(self, field.name))), None)


def table(title: str, values: Mapping[str, Any]) -> str:
    """An HTML table of names and values. Text is escaped; PIL images are shown, of tensors and arrays their shape."""
    rows = [(name, _cell(value)) for name, value in values.items()]
    cells = "".join(f'<tr><th style="{_STYLE}">{_text(n)}</th><td style="{_STYLE}">{v}</td></tr>' for n, v in rows)
    return f"<table><caption>{_text(title)}</caption>{cells}</table>"


def lines(text: str) -> str:
    """Text of several lines in HTML."""
    return f"<pre>{html.escape(text)}</pre>"


def png(image: Any) -> bytes:
    """A PIL image as a PNG of at most `SIDE` pixels a side, without what its file says."""
    small = image.convert("RGB")
    small.info.clear()
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return stream.getvalue()


def _cell(value: Any) -> str:
    if _is_image(value):
        return f'<img src="data:image/png;base64,{base64.b64encode(png(value)).decode()}">'
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _text(f"{type(value).__name__} {tuple(value.shape)} {value.dtype}")
    if isinstance(value, (list, tuple)) and any(map(_is_image, value)):
        return "".join(map(_cell, value))
    if isinstance(value, Mapping):
        return _text(_joined(f"{name}: {one}" for name, one in value.items()))
    return _text(_joined(map(str, value)) if isinstance(value, (list, tuple)) else value)


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _text(value: Any) -> str:
    text = str(value)
    return html.escape(text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…")


def _is_image(value: Any) -> bool:
    return hasattr(value, "thumbnail") and hasattr(value, "convert")


def _is_default(field: dataclasses.Field, values: Mapping[str, Any]) -> bool:
    """Whether a field has its default; arrays and tensors have none."""
    return values[field.name] is field.default or (
        isinstance(values[field.name], (str, int, float, tuple)) and values[field.name] == field.default
    )
