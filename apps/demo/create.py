"""Tab: pictures from sentences, with a preview of the denoising."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from ..generate import PROMPTS
from ..request import Request
from . import limits, widgets
from .holder import DEVICE, Holder
from .limits import LIMITS


class Create(NamedTuple):
    """What other tabs use of this one."""

    use: gr.Button
    chosen: gr.State
    """File of the picture that was clicked last."""


def build(holder: Holder) -> Create:
    """Lay the tab out."""
    low, high, step = holder.sides
    side = holder.studio.default_size or 512
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = widgets.prompt_box(PROMPTS[-1])
            negative = widgets.prompt_box(label="Steer away from", lines=1)
            with gr.Row():
                width = gr.Slider(low, high, side, step=step, label="Width", min_width=120)
                height = gr.Slider(low, high, side, step=step, label="Height", min_width=120)
            count = gr.Slider(1, LIMITS.batch, 1, step=1, label="Pictures")
            sampled = widgets.sampling()
            dice = gr.Button("Draw another seed", size="sm")
            make, stop = widgets.buttons("Create")
            gr.Examples([[text] for text in PROMPTS], [prompt], label="Examples")
        with gr.Column(min_width=280):
            preview = gr.Image(label="Preview", interactive=False, height=280, buttons=[])
            status = widgets.status()
            gallery = gr.Gallery(label="Pictures", columns=2, height=360, format="png", interactive=False)
            use = gr.Button("Use as condition")
            chosen = gr.State()

    @limits.refusing
    def create(
        prompt: str, negative: str, width: int, height: int, steps: int, guidance: float, seed: int, count: int,
        person: gr.Request,
    ) -> Iterator[tuple[Any, list[str], str]]:  # fmt: skip
        """Make pictures from a sentence.

        Args:
            prompt: what to show.
            negative: what to steer away from.
            width: in pixels.
            height: in pixels.
            steps: of the sampler.
            guidance: scale.
            seed: of the first picture; the others count up.
            count: pictures.

        Returns:
            preview, PNG files that tell how they were made, and how far it is.
        """
        size = {name: limits.whole(side, name, low, high) for name, side in (("width", width), ("height", height))}
        base = widgets.read_sampling(steps, guidance, seed)
        said = (limits.text(prompt), limits.text(negative, "the text to steer away from"))
        number = limits.whole(count, "the number of pictures", 1, LIMITS.batch)
        requests = [Request(*said, **{**size, **base, "seed": base["seed"] + i}) for i in range(number)]
        for shown in holder.make(requests, person):
            yield shown.preview if shown.preview is not None else gr.skip(), shown.files, shown.status

    def chose(event: gr.SelectData) -> str:
        return event.value["image"]["path"]

    run = gr.on(
        [make.click, prompt.submit], create, [prompt, negative, width, height, *sampled, count],
        [preview, gallery, status], api_name="create", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, queue=False, api_visibility="private")
    run.then(lambda files: files[-1][0] if files else None, gallery, chosen, queue=False, api_visibility="private")
    gallery.select(chose, None, chosen, queue=False, api_visibility="private")
    dice.click(lambda: random.randrange(2**31), None, sampled.seed, queue=False, api_visibility="private")
    return Create(use, chosen)
