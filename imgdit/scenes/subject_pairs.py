"""What makes and scores the pairs of `imgdit.data.subjects`: the embedded model with its probe, or any pipeline
that can draw two images in one, with a network that tells how alike they are."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from imgdit import ImgDiTPipeline
from imgdit.checkpoints import SCENE_PROBE, SCENES
from imgdit.data.subjects import Idea, Pair
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.hub import find_model
from imgdit.images import to_pixels
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import load_pipeline, over_components
from imgdit.pipelines.one_diffusion import OneDiffusionPipeline
from imgdit.scenes.captions import caption
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.world import Scene, another_look
from imgdit.tasks import TASK_TOKENS, ImageFrame

COPY = 0.03
"""Mean absolute difference of the pixels below which a pair is one image twice and teaches nothing."""
DIPTYCH = "two images side by side of the same {subject}. left: {left}. right: {right}"
"""What one wide image is asked for."""
PLACES = (
    ("{subject} on a white background", "{subject} on a wooden table by a window"),
    ("{subject} in a studio", "{subject} on the beach at sunset"),
    ("{subject} on a shelf", "{subject} in the snow"),
)


def scene_ideas(count: int, seed: int = 0) -> list[Idea]:
    """Single objects of the scenes, told in two looks."""
    ideas = []
    for number in range(seed, seed + count):
        scene, rng = Scene.sample(number, objects=1), Random(number)
        thing = scene.objects[0]
        captions = (caption(scene, rng), caption(another_look(scene, rng), rng))
        ideas.append(Idea(f"{thing.colour} {thing.kind}", captions))
    return ideas


def named_ideas(subjects: list[str], count: int) -> list[Idea]:
    """Things of a list in turn, in one pair of `PLACES` after the other."""
    ideas = []
    for number in range(count):
        subject = subjects[number % len(subjects)]
        left, right = PLACES[number // len(subjects) % len(PLACES)]
        ideas.append(Idea(subject, (left.format(subject=subject), right.format(subject=subject))))
    return ideas


class ScenePairs:
    """The embedded model draws the reference from its caption, and the target from the reference.

    Args:
        model: pipeline folder of a model of the scenes.
        steps, guidance: of the sampler.
        loading: of the pipeline.
    """

    def __init__(
        self,
        model: str | Path = SCENES,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        loading: LoadOptions = AUTO,
    ):
        pipe = load_pipeline(model, loading)
        self.text: Any = over_components(ImgDiTPipeline, pipe, loading)
        self.any: Any = over_components(OneDiffusionPipeline, pipe, loading)
        for pipe in (self.text, self.any):
            pipe.set_progress_bar_config(disable=True)
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance}

    def __call__(self, idea: Idea, seed: int) -> Pair:
        generator = torch.Generator().manual_seed(seed)
        reference = self.text(idea.places[0], generator=generator, **self.options).images[0]
        frames = [ImageFrame.generate(), ImageFrame.clean(reference)]
        caption = f"{TASK_TOKENS['subject']} {idea.places[1]}"
        return Pair(reference, self.any(caption, frames, generator=generator, **self.options).images[0])


class ProbeScore:
    """How sure the scenes' probe is that both images show the subject; 0 for one image twice."""

    def __init__(self, probe: str | Path = SCENE_PROBE):
        self.probe = SceneProbe.from_pretrained(probe).float().eval()

    @torch.no_grad()
    def __call__(self, idea: Idea, pair: Pair) -> float:
        images = torch.cat([to_pixels(image) for image in pair])
        if _is_copy(images):
            return 0.0
        colour, kind = idea.subject.split()
        answers = self.probe(images * 2 - 1).answers
        sure = [
            answers[question].softmax(1)[:, self.probe.questions[question].index(answer)]
            for question, answer in (("left object", kind), ("left colour", colour))
        ]
        return float(torch.stack(sure).min())


class Diptychs:
    """Any text-to-image pipeline draws both images as the halves of one, which keeps the subject the same.

    Args:
        model: folder or Hub repository of a pipeline.
        size: pixels per side of each half.
        loading: of the pipeline.
        options: of the pipeline's call.
    """

    def __init__(self, model: str, size: int = 512, loading: LoadOptions = AUTO, **options: Any):
        self.pipe = load_pipeline(model, loading)
        self.pipe.set_progress_bar_config(disable=True)
        self.size, self.options = size, options

    def __call__(self, idea: Idea, seed: int) -> Pair:
        caption = DIPTYCH.format(subject=idea.subject, left=idea.places[0], right=idea.places[1])
        generator = torch.Generator().manual_seed(seed)
        wide: Image.Image = self.pipe(
            caption, height=self.size, width=2 * self.size, generator=generator, **self.options
        ).images[0]
        return Pair(wide.crop((0, 0, self.size, self.size)), wide.crop((self.size, 0, 2 * self.size, self.size)))


class FeatureScore:
    """Cosine of the two images' features, cut off at 0; 0 for one image twice.

    Args:
        model: folder or Hub repository of an image encoder of transformers, such as "facebook/dinov2-base".
    """

    def __init__(self, model: str):
        from transformers import AutoImageProcessor, AutoModel

        model = find_model(model, "config.json", "image encoder")
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).eval()

    @torch.no_grad()
    def __call__(self, idea: Idea, pair: Pair) -> float:
        if _is_copy(torch.cat([to_pixels(image) for image in pair])):
            return 0.0
        hidden = self.model(**self.processor(list(pair), return_tensors="pt")).last_hidden_state[:, 0]
        return max(0.0, float(torch.cosine_similarity(hidden[0], hidden[1], dim=0)))


def _is_copy(images: torch.Tensor) -> bool:
    return float((images[0] - images[1]).abs().mean()) < COPY
