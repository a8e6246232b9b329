"""How fast images follow a stroke, and what few steps save: `imgdit.live` with the few-step LoRA of a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from imgdit.adapters.condition import Condition
from imgdit.defaults import GUIDANCE, STEPS
from imgdit.live import Latest, live
from imgdit.lora.files import find_adapters
from imgdit.pipelines.few_steps import FewSteps, load_few_steps
from imgdit.pipelines.loading import load_pipeline

PROMPT = "a photo of a red cube, in a grey studio"
PEN = 60.0
"""Positions of a pen that a browser reports in a second."""
KINDS = ("canny", "depth")
"""Conditions that are drawn, where the model has their adapters."""


class LiveRate(NamedTuple):
    """How images follow one kind of input."""

    follows: str
    images_per_second: float
    delay: float
    """Median seconds from a stroke to the image that shows it."""
    delay_95: float
    """The same, which 95 % of the images keep."""
    left_out: float
    """Fraction of the pen's positions that a later one replaced before they were drawn."""
    ratio: float
    """Seconds of an image with 28 guided steps over those of one in few steps, median over rounds in turn; NaN: not
    measured."""


def live_rates(model: Path, seconds: float = 10.0, rounds: int = 3) -> Iterator[LiveRate]:
    """Measure a model, first with its prompt alone, then with each condition of `KINDS`.

    Args:
        model: folder of a pipeline with a few-step LoRA and a folder `adapters`.
        seconds: of each stroke.
        rounds: counted pairs of images with few and with 28 steps.

    Raises:
        ValueError: the folder has no few-step LoRA.
    """
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    turbo = load_few_steps(pipe, model)
    adapters = find_adapters(model / "adapters")
    for kind in ("", *(kind for kind in KINDS if kind in adapters)):
        if kind:
            pipe.load_control(adapters[kind].path, adapter_name=kind)
        inputs = _input(kind, pipe.default_size, 0.5)
        times = [(_timed(pipe, inputs, turbo), _timed(pipe, inputs, None)) for _ in range(rounds + 1)][1:]
        ratio = median(slow / fast for fast, slow in times) if times else float("nan")
        yield _follow(pipe, turbo, kind, seconds)._replace(ratio=ratio)


def _timed(pipe: Any, inputs: dict[str, Any], turbo: FewSteps | None) -> float:
    call: dict[str, Any] = {} if turbo is not None else {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    (shown,) = live(pipe, [inputs], turbo=turbo, **call)
    return shown.seconds


def _follow(pipe: Any, turbo: FewSteps, kind: str, seconds: float) -> LiveRate:
    """Draw a stroke with a pen in a thread of its own while images follow."""
    inputs: Latest[dict[str, Any]] = Latest()
    drawn, size = 0, pipe.default_size

    def draw() -> None:
        nonlocal drawn
        end = time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            inputs.put({**_input(kind, size, 1 - (end - now) / seconds), "at": time.perf_counter()})
            drawn += 1
            time.sleep(1 / PEN)
        inputs.close()

    delays: list[float] = []
    pen = threading.Thread(target=draw)
    started = time.perf_counter()
    pen.start()
    for asked in inputs:
        at = asked.pop("at")
        for _ in live(pipe, [asked], turbo=turbo):
            delays.append(time.perf_counter() - at)
    pen.join()
    rate = len(delays) / (time.perf_counter() - started)
    late = quantiles(delays, n=20, method="inclusive")[-1] if len(delays) > 1 else delays[0]
    return LiveRate(kind or "prompt", rate, median(delays), late, inputs.replaced / drawn, float("nan"))


def _input(kind: str, size: int, fraction: float) -> dict[str, Any]:
    """What is asked for when a fraction of the stroke is drawn: a rectangle that grows, or words."""
    if not kind:
        return {"prompt": PROMPT if int(fraction * 20) % 2 else PROMPT.replace("red", "blue")}
    image = Image.new("RGB", (size, size))
    side = round(size * (0.2 + 0.4 * fraction))
    corner = (size - side) // 2
    fill = "white" if kind == "depth" else None
    ImageDraw.Draw(image).rectangle((corner, corner, corner + side, corner + side), fill, "white", 2)
    return {"prompt": PROMPT, "conditions": [Condition(image, kind)]}
