"""Images to latents and captions to embeddings, by the components of a pipeline's folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils import logging

from imgdit import compat
from imgdit.family import TokenFormat, family_named, prompt_encodings, refused_trainings
from imgdit.hub import find_pipeline
from imgdit.images.latents import encode_images
from imgdit.io.fingerprints import folder_hash
from imgdit.io.safe_json import read_object
from imgdit.models.functional import PATCH, unpack
from imgdit.training.stock import transformer_class


class EncodedText(NamedTuple):
    """One caption."""

    embeddings: torch.Tensor
    """(T, J): real tokens only, where the model has a mask. Several layers of a text encoder lie side by side."""
    pooled: torch.Tensor
    """(P,); (0,) of models that have none."""
    mask: torch.Tensor | None = None
    """Boolean (T,), false on padding, of models that read padded text; `None`: the tokens are real ones."""


class Encoder:
    """Autoencoder and text encoders of a pipeline folder, loaded when something has to be encoded.

    Every image and caption is encoded alone, so that what comes out depends on nothing else.

    Args:
        model: folder of a pipeline in diffusers' layout, a repository on the Hub, or "embedded".
    """

    def __init__(self, model: str):
        try:
            found = find_pipeline(model)
        except ValueError as error:
            raise ValueError(f"model is neither a pipeline's folder nor on the Hub: {error}") from error
        self.folder = Path(found)
        if not self.folder.is_dir():
            from huggingface_hub import snapshot_download

            kept = ["*.json", "vae/*", "text_encoder*/*", "tokenizer*/*", "text_processor/*"]
            self.folder = Path(snapshot_download(found, allow_patterns=kept))
        index = read_object(self.folder / "model_index.json")
        self.name = index["_class_name"]
        """Class of the pipeline."""
        encodings, reason = prompt_encodings(), refused_trainings().get(self.name)
        if reason is not None:
            raise ValueError(f"{self.folder} is of a {self.name}, which is not trained: {reason}")
        if self.name not in encodings:
            raise ValueError(f"{self.folder} is of a {self.name}; expected one of {', '.join(encodings)}")
        self._encoding = encodings[self.name]
        cuda = torch.cuda.is_available()
        self.device, self.dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "pipe"}  # workers load it if need be

    def load(self, **options: Any) -> Any:
        """The pipeline without its transformer; `options` of its `from_pretrained`."""
        own = self.name in ("ImgDiTPipeline", "OneDiffusionPipeline")
        owner = compat.DiffusionPipeline if own else diffusers.DiffusionPipeline
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # a transformer that is not there is no news
        try:
            return owner.from_pretrained(self.folder, transformer=None, **options)
        finally:
            logging.set_verbosity(level)

    @cached_property
    def pipe(self) -> Any:
        """The pipeline without its transformer, as it encodes."""
        pipe = self.load(dtype=self.dtype)
        if self._transformer == "NextDiT":  # as OneDiffusion's reference, which ignores it
            pipe.vae.register_to_config(shift_factor=None)
        return pipe.to(self.device)

    def unload(self) -> None:
        """Free the pipeline's memory, for what is trained; it is loaded again if something has to be encoded."""
        if self.__dict__.pop("pipe", None) is not None and self.device == "cuda":
            torch.cuda.empty_cache()

    @property
    def _transformer(self) -> str:
        """Class of the transformer; empty where the folder has none."""
        config = self.folder / "transformer" / "config.json"
        return read_object(config)["_class_name"] if config.exists() else ""

    @cached_property
    def cell(self) -> int:
        """Pixels per side of a latent cell; from the configuration, so that cached latents need no autoencoder."""
        return cell_of(read_object(self.folder / "vae" / "config.json"))

    def origin(self, *folders: str) -> dict[str, str]:
        """What a cache has to know about components: a hash of their files, and what they compute in."""
        parts = sorted(part for name in folders for part in self.folder.glob(f"{name}*") if part.is_dir())
        known = {"model": folder_hash(parts), "dtype": str(self.dtype).removeprefix("torch.")}
        if "vae" in folders and self._tokens is not None:
            known["tokens"] = self._transformer
        return known

    @torch.no_grad()
    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """An image (3, H, W) in [0, 1] to scaled latents (C, h, w), rounded to float16 as caches keep them.

        Their tokens, as `pack` makes them, are what the model reads: those of a transformer that is trained in its own
        class have its normalisation and order of features.
        """
        vae, pixels = self.pipe.vae, image[None].to(self.device) * 2 - 1
        if self._tokens is None:
            return encode_images(vae, pixels)[0].half().cpu()
        grid = (image.shape[1] // (self.cell * PATCH), image.shape[2] // (self.cell * PATCH))
        tokens = self._tokens.encode(_empty_model(self.folder), vae, pixels.to(vae.dtype), None)
        return unpack(tokens, PATCH, grid)[0].half().cpu()

    @property
    def _tokens(self) -> TokenFormat | None:
        """How images become tokens of a transformer that is trained in its own class; `None` for others."""
        family = family_named(self._transformer)
        return None if family is None or family.training is None else family.tokens

    @property
    def prompt_length(self) -> int | None:
        """Text tokens of a prompt at most, of a transformer that is trained in its own class; `None` for others."""
        return None if self._tokens is None else self._encoding.length

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the parts of an `EncodedText` that are not `None`."""
        return EncodedText._fields if self._encoding.keeps_padding else EncodedText._fields[:-1]

    @torch.no_grad()
    def text(self, caption: str) -> EncodedText:
        """A caption."""
        places, others, keeps_padding, _ = self._encoding
        found = self.pipe.encode_prompt(caption, **dict.fromkeys(others, caption))
        embeddings = found[places[0]][0].flatten(1).cpu()
        pooled = torch.empty(0) if places[1] is None else found[places[1]][0].cpu()
        mask = None if places[2] is None else found[places[2]]  # `None` too where all tokens are real
        if keeps_padding:
            assert mask is not None
            return EncodedText(embeddings, pooled, mask[0].bool().cpu())
        return EncodedText(embeddings if mask is None else embeddings[mask[0].bool().cpu()], pooled)


def cell_of(config: Mapping[str, Any]) -> int:
    """Pixels per side of a latent cell, by the configuration of an autoencoder."""
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)


@lru_cache(maxsize=1)
def _empty_model(folder: Path) -> Any:
    """The transformer of a folder without weights: what token formats ask about its sizes."""
    owner, config = transformer_class(str(folder), "transformer")
    with torch.device("meta"):
        return owner.from_config(config)
