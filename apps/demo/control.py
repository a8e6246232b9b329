"""Tab: an image that follows another one, uploaded or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import gradio as gr
from PIL import Image

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.demo.limits import LIMITS
from imgdit.apps.jobs.conditions import condition_of, drawn_map, lines_on_black
from imgdit.apps.jobs.request import Control, Request
from imgdit.apps.session import Session
from imgdit.images import fit, open_image

NAMES = {
    "canny": "edges (canny)",
    "depth": "depth: near is white",
    "segmentation": "segmentation: a colour per object",
    "mask": "mask: what you paint over is generated",
    "subject": "subject: the same object elsewhere",
    "blur": "blurred copy: sharpen it",
    "grey": "grey copy: colour it",
}
"""What people read; other kinds by their own names."""
INVERTED = "Inverted: the model reads white on black."


def build(holder: Holder) -> tuple[widgets.Canvas, widgets.Onward]:
    """Lay the tab out; its canvas, and where its result can go."""
    session = holder.session
    texts, of_scenes = examples.texts(session), examples.of_scenes(session)
    kinds = [kind for kind in NAMES if kind in session.shelf.controls]
    kinds += [kind for kind in session.shelf.controls if kind not in kinds]
    choices = [(NAMES.get(kind, kind.replace("_", " ")), kind) for kind in kinds]
    first = kinds[0] if kinds else None
    side = session.default_size or 512
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="pair"):
                canvas = widgets.canvas("Upload an image or draw one", side, height=360)
                slider = widgets.compare_slider("Before and after", "says-control")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(texts.control)
                make, stop = widgets.buttons("Control")
            onward = widgets.onward_buttons("control")
        with gr.Column(elem_classes="drawers"):
            with gr.Group():
                kind = gr.Dropdown(choices, value=first, label="The image is followed by its", interactive=bool(kinds))
                find = gr.Checkbox(True, label="It is a photo: find the condition in it")
            legend = gr.Markdown(examples.legend(), visible=of_scenes and first == "segmentation", elem_classes="note")
            sketch = [[{"background": file, "layers": [], "composite": file}] for file in holder.examples]
            if sketch:
                gr.Examples(sketch, [canvas], label="Example images")
            with gr.Accordion("Strength", open=False):
                gr.Markdown(_about_adapters(holder))
                strength = gr.Slider(0, 3, 1, step=0.05, label="Strength", info="1: as trained; 0: nothing")
                start = gr.Slider(0, 1, 0, step=0.05, label="Begins after this fraction of the steps")
                end = gr.Slider(0, 1, 1, step=0.05, label="Ends after this fraction of the steps")
            with gr.Accordion("A second condition", open=False):
                second = widgets.upload("Second image", height=200)
                second_kind = gr.Dropdown(choices, value=first, label="It is followed by its", interactive=bool(kinds))
                second_strength = gr.Slider(0, 3, 1, step=0.05, label="Strength of the second")
            sampled = widgets.sampling()
            condition = widgets.result("Condition, as the model reads it")
            file = gr.File(label="PNG that stores how it was generated", interactive=False, height=80)

    run = make.click(
        limits.refusing(status)(_Handlers(holder, kinds).control),
        [prompt, canvas, kind, find, strength, start, end, second, second_kind, second_strength, *sampled],
        [condition, slider, file, status], api_name="control", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)
    kind.change(lambda name: gr.Markdown(visible=of_scenes and name == "segmentation"), kind, legend, **QUICK)
    return canvas, widgets.Onward(file, file, [run], status, onward)


class _Handlers:
    """What the buttons of the tab do.

    Args:
        holder: of the model.
        kinds: of conditions that it takes.
    """

    def __init__(self, holder: Holder, kinds: list[str]):
        self.holder, self.kinds = holder, kinds

    def control(
        self, prompt: str, drawing: Any, kind: str, find: bool, strength: float, start: float, end: float,
        second: str | None, second_kind: str, second_strength: float,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any, str]]:  # fmt: skip
        """Generate an image that follows another one.

        Args:
            prompt: what to show.
            drawing: the image, and what was drawn on it; for "mask", what was drawn is the hole.
            kind: what the image is: canny, depth, segmentation, mask, subject, …
            find: whether it is a photo in which the condition has to be found.
            strength: of the condition; adapters only.
            start: fraction of the steps after which it acts; adapters only.
            end: fraction of the steps after which it ends; adapters only.
            second: another condition; adapters only.
            second_kind: what it is.
            second_strength: its strength.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            the condition, the given image beside the generated one, its PNG file, and how far it is.
        """
        chosen = limits.choice(kind, "the kind", self.kinds)
        sketch = _read_drawing(drawing, chosen)
        base = widgets.read_sampling(steps, guidance, seed)
        text = limits.text(prompt)
        acts = {
            "strength": float(limits.number(strength, "strength", 0, 10)),
            "start": float(limits.number(start, "start", 0, 1)),
            "end": float(limits.number(end, "end", 0, 1)),
        }
        other = limits.image(second, "the second image")
        other_kind = None if other is None else limits.choice(second_kind, "the second kind", self.kinds)
        looking = find or chosen == "mask"
        if looking:
            yield gr.skip(), gr.skip(), gr.skip(), "Looking for the condition."
        with self.holder.busy(person) if looking else nullcontext():
            photo, found, inverted = _condition(self.holder.session, chosen, sketch, find, text)
        yield self.holder.keep(found), gr.skip(), gr.skip(), "Waiting for the first step."
        controls = [Control(chosen, found, **acts)]
        if other is not None and other_kind is not None:
            other, also = lines_on_black(other_kind, other)
            inverted = inverted or also
            weight = float(limits.number(second_strength, "the second strength", 0, 10))
            controls.append(Control(other_kind, other, weight))
        request = Request(text, controls=tuple(controls), **base)
        before = None
        for shown in self.holder.make([request], person, [INVERTED] if inverted else []):
            latest = shown.files[0] if shown.files else shown.preview
            if latest is not None and before is None:  # a preview has the size of what it becomes
                before = self.holder.keep(fit(photo, open_image(latest).size))
            both = gr.skip() if latest is None else (before, latest)
            yield gr.skip(), both, shown.files[0] if shown.files else gr.skip(), shown.status


def _read_drawing(drawing: Any, kind: str) -> widgets.Drawing:
    """What stands on the canvas."""
    sketch = widgets.read_drawing(drawing)
    if sketch is None or sketch.is_blank:
        raise limits.Refused("draw or upload an image first")
    if kind == "mask" and sketch.below is None:
        raise limits.Refused("upload an image first, and paint over what is to be filled")
    return sketch


def _condition(
    session: Session, kind: str, sketch: widgets.Drawing, find: bool, caption: str
) -> tuple[Image.Image, Image.Image, bool]:
    """The image that is followed, the condition in it or that it is, and whether that is the image inverted."""
    if kind == "mask" and sketch.below is not None:
        hole = sketch.drawn if sketch.drawn.getbbox() else None
        return sketch.below, condition_of(session, kind, sketch.below, hole), False
    if find:
        description = caption if kind == "segmentation" else ""
        return sketch.image, condition_of(session, kind, sketch.image, caption=description), False
    if sketch.below is None:
        return sketch.image, *drawn_map(kind, sketch.image, sketch.strokes)
    return sketch.image, *lines_on_black(kind, sketch.image)


def _about_adapters(holder: Holder) -> str:
    names = ", ".join(holder.session.shelf.adapters)
    if names:
        return f"Condition adapters: {names}. Strength and range act on these kinds."
    return (
        f"There are no condition adapters beside this model: a condition is read as a conditioning frame, "
        f"alone and at full strength. Images of up to {LIMITS.upload_mib} MiB are taken."
    )
