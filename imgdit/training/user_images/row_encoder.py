"""A row of people's data to latents and embeddings, through caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from imgdit.cameras import FOCAL_LENGTH, RAY_CHANNELS, ray_frames, relative_rays, scale_positions
from imgdit.data.opening import decode_image
from imgdit.data.rows import Blob, Row
from imgdit.images import fit, to_image, to_pixels
from imgdit.images.fitting import SHARP, Size
from imgdit.images.preprocess import preprocess
from imgdit.io.tensor_cache import TensorCache, tensor_key
from imgdit.tasks import task_caption
from imgdit.training.user_images.encoder import EncodedText, Encoder
from imgdit.training.user_images.index import IndexedImage
from imgdit.training.user_images.settings import UserImagesSettings


class Caches(NamedTuple):
    """What was computed before."""

    latents: TensorCache
    texts: TensorCache


class RowEncoder:
    """What rows are trained on as, computed once where there is a cache.

    Args:
        settings: of the data.

    Raises:
        ValueError: there is no such model, or the cache is of another one.
    """

    def __init__(self, settings: UserImagesSettings):
        self.settings = settings
        self.encoder = Encoder(settings.model)
        self.caches: Caches | None = None

    def open_caches(self) -> None:
        """Use the caches of the settings' folder, if there is one.

        Raises:
            ValueError: they were filled by another model.
        """
        if self.settings.cache is not None:
            folder = Path(self.settings.cache)
            self.caches = Caches(
                TensorCache(folder / "latents", self.encoder.origin("vae")),
                TensorCache(folder / "text", self.encoder.origin("text_encoder", "tokenizer")),
            )

    def frames(self, image: IndexedImage) -> list[torch.Tensor]:
        """Latents (C, h, w) of a row's frames: views, each with its camera's rays if they are asked for, condition."""
        latents = [self._latents(key, pixels) for key, pixels in self._encoded_images(image)]
        if not self.settings.cameras:
            return latents
        assert image.row.cameras is not None
        views = self.settings.views
        poses = scale_positions(image.row.cameras[:views])
        focal = image.row.focal_length or FOCAL_LENGTH
        rays = ray_frames(relative_rays(poses, latents[0].shape[-1], focal))
        if latents[0].shape[0] != RAY_CHANNELS:
            raise ValueError(f"rays fill {RAY_CHANNELS} latent channels, the autoencoder has {latents[0].shape[0]}")
        return [grid for pair in zip(latents, rays) for grid in pair] + latents[views:]

    def black(self, size: Size) -> torch.Tensor:
        """Latents (C, h, w) of a black image, width and height in pixels: what a dropped condition becomes."""
        return self._latents(tensor_key("black", size), lambda: torch.zeros(3, size[1], size[0]))

    def captions(self, row: Row) -> list[str]:
        """Every caption that a row may be trained with, with its task's token."""
        return [task_caption(caption, self.settings.task) for caption in row.captions or ("",)]

    def text(self, caption: str) -> EncodedText:
        """Embeddings of a caption."""
        if self.caches is None:
            return self.encoder.text(caption)
        cache = self.caches.texts
        keys = {part: tensor_key(caption, part) for part in self.encoder.text_parts}
        if any(key not in cache for key in keys.values()):
            encoded = self.encoder.text(caption)
            for part, key in keys.items():
                cache.add(key, getattr(encoded, part))
        return EncodedText(**{part: cache.read(key) for part, key in keys.items()})

    def is_cached(self, image: IndexedImage) -> bool:
        """Whether everything of a row is in the caches, which are open."""
        assert self.caches is not None
        latents, texts = self.caches
        return all(key in latents for key, _ in self._encoded_images(image)) and all(
            tensor_key(caption, "pooled") in texts for caption in self.captions(image.row)
        )

    def fill(self, image: IndexedImage) -> None:
        """Compute what the caches lack of a row."""
        self.frames(image)
        if self.settings.condition is not None and self.settings.mode != "frame":
            self.black(image.bucket)
        for caption in self.captions(image.row):
            self.text(caption)

    def flush(self) -> None:
        """Write what was added to the caches, which are open."""
        assert self.caches is not None
        for cache in self.caches:
            cache.flush()

    def _encoded_images(self, image: IndexedImage) -> list[tuple[str, Callable[[], torch.Tensor]]]:
        """Key, and what gives the pixels (3, H, W), of each frame that has to be encoded. The words in the keys stay
        as they are: caches are older than this version."""
        settings, (row, inspection, size) = self.settings, image

        def fitted(blob: Blob, sharp: bool = False) -> Callable[[], torch.Tensor]:
            resample = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
            return lambda: to_pixels(fit(decode_image(blob.read()).image, size, resample))[0]

        hashes = inspection.hashes
        blobs = {"picture": row.image, **{str(n): row.frames[n] for n in range(settings.views - 1)}}
        found = [(tensor_key("picture", hashes[name], size), fitted(blob)) for name, blob in blobs.items()]
        condition, preprocessor = settings.condition, settings.preprocessor
        if condition is not None and condition in row.conditions:
            sharp = condition in SHARP
            key = tensor_key("condition", hashes[condition], size, sharp)
            found.append((key, fitted(row.conditions[condition], sharp)))
        elif condition is not None:
            assert preprocessor is not None
            options = sorted(settings.preprocessor_options.items())
            key = tensor_key("computed", hashes["picture"], size, preprocessor, options)
            found.append((key, lambda: self._computed(preprocessor, fitted(row.image)())))
        return found

    def _computed(self, preprocessor: str, pixels: torch.Tensor) -> torch.Tensor:
        """A condition by its preprocessor, at the image's size."""
        computed = preprocess(preprocessor, to_image(pixels), **self.settings.preprocessor_options)[0]
        if computed.shape == pixels.shape:
            return computed
        return to_pixels(to_image(computed).resize((pixels.shape[2], pixels.shape[1]), Image.Resampling.BICUBIC))[0]

    def _latents(self, key: str, pixels: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.caches is None:
            return self.encoder.latents(pixels()).float()
        cache = self.caches.latents
        if key not in cache:
            cache.add(key, self.encoder.latents(pixels()))
        return cache.read(key).float()
