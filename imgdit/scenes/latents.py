"""Scenes as latents: rendered and encoded once, kept in shards, read while a backbone trains.

    <folder>/index.json                    what the shards were made with; another autoencoder is refused
    <folder>/train-00000.safetensors       `SHARD` scenes: "images" (SHARD, VIEWS, LOOKS, C, h, w), "maps"
                                           (SHARD, VIEWS, MAPS, C, h, w), "others" (SHARD, VIEWS, C, h, w), float16

A shard is written beside and renamed, so several processes may fill one folder and a kill costs one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from imgdit.images.latents import encode_images
from imgdit.io.atomic import check_index, write_tensors
from imgdit.io.fingerprints import weights_hash
from imgdit.naming import check_name
from imgdit.scenes.geometry import Size, geometry, sides
from imgdit.scenes.render import rendering
from imgdit.scenes.shading import shade
from imgdit.scenes.tasks import from_scene
from imgdit.scenes.world import SPLITS, Scene, another_camera, another_look, pick

VIEWS = 2
"""Cameras of each scene."""
LOOKS = 3
"""Images of each view: the scene, in another style and place, and with other colours as well."""
MAPS = ("depth", "canny", "segmentation")
"""Conditions that all looks of a view share."""
OTHERS = ("boxes", "blur", "grey", "mask", "super_resolution")
"""Tasks of which each view has the condition of one, for its first look."""
SHARD = 64
"""Scenes in a file."""
SIZE = 128
"""Pixels per side, unless asked for otherwise."""
_FORMAT = "imgdit-scene-latents-1"


class SceneViews(NamedTuple):
    """What is drawn of one seed."""

    looks: tuple[tuple[Scene, ...], ...]
    """`VIEWS` x `LOOKS` scenes; the looks of a number show the same in both views."""
    others: tuple[str, ...]
    """The task of each view's other condition, of `OTHERS`."""


def scene_views(seed: int, split: str = "train") -> SceneViews:
    """The views and looks of a seed; the same on every machine."""
    scene, rng = Scene.sample(seed, split), Random(seed)
    looks = (scene, another_look(scene, rng), another_look(scene, rng, recolour=True))
    other = another_camera(scene, rng).camera
    return SceneViews(
        looks=(looks, tuple(look.with_camera(other) for look in looks)),
        others=tuple(pick(rng, OTHERS) for _ in range(VIEWS)),
    )


@torch.no_grad()
def encode_scene(
    vae: Any, seed: int, split: str = "train", size: Size = SIZE, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The latents of a seed, float16, by the names and shapes of a shard's row.

    Args:
        vae: autoencoder; its scaling is not applied, so that it can be chosen from the latents.
        seed, split: of the scene.
        size: pixels per side, or rows and columns.
        device: where to render and encode.
    """
    views, rng = scene_views(seed, split), Random(seed)
    rows: dict[str, list[torch.Tensor]] = {"pictures": [], "maps": [], "others": []}
    for looks, task in zip(views.looks, views.others):
        buffers = geometry([looks[0]], size, device, oversample=2)
        seen = rendering(buffers, [looks[0]])
        images = [seen.rgb[0], *(shade(buffers, [look])[0] for look in looks[1:])]
        maps = [from_scene(name, looks[0], rng, seen).condition for name in MAPS]
        other = from_scene(task, looks[0], rng, seen).condition[None]
        if tuple(other.shape[-2:]) != sides(size):  # super-resolution's small image
            other = F.interpolate(other, sides(size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = torch.cat([torch.stack([*images, *maps]), other]) * 2 - 1
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            latents = encode_images(vae, pixels) / vae.config.scaling_factor
        latents = latents.half().cpu()
        rows["pictures"].append(latents[:LOOKS])
        rows["maps"].append(latents[LOOKS : LOOKS + len(MAPS)])
        rows["others"].append(latents[-1])
    return {name: torch.stack(parts) for name, parts in rows.items()}


def cache_latents(
    vae: Any,
    folder: str | Path,
    scenes: int,
    split: str = "train",
    *,
    size: int = SIZE,
    part: tuple[int, int] = (1, 1),
    device: torch.device | str = "cpu",
) -> Path:
    """Render and encode scenes; shards that are there are kept.

    Args:
        vae: autoencoder.
        folder: of the shards.
        scenes: how many, from seed 0 on; whole shards are written.
        split: "train" or "heldout", see `Scene.sample`.
        size: pixels per side.
        part: (k, n): every nth shard, from the kth on; so n processes share the work.
        device: where to render and encode.

    Raises:
        ValueError: the folder holds latents of another autoencoder or size, or the disk is full; what is there stays.
    """
    check_name("split", split, SPLITS)
    number, of = part
    if scenes < 1 or not 1 <= number <= of:
        raise ValueError(f"at least one scene and a part k of n with 1 <= k <= n are needed, got {scenes} and {part}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vae = vae.to(device, memory_format=torch.channels_last).eval()
    _check_index(folder, weights_hash(vae, dtype=torch.float16), size)
    shards = range(number - 1, -(-scenes // SHARD), of)
    missing = [shard for shard in shards if not _shard(folder, split, shard).exists()]
    for shard in tqdm(missing, desc=f"{split} latents", unit="shard"):
        rows = [encode_scene(vae, shard * SHARD + row, split, size, device) for row in range(SHARD)]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        write_tensors(_shard(folder, split, shard), tensors)
    return folder


def _shard(folder: Path, split: str, shard: int) -> Path:
    return folder / f"{split}-{shard:05d}.safetensors"


def _check_index(folder: Path, autoencoder: str, size: int) -> None:
    origin: dict[str, Any] = {"format": _FORMAT, "autoencoder": autoencoder}
    if size != SIZE:  # left out otherwise, so that older caches stay valid
        origin["size"] = size
    check_index(folder, origin, "autoencoder")


class SceneLatents:
    """Cached latents of scenes 0 … n - 1.

    Args:
        folder: of `cache_latents`.
        split: as there.
        autoencoder: `fingerprint` of the autoencoder that they must be from; `None`: any, of any size.
        size: pixels per side that they must be of.

    Raises:
        ValueError: nothing is cached there, or of another autoencoder or size.
    """

    def __init__(self, folder: str | Path, split: str = "train", autoencoder: str | None = None, size: int = SIZE):
        self.folder, self.split = Path(folder), split
        shards = sorted(self.folder.glob(f"{split}-*.safetensors"))
        # Shards of a later part may be there already; what counts is the row without a gap.
        self.shards = next((i for i in range(len(shards)) if shards[i] != _shard(self.folder, split, i)), len(shards))
        if not self.shards:
            raise ValueError(f"{self.folder} holds no cached latents of the split {split!r}; make them first")
        if autoencoder is not None:
            _check_index(self.folder, autoencoder, size)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.shards * SHARD

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to worker processes

    def read(self, scene: int, name: str, *place: int) -> torch.Tensor:
        """Latents (C, h, w) float32: ("images", view, look), ("maps", view, map) or ("others", view).

        Raises:
            ValueError: a shard that was there is gone, or damaged.
        """
        shard, row = divmod(scene, SHARD)
        if shard not in self._open:
            path = _shard(self.folder, self.split, shard)
            try:
                self._open[shard] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read, though it was there before: {error}. Bring it back or make it again, and "
                    "resume"
                ) from error
        return self._open[shard].get_slice(name)[(row, *place)].float()

    def images(self, scenes: int) -> Iterator[torch.Tensor]:
        """The latents (C, h, w) of the first look of the first scenes."""
        for scene in range(min(scenes, len(self))):
            yield self.read(scene, "pictures", 0, 0)
