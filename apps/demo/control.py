"""Tab: a picture that follows another one, uploaded or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from imgdit.images import fit, open_image

from ..prepare import condition_of
from ..request import Control, Request
from . import limits, widgets
from .holder import DEVICE, Holder
from .limits import LIMITS

NAMES = {
    "canny": "canny: edges",
    "depth": "depth: near is white",
    "segmentation": "segmentation: a colour per kind",
    "mask": "mask: paint over what is to be filled",
    "subject": "subject: the same thing elsewhere",
}
"""What people read; other kinds by their own names."""


def build(holder: Holder) -> gr.ImageEditor:
    """Lay the tab out; its canvas."""
    studio = holder.studio
    kinds = [kind for kind in NAMES if kind in studio.controls]
    kinds += [kind for kind in studio.controls if kind not in kinds]
    choices = [(NAMES.get(kind, kind.replace("_", " ")), kind) for kind in kinds]
    first = kinds[0] if kinds else None
    side = studio.default_size or 512
    with gr.Row():
        with gr.Column(min_width=280):
            canvas = widgets.canvas("Upload a picture or draw one", side, height=360)
            examples = [[{"background": file, "layers": [], "composite": file}] for file in holder.examples]
            gr.Examples(examples, [canvas], label="Examples")
            kind = gr.Dropdown(choices, value=first, label="It is a", interactive=bool(kinds))
            find = gr.Checkbox(True, label="It is a photo: find the condition in it")
            prompt = widgets.prompt_box("a photo of a green cone on a wooden floor")
            with gr.Accordion("Strength", open=False):
                gr.Markdown(_about_adapters(holder))
                strength = gr.Slider(0, 3, 1, step=0.05, label="Strength", info="1: as trained; 0: nothing")
                start = gr.Slider(0, 1, 0, step=0.05, label="Begins after this share of the steps")
                end = gr.Slider(0, 1, 1, step=0.05, label="Ends after this share of the steps")
            with gr.Accordion("A second condition", open=False):
                second = widgets.upload("Second picture", height=200)
                second_kind = gr.Dropdown(choices, value=first, label="It is a", interactive=bool(kinds))
                second_strength = gr.Slider(0, 3, 1, step=0.05, label="Strength of the second")
            sampled = widgets.sampling()
            make, stop = widgets.buttons("Control")
        with gr.Column(min_width=280):
            condition = widgets.result("Condition, as the model reads it", height=220)
            slider = gr.ImageSlider(label="Before and after", interactive=False, max_height=520, format="png")
            status = widgets.status()
            file = gr.File(label="PNG that tells how it was made", interactive=False, height=90)

    @limits.refusing
    def control(
        prompt: str, drawing: widgets.Drawing | None, kind: str, find: bool, strength: float, start: float, end: float,
        second: Image.Image | None, second_kind: str, second_strength: float,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any, str]]:  # fmt: skip
        """Make a picture that follows another one.

        Args:
            prompt: what to show.
            drawing: the picture, and what was drawn on it; for "mask", what was drawn is the hole.
            kind: what the picture is: canny, depth, segmentation, mask, subject, …
            find: whether it is a photo in which the condition has to be found.
            strength: of the condition; adapters only.
            start: share of the steps after which it acts; adapters only.
            end: share of the steps after which it ends; adapters only.
            second: another condition; adapters only.
            second_kind: what it is.
            second_strength: its strength.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            the condition, the given picture beside the made one, its PNG file, and how far it is.
        """
        if drawing is None:
            raise limits.Refused("there is no picture to follow; upload one or draw one")
        chosen = limits.choice(kind, "the kind", kinds)
        base = widgets.read_sampling(steps, guidance, seed)
        text = limits.text(prompt)
        acts = {
            "strength": float(limits.number(strength, "strength", 0, 10)),
            "start": float(limits.number(start, "start", 0, 1)),
            "end": float(limits.number(end, "end", 0, 1)),
        }
        photo = drawing.picture
        if chosen == "mask" and drawing.below is not None:
            photo = drawing.below
        yield gr.skip(), gr.skip(), gr.skip(), "Looking for the condition."
        found = photo
        if find or chosen == "mask":
            hole = drawing.drawn if drawing.drawn.getbbox() else None
            with holder.busy(person):
                found = condition_of(studio, chosen, photo, hole)
        yield holder.keep(found), gr.skip(), gr.skip(), "Waiting for the first step."
        controls = [Control(chosen, found, **acts)]
        if second is not None:
            other = limits.choice(second_kind, "the second kind", kinds)
            weight = float(limits.number(second_strength, "the second strength", 0, 10))
            controls.append(Control(other, second, weight))
        for shown in holder.make([Request(text, controls=tuple(controls), **base)], person):
            if not shown.files:
                yield gr.skip(), gr.skip(), gr.skip(), shown.status
                continue
            made = open_image(shown.files[0])
            before = fit(photo, made.size)
            yield gr.skip(), (holder.keep(before), shown.files[0]), shown.files[0], shown.status

    make.click(
        control,
        [prompt, canvas, kind, find, strength, start, end, second, second_kind, second_strength, *sampled],
        [condition, slider, file, status], api_name="control", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, queue=False, api_visibility="private")
    return canvas


def _about_adapters(holder: Holder) -> str:
    names = ", ".join(holder.studio.adapters)
    if names:
        return f"Condition adapters: {names}. Strength and range act on these kinds."
    return (
        f"There are no condition adapters beside this model: a condition is read as a given frame, "
        f"alone and at full strength. Pictures of up to {LIMITS.upload_mib} MiB are taken."
    )
