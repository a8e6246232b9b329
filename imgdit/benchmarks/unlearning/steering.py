"""`imgdit bench sae-steering`: do features of sparse autoencoders detect concepts, and do they steer images?

"Look But Don't Touch" (arXiv 2606.31699) says that they detect and do not steer. Each direction is added to all tokens
of a hookpoint at the same norm, up in images without the concept and down in images with it, and a probe says how
probable the concept is in the image.

B images, n tokens, d width, S timesteps, U selected features.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from imgdit import DiffusionPipeline
from imgdit.benchmarks.unlearning.detection import (
    DIRECTIONS,
    Directions,
    Recorded,
    detection,
    learn_directions,
    record,
)
from imgdit.benchmarks.unlearning.images import digest
from imgdit.benchmarks.unlearning.labels import QUESTIONS
from imgdit.io.atomic import write_text
from imgdit.io.fingerprints import weights_hash
from imgdit.io.safe_json import read_object
from imgdit.sae.edits import ChosenFeatures
from imgdit.sae.hooks import hooked
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.streams import Tokens
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.labels import LABELS, kind_of, label_prompts
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.world import OBJECTS, STYLES

SCALED = "features scaled"
STEERED = (SCALED, *DIRECTIONS)
"""What is added: the part of each token that the selected features make, or one of `DIRECTIONS` to all tokens."""
LEARN, TEST = 7, 11
"""Seeds of the prompts that directions are learned from and measured on."""
LEARN_NOISE, TEST_NOISE = 0, 10_000
"""Seeds of their first images."""


@dataclass(frozen=True)
class SteeringPlan:
    """How much is measured."""

    concepts: tuple[str, ...] = (*STYLES, *OBJECTS)
    """Styles and objects."""
    prompts: int = 8
    """Of each label to learn from, and as many others to detect it in."""
    images: int = 4
    """For each concept, hookpoint, direction and strength, up and down."""
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    """Norm of what is added to a token, in units of the root mean square norm of the hookpoint's tokens."""
    top_n: int = 4
    """Features per timestep."""
    steps: int = 20
    """Of the sampler."""
    guidance: float = 3.0
    """Scale."""

    def __post_init__(self) -> None:
        for concept in self.concepts:
            kind_of(concept)
        for name in ("prompts", "images", "top_n", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.concepts:
            raise ValueError("there is nothing to steer; give at least one concept")
        if not self.strengths or not all(math.isfinite(one) and one > 0 for one in self.strengths):
            raise ValueError(f"strengths must be positive numbers, got {self.strengths}")

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance}


QUICK = SteeringPlan(("neon", "sketch", "cube", "torus"), prompts=2, images=1, strengths=(0.2, 0.8), steps=6)


def run(model: Path, probe: Path, saes: Path, out: Path, plan: SteeringPlan) -> dict[str, Any]:
    """Measure detection and steering; `out` gets steering.json, and concepts that are measured there already are not
    measured again.

    Args:
        model, probe, saes: folders of the pipeline, of the `SceneProbe` and of the SAEs.
        out: folder.
        plan: how much.

    Raises:
        ValueError: no autoencoders there, or a transcoder, whose features are not in what it reads.
    """
    pipe = DiffusionPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    found = ConceptUnlearner.from_pretrained(saes).saes
    for place, sae in found.items():
        if sae.config.transcode:
            raise ValueError(f"{place} has a transcoder; steering is measured with autoencoders of a module's output")
        sae.to(pipe.transformer.device)
    seer = SceneProbe.from_pretrained(probe).to(pipe.transformer.device).eval()
    key = digest(
        weights_hash(pipe.transformer, pipe.vae, pipe.text_encoder, seer),
        {place: sae.fingerprint() for place, sae in found.items()},
        {**dataclasses.asdict(plan), "concepts": None},
    )
    folder = out / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    files = {concept: folder / f"{concept}-{key}.json" for concept in plan.concepts}
    for kind in LABELS:
        missing = [concept for concept, file in files.items() if kind_of(concept) == kind and not file.is_file()]
        if missing:
            lessons, unseen = _recordings(pipe, found, kind, plan)
        for concept in tqdm(missing, desc=f"{kind}s", disable=None):
            learned = {
                place: learn_directions(lessons[place], sae, concept, top_n=plan.top_n, seed=number)
                for number, (place, sae) in enumerate(found.items())
            }
            values = {
                "timesteps": {place: list(one.timesteps) for place, one in unseen.items()},
                "auc": {place: detection(unseen[place], learned[place]) for place in found},
                "steered": _dose(pipe, seer, found, concept, learned, lessons, plan),
            }
            write_text(files[concept], json.dumps(values))
    result = {
        "plan": dataclasses.asdict(plan),
        "hookpoints": list(found),
        "concepts": {concept: read_object(file) for concept, file in files.items()},
    }
    write_text(out / "steering.json", json.dumps(result, indent=1))
    return result


def _recordings(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], kind: str, plan: SteeringPlan
) -> tuple[dict[str, Recorded], dict[str, Recorded]]:
    """Activations to learn from, and others to detect in."""
    lessons = record(pipe, saes, label_prompts(plan.prompts, LEARN, kind), seed=LEARN_NOISE, **plan.call)
    return lessons, record(pipe, saes, label_prompts(plan.prompts, TEST, kind), seed=TEST_NOISE, **plan.call)


# Steering


def _dose(
    pipe: Any,
    probe: SceneProbe,
    saes: Mapping[str, SparseAutoencoder],
    concept: str,
    learned: Mapping[str, Directions],
    lessons: Mapping[str, Recorded],
    plan: SteeringPlan,
) -> dict[str, Any]:
    """Probability of the concept ("concept") and of the label of the other kind that the prompt asks for ("kept"), a
    mean for each strength, the first of which is 0; by way ("up", "down"), hookpoint and what is added."""
    kind = kind_of(concept)
    rest = [label for label in LABELS[kind] if label != concept]
    lines = label_prompts(plan.images, TEST, kind)
    asked = LABELS["object" if kind == "style" else "style"]
    result: dict[str, Any] = {}
    for way, sign in (("up", 1.0), ("down", -1.0)):
        prompts = [lines[concept if way == "down" else rest[i % len(rest)]][i] for i in range(plan.images)]
        kept = [asked[i % len(asked)] for i in range(plan.images)]

        def seen(edit: _Edit | None, prompts: list[str] = prompts, kept: list[str] = kept) -> list[list[float]]:
            return _probabilities(pipe, probe, concept, prompts, kept, edit, plan)

        plain = seen(None)[0]
        result[way] = {}
        for place, sae in saes.items():
            result[way][place] = {}
            for name in STEERED:
                edit = _Edit(place, sae, learned[place], lessons[place], name, [sign * s for s in plan.strengths])
                rows = [plain, *seen(edit)]
                result[way][place][name] = {"concept": [row[0] for row in rows], "kept": [row[1] for row in rows]}
    return result


@dataclass(frozen=True)
class _Edit:
    """Something that is added at one hookpoint."""

    place: str
    sae: SparseAutoencoder
    learned: Directions
    lessons: Recorded
    name: str
    strengths: Sequence[float]

    def function(self, strengths: Sequence[float]) -> Callable[[Tokens], torch.Tensor]:
        """The hook of a batch whose images have these strengths."""
        times, units = torch.tensor(self.lessons.timesteps), self.learned.units.get(self.name)
        numbers = self.learned.selection.features
        device = self.sae.W_dec.device
        chosen = ChosenFeatures(self.sae, numbers, torch.zeros(len(numbers), device=device))

        def change(tokens: Tokens) -> torch.Tensor:
            x = tokens.values  # (B, n, d)
            step = int((times - tokens.call.timestep).abs().argmin())
            each = torch.tensor(strengths).repeat(len(x) // len(strengths)) * self.lessons.norms[step]  # (B,)
            if units is not None:
                return x + (each[:, None, None] * units[step]).to(x)
            rows, scale = chosen.normalize(x.reshape(-1, x.shape[-1]).to(self.sae.W_dec.dtype), tokens.call.timestep)
            acts = chosen.activations(rows, chosen.scores(rows)) * self.learned.selection.selected[step].to(device)
            part = chosen.added(torch.zeros_like(rows), acts, torch.full_like(acts, 2.0), scale).view(x.shape)
            size = part.square().sum(2).mean(1).sqrt()  # (B,) root mean square of the tokens' norms
            return x + (torch.where(size > 0, each.to(size) / size, 0.0)[:, None, None] * part).to(x)

        return change


@torch.no_grad()
def _probabilities(
    pipe: Any,
    probe: SceneProbe,
    concept: str,
    prompts: Sequence[str],
    kept: Sequence[str],
    edit: _Edit | None,
    plan: SteeringPlan,
    batch: int = 8,
) -> list[list[float]]:
    """For each strength, the mean probabilities of the concept and of the labels `kept`."""
    strengths = [0.0] if edit is None else list(edit.strengths)
    jobs = [(strength, i) for strength in strengths for i in range(len(prompts))]
    kind = kind_of(concept)
    other = "object" if kind == "style" else "style"
    rows: list[tuple[float, ...]] = []
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        hooks = {} if edit is None else {edit.place: edit.function([strength for strength, _ in part])}
        source = {} if edit is None else {edit.place: edit.sae.config.reads}
        generators = [torch.Generator().manual_seed(TEST_NOISE + i) for _, i in part]
        with hooked(pipe, hooks, source=source):
            images = pipe([prompts[i] for _, i in part], generator=generators, output_type="pt", **plan.call).images
        answers = probe(images.float() * 2 - 1).answers
        for row, (_, i) in enumerate(part):
            pair = ((kind, concept), (other, kept[i]))
            shown, left = (_probability(probe, answers, domain, label, row) for domain, label in pair)
            rows.append((shown, left))
    count = len(prompts)
    return [
        [sum(row[part] for row in rows[first : first + count]) / count for part in (0, 1)]
        for first in range(0, len(rows), count)
    ]


def _probability(probe: SceneProbe, answers: Mapping[str, torch.Tensor], domain: str, label: str, row: int) -> float:
    question = QUESTIONS[domain]
    return float(answers[question][row].float().softmax(0)[list(probe.questions[question]).index(label)])
