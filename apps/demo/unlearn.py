"""Tab: a picture with and without concepts, from the same noise, and where the concepts were seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from imgdit.images import open_image
from imgdit.sae.features import heat_maps

from ..request import Request
from . import limits, widgets
from .heat import overlay
from .holder import DEVICE, Holder
from .limits import LIMITS

MODES = ("scale", "remove", "replace")

EXAMPLE = "a green pyramid at night, neon style"


def build(holder: Holder) -> None:
    """Lay the tab out."""
    studio = holder.studio
    concepts = studio.unlearner.concepts if studio.has_sae else []
    if not concepts:
        gr.Markdown(
            f"There is no sparse autoencoder with concepts in `{holder.sae_place}`; `imgdit sae train RECIPE` makes "
            "one."
        )
    books = studio.unlearner.books.values() if studio.has_sae else ()
    stored = next((selection.multiplier for book in books for selection in book.selections.values()), -1.0)
    with gr.Row():
        with gr.Column(min_width=280):
            said = [name for name in concepts if name in EXAMPLE][:1]  # so that one click shows something
            chosen = gr.CheckboxGroup(concepts, value=said, label="Concepts to unlearn", interactive=bool(concepts))
            prompt = widgets.prompt_box(EXAMPLE)
            mode = gr.Radio(MODES, value="scale", label="How")
            multiplier = gr.Slider(-20, 1, stored, step=0.1, label="Multiplier (of scale)", info="lower: stronger")
            sampled = widgets.sampling()
            make, stop = widgets.buttons("Unlearn")
            status = widgets.status()
        with gr.Column(min_width=280):
            with gr.Row():
                plain = widgets.result("As it is", height=220)
                without = widgets.result("Unlearned", height=220)
            heat = widgets.result("Where the concepts are seen", height=220)

    @limits.refusing
    def unlearn(
        prompt: str, chosen: Sequence[str], mode: str, multiplier: float,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any, str]]:  # fmt: skip
        """Make a picture with and without concepts, from the same noise.

        Args:
            prompt: what to show.
            chosen: names of the concepts.
            mode: "scale", "remove" or "replace".
            multiplier: of "scale"; the lower, the stronger.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            PNG files of the plain picture, the other one, a heat map of the concepts, and how far it is.
        """
        if not studio.has_sae:
            raise limits.Refused(f"there is no sparse autoencoder in {holder.sae_place}, so nothing can be unlearned")
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
        files: list[str] = []
        for shown in holder.make([base, other], person):
            files = shown.files
            first, second = [*files, gr.skip(), gr.skip()][:2]
            yield first, second, gr.skip(), shown.status
        if len(files) == 2:
            with holder.busy(person):
                found = _seen(holder, base, names)
            seen = None if found is None else holder.keep(overlay(open_image(files[0]), found))
            yield files[0], files[1], seen, "Done."

    make.click(
        unlearn, [prompt, chosen, mode, multiplier, *sampled], [plain, without, heat, status],
        api_name="unlearn", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, queue=False, api_visibility="private")
    gr.Markdown(f"Both pictures start from the same noise; up to {LIMITS.steps} steps.")


def _seen(holder: Holder, request: Request, names: Sequence[str]) -> Any:
    """Mean activation (rows, columns) of the features of concepts; `None` where no SAE sees them in the picture."""
    unlearner, hookpoint = holder.studio.unlearner, holder.studio.seen_at
    book = unlearner.books.get(hookpoint)
    known = [] if book is None else [book.selections[name] for name in names if name in book.selections]
    if not known:
        return None
    features = sorted({int(feature) for selection in known for feature in selection.features})
    found = heat_maps(
        holder.studio.pipe, unlearner.saes[hookpoint], [request.prompt], features, hookpoint=hookpoint,
        seed=request.seed, num_inference_steps=request.steps, guidance_scale=request.guidance,
    )  # fmt: skip
    return None if found.maps is None else found.maps[0].mean(0)
