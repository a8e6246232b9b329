"""What the demo lets a stranger ask for, and how a refusal reaches them: one message, the traceback in the log."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from imgdit.images import open_image, to_rgb, to_rgba

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of the queue."""

    upload_mib: int = 10
    pixels: int = 4096 * 4096
    """Of an uploaded image, asked of its header before anything is unpacked."""
    prompt: int = 500
    """Letters."""
    steps: int = 50
    side: int = 256
    """Pixels of a generated image."""
    batch: int = 4
    guidance: float = 15.0
    queue: int = 64
    """Requests that wait, of all people; more are refused at once."""
    kept_seconds: int = 3600
    """After which files of uploads and results are deleted."""


LIMITS = Limits()


class Refused(ValueError):
    """A request that is outside of the limits."""


def text(value: Any, what: str = "the prompt", longest: int = LIMITS.prompt) -> str:
    """A message."""
    value = "" if value is None else value
    if not isinstance(value, str):
        raise Refused(f"{what} must be a text, got {type(value).__name__}")
    if len(value) > longest:
        raise Refused(f"{what} may have {longest} letters, got {len(value)}; shorten it")
    return value.strip()


def number(value: Any, what: str, low: float, high: float) -> float:
    """A finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise Refused(f"{what} must be a number, got {str(value)[:40]!r}")
    if not low <= value <= high:
        raise Refused(f"{what} must be from {low:g} to {high:g}, got {value!r:.40}")
    return value


def whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number within bounds."""
    checked = number(value, what, low, high)
    if checked != int(checked):
        raise Refused(f"{what} must be a whole number, got {checked:g}")
    return int(checked)


def choice(value: Any, what: str, choices: Any) -> str:
    """One of some names."""
    if value not in list(choices):
        raise Refused(f"{what} must be one of {', '.join(choices) or 'none here'}; got {str(value)[:40]!r}")
    return value


def image(source: str | bytes | None, what: str = "the image", mode: str = "RGB") -> Image.Image | None:
    """An uploaded file, or what was in it, as an image; its size is looked at first. `None` if there is none."""
    if not source:
        return None

    try:
        image = open_image(source, what, LIMITS.pixels)
        check_size(*image.size, what)
        return to_rgb(image, name=what) if mode == "RGB" else to_rgba(image, what).convert(mode)
    except ValueError as error:
        raise Refused(str(error)) from error


def check_size(width: int, height: int, what: str = "the image") -> None:
    """Refuse an image that would take too much memory, or has nothing in it."""
    if min(width, height) < 8:
        raise Refused(f"{what} must have at least 8 pixels per side, got {width}x{height}")
    if width * height > LIMITS.pixels:
        millions = LIMITS.pixels / 1e6
        raise Refused(f"{what} may have {millions:.0f} million pixels, got {width}x{height}; make it smaller")


def as_sentence(text: str) -> str:
    """A message as it stands on the page."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")


def refusing(status: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a handler: what it refuses reaches the person once, as a notice and in the status, without a veil
    over what they work on; programs get it as an error. The log has the traceback of what went wrong here.

    Args:
        status: the output that says it, of a handler that yields.
    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
                try:
                    yield from function(*args, **kwargs)
                except Exception as error:
                    message, failure = _as_refusal(error)
                    if status is not None:
                        yield {status: message}
                    raise failure from error

            return stream

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise _as_refusal(error)[1] from error

        return call

    return decorated


def _as_refusal(error: Exception) -> tuple[str, gr.Error]:
    """What a person is told, and what a program gets; the notice is on its way."""
    if isinstance(error, (ValueError, ImportError)):
        logger.info("refused: %s", error)
        text = " ".join(str(error).split())[:400]
        gr.Warning(as_sentence(text))
        return as_sentence(text), gr.Error(text, visible=False, print_exception=False)
    logger.exception("a request failed")
    text = "Something went wrong here; the log of the server tells what."
    return text, gr.Error(text, print_exception=False)
