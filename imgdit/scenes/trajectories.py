"""Data of a few-step edition: states on the guided path of a model from noise to images of scenes' captions.

    <folder>/index.json                    what made the states; another model or guidance is refused
    <folder>/train-00000.safetensors       `SHARD` paths: "states" (SHARD, K + 1, N, C) float16 and their text

The paths are computed once and read many times: a path of 12 levels costs as much as seven steps of the student.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.defaults import GUIDANCE
from imgdit.frames import Frame
from imgdit.io.atomic import check_index, write_tensors
from imgdit.io.fingerprints import weights_hash
from imgdit.io.order import mixed_seed
from imgdit.layout import FrameLayout
from imgdit.models.functional import PATCH
from imgdit.models.mmdit import MMDiT
from imgdit.naming import check_name
from imgdit.scenes.captions import caption, leave_out
from imgdit.scenes.training_frames import UNSAID, encode_texts, scene_components
from imgdit.scenes.world import SPLITS, Scene, pick
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training.batches import Batch, Text
from imgdit.training.few_steps import guided_velocity, ode_path, path_levels, straight_line

SHARD = 16
"""Paths in a file, and samples of a batch."""
HELD_OUT = 2 * SHARD
"""Paths of the held-out split."""
_FORMAT = "imgdit-scene-trajectories-1"


class SceneTrajectories:
    """Endless: sample i is a `Batch`, the same for the same i: `SHARD` states of paths with one prompt each, as the
    data and noise of the line to the state one student's step later (`straight_line`).

    Args:
        folder: of the paths; those that are missing are computed first.
        paths: of the training split; whole files are written.
        model: pipeline folder, "embedded" for the one that comes along.
        guidance_scale: of the paths, which the student then has without guidance.
        steps: of the student.
        substeps: levels of the path per step of the student.
        split: "train" or "heldout".

    Raises:
        ValueError: the folder holds paths of another model, guidance or levels.
    """

    def __init__(
        self,
        folder: str = "outputs/scenes/trajectories",
        paths: int = 640,
        model: str = EMBEDDED,
        guidance_scale: float = GUIDANCE,
        steps: int = 4,
        substeps: int = 3,
        split: str = "train",
    ):
        check_name("split", split, SPLITS)
        self.steps, self.substeps, self.split = steps, substeps, split
        self.folder = Path(folder)
        self.shards = -(-(HELD_OUT if split == "heldout" else paths) // SHARD)
        source = str(SCENES) if model == EMBEDDED else model
        scheduler = MultiFrameFlowMatchScheduler.from_pretrained(source, subfolder="scheduler")
        transformer = MMDiT.from_pretrained(source, subfolder="transformer").eval()
        side = transformer.config.sample_size // PATCH
        self.levels = torch.tensor(path_levels(scheduler, steps * substeps, side * side))
        self.folder.mkdir(parents=True, exist_ok=True)
        levels = [round(level, 6) for level in self.levels.tolist()]
        origin = {
            "format": _FORMAT, "model": weights_hash(transformer, dtype=torch.float16),
            "guidance_scale": guidance_scale, "levels": levels,
        }  # fmt: skip
        check_index(self.folder, origin, "model")
        missing = [shard for shard in range(self.shards) if not self._path(shard).exists()]
        if missing:
            parts = scene_components(model)
            for shard in tqdm(missing, desc=f"{split} trajectories", unit="shard"):
                rows = _compute(transformer, parts, self.levels, guidance_scale, shard, split)
                write_tensors(self._path(shard), rows)
        self.layout = partial(FrameLayout.build, [Frame((side, side))])
        self._read = lru_cache(maxsize=None)(load_file)

    def __getitem__(self, index: int) -> Batch:
        rng = Random(mixed_seed(index, 0))
        rows = self._read(self._path(pick(rng, range(self.shards))))
        states = rows["states"].float()
        parts = [k % self.steps for k in range(len(states))]
        rng.shuffle(parts)
        first = torch.tensor(parts) * self.substeps
        every = torch.arange(len(states))
        level, after = self.levels[first][:, None], self.levels[first + self.substeps][:, None]
        data, noise = straight_line(states[every, first], states[every, first + self.substeps], level, after)
        text = Text(rows["embeddings"].float(), rows["pooled"].float(), rows["mask"].bool())
        return Batch(data, self.layout(text.embeddings.shape[1]), text, sigmas=level, noise=noise)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{shard:05d}.safetensors"


@torch.no_grad()
def _compute(
    transformer: MMDiT, parts: tuple[Any, Any, Any], levels: torch.Tensor, guidance: float, shard: int, split: str
) -> dict[str, torch.Tensor]:
    """The rows of a file."""
    scenes = range(shard * SHARD, (shard + 1) * SHARD)
    rngs = [Random(mixed_seed(scene, 26)) for scene in scenes]
    prompts = [caption(Scene.sample(s, split), rng, leave_out(rng, UNSAID)) for s, rng in zip(scenes, rngs)]
    _, text_encoder, tokenizer = parts
    text, empty = encode_texts(text_encoder, tokenizer, prompts)
    side = transformer.config.sample_size // PATCH
    layout = FrameLayout.build([Frame((side, side))], text.embeddings.shape[1])
    generator = torch.Generator().manual_seed(mixed_seed(shard, 27))
    start = torch.randn(SHARD, side * side, transformer.config.in_channels, generator=generator)

    def velocity(states: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return guided_velocity(transformer, states, sigmas, text, empty, layout, guidance)

    states = ode_path(velocity, start, levels.expand(SHARD, -1))
    assert text.mask is not None
    return {
        "states": states.half(), "embeddings": text.embeddings.half(), "pooled": text.pooled.half(),
        "mask": text.mask.to(torch.uint8),
    }  # fmt: skip
