"""Tab: images from prompts, seen while they are denoised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.demo.limits import LIMITS
from imgdit.apps.jobs.request import Request
from imgdit.defaults import STRENGTH
from imgdit.scenes.meanings import KINDS

BEGINS = "The next image begins at the starting image."


def build(holder: Holder) -> tuple[widgets.Upload, widgets.Onward]:
    """Lay the tab out; the place of a starting image, and where its result can go."""
    low, high, step = holder.sides
    side = holder.session.default_size or 512
    texts = examples.texts(holder.session)
    of_scenes = examples.of_scenes(holder.session)
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            image = widgets.main_result("Image", "says-create")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(texts.create)
                make, stop = widgets.buttons("Create")
            unknown = gr.Markdown(elem_classes=["note", "unknown"], visible=False)
            with gr.Row(elem_classes="uses"):
                again = gr.Button("Another seed", size="sm")
                onward = widgets.onward_buttons("create")
            gallery = gr.Gallery(label="All images", format="png", type="filepath", visible="hidden")
        with gr.Column(elem_classes="drawers"):
            start, strength = _beginning(holder.session.begins_at_images, status)
            if of_scenes:
                with gr.Accordion("What this model can draw", open=True):
                    for kind, names in KINDS.items():
                        widgets.chips(names, f"{kind.capitalize()}s", prompt, adding=True)
            with gr.Accordion("Example prompts", open=not of_scenes):
                widgets.chips(texts.prompts, "", prompt)
            sampled = widgets.sampling()
            with gr.Accordion("More", open=False):
                negative = widgets.prompt_box(label="Steer away from", lines=1)
                count = gr.Slider(1, LIMITS.batch, 1, step=1, label="Images")
                # A model that was trained at one size generates no other well.
                with gr.Row(visible=len(holder.session.shelf.taught.sizes) != 1):
                    width = gr.Slider(low, high, side, step=step, label="Width", min_width=120)
                    height = gr.Slider(low, high, side, step=step, label="Height", min_width=120)

    @limits.refusing(status)
    def create(
        prompt: str, negative: str, width: int, height: int, steps: int, guidance: float, seed: int, count: int,
        person: gr.Request, start: str | None = None, strength: float = STRENGTH,
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
            start: image to begin at, under noise; none: noise alone.
            strength: of the starting image: fraction of the steps that run.

        Returns:
            the last image, PNG files that tell how they were made, and how far it is.
        """
        size = {name: limits.whole(side, name, low, high) for name, side in (("width", width), ("height", height))}
        base = widgets.read_sampling(steps, guidance, seed)
        texts = (limits.text(prompt), limits.text(negative, "the text to steer away from"))
        number = limits.whole(count, "the number of images", 1, LIMITS.batch)
        base["image"] = limits.image(start, "the starting image")
        base["strength"] = float(limits.number(strength, "the strength", 0.05, 1))
        requests = [Request(*texts, **{**size, **base, "seed": base["seed"] + i}) for i in range(number)]
        for shown in holder.make(requests, person):
            if shown.over:  # what was generated, not a step on the way
                yield shown.files[-1] if shown.files else None, shown.files, shown.status
            else:
                yield shown.preview if shown.preview is not None else gr.skip(), shown.files, shown.status

    given = [prompt, negative, width, height, *sampled, count, start, strength]
    run = gr.on(
        [make.click, prompt.submit], create, given, [image, gallery, status],
        api_name="create", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    other = again.click(widgets.another_seed, None, sampled.seed, **QUICK).then(
        create, given, [image, gallery, status], api_visibility="private", trigger_mode="once", **DEVICE
    )
    stop.click(holder.stop, None, status, **QUICK)
    prompt.change(_about_words(holder), prompt, unknown, trigger_mode="always_last", **QUICK)
    return start, widgets.Onward(image, gallery, [run, other], status, onward)


def _beginning(visible: bool, status: gr.Textbox) -> tuple[widgets.Upload, gr.Slider]:
    """The drawer of the starting image: its place, and how strongly it is changed.

    Args:
        visible: whether the model begins at images.
        status: says that the next image does.
    """
    with gr.Accordion("Starting image", open=False, visible=visible, elem_classes="starting") as drawer:
        start = widgets.upload("Starting image", None, ["small"])
        strength = gr.Slider(
            0.05, 1, STRENGTH, step=0.05, label="Strength",
            info="Fraction of the steps that run; the larger, the less is left of the image. 1: nothing.",
        )  # fmt: skip
    start.change(_about_start, start, [drawer, status], trigger_mode="always_last", **QUICK)
    return start, strength


def _about_start(file: str | None) -> tuple[gr.Accordion, str]:
    """The drawer of the starting image, open where there is one, and what is said of it."""
    return gr.Accordion(open=file is not None), "" if file is None else BEGINS


def _about_words(holder: Holder) -> Any:
    """What tells words that the model was never taught while they are written."""

    def told(prompt: str) -> Any:
        remark = holder.session.shelf.about_words([prompt or ""])
        return gr.Markdown(limits.as_sentence(remark) if remark else "", visible=bool(remark))

    return told
