"""Images of the unlearning benchmark, on disk under a name that everything which makes them decides.

<folder>/<method>/<concepts>-<hash>/   the images in UnlearnCanvas' layout, and
    info.json                          what the hash stands for, and what making ready cost
    seen-<hash of the probe>.json      what the probe saw
    judged-<hash of the judge>.json    what a model answered that was asked as well
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from imgdit.benchmarks.speed.timing import compare
from imgdit.benchmarks.unlearning.attacks import Attack
from imgdit.benchmarks.unlearning.labels import QUESTIONS, judge_classifier
from imgdit.benchmarks.unlearning.methods.catalogue import METHODS
from imgdit.benchmarks.unlearning.methods.material import Material, Unlearned
from imgdit.benchmarks.unlearning.plan import Cell, Seen, cells, find_image, read_folder
from imgdit.benchmarks.unlearning.prompt_attack import attack_prompt
from imgdit.images import open_image, to_image, to_pixels
from imgdit.io.atomic import write_text, written_whole
from imgdit.io.fingerprints import weights_hash
from imgdit.io.safe_json import read_object
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.world import OBJECTS, STYLES

NOTHING = "nothing"
"""What the probe calls what it does not see."""
MORE_QUESTIONS = ("left colour", "background", "right object")
"""What the probe is asked beside `QUESTIONS`, in the order of `Look`."""
TIMED_STEPS, TIMED_ROUNDS = 4, 3
"""Steps of the images that a method's time is measured on, and pairs of them."""


class Album(NamedTuple):
    """Images of one method and some concepts."""

    folder: Path
    setup_seconds: float
    """To make the method ready for the concepts; without the statistics, which serve all."""
    size: int
    """Bytes beside the model."""
    time_ratio: float | None
    """Time of a call over the unmodified model's, where it was measured."""


class Look(NamedTuple):
    """What the probe saw in an image."""

    seen: Seen
    pixels: float
    """Root mean square difference of the unmodified model's image from the same noise, of values in [0, 1]."""
    features: float
    """1 − cosine of the probe's features of the two."""
    colour: str
    """Of the object, or of the left one of two."""
    background: str
    second: str
    """The right one of two objects; `NOTHING`: there is one."""

    @property
    def artefact(self) -> bool:
        """Whether the probe sees no object or no style at all."""
        return NOTHING in (self.seen.style, self.seen.object)


def digest(*parts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class GeneratedImages:
    """Generates images that are not there yet.

    Args:
        pipe: a pipeline of the scenes.
        material: what methods learn from.
        folder: of all images.
        steps, guidance: of the sampler.
        batch: images at once; each has its own noise, so it changes nothing.
    """

    def __init__(
        self, pipe: Any, material: Material, folder: Path, *, steps: int, guidance: float, batch: int = 8
    ) -> None:
        self.pipe, self.material, self.folder, self.batch = pipe, material, folder, batch
        self.call = {"num_inference_steps": steps, "guidance_scale": guidance}
        saes = {hookpoint: sae.fingerprint() for hookpoint, sae in material.saes.items()}
        learned = {name: list(lines) for kind in material.prompts.values() for name, lines in kind.items()}
        self.model = weights_hash(pipe.transformer, pipe.vae, pipe.text_encoder)
        # By whether a method reads autoencoders: images of those that read none are good beside any.
        self.lessons = {
            needs_saes: digest(saes if needs_saes else {}, learned, dict(material.call), material.seed)
            for needs_saes in (False, True)
        }
        # A cell's prompt and noise are functions of its name: some stand for the functions.
        self.asked = digest([[cell.prompt, cell.noise] for cell in cells([0])])

    def album(
        self,
        method: str,
        concepts: Sequence[str],
        wanted: Sequence[Cell],
        settings: Mapping[str, Any] | None = None,
        *,
        timed: bool = False,
        attack: Attack | None = None,
    ) -> Album:
        """Images of the cells under a method.

        Args:
            settings: of the method; the first of its grid by default.
            timed: measure what a call costs, if images have to be generated.
            attack: on the method.
        """
        chosen = METHODS[method]
        settings = dict(chosen.grid[0] if settings is None else settings)
        # The unmodified model learns nothing, so its images are good for any material.
        lessons = None if method == "none" else self.lessons[chosen.needs_saes]
        key = {
            "model": self.model, "method": method, "settings": settings, "concepts": list(concepts),
            "lessons": lessons, "asked": self.asked, "call": self.call, "attack": attack is not None and attack.key,
        }  # fmt: skip
        if chosen.rule > 1:
            key["rule"] = chosen.rule
        folder = self.folder / method / f"{'+'.join(concepts) or 'all'}-{digest(key)}"
        folder.mkdir(parents=True, exist_ok=True)
        info_file = folder / "info.json"
        info = read_object(info_file) if info_file.is_file() else None
        missing = [cell for cell in wanted if find_image(folder, cell) is None]
        if missing or info is None or (timed and info["time_ratio"] is None):
            start = time.perf_counter()
            unlearned = chosen.prepare(self.pipe, concepts, self.material, **settings)
            seconds = time.perf_counter() - start
            ratio = self._time_ratio(unlearned, wanted) if timed else None
            info = {**key, "setup_seconds": seconds, "size": unlearned.size, "time_ratio": ratio}
            write_text(info_file, json.dumps(info, indent=1))
            self._make(folder, unlearned, missing, attack)
        return Album(folder, info["setup_seconds"], info["size"], info["time_ratio"])

    def _make(self, folder: Path, unlearned: Unlearned, missing: Sequence[Cell], attack: Attack | None) -> None:
        optimised = attack is not None and attack.kind == "embedding"
        size = 1 if optimised else self.batch
        name = "/".join(folder.parts[-2:])
        for first in tqdm(range(0, len(missing), size), desc=name, disable=None):
            group = missing[first : first + size]
            inputs = {"prompt": [cell.prompt for cell in group]} if attack is None else attack.inputs(group)
            if optimised:
                # What the attack aims at is the image that the unmodified model makes of the prompt.
                latents = self._sample(group, inputs, output_type="latent")
            with unlearned.attach(self.pipe) as call:
                if optimised:
                    inputs = dict(attack_prompt(self.pipe, group[0].prompt, latents, seed=group[0].noise))
                images = self._sample(group, {**inputs, **call})
            for cell, image in zip(group, images):
                with written_whole(folder / f"{cell.name}.png") as file:
                    to_image(image).save(file, format="PNG")

    def _sample(
        self, group: Sequence[Cell], inputs: Mapping[str, Any], output_type: str = "pt", **call: Any
    ) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(cell.noise) for cell in group]
        options = {**self.call, **inputs, **call}
        return self.pipe(generator=generators, output_type=output_type, **options).images

    def _time_ratio(self, unlearned: Unlearned, wanted: Sequence[Cell]) -> float:
        """What a call costs over the same call of the unmodified model."""
        group = wanted[: self.batch]
        inputs = {"prompt": [cell.prompt for cell in group]}

        def changed() -> torch.Tensor:
            with unlearned.attach(self.pipe) as call:
                return self._sample(group, {**inputs, **call}, "latent", num_inference_steps=TIMED_STEPS)

        def plain() -> torch.Tensor:
            return self._sample(group, inputs, "latent", num_inference_steps=TIMED_STEPS)

        device = self.pipe.transformer.device
        return compare("a call", "unmodified", changed, plain, rounds=TIMED_ROUNDS, device=device).ratio


class Eyes:
    """The probe, and what it has seen already."""

    def __init__(self, probe: SceneProbe) -> None:
        self.probe, self.name = probe, f"seen-{weights_hash(probe)}.json"

    def looks(self, folder: Path, wanted: Sequence[Cell], plain: Path, batch: int = 32) -> list[Look]:
        """What a folder's images show, and how far they are from those in `plain`."""
        file = folder / self.name
        stored: dict[str, Any] = read_object(file) if file.is_file() else {}
        # Earlier versions asked the probe less.
        known = {name: row for name, row in stored.items() if len(row) == len(Look._fields) + 1}
        new = [cell for cell in wanted if cell.name not in known]
        for first in range(0, len(new), batch):
            known |= self._look(folder, new[first : first + batch], plain)
        if new:
            write_text(file, json.dumps(known))
        rows = [(cell, known[cell.name]) for cell in wanted]
        return [Look(Seen(cell, row[0], row[1]), *row[2:]) for cell, row in rows]

    @torch.no_grad()
    def _look(self, folder: Path, group: Sequence[Cell], plain: Path) -> dict[str, Any]:
        generated, before = _images(folder, group), _images(plain, group)
        reading, original = self.probe(generated * 2 - 1), self.probe(before * 2 - 1)
        pixels = (generated - before).square().flatten(1).mean(1).sqrt().tolist()
        features = (1 - F.cosine_similarity(reading.features, original.features)).tolist()
        called = [
            [self.probe.questions[question][n] for n in reading.answers[question].argmax(1).tolist()]
            for question in (*QUESTIONS.values(), *MORE_QUESTIONS)
        ]
        rows = zip(group, pixels, features, *called)
        return {cell.name: [style, kind, round(p, 5), round(f, 5), *more] for cell, p, f, style, kind, *more in rows}


class JudgeEyes:
    """A model that answers questions about images, and what it has said already.

    Args:
        pipe: with `choose`, see `load_image_text_pipeline`.
    """

    def __init__(self, pipe: Any) -> None:
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.name = f"judged-{weights_hash(*models)}.json"
        labels = {"style": STYLES, "object": OBJECTS}
        self.classify = {domain: judge_classifier(pipe, domain, names) for domain, names in labels.items()}

    def seen(self, folder: Path, wanted: Sequence[Cell]) -> list[Seen]:
        """What a folder's images show."""
        file = folder / self.name
        known: dict[str, Any] = read_object(file) if file.is_file() else {}
        new = [cell for cell in wanted if cell.name not in known]
        if new:
            for one in read_folder(folder, new, self.classify["style"], self.classify["object"]):
                known[one.cell.name] = [one.style, one.object]
            write_text(file, json.dumps(known))
        return [Seen(cell, *known[cell.name]) for cell in wanted]


def _images(folder: Path, group: Sequence[Cell]) -> torch.Tensor:
    """(N, 3, S, S) in [0, 1]."""
    return torch.cat([to_pixels(open_image(folder / f"{cell.name}.png")) for cell in group])
