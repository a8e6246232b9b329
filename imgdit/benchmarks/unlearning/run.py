"""`imgdit bench unlearn`: UnlearnCanvas' protocol (arXiv 2402.11846) on the procedural scenes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imgdit import DiffusionPipeline
from imgdit.benchmarks.metrics import wilson
from imgdit.benchmarks.unlearning.attacks import ATTACKS, Attack
from imgdit.benchmarks.unlearning.captions import chosen_cells, counts, settings_on_images, write_captions
from imgdit.benchmarks.unlearning.conditions import ConditionedImages, adapter_file, conditioned
from imgdit.benchmarks.unlearning.images import Eyes, GeneratedImages, JudgeEyes, Look
from imgdit.benchmarks.unlearning.learning import build_material
from imgdit.benchmarks.unlearning.methods.catalogue import METHODS
from imgdit.benchmarks.unlearning.methods.material import Unlearned
from imgdit.benchmarks.unlearning.plan import VALIDATION, Cell, Seen, cells, scene_seeds
from imgdit.benchmarks.unlearning.report import SCORES, markdown
from imgdit.benchmarks.unlearning.retention import in_prompt
from imgdit.benchmarks.unlearning.table import (
    DOMAINS,
    accuracies,
    bootstrap_means,
    domain_means,
    interval,
    score_images,
    score_together,
)
from imgdit.io.atomic import write_text
from imgdit.moved import renamed
from imgdit.naming import check_name, old_names
from imgdit.pipelines.image_text_loading import load_image_text_pipeline
from imgdit.pipelines.load_options import LoadOptions
from imgdit.scenes.labels import kind_of
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.world import OBJECTS, STYLES

SEQUENCE = ("neon", "cube", "sketch", "torus", "sepia", "cone")
"""Unlearned one after the other, styles and objects in turn, so that some of both are always left."""
FEW_TARGETS = ("neon", "mosaic", "cube", "torus")
FEW_METHODS = ("none", "negative", "direction", "saeuron", "scale")
OURS = ("scale", "replace")


@old_names(sentences="prompts")
@dataclass(frozen=True)
class UnlearnPlan:
    """How much is measured."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Names of `METHODS`; "none" is always among them."""
    targets: tuple[str, ...] = (*STYLES, *OBJECTS)
    """Labels that are unlearned, one at a time."""
    seeds: int = 6
    """Images of each style with each object, for each target and method."""
    steps: int = 20
    """Of the sampler."""
    guidance: float = 3.0
    """Scale."""
    prompts: int = 16
    """For each label, to learn from."""
    tune: bool = False
    """Choose each method's settings on other seeds first; otherwise the first of its grid are used."""
    together: int = 2
    """Seeds of the images for several labels at once, 1 to 6 of `SEQUENCE` and all styles and objects; 0: none."""
    attack: int = 5
    """Prompts of each of `FEW_TARGETS` that are attacked; 0: none."""
    attacks: tuple[str, ...] = ATTACKS
    """Some of `ATTACKS`."""
    conditions: int = 0
    """Images under a depth condition that show each of `FEW_TARGETS`, and as many of others; 0: none."""
    captions: int = 0
    """Captions of images that show a target, and as many of others, for each method that works on images; 0: none."""

    def __post_init__(self) -> None:
        for name in self.methods:
            check_name("method", name, METHODS)
        for target in self.targets:
            kind_of(target)
        for attack in self.attacks:
            check_name("attack", attack, ATTACKS)
        if not self.targets:
            raise ValueError("there is nothing to unlearn; give at least one target")
        for name in ("seeds", "steps", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.guidance <= 1:
            raise ValueError(
                f"half of the methods work through guidance; guidance must be above 1, got {self.guidance}"
            )
        if self.captions and not any(settings_on_images(METHODS[name]) for name in self.methods):
            able = ", ".join(name for name, method in METHODS.items() if settings_on_images(method))
            raise ValueError(f"captions are written under methods that work on images ({able}); got {self.methods}")

    @property
    def needs_saes(self) -> bool:
        return any(METHODS[name].needs_saes for name in self.methods)


QUICK = UnlearnPlan(FEW_METHODS, FEW_TARGETS, seeds=2, steps=12, prompts=6, together=0, attack=0)
"""1,632 images and 84 to learn from."""


def run(
    model: Path, probe: Path, saes: Path, out: Path, plan: UnlearnPlan, judge: str | Path | None = None
) -> dict[str, Any]:
    """Measure methods; `out` gets unlearn.json, the tables (unlearn.md) and the images, and what it has already is not
    made again.

    Args:
        model, probe, saes: folders of the pipeline, of the `SceneProbe` and of the SAEs.
        out: folder.
        plan: how much.
        judge: pipeline that is asked about the images besides the probe, see `load_image_text_pipeline`.
    """
    if plan.needs_saes and not saes.is_dir():
        needing = ", ".join(name for name in plan.methods if METHODS[name].needs_saes)
        raise ValueError(
            f"there is no folder {saes} of autoencoders; train them (`imgdit sae train scenes/sae` and "
            "`scenes/sae_text`), name another folder with --saes, or leave out the methods that need them "
            f"({needing})"
        )
    if plan.conditions:
        adapter_file(model)
    pipe = DiffusionPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    material, seconds = build_material(
        pipe,
        saes if plan.needs_saes else None,
        out,
        prompts_per_label=plan.prompts,
        steps=plan.steps,
        guidance=plan.guidance,
    )
    generated = GeneratedImages(pipe, material, out / "pictures", steps=plan.steps, guidance=plan.guidance)
    judging = None
    if judge is not None:
        judging = JudgeEyes(load_image_text_pipeline(judge, LoadOptions(device="auto")))
    writer = load_image_text_pipeline(model, LoadOptions(device="auto")) if plan.captions else None
    eyes = Eyes(SceneProbe.from_pretrained(probe).eval())
    bench = _Bench(plan, generated, eyes, seconds, judging, writer)
    result = bench.result()
    if plan.conditions:
        images = ConditionedImages(model, eyes.probe, plan.conditions, generated.call)
        result["conditions"] = bench.conditioned(
            images, {name: row["settings"] for name, row in result["methods"].items()}
        )
    write_text(out / "unlearn.json", json.dumps(result, indent=1, ensure_ascii=False))
    write_text(out / "unlearn.md", markdown(result))
    return result


class _Bench:
    def __init__(
        self,
        plan: UnlearnPlan,
        generated: GeneratedImages,
        eyes: Eyes,
        statistics_seconds: float,
        judge: JudgeEyes | None,
        writer: Any = None,
    ) -> None:
        self.plan, self.generated, self.eyes, self.judge, self.writer = plan, generated, eyes, judge, writer
        self.statistics_seconds = statistics_seconds
        self.methods = [name for name in METHODS if name in plan.methods or name == "none"]
        self.domains = {target: kind_of(target) for target in plan.targets}
        self.tried: dict[str, list[dict[str, Any]]] = {}

    def result(self) -> dict[str, Any]:
        plan = self.plan
        wanted = cells(scene_seeds(plan.seeds))
        settings = {name: self._tuned(name) if plan.tune else dict(self._grid(name)[0]) for name in self.methods}
        looks = {name: self._of_targets(name, settings[name], wanted, timed=True) for name in self.methods}
        seen = {name: {target: [look.seen for look in of[target]] for target in of} for name, of in looks.items()}
        draws = {name: bootstrap_means(of, self.domains) for name, of in seen.items()}
        rows = {
            name: {
                **self._summary(name, seen[name], draws[name], draws),
                **self._side_effects(looks[name]),
                "in_prompt": in_prompt(looks[name], self.domains),
                **self._costs(name, settings[name], wanted),
            }
            for name in self.methods
        }
        plain = next(iter(seen["none"].values()))
        judged = {} if self.judge is None else {name: self._judged(name, settings[name], seen[name]) for name in seen}
        return {
            "plan": dataclasses.asdict(plan),
            "model": self.generated.model,
            "unmodified": {domain: accuracies(plain, domain) for domain in ("style", "object")},
            "methods": rows,
            "together": {name: self._together(name, settings[name]) for name in self.methods} if plan.together else {},
            "attack": {name: self._attacked(name, settings[name]) for name in self.methods} if plan.attack else {},
            "judged": judged,
            "conditions": {},
            "captions": {} if self.writer is None else self._captioned(wanted),
            "tuning": self.tried,
            "pictures": {
                name: {target: [_row(look) for look in found] for target, found in of.items()}
                for name, of in looks.items()
            },
        }

    def _looks(self, name: str, concepts: Sequence[str], settings: Mapping[str, Any], wanted: Any, **how: Any) -> Any:
        album = self.generated.album(name, [] if name == "none" else concepts, wanted, settings, **how)
        plain = self.generated.album("none", [], wanted)
        return self.eyes.looks(album.folder, wanted, plain.folder)

    def _of_targets(
        self, name: str, settings: Mapping[str, Any], wanted: Sequence[Cell], timed: bool = False
    ) -> dict[str, list[Look]]:
        return {
            target: self._looks(name, [target], settings, wanted, timed=timed and n == 0 and name != "none")
            for n, target in enumerate(self.plan.targets)
        }

    def _judged(self, name: str, settings: Mapping[str, Any], seen: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
        """Scores by what the judge answers, and how often it says what the probe sees."""
        assert self.judge is not None
        scores, same, total = [], dict.fromkeys(DOMAINS, 0), 0
        for target, by_probe in seen.items():
            wanted = [one.cell for one in by_probe]
            album = self.generated.album(name, [] if name == "none" else [target], wanted, settings)
            by_judge = self.judge.seen(album.folder, wanted)
            scores.append(score_images(target, self.domains[target], by_judge))
            total += len(wanted)
            for domain in DOMAINS:
                same[domain] += sum(a.called(domain) == b.called(domain) for a, b in zip(by_judge, by_probe))
        means = {domain: mean._asdict() for domain, mean in domain_means(scores).items()}
        return {"means": means, "agrees_with_probe": same, "of": total}

    def _captioned(self, wanted: Sequence[Cell]) -> dict[str, Any]:
        """For each method that works on images and each target: what captions of unmodified images say, plainly and
        while the method works, and captions of the images that were generated under it."""
        self.writer.set_progress_bar_config(disable=True)
        plain = self.generated.album("none", [], wanted).folder
        found: dict[str, Any] = {}
        before: dict[str, Any] = {}
        for name in self.methods:
            settings = settings_on_images(METHODS[name])
            if settings is None:
                continue
            found[name] = {}
            for target in self.plan.targets:
                shows, others = chosen_cells(target, wanted, self.plan.captions)
                cells_ = [*shows, *others]
                if target not in before:
                    before[target] = counts(target, shows, others, write_captions(self.writer, plain, cells_))
                unlearned = METHODS[name].prepare(self.generated.pipe, [target], self.generated.material, **settings)
                read = write_captions(self.writer, plain, cells_, unlearned)
                album = self.generated.album(name, [target], cells_, settings)
                drawn = write_captions(self.writer, album.folder, cells_)
                found[name][target] = {
                    "plain": before[target],
                    "removed": counts(target, shows, others, read),
                    "generated": counts(target, shows, others, drawn),
                }
        return found

    def conditioned(self, images: ConditionedImages, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What images under a depth condition show, see `conditioned`."""
        generated = self.generated

        def prepared(name: str, target: str) -> Unlearned:
            concepts = [] if name == "none" else [target]
            return METHODS[name].prepare(generated.pipe, concepts, generated.material, **settings[name])

        targets = [target for target in FEW_TARGETS if target in self.plan.targets]
        methods = {name: partial(prepared, name) for name in self.methods}
        return conditioned(images, targets, methods, prepared("none", ""))

    def _grid(self, name: str) -> Sequence[Mapping[str, Any]]:
        return METHODS[name].usable(self.generated.material.streams(self.generated.pipe))

    def _tuned(self, name: str) -> dict[str, Any]:
        """The settings of the grid with the best mean of UA, IRA, CRA and in-prompt retention, on other seeds."""
        grid = self._grid(name)
        if len(grid) == 1:
            return dict(grid[0])
        wanted, targets = cells(scene_seeds(1, VALIDATION)), [t for t in FEW_TARGETS if t in self.plan.targets]
        tried = self.tried[name] = []
        for settings in grid:
            looks = {t: self._looks(name, [t], settings, wanted) for t in targets or self.plan.targets[:1]}
            scores = [score_images(t, kind_of(t), [look.seen for look in found]) for t, found in looks.items()]
            retained = in_prompt(looks, self.domains)["mean"]["value"]
            mean = (3 * sum(s.scores.mean for s in scores) / len(scores) + retained) / 4
            of_targets = {s.target: s.scores for s in scores}
            tried.append({"settings": dict(settings), "mean": mean, "in_prompt": retained, "targets": of_targets})
        return dict(max(tried, key=lambda entry: entry["mean"])["settings"])

    def _summary(
        self, name: str, seen: Mapping[str, Any], draws: Mapping[str, np.ndarray], everyone: Mapping[str, Any]
    ) -> dict[str, Any]:
        scores = [score_images(target, self.domains[target], found) for target, found in seen.items()]
        means = domain_means(scores)
        six = [value for mean in means.values() for value in mean]
        of_six = _of_six(draws)
        against = {
            other: interval(_of_six(everyone[other]) - of_six, float((_of_six(everyone[other]) - of_six).mean()))
            for other in OURS
            if other in everyone and other != name
        }
        return {
            "title": METHODS[name].title,
            "means": {
                domain: {score: interval(draws[domain][:, i], mean[i])._asdict() for i, score in enumerate(SCORES)}
                for domain, mean in means.items()
            },
            "mean": interval(of_six, sum(six) / len(six))._asdict(),
            "minimum": min(six),
            "ours_better_by": {other: value._asdict() for other, value in against.items()},
            "targets": {s.target: _target(s) for s in scores},
        }

    def _side_effects(self, looks: Mapping[str, Sequence[Look]]) -> dict[str, Any]:
        """Artefacts over all images, and changes of those whose prompt does not name the target."""
        every = [look for found in looks.values() for look in found]
        kept = [
            look
            for target, found in looks.items()
            for look in found
            if look.seen.cell.expected(self.domains[target]) != target
        ]
        bad = sum(look.artefact for look in every)
        return {
            "artefacts": {**wilson(bad, len(every))._asdict(), "pictures": bad, "of": len(every)},
            "pixel_change": float(np.mean([look.pixels for look in kept])),
            "feature_change": float(np.mean([look.features for look in kept])),
        }

    def _costs(self, name: str, settings: Mapping[str, Any], wanted: Sequence[Cell]) -> dict[str, Any]:
        concepts = [[] if name == "none" else [target] for target in self.plan.targets]
        albums = [self.generated.album(name, names, wanted, settings) for names in concepts]
        labels = sum(len(of) for of in self.generated.material.prompts.values())
        shared = self.statistics_seconds / labels if METHODS[name].needs_saes else 0.0
        ratios = [album.time_ratio for album in albums if album.time_ratio is not None]
        return {
            "settings": dict(settings),
            "tuned_values": METHODS[name].tuned,
            "setup_seconds": float(np.mean([album.setup_seconds for album in albums])) + shared,
            "bytes": float(np.mean([album.size for album in albums])),
            "time_ratio": ratios[0] if ratios else 1.0,
        }

    def _together(self, name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One more label at a time."""
        wanted = cells(scene_seeds(self.plan.together))
        sets = [SEQUENCE[: count + 1] for count in range(len(SEQUENCE))]
        if not METHODS[name].needs_other:
            sets.append(tuple(dict.fromkeys([cell.style for cell in wanted] + [cell.object for cell in wanted])))
        found = []
        for concepts in sets:
            seen = [look.seen for look in self._looks(name, concepts, settings, wanted)]
            found.append({"concepts": concepts, **score_together({c: kind_of(c) for c in concepts}, seen)})
        return found

    def _attacked(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """How often the target is seen in images of its own prompts, before and under each attack."""
        kinds = ("", *self.plan.attacks)
        shown, total = dict.fromkeys(kinds, 0), 0
        for target in (t for t in FEW_TARGETS if t in self.plan.targets):
            domain = kind_of(target)
            all_cells = [cell for cell in cells(scene_seeds(self.plan.seeds)) if cell.expected(domain) == target]
            wanted = all_cells[:: max(1, len(all_cells) // self.plan.attack)][: self.plan.attack]
            total += len(wanted)
            for kind in kinds:
                attack = Attack(kind, target) if kind else None
                looks = self._looks(name, [target], settings, wanted, attack=attack)
                shown[kind] += sum(look.seen.right(domain) for look in looks)
        return {"shown": shown.pop(""), "shown_under_attack": shown, "of": total}


def _of_six(draws: Mapping[str, np.ndarray]) -> np.ndarray:
    """(R,) mean of the scores of all domains."""
    return np.mean([values.mean(1) for values in draws.values()], axis=0)


def _target(scores: Any) -> dict[str, Any]:
    named = dict(zip(SCORES, scores.scores))
    return {
        **named,
        "domain": scores.domain,
        "UA_interval": scores.unlearned._asdict(),
        "CRA_everywhere": scores.cross_everywhere,
        "confusion": scores.confusion,
    }


def _row(look: Look) -> list[Any]:
    return [look.seen.cell.name, look.seen.style, look.seen.object, *look[1:]]


def __getattr__(name: str) -> Any:
    """A name of an earlier version; it goes with the next one."""
    return renamed(__name__, name, {"table": "benchmarks.unlearning.report.table"})
