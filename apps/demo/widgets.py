"""Components that several tabs share, with their limits on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

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
    unpacked = box.preprocess

    def preprocess(payload: Any) -> Drawing | None:
        if payload is None:
            return None
        for file in filter(None, [payload.background, payload.composite, *payload.layers]):
            limits.picture(file.path, "the drawing")
        return _drawing(unpacked(payload))

    box.preprocess = limits.refusing(preprocess)  # type: ignore[method-assign]
    return box


def _drawing(read: Any) -> Drawing | None:
    if read is None or read["composite"] is None:
        return None
    composite = _flat(read["composite"])
    drawn = Image.new("L", composite.size)
    for layer in read["layers"] or []:
        drawn.paste(255, mask=layer.convert("RGBA").getchannel("A").resize(composite.size).point(_any))
    if drawn.getbbox() is None and _is_empty(read["background"]):
        return None
    below = None if _is_empty(read["background"]) else _flat(read["background"]).resize(composite.size)
    return Drawing(composite, below, drawn)


def _any(alpha: int) -> int:
    return 255 if alpha else 0


def _is_empty(picture: Image.Image | None) -> bool:
    return picture is None or picture.convert("RGBA").getchannel("A").getbbox() is None


def _flat(picture: Image.Image) -> Image.Image:
    """On black, as maps have nothing where nothing was drawn."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")


class Sampling(NamedTuple):
    """Controls of every sampler."""

    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number


def prompt_box(value: str = "", label: str = "Prompt", lines: int = 2) -> gr.Textbox:
    """A sentence."""
    return gr.Textbox(value, label=label, lines=lines, max_length=LIMITS.prompt)


def sampling(steps: int = 20, guidance: float = 3.0) -> Sampling:
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
