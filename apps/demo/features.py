"""Tab: search the features of a sparse autoencoder by words, look at their images, steer one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import gradio as gr
import torch

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.heat import beside, overlay
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.jobs.request import Request
from imgdit.apps.jobs.run import same_pixels
from imgdit.apps.session import Session
from imgdit.images import open_image
from imgdit.sae.concepts import ConceptStatistics
from imgdit.sae.features import FeatureSurvey, contrast_features, heat_maps, survey_features
from imgdit.sae.model import SparseAutoencoder

STEPS = 8
"""Of each image that is searched for features."""
REACH = 40.0
"""What a feature is multiplied by at most on the page."""
STRONGEST = 1.0
"""Of the activations that are read: how large a feature may become on the page."""
FOUND, TOP = 12, 6
"""Features that a search tells, and images of one."""


def build(holder: Holder) -> widgets.Onward:
    """Lay the tab out, for a model with an autoencoder; its result, and where that can go."""
    texts = examples.texts(holder.session)
    handlers = _Handlers(holder)
    concept, first = _first(holder.session, texts.steer)
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="compared"):
                with gr.Column():
                    slider = widgets.compare_slider("As it is, and steered", "says-steer")
                with gr.Column(elem_classes="thumbs"):
                    plain = widgets.result("As it is")
                    steered = widgets.result("Steered")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(texts.steer)
                make, stop = widgets.buttons("Steer")
            onward = widgets.onward_buttons("features")
        with gr.Column(elem_classes="drawers"):
            with gr.Group():
                words = widgets.prompt_box(texts.words, "Words with what is looked for", 1)
                against = widgets.prompt_box(texts.against, "Words without it", 1)
            search = gr.Button("Search", variant="secondary")
            table = gr.Dataframe(
                headers=["feature", "score", "% of input"], label="Features, the best first: click one to take it",
                interactive=False, max_height=200, elem_classes="rows",
            )  # fmt: skip
            feature = gr.Number(
                first, label="Feature", precision=0, minimum=0, maximum=handlers.last,
                info=f"At first {concept}; after a search the best one.",
            )  # fmt: skip
            factor = gr.Slider(
                -8, 8, -1, step=0.5, label="Multiply the feature by",
                info="1 changes nothing, 0 removes it, below 0: its opposite.",
            )  # fmt: skip
            sampled = widgets.sampling()
    with gr.Row(elem_classes="heading"):
        gr.Markdown("**Where the feature is strongest:** each image beside the same under the feature's heat map")
        look = gr.Button("Top images", size="sm")
    images = widgets.results("Where the feature is strongest", 3, "tops")

    guarded = limits.refusing(status)
    looking: dict[str, Any] = {"trigger_mode": "once", **DEVICE}
    top_images = guarded(handlers.feature_images)
    look.click(top_images, feature, [images, status], api_name="feature_images", **looking)
    found = search.click(
        guarded(handlers.search_features), [words, against], [table, feature, status],
        api_name="search_features", **looking,
    )  # fmt: skip
    found.success(_reach_of_best, table, factor, **QUICK).success(
        top_images, feature, [images, status], api_visibility="private", **looking
    )
    table.select(_clicked, table, [feature, factor, status], **QUICK).then(
        top_images, feature, [images, status], api_visibility="private", **looking
    )
    run = make.click(
        guarded(handlers.steer), [prompt, feature, factor, *sampled], [plain, steered, status],
        api_name="steer", **looking,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)
    widgets.compare_when_changed(slider, plain, steered)
    return widgets.Onward(steered, steered, [run], status, onward)


class _Handlers:
    """What the buttons of the tab do.

    Args:
        holder: of a model with an autoencoder.
    """

    def __init__(self, holder: Holder):
        self.holder, self.session = holder, holder.session
        self.bank = examples.texts(self.session).bank
        self.last = self.sae.config.num_latents - 1

    @property
    def sae(self) -> SparseAutoencoder:
        return self.session.unlearner.saes[self.session.seen_at]

    @cached_property
    def survey(self) -> FeatureSurvey:
        """How active every feature is on the bank of prompts."""
        return survey_features(self.session.pipe, self.sae, self.bank, num_inference_steps=STEPS, guidance_scale=1.0)

    def search_features(self, words: str, against: str, person: gr.Request) -> Iterator[tuple[Any, Any, str]]:
        """Find the features that one prompt's images have and another's have not.

        Args:
            words: with what is looked for.
            against: without it.

        Returns:
            rows of feature, score and how large it is in percent of the activations, the best first; the best; and
            how far it is.
        """
        read = [limits.text(text, what) for text, what in ((words, "the words"), (against, "the other words"))]
        if not all(read):
            raise limits.Refused("give words with what is looked for, and words without it")
        yield gr.skip(), gr.skip(), "Searching."
        with self.holder.busy(person):
            found = contrast_features(
                self.session.pipe, self.sae, read[:1], read[1:], num_inference_steps=STEPS, guidance_scale=1.0
            )
        best = found.scores("prompts").mean(0).topk(min(FOUND, self.last + 1))
        part = _part_of_input(self.sae, found)
        rows = [
            [int(number), round(float(score), 5), round(100 * float(part[number]), 2)] for score, number in zip(*best)
        ]
        yield rows, rows[0][0], f"Feature {rows[0][0]} is chosen, the best of these."

    def feature_images(self, feature: int, person: gr.Request) -> Iterator[tuple[Any, str]]:
        """The images on which a feature is strongest, of a bank of prompts, and where in them.

        Args:
            feature: its number.

        Returns:
            files of images under their heat maps with their prompts, and a note.
        """
        number = limits.whole(feature, "the feature", 0, self.last)
        yield gr.skip(), f"Looking through {len(self.bank)} images."
        with self.holder.busy(person):
            shown = _strongest(self.holder, self.sae, self.survey, self.bank, number)
        if not shown:
            yield shown, f"Feature {number} was not active on any of {len(self.bank)} images; choose another."
            return
        yield (
            shown,
            f"active on {len(shown)} of the {len(self.bank)} images that were looked at, the strongest first",
        )

    def steer(
        self, prompt: str, feature: int, factor: float, steps: int, guidance: float, seed: int, person: gr.Request
    ) -> Iterator[tuple[Any, Any, str]]:
        """Generate an image with a feature multiplied, beside the same as it is.

        Args:
            prompt: what to show.
            feature: its number.
            factor: 0 removes it, 1 changes nothing.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            PNG files of the plain image and the steered one, and how far it is.
        """
        number = limits.whole(feature, "the feature", 0, self.last)
        base = Request(limits.text(prompt), **widgets.read_sampling(steps, guidance, seed))
        by = float(limits.number(factor, "the factor", -100, 100))
        for shown in self.holder.make([base, replace(base, features=((number, by),))], person):
            first, second = widgets.two_of(shown)
            note = ""
            if shown.over and len(shown.files) == 2 and same_pixels(*map(open_image, shown.files)):
                note = (
                    " Nothing changed: multiplied by 1."
                    if by == 1
                    else f" Nothing changed: feature {number} is never active in this image. Search for one that is."
                )
            yield first, second, shown.status + note


def _first(session: Session, prompt: str) -> tuple[str, int]:
    """A feature to begin with that is active for a prompt, and what it is: the most its own of a concept in it."""
    book = session.unlearner.books.get(session.seen_at)
    for name, selection in reversed(book.selections.items() if book is not None else ()):
        if name in prompt and len(selection.features):
            excess = (selection.means - selection.thresholds).mean(0)
            return f'one of "{name}"', int(selection.features[excess.argmax()])
    return "any", 0


def _strongest(
    holder: Holder, sae: SparseAutoencoder, survey: FeatureSurvey, bank: Sequence[str], number: int
) -> list[tuple[str, str]]:
    """Files and captions of the images on which a feature is strongest, under its heat maps."""
    shown = []
    for row, value, _ in survey.top_images(number, TOP):
        found = heat_maps(
            holder.session.pipe, sae, [bank[row]], [number], seed=row, num_inference_steps=STEPS,
            guidance_scale=1.0, output_type="pil",
        )  # fmt: skip
        image = found.images[0]
        if found.maps is not None:
            image = beside(image, overlay(image, found.maps[0, 0]))
        shown.append((holder.keep(image), f"{value:.2f}: {bank[row]}"))
    return shown


def _part_of_input(sae: SparseAutoencoder, found: ConceptStatistics) -> torch.Tensor:
    """(L,) length of what each feature writes, as a fraction of the length of what the autoencoder reads: means over
    the tokens of the images that have what is looked for, at the timestep where it is largest."""
    written = found.means["prompts"] * sae.W_dec.float().norm(dim=1).cpu()  # (S, L)
    return (written / found.inputs["prompts"].norm(dim=1, keepdim=True)).amax(0)


def _reach(part: float) -> float:
    """How far a feature is multiplied at most: until it writes `STRONGEST` of what is read, and not beyond `REACH`.

    Args:
        part: what it writes by itself, in percent of what is read.
    """
    return float(min(max(math.ceil(100 * STRONGEST / max(part, 1e-6)), 4), REACH))


def _set_reach(part: float) -> gr.Slider:
    reach = _reach(part)
    return gr.Slider(minimum=-reach, maximum=reach, value=-math.ceil(reach / 4))


def _reach_of_best(table: Any) -> gr.Slider:
    return _set_reach(float(table.iloc[0, 2]))


def _clicked(table: Any, event: gr.SelectData) -> tuple[int, gr.Slider, str]:
    row = table.iloc[event.index[0]]
    number = int(row.iloc[0])
    return number, _set_reach(float(row.iloc[2])), f"Feature {number} is chosen."
