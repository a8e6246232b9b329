"""What features do on many prompts, computed in parts that stay on disk: a run that was killed goes on.

<folder>/parts/<hash>/survey-<first>.safetensors   densities, means and strongest activations of some prompts
<folder>/parts/<hash>/maps-<hash>-<first>.safetensors   heat maps of chosen features
<folder>/parts/<hash>/<number>.png                 the images

The hash is of everything that determines them: model, autoencoder, prompts, seed and arguments of the pipeline.

S timesteps, L latents, P prompts, m chosen features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imgdit.io.atomic import write_tensors, write_text, written_whole
from imgdit.io.checkpoints import read_tensors
from imgdit.io.safe_json import read_object
from imgdit.sae.features import FeatureSurvey, HeatMaps, contrast_features, heat_maps, survey_features
from imgdit.sae.fingerprints import model_fingerprint
from imgdit.sae.hooks import denoiser_of
from imgdit.sae.model import SparseAutoencoder

PART = 16
"""Prompts of a part."""

Caption = Callable[[list[Image.Image]], Sequence[str]]


class FeatureParts:
    """Surveys and heat maps of an autoencoder's features on prompts.

    Args:
        pipe: the pipeline that the autoencoder was trained on.
        sae: with a hookpoint.
        prompts: texts.
        folder: of all that is written.
        seed: of the first prompt.
        call: arguments of the pipeline.
    """

    def __init__(
        self, pipe: Any, sae: SparseAutoencoder, prompts: Sequence[str], folder: Path, *, seed: int = 0, **call: Any
    ) -> None:
        place = sae.config.hookpoint
        if place is None:
            raise ValueError("the SAE names no hookpoint; set config.hookpoint to the module path that it reads")
        if not prompts:
            raise ValueError("there is nothing to generate images of; give at least one prompt")
        self.pipe, self.sae, self.prompts, self.seed, self.call = pipe, sae, list(prompts), seed, call
        model = model_fingerprint(denoiser_of(pipe, place))
        name = _digest(sae.fingerprint(), model, self.prompts, seed, call)
        self.parts = folder / "parts" / name
        self.parts.mkdir(parents=True, exist_ok=True)

    def _firsts(self) -> range:
        return range(0, len(self.prompts), PART)

    def survey(self) -> FeatureSurvey:
        """See `survey_features`."""
        found = []
        for first in self._firsts():
            lines, file = self.prompts[first : first + PART], self.parts / f"survey-{first:06d}.safetensors"
            if not file.is_file():
                part = survey_features(self.pipe, self.sae, lines, seed=self.seed + first, **self.call)
                tensors = {**part._asdict(), "timesteps": torch.tensor(part.timesteps, dtype=torch.float64)}
                write_tensors(file, {key: value.contiguous() for key, value in tensors.items()})
            stored = read_tensors(file)
            times = tuple(stored.pop("timesteps").tolist())
            found.append((len(lines), FeatureSurvey(times, **stored)))
        total = sum(count for count, _ in found)
        return FeatureSurvey(
            found[0][1].timesteps,
            torch.stack([part.density * (count / total) for count, part in found]).sum(0),
            torch.stack([part.means * (count / total) for count, part in found]).sum(0),
            torch.cat([part.strongest for _, part in found]),
            torch.cat([part.places for _, part in found]),
        )

    def contrast(self, against: Sequence[str]) -> torch.Tensor:
        """Scores (S, L), see `contrast_features`."""
        file = self.parts / f"contrast-{_digest(list(against))}.safetensors"
        if not file.is_file():
            found = contrast_features(self.pipe, self.sae, self.prompts, against, seed=self.seed, **self.call)
            write_tensors(file, {"scores": found.scores("prompts").contiguous()})
        return read_tensors(file)["scores"]

    def heat_maps(self, features: Sequence[int], wanted: Collection[int]) -> HeatMaps:
        """See `heat_maps`.

        Args:
            wanted: numbers of prompts whose image is asked for; others of their part come along. Maps of the rest are
                0, and their image is `None`.
        """
        maps: list[torch.Tensor | None] = []
        images: list[Image.Image | None] = []
        name = _digest(list(features))
        for first in self._firsts():
            numbers = range(first, min(first + PART, len(self.prompts)))
            if not set(numbers) & set(wanted):
                maps.append(None)
                images += [None] * len(numbers)
                continue
            file = self.parts / f"maps-{name}-{first:06d}.safetensors"
            if not file.is_file():
                self._generate(features, numbers, file)
            maps.append(read_tensors(file).get("maps"))
            for number in numbers:
                with Image.open(self.image(number)) as opened:
                    images.append(opened.convert("RGB"))
        shape = next((part.shape[1:] for part in maps if part is not None), None)
        if shape is None:
            return HeatMaps(tuple(features), None, images)
        sizes = [min(PART, len(self.prompts) - first) for first in self._firsts()]
        filled = [torch.zeros(n, *shape) if part is None else part for n, part in zip(sizes, maps)]
        return HeatMaps(tuple(features), torch.cat(filled), images)

    def _generate(self, features: Sequence[int], numbers: range, file: Path) -> None:
        lines, seed = [self.prompts[number] for number in numbers], self.seed + numbers.start
        shown = heat_maps(self.pipe, self.sae, lines, features, seed=seed, output_type="pil", **self.call)
        for number, image in zip(numbers, shown.images):
            with written_whole(self.image(number)) as temporary:
                image.save(temporary, "PNG")
        # Last: it says that the images are there. Of a text there is no map.
        write_tensors(file, {} if shown.maps is None else {"maps": shown.maps.contiguous()})

    def image(self, number: int) -> Path:
        """File of a prompt's image."""
        return self.parts / f"{number:06d}.png"

    def captions(self, shown: HeatMaps, caption: Caption, maker: str) -> list[str | None]:
        """What a model says of the images that there are.

        Args:
            caption: of images.
            maker: name of the model.
        """
        file = self.parts / f"captions-{_digest(maker)}.json"
        known: dict[str, Any] = read_object(file) if file.is_file() else {}
        missing = [n for n, image in enumerate(shown.images) if image is not None and str(n) not in known]
        for first in range(0, len(missing), PART):
            part = missing[first : first + PART]
            known |= dict(zip(map(str, part), map(str, caption([shown.images[n] for n in part])), strict=True))
            write_text(file, json.dumps(known, ensure_ascii=False))
        return [known.get(str(n)) for n in range(len(shown.images))]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
