"""The backbone's data: frames of scenes, whose latents and text come from the trained autoencoder and text encoder.

Every sample is a whole batch, of one kind:

    pictures    one frame and its sentence
    pairs       [picture, condition]: depth, edges, segmentation and the other tasks of `data.tasks`; either may be
                given or made, so the inverse tasks are learned along
    views       [picture, rays, picture, rays] of two cameras; the first camera's rays are always the same and given

as in OneDiffusion (arXiv 2411.16318, sections 3 and 4). A batch has about the same number of tokens whatever its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from ..cameras import ray_frames, relative_rays, scale_positions
from ..data.captions import caption, leave_unsaid
from ..data.geometry import camera_to_world, intrinsics
from ..data.latents import LOOKS, MAPS, SHARD, VIEWS, SceneLatents, cache_latents, scene_views
from ..data.scenes import Camera, Scene, pick
from ..data.sentences import prompt
from ..data.words import caption_tokenizer
from ..frames import Frame, FrameLayout
from ..models.autoencoding import fingerprint
from ..models.functional import pack
from .data import mixed_seed
from .objectives import Batch, Text
from .trained import load_trained

PATCH = 2
"""Latent cells per side of a token, as in FLUX."""
SHARES = {"pictures": 0.45, "pairs": 0.35, "views": 0.2}
"""Of the batches."""
FRAMES = {"pictures": 1, "pairs": 2, "views": 4}
PAIRS = {"depth": 0.25, "canny": 0.18, "segmentation": 0.22, "other": 0.2, "editing": 0.075, "subject": 0.075}
"""Of the pairs; "other" is the one condition that each view was cached with."""
MARKED, BARE, UNSAID = 0.25, 0.15, 0.1
"""Shares of text-to-image prompts that begin with their task's token, of other prompts that hold nothing but their
token, and of sentences that leave the place or the style unsaid."""
HELD_OUT = 2 * SHARD
"""Scenes of the held-out split."""


class _Sample(NamedTuple):
    latents: list[torch.Tensor]
    """Frames (C, h, w)."""
    prompt: str


class SceneFrames:
    """Endless: sample i is a `Batch`, the same for the same i.

    What is missing of the cached latents is made first.

    Args:
        latents: folder of the cache, see `data.latents`.
        scenes: training scenes in it.
        autoencoder, text_encoder: folders of the runs that trained them.
        tokens: picture tokens of a batch; how many samples that are depends on the kind.
        split: "train" or "heldout".
    """

    def __init__(
        self,
        latents: str = "outputs/scenes/latents",
        scenes: int = 6144,
        autoencoder: str = "outputs/scenes/autoencoder",
        text_encoder: str = "outputs/scenes/text_encoder",
        tokens: int = 4096,
        split: str = "train",
    ):
        wanted = HELD_OUT if split == "heldout" else scenes
        vae = load_trained(autoencoder)
        cache_latents(vae, latents, wanted, split, device="cuda" if torch.cuda.is_available() else "cpu")
        self.latents = SceneLatents(latents, split, fingerprint(vae.cpu()))
        self.scenes, self.split, self.tokens = wanted, split, tokens
        self.scale = latent_scale(latents)
        self.text_encoder = load_trained(text_encoder).encoder
        self.tokenizer = caption_tokenizer()

    def __getitem__(self, index: int) -> Batch:
        rng = Random(mixed_seed(index, 0))
        kind = _choose(rng, SHARES)
        latents = self.latents.read(0, "pictures", 0, 0)
        size = (latents.shape[1] // PATCH, latents.shape[2] // PATCH)
        count = max(1, self.tokens // (FRAMES[kind] * size[0] * size[1]))
        make = {"pictures": self._picture, "pairs": self._pair, "views": self._views}[kind]
        samples = [make(rng) for _ in range(count)]
        text, empty = self.encode([sample.prompt for sample in samples])
        tokens = [pack(torch.stack(frames), PATCH) for frames in zip(*(sample.latents for sample in samples))]
        layout = FrameLayout.build(frames_of(kind, size), text.embeddings.shape[1])
        return Batch(torch.cat(tokens, dim=1), layout, text, empty)

    def encode(self, prompts: Sequence[str]) -> tuple[Text, Text]:
        """Text of the prompts, and the empty one of the same length."""
        tokens = self.tokenizer([*prompts, ""], padding="longest", return_tensors="pt")
        mask = tokens.attention_mask.bool()
        with torch.no_grad():
            embeddings = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        weight = mask[..., None].to(embeddings)
        pooled = (embeddings * weight).sum(1) / weight.sum(1)
        whole = Text(embeddings, pooled, mask)
        return whole._map(lambda x: x[:-1]), whole._map(lambda x: x[-1:])

    def _latent(self, scene: int, name: str, *place: int) -> torch.Tensor:
        return self.latents.read(scene, name, *place) * self.scale

    def _draw(self, rng: Random) -> tuple[int, int, int]:
        """A scene, a view and a look."""
        return pick(rng, range(self.scenes)), pick(rng, range(VIEWS)), pick(rng, range(LOOKS))

    def _picture(self, rng: Random) -> _Sample:
        scene, view, look = self._draw(rng)
        said = self._say(rng, scene_views(scene, self.split).looks[view][look])
        task = "text_to_image" if rng.random() < MARKED else None
        return _Sample([self._latent(scene, "pictures", view, look)], prompt(said, task))

    def _pair(self, rng: Random) -> _Sample:
        scene, view, look = self._draw(rng)
        drawn = scene_views(scene, self.split)
        task = _choose(rng, PAIRS)
        if task == "editing":  # the same view in another look
            given = self._latent(scene, "pictures", view, pick(rng, [n for n in range(LOOKS) if n != look]))
        elif task == "subject":  # the same objects elsewhere: only the first two looks share their colours
            look = pick(rng, (0, 1))
            given = self._latent(scene, "pictures", 1 - view, 1 - look)
        elif task == "other":
            task, look = drawn.others[view], 0
            given = self._latent(scene, "others", view)
        else:
            given = self._latent(scene, "maps", view, MAPS.index(task))
        said = "" if rng.random() < BARE else self._say(rng, drawn.looks[view][look])
        return _Sample([self._latent(scene, "pictures", view, look), given], prompt(said, task))

    def _views(self, rng: Random) -> _Sample:
        scene, first, look = self._draw(rng)
        order = (first, 1 - first)
        looks = [scene_views(scene, self.split).looks[view][look] for view in order]
        said = "" if rng.random() < BARE else self._say(rng, looks[0])
        pictures = [self._latent(scene, "pictures", view, look) for view in order]
        rays = scene_rays([look.camera for look in looks], pictures[0].shape[-1])
        return _Sample([pictures[0], rays[0], pictures[1], rays[1]], prompt(said, "views"))

    @staticmethod
    def _say(rng: Random, scene: Scene) -> str:
        return caption(scene, rng, leave_unsaid(rng, UNSAID))


def frames_of(kind: str, size: tuple[int, int]) -> list[Frame]:
    """The frames of a kind of batch, with `size` rows and columns of tokens."""
    held = [kind == "views" and n == 1 for n in range(FRAMES[kind])]  # the first camera's rays say nothing new
    return [Frame(size, sigma=0.0 if given else None, index=float(n)) for n, given in enumerate(held)]


def scene_rays(cameras: Sequence[Camera], size: int) -> torch.Tensor:
    """Ray frames (V, 16, size, size) of scenes' cameras, relative to the first."""
    return ray_frames(relative_rays(scene_poses(cameras), size, float(intrinsics(1)[0, 0])))


def scene_poses(cameras: Sequence[Camera]) -> torch.Tensor:
    """Camera-to-world matrices (V, 4, 4), their distances scaled as in training."""
    return scale_positions(camera_to_world(cameras))


@lru_cache(maxsize=4)
def latent_scale(folder: str | Path) -> float:
    """The autoencoder's `scaling_factor`, to two digits: one over the deviation of the first shard's pictures."""
    pictures = torch.stack(list(SceneLatents(folder).pictures(SHARD)))
    return round(1.0 / float(pictures.std()), 2)


def _choose(rng: Random, shares: dict[str, float]) -> str:
    place = rng.random() * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return name


def collate_batch(samples: Sequence[Any]) -> Batch:
    """The only sample, which is a batch already."""
    (batch,) = samples
    return batch
