"""`imgdit bench unlearn-canvas`: images that somebody generated, in UnlearnCanvas' own layout.

<folder>/<target>/<style>_<object>_seed<number>.jpg    of the model that unlearned the target
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgdit.benchmarks.unlearning.labels import classifier, label_all
from imgdit.benchmarks.unlearning.plan import ENDINGS, Cell, Classify, cells, read_folder
from imgdit.benchmarks.unlearning.table import TargetScores, domain_means, score_images
from imgdit.data.listing import is_stranger


def run(
    folder: Path, style_classifier: str, object_classifier: str, labels: Path | None = None, **engine: Any
) -> dict[str, Any]:
    """Scores of every target that has a folder.

    Args:
        folder: of the images.
        style_classifier, object_classifier: see `classifier`; also a pipeline that answers questions about images.
        labels: folder that keeps what the classifiers said; `None`: nothing is kept.
        engine: with `labels`, see `imgdit.io.bulk.run_bulk`.

    Raises:
        ValueError: no folder of a style or object, or one that lacks images.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    targets = [inner for inner in inside if inner.is_dir() and not is_stranger(inner.name)]
    if not targets:
        raise ValueError(f"{folder} holds no folder of images; expected one for each unlearned style or object")
    names = {inner: _cells(inner) for inner in targets}
    every = [cell for found in names.values() for cell in found]
    styles, objects, seeds = (sorted(set(values)) for values in zip(*every))
    wanted = cells(seeds, styles, objects)
    described = {"style": (style_classifier, styles), "object": (object_classifier, objects)}
    style, thing = _classifiers(targets, described, labels, engine)
    scores = []
    for inner in targets:
        if inner.name not in (*styles, *objects):
            raise ValueError(f"{inner} is not called by a style or object of its images: {', '.join(styles)}, …")
        seen = read_folder(inner, wanted, style, thing)
        scores.append(score_images(inner.name, "style" if inner.name in styles else "object", seen))
    return {
        "styles": styles,
        "objects": objects,
        "seeds": seeds,
        "targets": {s.target: _target(s) for s in scores},
        "means": {domain: mean._asdict() for domain, mean in domain_means(scores).items()},
    }


def _classifiers(
    targets: list[Path], described: Mapping[str, tuple[str, list[str]]], labels: Path | None, engine: dict[str, Any]
) -> list[Classify]:
    """Of styles and of objects: what is asked as it comes, or what a job has asked about all images."""
    if labels is None:
        return [classifier(source, domain, names) for domain, (source, names) in described.items()]
    files = [file for inner in targets for file in _images(inner)]
    sources, names = ({domain: one[n] for domain, one in described.items()} for n in range(2))
    labelled = label_all(files, sources, labels, names, **engine)  # type: ignore[arg-type]
    return [lambda asked, known=known: [known[file] for file in asked] for known in labelled.values()]  # type: ignore[misc]


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in ENDINGS and not is_stranger(file.name))


def _cells(folder: Path) -> list[Cell]:
    """What the names of a folder's images say. Styles may have underscores in them, objects do not."""
    found = []
    for file in _images(folder):
        parts = file.stem.rsplit("_", 2)
        if len(parts) != 3 or not parts[2].removeprefix("seed").isdigit():
            raise ValueError(f"{file} is not called <style>_<object>_seed<number>")
        found.append(Cell(parts[0], parts[1], int(parts[2].removeprefix("seed"))))
    if not found:
        raise ValueError(f"{folder} holds no images; expected <style>_<object>_seed<number>.jpg")
    return found


def _target(scores: TargetScores) -> dict[str, Any]:
    return {
        "domain": scores.domain,
        **scores.scores._asdict(),
        "cross_everywhere": scores.cross_everywhere,
        "unlearned_interval": scores.unlearned._asdict(),
        "confusion": scores.confusion,
    }


def table(result: Mapping[str, Any]) -> str:
    """The scores as text; CRA as UnlearnCanvas counts it stands behind ours."""
    lines = [f"{'target':<24}{'UA':>7}{'95 %':>15}{'IRA':>7}{'CRA':>7}{'CRA of all images':>22}"]
    for target, row in result["targets"].items():
        spread = f"{100 * row['unlearned_interval']['low']:.1f}–{100 * row['unlearned_interval']['high']:.1f}"
        lines.append(
            f"{target:<24}{100 * row['unlearned']:>7.1f}{spread:>15}{100 * row['retained']:>7.1f}"
            f"{100 * row['cross']:>7.1f}{100 * row['cross_everywhere']:>22.1f}"
        )
    for domain, row in result["means"].items():
        values = (100 * row[name] for name in ("unlearned", "retained", "cross"))
        lines.append(f"{f'mean of {domain} targets':<24}{next(values):>7.1f}{next(values):>22.1f}{next(values):>7.1f}")
    return "\n".join(lines)
