"""Tab: an image with and without concepts, from the same noise, and where the concepts were seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import torch

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.heat import overlay
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.jobs.request import Request
from imgdit.images import open_image
from imgdit.sae.concept_maps import concept_maps
from imgdit.sae.hooks import site

MODES = ("scale", "remove", "replace")

FAINT = 0.5
"""Fraction of its activation in its own images below which a concept is hardly seen."""
SEARCHING = "Looking where the concepts are seen."
ABOUT = (
    "Both images start from the same noise. *Concepts seen*: the redder, the more of a chosen concept the model sees "
    "there."
)


def build(holder: Holder) -> widgets.Onward:
    """Lay the tab out, for a model with concepts; its result, and where that can go."""
    session = holder.session
    concepts = session.unlearner.concepts
    example = examples.texts(session).unlearn
    books = session.unlearner.books.values()
    stored = next((selection.multiplier for book in books for selection in book.selections.values()), -1.0)
    chosen_first = [name for name in concepts if name in example][:1] or concepts[:1]  # one click shows something
    default = session.unlearner.default_mode(session.pipe, chosen_first)
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="compared"):
                with gr.Column():
                    slider = widgets.compare_slider("As it is, and unlearned", "says-unlearn")
                with gr.Column(elem_classes="thumbs"):
                    plain = widgets.result("As it is")
                    without = widgets.result("Unlearned")
                    heat = widgets.result("Concepts seen")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(example)
                make, stop = widgets.buttons("Unlearn")
            onward = widgets.onward_buttons("unlearn")
        with gr.Column(elem_classes="drawers"):
            chosen = gr.CheckboxGroup(
                concepts, value=chosen_first, label="Concepts to unlearn", elem_classes="concepts", elem_id="concepts"
            )
            if style := examples.concept_style(session, concepts):
                gr.HTML(style, padding=False, elem_classes="unseen")
            mode, multiplier = _how(default, stored)
            sampled = widgets.sampling()
            gr.Markdown(ABOUT, elem_classes="note")

    @limits.refusing(status)
    def unlearn(
        prompt: str, chosen: Sequence[str], mode: str, multiplier: float,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any, str]]:  # fmt: skip
        """Generate an image with and without concepts, from the same noise.

        Args:
            prompt: what to show.
            chosen: names of the concepts.
            mode: "scale", "remove" or "replace".
            multiplier: of "scale"; the lower, the stronger.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            PNG files of the plain image, the other one, a heat map of the concepts, and how far it is.
        """
        names = [limits.choice(name, "a concept", concepts) for name in chosen or ()]
        if not names:
            raise limits.Refused("choose at least one concept")
        base = Request(limits.text(prompt), **widgets.read_sampling(steps, guidance, seed))
        other = replace(
            base,
            concepts=tuple(names),
            mode=limits.choice(mode, "the mode", MODES),
            multiplier=float(limits.number(multiplier, "the multiplier", -100, 1)),
        )
        shown = None
        for shown in holder.make([base, other], person):
            first, second = widgets.two_of(shown)
            status = SEARCHING if shown.over and len(shown.files) == 2 else shown.status
            yield first, second, None, status
        if shown is not None and len(shown.files) == 2:
            with holder.busy(person):
                seen, note = _seen(holder, base, names)
            image = None if seen is None else overlay(open_image(shown.files[0]), seen, full=1.0)
            kept = None if image is None else holder.keep(image)
            yield shown.files[0], shown.files[1], kept, f"{shown.status} {note}".strip()

    run = make.click(
        unlearn, [prompt, chosen, mode, multiplier, *sampled], [plain, without, heat, status],
        api_name="unlearn", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)
    widgets.compare_when_changed(slider, plain, without)
    return widgets.Onward(without, without, [run], status, onward)


def _how(default: str, stored: float) -> tuple[gr.Radio, gr.Slider]:
    """What happens to the concepts, folded away.

    Args:
        default: the mode that is chosen first.
        stored: the concepts' own multiplier.
    """
    with gr.Accordion("How", open=False):
        mode = gr.Radio(MODES, value=default, label="What happens to the concepts' features")
        multiplier = gr.Slider(
            -20, 1, stored, step=0.1, label="Multiplier (of scale)", visible=default == "scale",
            info="1 changes nothing, 0 removes the concept; the further below 0, the stronger.",
        )  # fmt: skip
    mode.change(lambda name: gr.Slider(visible=name == "scale"), mode, multiplier, **QUICK)
    return mode, multiplier


def _seen(holder: Holder, request: Request, names: Sequence[str]) -> tuple[torch.Tensor | None, str]:
    """Where concepts are seen (rows, columns), in units of how they are in their own images; and what is to be said of
    it. `None` where there is no map."""
    unlearner, hookpoint = holder.session.unlearner, holder.session.seen_at
    book = unlearner.books.get(hookpoint)
    if book is None or site(holder.session.pipe, hookpoint).text:
        return None, "No autoencoder with concepts reads the image, so there is no map of where they are seen."
    found = concept_maps(
        holder.session.pipe, unlearner.saes[hookpoint], book, [name for name in names if name in book.selections],
        [request.prompt], hookpoint=hookpoint, seed=request.seed, num_inference_steps=request.steps,
        guidance_scale=request.guidance,
    )  # fmt: skip
    unknown = [name for name in names if name not in found.concepts]
    faint = [name for name, heat in zip(found.concepts, found.maps[0]) if float(heat.max()) < FAINT]
    notes = []
    if unknown:
        notes.append(f"Not on the map, as no feature stands for it in the image: {', '.join(unknown)}.")
    if faint:
        notes.append(f"Hardly seen in this image: {', '.join(faint)}.")
    return (found.maps[0].amax(0) if found.concepts else None), " ".join(notes)
