"""Classifiers of image files, for `imgdit bench unlearn` and `unlearn-canvas`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imgdit.benchmarks.unlearning.plan import Classify
from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.hub import INDEX, find_model
from imgdit.images import open_image, to_pixels, to_rgb
from imgdit.io.atomic import check_index, write_text
from imgdit.io.bulk import run_bulk
from imgdit.io.safe_json import read_object
from imgdit.pipelines.image_text_loading import load_image_text_pipeline
from imgdit.pipelines.load_options import LoadOptions
from imgdit.pipelines.vision_language_loading import is_published, model_type_of
from imgdit.scenes.probe import SceneProbe

ASKED = {"style": "what style is it?", "object": "what object is it?"}
"""What a model that answers questions is asked."""
QUESTIONS = {"style": "style", "object": "left object"}
"""What a `SceneProbe` is asked; a single object counts as the left one."""


def classifier(source: str | Path, domain: str, labels: Sequence[str] = ()) -> Classify:
    """Labels of the domain "style" or "object".

    Args:
        source: folder of a `SceneProbe`; folder or Hub repository of a transformers image classifier, whose
            `id2label` are the labels; or of a pipeline that answers questions about images.
        labels: what such a pipeline chooses among.
    """
    if answers_questions(source):
        return judge_classifier(load_image_text_pipeline(source, LoadOptions(device="auto")), domain, labels)
    source = find_model(source, "config.json", "image classifier")
    config = Path(source) / "config.json"
    if config.is_file() and read_object(config).get("_class_name") == "SceneProbe":
        return probe_classifier(SceneProbe.from_pretrained(source).eval(), domain)
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForImageClassification.from_pretrained(source).to(device).eval()

    @torch.no_grad()
    def classify(files: Sequence[Path]) -> list[str]:
        images = [to_rgb(open_image(file)) for file in files]
        logits = model(**processor(images, return_tensors="pt").to(device)).logits
        return [model.config.id2label[number] for number in logits.argmax(1).tolist()]

    return classify


def probe_classifier(probe: SceneProbe, domain: str) -> Classify:
    """Labels that a probe reads."""

    def classify(files: Sequence[Path]) -> list[str]:
        return probe_labels(probe, torch.cat([to_pixels(open_image(file)) for file in files]))[domain]

    return classify


@torch.no_grad()
def probe_labels(probe: SceneProbe, pixels: torch.Tensor) -> dict[str, list[str]]:
    """Style and object of each of (N, 3, S, S) images in [0, 1], as a probe reads them."""
    answers = probe(pixels * 2 - 1).answers
    return {
        domain: [probe.questions[question][number] for number in answers[question].argmax(1).tolist()]
        for domain, question in QUESTIONS.items()
    }


def answers_questions(source: str | Path) -> bool:
    """Whether a name is that of a pipeline or of a published model that writes about images."""
    place = SCENES if source == EMBEDDED else Path(source).expanduser()
    return (place / INDEX).is_file() or is_published(source) or model_type_of(source) == "mmada"


def judge_classifier(pipe: Any, domain: str, labels: Sequence[str], batch: int = 8) -> Classify:
    """Labels that are the most likely answers of a pipeline with `choose`."""
    pipe.set_progress_bar_config(disable=True)
    written = [label.replace("_", " ").lower() for label in labels]

    def classify(files: Sequence[Path]) -> list[str]:
        found: list[str] = []
        for first in range(0, len(files), batch):
            images = [to_rgb(open_image(file)) for file in files[first : first + batch]]
            found += [labels[number] for number in pipe.choose(images, ASKED[domain], written).best]
        return found

    return classify


CHUNK = 64
"""Images that a worker labels before it writes them."""


class LabelImages:
    """Says what one chunk of images shows.

    Args:
        classifiers: what is told apart -> classifier of it, see `classifier`.
        labels: what there is of each.
        out: folder of what was said.
    """

    def __init__(self, classifiers: dict[str, str], labels: dict[str, list[str]], out: str):
        self.classify = {
            domain: classifier(source, domain, labels.get(domain, ())) for domain, source in classifiers.items()
        }
        self.out = Path(out)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        files = [Path(name) for name in item["files"]]
        labels = {domain: list(classify(files)) for domain, classify in self.classify.items()}
        write_text(self.out / item["chunk"], json.dumps({"files": list(item["files"]), "labels": labels}))
        return {"count": len(files), "process": os.getpid()}


def label_all(
    files: Sequence[Path],
    classifiers: dict[str, str],
    out: Path,
    labels: dict[str, list[str]] | None = None,
    **engine: Any,
) -> dict[str, dict[Path, str]]:
    """Labels of images; what is written in the folder already is not asked again.

    Args:
        files: images, in an order that is the same every time.
        classifiers: what is told apart ("style", "object") -> folder or Hub repository of its classifier.
        out: folder of what was said.
        labels: what there is of each, for models that choose among labels.
        engine: see `run_bulk`.

    Returns:
        For each of `classifiers`, the label of each file.

    Raises:
        ValueError: the folder holds labels of other images or by other classifiers.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [str(file.resolve()) for file in files]
    stamps = [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in names]
    check_index(out, {"classifiers": dict(classifiers), "files": stamps}, "job")
    chunks = {f"{first:08d}.json": names[first : first + CHUNK] for first in range(0, len(names), CHUNK)}
    items = [{"chunk": chunk, "files": part} for chunk, part in chunks.items() if not (out / chunk).exists()]
    arguments = {"classifiers": dict(classifiers), "labels": labels or {}, "out": str(out.resolve())}
    for _ in run_bulk(items, LabelImages, arguments, **engine):
        pass
    found: dict[str, dict[Path, str]] = {domain: {} for domain in classifiers}
    places = dict(zip(names, files, strict=True))
    for chunk in chunks:
        written = read_object(out / chunk)
        for domain, labelled in written["labels"].items():
            found[domain] |= dict(zip((places[name] for name in written["files"]), labelled, strict=True))
    return found
