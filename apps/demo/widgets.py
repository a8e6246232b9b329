"""Components that several tabs share."""

from __future__ import annotations

import random
import re
from abc import ABCMeta
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from imgdit.apps.demo import limits
from imgdit.apps.demo.holder import QUICK, Shown
from imgdit.apps.demo.limits import LIMITS
from imgdit.defaults import GUIDANCE, STEPS

PAPER = "white"
"""Colour of an empty canvas in the browser."""
COLOURS = ("#000000", "#808080", "#ffffff", "#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff")
"""Of the brush, the first by default: it must be seen on paper. The last six are kinds in a segmentation."""


class _WithoutStub(type(gr.Image)):  # type: ignore[misc]
    """Of subclasses of components: gradio's own metaclass would write a stub file beside this module for each."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attributes)


# Both components hand on what was sent as it is: handlers open it, so that a refusal is theirs to tell, and a header
# is looked at before anything is unpacked. They are classes because gradio makes a component anew for each visitor
# whose page changes it.


class Upload(gr.Image, metaclass=_WithoutStub):
    """A place for an image; handlers get its file, for `limits.image`."""

    def get_block_name(self) -> str:
        return "image"

    def preprocess(self, payload: Any) -> Any:
        return getattr(payload, "path", None)


class Canvas(gr.ImageEditor, metaclass=_WithoutStub):
    """An image that is uploaded, drawn, or drawn on; handlers get its parts, for `read_drawing`."""

    def get_block_name(self) -> str:
        return "imageeditor"

    def preprocess(self, payload: Any) -> Any:
        # A browser sends the parts beside the request, a program within it.
        return payload if payload is None or payload.id is None else self.blob_storage.get(payload.id)


class Drawing(NamedTuple):
    """What came from a canvas."""

    image: Image.Image
    """As it is seen, with what was drawn on it."""
    below: Image.Image | None
    """What was drawn on; `None`: empty paper."""
    strokes: Image.Image
    """What was drawn, RGBA on nothing."""

    @property
    def drawn(self) -> Image.Image:
        """White where something was drawn, however thinly."""
        return self.strokes.getchannel("A").point(_any)

    @property
    def is_blank(self) -> bool:
        """Whether nothing is to be seen: paper, or white on it."""
        return _is_paper(self.image) and (self.below is None or _is_paper(self.below))


def upload(label: str, height: int | None, classes: Sequence[str] = (), visible: Any = True) -> Upload:
    """A place for an image.

    Args:
        label: above it.
        height: in pixels of the page; `None`: the classes tell.
        classes: of the page's style.
        visible: as of any component.
    """
    return Upload(
        label=label, height=height, type="filepath", sources=["upload", "clipboard"], elem_classes=list(classes),
        visible=visible,
    )  # fmt: skip


def canvas(label: str, side: int, height: int) -> Canvas:
    """A place to draw, and to draw on an image.

    Args:
        label: above it.
        side: pixels of the canvas where nothing is uploaded.
        height: in pixels of the page.
    """
    side = max(side, 256)
    return Canvas(
        label=label,
        height=height,
        type="pil",
        sources=["upload", "clipboard"],
        brush=gr.Brush(default_size=side // 48, colors=list(COLOURS), default_color=COLOURS[0]),
        layers=False,
        canvas_size=(side, side),
        elem_classes="canvas",
    )


def read_drawing(sent: Any) -> Drawing | None:
    """What a `Canvas` handed on; `None` where nothing was uploaded or drawn.

    A browser sends the paper as a white background, a program none; what is transparent shows the paper.
    """
    if sent is None:
        return None
    background, composite, *layers = (
        limits.image(getattr(part, "path", part), "the drawing", "RGBA")
        for part in (sent.background, sent.composite, *(sent.layers or ()))
    )
    strokes = [layer for layer in layers if layer is not None and not _is_empty(layer)]
    if background is not None and not _is_empty(background) and not _is_paper(background):
        return _drawn_on(background, strokes)
    if not strokes:  # a program may send the whole alone
        return None if composite is None or _is_empty(composite) else _drawn_on(composite, [])
    drawing = _drawn_on(Image.new("RGBA", strokes[0].size, PAPER), strokes)
    if _is_paper(drawing.image) and (background is None or _is_empty(background)):  # white on nothing: a map
        drawing = _drawn_on(Image.new("RGBA", strokes[0].size, "black"), strokes)
    return drawing._replace(below=None)


def _drawn_on(below: Image.Image, strokes: Sequence[Image.Image]) -> Drawing:
    """All in RGBA."""
    below = Image.alpha_composite(Image.new("RGBA", below.size, PAPER), below)
    drawn = Image.new("RGBA", below.size, (0, 0, 0, 0))
    for stroke in strokes:
        drawn = Image.alpha_composite(drawn, stroke.resize(below.size))
    return Drawing(Image.alpha_composite(below, drawn).convert("RGB"), below.convert("RGB"), drawn)


def _any(alpha: int) -> int:
    return 255 if alpha else 0


def _is_empty(image: Image.Image) -> bool:
    return image.getchannel("A").getbbox() is None


def _is_paper(image: Image.Image) -> bool:
    """Whether every channel of every pixel is full."""
    return all(extrema == (255, 255) for extrema in image.getextrema())


class Sampling(NamedTuple):
    """Controls of every sampler."""

    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number


class Onward(NamedTuple):
    """A result of a tab, and the buttons that take it to other tabs; hidden until there is somewhere to take it."""

    image: Any
    """Component that shows the result."""
    made: Any
    """Component with the files of a run, for the history."""
    runs: Sequence[Any]
    """Events that generate."""
    status: gr.Textbox
    buttons: dict[str, gr.Button]
    """By the name of where they go."""


ONWARD = {
    "start": "Use as starting image",
    "control": "Use as condition",
    "any": "Use as clean frame",
    "views": "Turn the camera",
    "ask": "Caption or ask about it",
}
"""Where a result may go, and what the buttons say: ids of tabs, and "start", which is the tab Create."""


def onward_buttons(here: str) -> dict[str, gr.Button]:
    """A row of buttons under a result.

    Args:
        here: id of this tab.
    """
    with gr.Row(elem_classes="uses"):
        return {name: gr.Button(label, size="sm", visible=False) for name, label in ONWARD.items() if name != here}


def files_of(value: Any) -> list[str]:
    """Files of what a component shows."""
    if not value:
        return []
    return [value] if isinstance(value, str) else [item if isinstance(item, str) else item[0] for item in value]


def main_result(label: str, says: str) -> gr.Image:
    """The image of a tab, as large as the window allows.

    Args:
        label: above it.
        says: class of what it says while it is empty, see page.css.
    """
    return gr.Image(
        label=label, min_width=120, interactive=False, format="png", type="filepath",
        buttons=["download", "fullscreen"], elem_classes=["result", "main-result", says],
    )  # fmt: skip


def compare_slider(label: str, says: str) -> gr.ImageSlider:
    """Two images over each other, as large as the window allows, with a line to drag; see `main_result`."""
    return gr.ImageSlider(
        label=label, interactive=False, format="png", type="filepath", max_height=2000,
        elem_classes=["result", "main-result", "compare", says],
    )  # fmt: skip


def compare_when_changed(slider: gr.ImageSlider, first: gr.Image, second: gr.Image) -> None:
    """Show two images in a slider whenever one of them changes; the first alone while there is no second."""

    def together(one: str | None, other: str | None) -> tuple[str, str] | None:
        return None if one is None else (one, other or one)

    gr.on([first.change, second.change], together, [first, second], slider, trigger_mode="always_last", **QUICK)


def two_of(shown: Shown) -> tuple[Any, Any]:
    """What a pair of images shows while it is generated: those that are finished, and how far the next one is."""
    following = [] if shown.over else [shown.preview]
    first, second = [*shown.files, *following, None, None][:2]
    return first, second


def result(label: str, square: bool = True) -> gr.Image:
    """A smaller image that was generated, shown whole; it can be downloaded and enlarged, and is sent nowhere.

    Args:
        square: as high as it is wide, also while it is empty.
    """
    return gr.Image(
        label=label, min_width=80, interactive=False, format="png", type="filepath",
        buttons=["download", "fullscreen"], elem_classes=["result", "square", "small"] if square else ["result"],
    )  # fmt: skip


def results(label: str, columns: int, *classes: str) -> gr.Gallery:
    """Several images that were generated, shown whole.

    Args:
        label: above them.
        columns: at most.
        classes: of the page's style, besides.
    """
    return gr.Gallery(
        label=label, columns=columns, format="png", interactive=False, object_fit="contain", type="filepath",
        buttons=["download", "fullscreen"], elem_classes=["results", *classes],
    )  # fmt: skip


def prompt_box(value: str = "", label: str = "Prompt", lines: int = 2) -> gr.Textbox:
    """A message."""
    return gr.Textbox(value, label=label, lines=lines, max_length=LIMITS.prompt)


def chips(names: Sequence[str], label: str, box: gr.Textbox, *, adding: bool = False) -> gr.Dataset:
    """Words to click; each is the text of a box, or is added to it.

    Args:
        names: the words.
        label: above them.
        box: where they go.
        adding: to what the box has, see `with_word`.
    """
    found = gr.Dataset(
        components=[box], samples=[[name] for name in names], label=label, samples_per_page=100, elem_classes="chips"
    )
    if adding:
        found.click(lambda word, text: with_word(text, word[0], names), [found, box], box, **QUICK)
    else:
        found.click(lambda word: word[0], found, box, **QUICK)
    return found


def with_word(text: str, word: str, kind: Sequence[str]) -> str:
    """A prompt with a word: in place of the only one of its kind that the prompt has, else at its end.

    Args:
        text: the prompt.
        word: is one of `kind`.
        kind: words of which a prompt usually has one.
    """
    pattern = r"\b(" + "|".join(sorted(map(re.escape, kind), key=len, reverse=True)) + r")\b"
    if len(re.findall(pattern, text or "")) == 1:
        return re.sub(pattern, word, text)
    return f"{text.rstrip(' ,')}, {word}" if (text or "").strip() else word


PRESETS = (("Draft", 10), ("Standard", STEPS), ("Fine", LIMITS.steps))
"""Numbers of steps that have a name."""


def sampling() -> Sampling:
    """Steps, guidance and seed, folded away."""
    with gr.Accordion("Sampling", open=False):
        preset = gr.Radio(PRESETS, value=STEPS, label="Preset")
        steps = gr.Slider(1, LIMITS.steps, STEPS, step=1, label="Steps")
        guidance = gr.Slider(0, LIMITS.guidance, GUIDANCE, step=0.1, label="Guidance")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        dice = gr.Button("Draw another seed", size="sm")
    preset.input(lambda number: number, preset, steps, **QUICK)
    dice.click(another_seed, None, seed, **QUICK)
    return Sampling(steps, guidance, seed)


def another_seed() -> int:
    """At random."""
    return random.randrange(2**31)


def read_sampling(steps: Any, guidance: Any, seed: Any) -> dict[str, Any]:
    """Their values, checked, as a request has them."""
    return {
        "steps": limits.whole(steps, "steps", 1, LIMITS.steps),
        "guidance": float(limits.number(guidance, "guidance", 0, LIMITS.guidance)),
        "seed": limits.whole(seed, "the seed", 0, 2**31 - 1),
    }


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """What starts and what stops, in a column; page.js presses them for Ctrl+Enter and Esc."""
    with gr.Column():
        return (
            gr.Button(name, variant="primary", min_width=80, elem_classes="make"),
            gr.Button("Stop", variant="secondary", min_width=80, elem_classes="halt", size="sm"),
        )


def status() -> gr.Textbox:
    """Says how far it is."""
    return gr.Textbox(label="Status", interactive=False, lines=1, max_lines=4, elem_classes="status")
