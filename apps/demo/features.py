"""Tab: search the features of a sparse autoencoder by words, look at their pictures, steer one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import Any

import gradio as gr

from imgdit.data.captions import caption
from imgdit.data.scenes import Scene
from imgdit.sae.features import contrast_features, heat_maps, survey_features

from ..request import Request
from . import limits, widgets
from .heat import overlay
from .holder import DEVICE, Holder

BANK, STEPS = 24, 8
"""Sentences whose pictures are looked through for a feature's strongest, and steps of each."""
FOUND, TOP = 12, 6
"""Features that a search tells, and pictures of one."""


def build(holder: Holder) -> None:
    """Lay the tab out."""
    studio = holder.studio
    last = 0
    if studio.has_sae:
        last = studio.unlearner.saes[studio.seen_at].config.num_latents - 1
    else:
        gr.Markdown(f"There is no sparse autoencoder in `{holder.sae_place}`; `imgdit sae train RECIPE` makes one.")

    def sae() -> Any:
        if not studio.has_sae:
            raise limits.Refused(f"there is no sparse autoencoder in {holder.sae_place}, so there are no features")
        return studio.unlearner.saes[studio.seen_at]

    @lru_cache(maxsize=1)
    def survey() -> Any:
        return survey_features(studio.pipe, sae(), bank(), num_inference_steps=STEPS, guidance_scale=1.0)

    @limits.refusing
    def search_features(words: str, against: str, person: gr.Request) -> list[list[Any]]:
        """Find the features that one sentence's pictures have and another's have not.

        Args:
            words: with what is looked for.
            against: without it.

        Returns:
            rows of feature and score, the best first.
        """
        read = [limits.text(text, what) for text, what in ((words, "the words"), (against, "the other words"))]
        if not all(read):
            raise limits.Refused("give words with what is looked for, and words without it")
        with holder.busy(person):
            found = contrast_features(
                studio.pipe, sae(), read[:1], read[1:], num_inference_steps=STEPS, guidance_scale=1.0
            )
        best = found.scores("prompts").mean(0).topk(FOUND)
        return [[int(number), round(float(score), 5)] for score, number in zip(*best)]

    @limits.refusing
    def feature_pictures(feature: int, person: gr.Request) -> tuple[list[tuple[str, str]], str]:
        """The pictures on which a feature is strongest, of a bank of scenes, and where in them.

        Args:
            feature: its number.

        Returns:
            files of pictures under their heat maps with their sentences, and a note.
        """
        autoencoder = sae()
        number = limits.whole(feature, "the feature", 0, last)
        with holder.busy(person):
            rows = survey().top_pictures(number, TOP)
            shown = []
            for row, value, _ in rows:
                found = heat_maps(
                    studio.pipe, autoencoder, [bank()[row]], [number], seed=row, num_inference_steps=STEPS,
                    guidance_scale=1.0, output_type="pil",
                )  # fmt: skip
                picture = found.pictures[0]
                if found.maps is not None:
                    picture = overlay(picture, found.maps[0, 0])
                shown.append((holder.keep(picture), f"{value:.2f}: {bank()[row]}"))
        return shown, f"active on {len(shown)} of the {BANK} pictures that were looked at, the strongest first"

    @limits.refusing
    def steer(
        prompt: str, feature: int, factor: float, steps: int, guidance: float, seed: int, person: gr.Request
    ) -> Iterator[tuple[Any, Any, str]]:
        """Make a picture with a feature multiplied, beside the same as it is.

        Args:
            prompt: what to show.
            feature: its number.
            factor: 0 removes it, 1 changes nothing.
            steps: of the sampler.
            guidance: scale.
            seed: of the noise.

        Returns:
            PNG files of the plain picture and the steered one, and how far it is.
        """
        sae()
        number = limits.whole(feature, "the feature", 0, last)
        base = Request(limits.text(prompt), **widgets.read_sampling(steps, guidance, seed))
        by = float(limits.number(factor, "the factor", -100, 100))
        for shown in holder.make([base, replace(base, features=((number, by),))], person):
            first, second = [*shown.files, gr.skip(), gr.skip()][:2]
            yield first, second, shown.status

    with gr.Row():
        with gr.Column(min_width=280):
            words = widgets.prompt_box("a red cube, neon style", "Words with what is looked for", 1)
            against = widgets.prompt_box("a red cube, photo style", "Words without it", 1)
            search = gr.Button("Search", variant="primary")
            table = gr.Dataframe(
                headers=["feature", "score"], label="Features, the best first", interactive=False, max_height=240
            )
            feature = gr.Number(0, label="Feature", precision=0, minimum=0, maximum=last)
            look = gr.Button("Top pictures")
        with gr.Column(min_width=280):
            prompt = widgets.prompt_box("a green pyramid at night, neon style")
            factor = gr.Slider(-10, 10, 3, step=0.5, label="Multiply the feature by")
            sampled = widgets.sampling()
            make, stop = widgets.buttons("Steer")
            with gr.Row():
                plain = widgets.result("As it is", height=200)
                steered = widgets.result("Steered", height=200)
    status = widgets.status()
    pictures = gr.Gallery(label="Where the feature is strongest", columns=3, height=320, interactive=False)

    search.click(search_features, [words, against], table, api_name="search_features", **DEVICE)
    table.select(_clicked, table, feature, queue=False, api_visibility="private")
    look.click(feature_pictures, feature, [pictures, status], api_name="feature_pictures", **DEVICE)
    make.click(
        steer, [prompt, feature, factor, *sampled], [plain, steered, status],
        api_name="steer", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, queue=False, api_visibility="private")


@lru_cache(maxsize=1)
def bank() -> list[str]:
    """Sentences of scenes that were held out of training."""
    return [caption(Scene.sample(i, "heldout"), Random(i)) for i in range(BANK)]


def _clicked(table: Any, event: gr.SelectData) -> int:
    return int(table.iloc[event.index[0], 0])
