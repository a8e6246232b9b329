"""The backbone's data: frames of scenes, whose latents and text come from the trained autoencoder and text encoder.

Every sample is a whole batch, of one kind:

    images    one frame and its caption
    pairs       [image, condition]: depth, edges, segmentation and the other tasks of `data.tasks`; either may be
                given or made, so the inverse tasks are learned along
    views       [image, rays, image, rays] of two cameras; the first camera's rays are always the same and given
    cameras     the same with both images given: where did the second one stand?

as in OneDiffusion (arXiv 2411.16318, sections 3 and 4). A batch has about the same number of tokens whatever its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderDC
from transformers import AutoTokenizer, T5EncoderModel

from imgdit.cameras import ray_frames, relative_rays, scale_positions
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.frames import Frame
from imgdit.io.fingerprints import weights_hash
from imgdit.io.order import mixed_seed
from imgdit.layout import FrameLayout
from imgdit.models.functional import PATCH, pack
from imgdit.naming import check_name, old_names, renamed_value
from imgdit.scenes.captions import caption, leave_out
from imgdit.scenes.geometry import camera_to_world, intrinsics
from imgdit.scenes.latents import LOOKS, MAPS, SHARD, SIZE, VIEWS, SceneLatents, cache_latents, scene_views
from imgdit.scenes.map_alignment import with_maps
from imgdit.scenes.tokenizer import caption_tokenizer
from imgdit.scenes.world import Camera, Scene, pick
from imgdit.tasks import task_caption
from imgdit.training.batches import Batch, Text
from imgdit.training.trained import load_trained

PROBABILITIES = {"images": 0.45, "pairs": 0.2, "views": 0.3, "cameras": 0.05}
"""Of the batches from step 20,000 of the embedded model on; the log has those before. Captions are learned in every
kind of batch, and soonest."""
FRAMES = {"images": 1, "pairs": 2, "views": 4, "cameras": 4}
CLEAN = {"views": (1,), "cameras": (0, 1, 2)}
"""Frames that are never generated. The first camera's rays say nothing new."""
FAINTEST = 0.9
"""Least noise of a camera that is looked for. A map of 256 rays tells six numbers: through less noise it shows them
itself, and the images would not be looked at."""
PAIRS = {"depth": 0.22, "canny": 0.16, "segmentation": 0.3, "other": 0.17, "editing": 0.075, "subject": 0.075}
"""Of the pairs; "other" is the one condition that each view was cached with."""
MARKED, BARE, UNSAID = 0.25, 0.15, 0.1
"""Fractions of text-to-image prompts that begin with their task's token, of other prompts that hold nothing but their
token, and of captions that leave the place or the style out."""
HELD_OUT = 2 * SHARD
"""Scenes of the held-out split."""


class Sample(NamedTuple):
    """One scene's frames, before they are a batch."""

    latents: list[torch.Tensor]
    """Frames (C, h, w)."""
    prompt: str
    """The caption behind its task's token."""
    shown: tuple[Scene | None, ...] = ()
    """The scene that each frame is an image of; `None`: it is a map, rays, or an image of something else."""


class CachedScenes:
    """Cached latents of scenes and what reads their captions; what is missing of the cache is made first.

    Args:
        vae: that the latents are made by.
        text_encoder, tokenizer: of the captions.
        latents: folder of the cache, see `data.latents`.
        scenes: of the split, from seed 0 on.
        split: "train" or "heldout".
        size: pixels per side.
        scale: of the latents; `None`: by the cache, see `latent_scale`.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        latents: str,
        scenes: int,
        split: str,
        size: int = SIZE,
        scale: float | None = None,
    ):
        scenes = HELD_OUT if split == "heldout" else scenes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cache_latents(vae, latents, scenes, split, size=size, device=device)
        self.latents = SceneLatents(latents, split, weights_hash(vae.cpu(), dtype=torch.float16), size)
        self.scenes, self.split = scenes, split
        self.scale = latent_scale(latents) if scale is None else scale
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        cells = self.latents.read(0, "pictures", 0, 0).shape[1:]
        self.size = (cells[0] // PATCH, cells[1] // PATCH)

    def encode(self, prompts: Sequence[str]) -> tuple[Text, Text]:
        """Text of the prompts, and the empty one of the same length."""
        return encode_texts(self.text_encoder, self.tokenizer, prompts)

    def batch(self, samples: Sequence[Sample], frames: Sequence[Frame]) -> Batch:
        """Samples of the same frames as one batch."""
        text, empty = self.encode([sample.prompt for sample in samples])
        tokens = [pack(torch.stack(grids), PATCH) for grids in zip(*(sample.latents for sample in samples))]
        return Batch(torch.cat(tokens, dim=1), FrameLayout.build(frames, text.embeddings.shape[1]), text, empty)

    def latent(self, scene: int, name: str, *place: int) -> torch.Tensor:
        """Scaled latents (C, h, w), see `SceneLatents.read`."""
        return self.latents.read(scene, name, *place) * self.scale

    def draw(self, rng: Random) -> tuple[int, int, int]:
        """A scene, a view and a look."""
        return pick(rng, range(self.scenes)), pick(rng, range(VIEWS)), pick(rng, range(LOOKS))

    @staticmethod
    def draw_caption(rng: Random, scene: Scene) -> str:
        """A caption, perhaps without the place or the style."""
        return caption(scene, rng, leave_out(rng, UNSAID))


@old_names(shares="probabilities")
class SceneFrames(CachedScenes):
    """Endless: sample i is a `Batch`, the same for the same i.

    Args:
        latents: folder of the cache, see `data.latents`; each `size` has its own.
        scenes: training scenes in it.
        autoencoder, text_encoder: folders of the runs that trained them.
        model: pipeline folder of the autoencoder and text encoder instead, "embedded" for the one that comes along.
        tokens: image tokens of a batch; how many samples that are depends on the kind.
        size: pixels per side.
        probabilities: of the kinds of batches, relative to each other; a kind that is left out has none.
        pairs: probabilities of the tasks among the pairs; "other" stands for five tasks alike, see
            `imgdit.scenes.latents.OTHERS`.
        maps: whether batches come with depth, normals and segmentation of their images, for the objective
            `imgdit.scenes.map_alignment:map_alignment`.
        split: "train" or "heldout".

    Raises:
        ValueError: an unknown kind or task, probabilities that are none, or a cache of another autoencoder or size.
    """

    def __init__(
        self,
        latents: str = "outputs/scenes/latents",
        scenes: int = 6144,
        autoencoder: str = "outputs/scenes/autoencoder",
        text_encoder: str = "outputs/scenes/text_encoder",
        model: str | None = None,
        tokens: int = 4096,
        size: int = SIZE,
        probabilities: dict[str, float] = PROBABILITIES,
        pairs: dict[str, float] = PAIRS,
        maps: bool = False,
        split: str = "train",
    ):
        probabilities = checked_probabilities(probabilities, pairs)
        if model is None:
            parts = (load_trained(autoencoder), load_trained(text_encoder).encoder, caption_tokenizer())
            super().__init__(*parts, latents, scenes, split, size)
        else:
            parts = scene_components(model)
            super().__init__(*parts, latents, scenes, split, size, parts[0].config.scaling_factor)
        self.tokens, self.probabilities, self.pairs, self.maps = tokens, probabilities, pairs, maps

    def __getitem__(self, index: int) -> Batch:
        rng = Random(mixed_seed(index, 0))
        return self.draw_batch(choose(rng, self.probabilities), rng)

    def draw_batch(self, kind: str, rng: Random) -> Batch:
        """A batch of a kind."""
        count = max(1, self.tokens // (FRAMES[kind] * self.size[0] * self.size[1]))
        views = self._views
        make = {"images": self._image, "pairs": self._pair, "views": views, "cameras": views}[kind]
        samples = [make(rng) for _ in range(count)]
        batch = self.batch(samples, frames_of(kind, self.size))
        if self.maps:
            batch = with_maps(batch, [sample.shown for sample in samples])
        if kind != "cameras":
            return batch
        levels = [1 - (1 - FAINTEST) * rng.random() ** 2 for _ in range(count)]
        return replace(batch, sigmas=torch.tensor([(0.0, 0.0, 0.0, level) for level in levels]))

    def _image(self, rng: Random) -> Sample:
        scene, view, look = self.draw(rng)
        shown = scene_views(scene, self.split).looks[view][look]
        text = self.draw_caption(rng, shown)
        task = "text_to_image" if rng.random() < MARKED else None
        return Sample([self.latent(scene, "pictures", view, look)], task_caption(text, task), (shown,))

    def _pair(self, rng: Random) -> Sample:
        scene, view, look = self.draw(rng)
        drawn = scene_views(scene, self.split)
        task = choose(rng, self.pairs)
        if task == "editing":  # the same view in another look
            condition = self.latent(scene, "pictures", view, pick(rng, [n for n in range(LOOKS) if n != look]))
        elif task == "subject":  # the same objects elsewhere: only the first two looks share their colours
            look = pick(rng, (0, 1))
            condition = self.latent(scene, "pictures", 1 - view, 1 - look)
        elif task == "other":
            task, look = drawn.others[view], 0
            condition = self.latent(scene, "others", view)
        else:
            condition = self.latent(scene, "maps", view, MAPS.index(task))
        text = "" if rng.random() < BARE else self.draw_caption(rng, drawn.looks[view][look])
        image = self.latent(scene, "pictures", view, look)
        return Sample([image, condition], task_caption(text, task), (drawn.looks[view][look], None))

    def _views(self, rng: Random) -> Sample:
        scene, first, look = self.draw(rng)
        order = (first, 1 - first)
        looks = [scene_views(scene, self.split).looks[view][look] for view in order]
        text = "" if rng.random() < BARE else self.draw_caption(rng, looks[0])
        images = [self.latent(scene, "pictures", view, look) for view in order]
        rays = scene_rays([look.camera for look in looks], images[0].shape[-1])
        frames = [images[0], rays[0], images[1], rays[1]]
        return Sample(frames, task_caption(text, "views"), (looks[0], None, looks[1], None))


def encode_texts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[Text, Text]:
    """Text of the prompts, and the empty one of the same length."""
    tokens = tokenizer([*prompts, ""], padding="longest", return_tensors="pt")
    mask = tokens.attention_mask.bool()
    with torch.no_grad():
        embeddings = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    weight = mask[..., None].to(embeddings)
    pooled = (embeddings * weight).sum(1) / weight.sum(1)
    whole = Text(embeddings, pooled, mask)
    return whole.rows(slice(None, -1)), whole.rows(slice(-1, None))


def scene_components(model: str) -> tuple[Any, Any, Any]:
    """Autoencoder, text encoder and tokenizer of a pipeline's folder, "embedded" for the one that comes along."""
    folder = str(SCENES) if model == EMBEDDED else model
    vae = AutoencoderDC.from_pretrained(folder, subfolder="vae").eval()
    text_encoder = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder").eval()
    return vae, text_encoder, AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")


def frames_of(kind: str, size: tuple[int, int]) -> list[Frame]:
    """The frames of a kind of batch, with `size` rows and columns of tokens."""
    clean = CLEAN.get(kind, ())
    return [Frame(size, sigma=0.0 if n in clean else None, index=float(n)) for n in range(FRAMES[kind])]


def scene_rays(cameras: Sequence[Camera], size: int) -> torch.Tensor:
    """Ray frames (V, 16, size, size) of scenes' cameras, relative to the first."""
    return ray_frames(relative_rays(scene_poses(cameras), size, float(intrinsics(1)[0, 0])))


def scene_poses(cameras: Sequence[Camera]) -> torch.Tensor:
    """Camera-to-world matrices (V, 4, 4), their distances scaled as in training."""
    return scale_positions(camera_to_world(cameras))


@lru_cache(maxsize=4)
def latent_scale(folder: str | Path) -> float:
    """The autoencoder's `scaling_factor`, to two digits: one over the deviation of the first shard's images."""
    images = torch.stack(list(SceneLatents(folder).images(SHARD)))
    return round(1.0 / float(images.std()), 2)


def checked_probabilities(kinds: dict[str, float], pairs: dict[str, float]) -> dict[str, float]:
    """Probabilities of the kinds of batches, by their names of today.

    Raises:
        ValueError: an unknown kind or task, or probabilities that are none.
    """
    kinds = {
        renamed_value(kind, {"pictures": "images"}, "data.arguments.probabilities"): value
        for kind, value in kinds.items()
    }
    _check_probabilities("probabilities", kinds, PROBABILITIES)
    _check_probabilities("pairs", pairs, PAIRS)
    return kinds


def _check_probabilities(name: str, values: dict[str, float], known: Iterable[str]) -> None:
    for key in values:
        check_name(f"name in {name}", key, known)
    if min(values.values(), default=-1.0) < 0 or not sum(values.values()) > 0:
        raise ValueError(f"{name} must be 0 or more, and one of them positive, got {values}")


def choose(rng: Random, values: dict[str, float]) -> str:
    """A name with the probability that its value has among all."""
    place = rng.random() * sum(values.values())
    for name, fraction in values.items():
        place -= fraction
        if place < 0:
            return name
    return name
