"""Tab: images from prompts, seen while they are denoised."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.demo.limits import LIMITS
from imgdit.apps.jobs.request import Request


class Create(NamedTuple):
    """What other tabs use of this one."""

    use: gr.Button
    ask: gr.Button
    status: gr.Textbox
    chosen: gr.State
    """File of the image that was clicked last, or generated last."""


def build(holder: Holder) -> Create:
    """Lay the tab out."""
    low, high, step = holder.sides
    side = holder.session.default_size or 512
    texts = examples.texts(holder.session)
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = widgets.prompt_box(texts.create)
            if examples.of_scenes(holder.session):
                gr.Markdown(f"What this model can draw:  \n{examples.vocabulary_note()}", elem_classes="note")
            negative = widgets.prompt_box(label="Steer away from", lines=1)
            # A model that was trained at one size generates no other well.
            with gr.Row(visible=len(holder.session.shelf.taught.sizes) != 1):
                width = gr.Slider(low, high, side, step=step, label="Width", min_width=120)
                height = gr.Slider(low, high, side, step=step, label="Height", min_width=120)
            count = gr.Slider(1, LIMITS.batch, 1, step=1, label="Images")
            sampled = widgets.sampling()
            dice = gr.Button("Draw another seed", size="sm")
            make, stop = widgets.buttons("Create")
            gr.Examples([[text] for text in texts.prompts], [prompt], label="Examples")
        with gr.Column(min_width=280):
            status = widgets.status()
            image = widgets.result("Image")
            gallery = widgets.results("All images", columns=LIMITS.batch, enlarged=False)
            with gr.Row():
                use = gr.Button("Use as condition", visible=bool(holder.session.shelf.controls), min_width=120)
                ask = gr.Button("Caption or ask about it", visible=False, min_width=120)
            chosen = gr.State()

    @limits.refusing(status)
    def create(
        prompt: str, negative: str, width: int, height: int, steps: int, guidance: float, seed: int, count: int,
        person: gr.Request,
    ) -> Iterator[tuple[Any, list[str], str]]:  # fmt: skip
        """Generate images from a prompt.

        Args:
            prompt: what to show.
            negative: what to steer away from.
            width: in pixels.
            height: in pixels.
            steps: of the sampler.
            guidance: scale.
            seed: of the first image; the others count up.
            count: images.

        Returns:
            the last image, PNG files that tell how they were made, and how far it is.
        """
        size = {name: limits.whole(side, name, low, high) for name, side in (("width", width), ("height", height))}
        base = widgets.read_sampling(steps, guidance, seed)
        texts = (limits.text(prompt), limits.text(negative, "the text to steer away from"))
        number = limits.whole(count, "the number of images", 1, LIMITS.batch)
        requests = [Request(*texts, **{**size, **base, "seed": base["seed"] + i}) for i in range(number)]
        for shown in holder.make(requests, person):
            if shown.over:  # what was generated, not a step on the way
                yield shown.files[-1] if shown.files else None, shown.files, shown.status
            else:
                yield shown.preview if shown.preview is not None else gr.skip(), shown.files, shown.status

    def chose(event: gr.SelectData) -> tuple[str, str]:
        file = event.value["image"]["path"]
        return file, file

    run = gr.on(
        [make.click, prompt.submit], create, [prompt, negative, width, height, *sampled, count],
        [image, gallery, status], api_name="create", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)
    run.then(lambda files: files[-1][0] if files else None, gallery, chosen, **QUICK)
    gallery.select(chose, None, [chosen, image], **QUICK)
    dice.click(lambda: random.randrange(2**31), None, sampled.seed, **QUICK)
    return Create(use, ask, status, chosen)
