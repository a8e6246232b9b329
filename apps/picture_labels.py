"""Classifiers of picture files, for `imgdit bench unlearn` and `unlearn-canvas`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imgdit.evaluation.unlearning_pictures import Classify
from imgdit.hub import find_model
from imgdit.images import open_image, to_pixels, to_rgb
from imgdit.models.scene_probe import SceneProbe
from imgdit.untrusted import read_object

QUESTIONS = {"style": "style", "object": "left object"}
"""What a `SceneProbe` is asked; a single object counts as the left one."""


def classifier(source: str | Path, domain: str) -> Classify:
    """Labels of the domain "style" or "object".

    Args:
        source: folder of a `SceneProbe`; or folder or Hub repository of a transformers image classifier, whose
            `id2label` are the labels.
    """
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
        pictures = [to_rgb(open_image(file)) for file in files]
        logits = model(**processor(pictures, return_tensors="pt").to(device)).logits
        return [model.config.id2label[number] for number in logits.argmax(1).tolist()]

    return classify


def probe_classifier(probe: SceneProbe, domain: str) -> Classify:
    """Labels that a probe reads."""
    choices = probe.questions[QUESTIONS[domain]]

    @torch.no_grad()
    def classify(files: Sequence[Path]) -> list[str]:
        pixels = torch.cat([to_pixels(open_image(file)) for file in files])
        logits = probe(pixels * 2 - 1).answers[QUESTIONS[domain]]
        return [choices[number] for number in logits.argmax(1).tolist()]

    return classify
