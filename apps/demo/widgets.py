"""Components that several tabs share, with their limits on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from imgdit.defaults import GUIDANCE, STEPS
from imgdit.images import to_rgb

from . import limits
from .limits import LIMITS


class Drawing(NamedTuple):
    """What came from a canvas."""

    picture: Image.Image
    """With what was drawn on it."""
    below: Image.Image | None
    """What was drawn on, if anything was uploaded."""
    drawn: Image.Image
    """White where something was drawn."""


def upload(label: str, height: int) -> gr.Image:
    """A place for a picture, whose header is looked at before it is unpacked; handlers get it in RGB."""
    box = gr.Image(label=label, height=height, type="pil", sources=["upload", "clipboard"])

    def preprocess(payload: Any) -> Image.Image | None:
        return limits.picture(getattr(payload, "path", None), label.lower())

    # Not a subclass: gradio would write a stub file into this folder for it.
    box.preprocess = limits.refusing(preprocess)  # type: ignore[method-assign]
    return box


def canvas(label: str, side: int, height: int) -> gr.ImageEditor:
    """A picture that is uploaded, drawn, or drawn on; handlers get a `Drawing`, or `None` of an empty one.

    Args:
        label: above it.
        side: pixels of the canvas where nothing is uploaded.
        height: in pixels of the page.
    """
    side = max(side, 256)
    box = gr.ImageEditor(
        label=label,
        height=height,
        type="pil",
        sources=["upload", "clipboard"],
        brush=gr.Brush(default_size=side // 16, colors=["#ffffff", "#000000", "#808080"]),
        layers=False,
        canvas_size=(side, side),
    )

    def preprocess(payload: Any) -> Drawing | None:
        # A browser sends the parts beside the request, a program within it. gradio's own reading would unpack them
        # before their size is looked at, and put what is drawn on nothing on white.
        sent = payload if payload is None or payload.id is None else box.blob_storage.get(payload.id)
        return None if sent is None else _drawing(sent)

    box.preprocess = limits.refusing(preprocess)  # type: ignore[method-assign]
    return box


def _drawing(sent: Any) -> Drawing | None:
    background, composite, *layers = (
        limits.picture(getattr(part, "path", part), "the drawing", "RGBA")
        for part in (sent.background, sent.composite, *(sent.layers or ()))
    )
    below = None if _is_empty(background) else background
    strokes = [layer for layer in layers if layer is not None and not _is_empty(layer)]
    if below is None and not strokes:
        return None if composite is None or _is_empty(composite) else _drawn_on(composite, [])._replace(below=None)
    # An upload is read as everywhere: what is transparent is white. A drawing on nothing is a map: there it is black.
    first = Image.new("RGBA", strokes[0].size, "black") if below is None else to_rgb(below).convert("RGBA")
    drawing = _drawn_on(first, strokes)
    return drawing if below is not None else drawing._replace(below=None)


def _drawn_on(below: Image.Image, strokes: Sequence[Image.Image]) -> Drawing:
    """All in RGBA; what is transparent becomes black."""
    below = Image.alpha_composite(Image.new("RGBA", below.size, "black"), below)
    picture, drawn = below, Image.new("L", below.size)
    for stroke in strokes:
        stroke = stroke.resize(below.size)
        picture = Image.alpha_composite(picture, stroke)
        drawn.paste(255, mask=stroke.getchannel("A").point(_any))
    return Drawing(picture.convert("RGB"), below.convert("RGB"), drawn)


def _any(alpha: int) -> int:
    return 255 if alpha else 0


def _is_empty(picture: Image.Image | None) -> bool:
    return picture is None or picture.getchannel("A").getbbox() is None


class Sampling(NamedTuple):
    """Controls of every sampler."""

    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number


def result(label: str, height: int | None = None) -> gr.Image:
    """A picture that was made; it can be downloaded and enlarged, and is sent nowhere."""
    return gr.Image(
        label=label, height=height, min_width=120, interactive=False, format="png", buttons=["download", "fullscreen"]
    )


def prompt_box(value: str = "", label: str = "Prompt", lines: int = 2) -> gr.Textbox:
    """A sentence."""
    return gr.Textbox(value, label=label, lines=lines, max_length=LIMITS.prompt)


def sampling(steps: int = STEPS, guidance: float = GUIDANCE) -> Sampling:
    """Steps, guidance and seed, folded away."""
    with gr.Accordion("Sampling", open=False):
        return Sampling(
            gr.Slider(1, LIMITS.steps, steps, step=1, label="Steps"),
            gr.Slider(0, LIMITS.guidance, guidance, step=0.1, label="Guidance"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        )


def read_sampling(steps: Any, guidance: Any, seed: Any) -> dict[str, Any]:
    """Their values, checked, as a request has them."""
    return {
        "steps": limits.whole(steps, "steps", 1, LIMITS.steps),
        "guidance": float(limits.number(guidance, "guidance", 0, LIMITS.guidance)),
        "seed": limits.whole(seed, "the seed", 0, 2**31 - 1),
    }


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """What starts and what stops."""
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120), gr.Button("Stop", variant="stop", min_width=80)


def status() -> gr.Textbox:
    """Says how far it is."""
    return gr.Textbox(label="Status", interactive=False, lines=1)
