"""Tab: an image that follows while one draws and types, by the model's few-step LoRA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.jobs.conditions import drawn_map, lines_on_black
from imgdit.apps.jobs.request import Control, Request

NOTHING = "nothing: the prompt alone"
NAMES = {"canny": "the edges drawn", "depth": "the depth drawn: dark is near"}
"""What a drawing may be, by kind of condition."""


def build(holder: Holder) -> widgets.Onward:
    """Lay the tab out; its result, and where that can go."""
    session = holder.session
    kinds = [kind for kind in NAMES if session.shelf.adapter_for(kind) is not None]
    side = session.default_size or 512
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="pair"):
                canvas = widgets.canvas("Draw here", side, height=360)
                image = widgets.main_result("The image follows", "says-live")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(examples.texts(session).control)
                keep, stop = widgets.buttons("Keep")
            onward = widgets.onward_buttons("live")
        with gr.Column(elem_classes="drawers"):
            choices = [(NAMES[kind], kind) for kind in kinds] + [(NOTHING, "")]
            kind = gr.Radio(choices, value=choices[0][1], label="The image follows")
            strength = gr.Slider(0, 3, 1, step=0.05, label="Strength", info="1: as trained; 0: nothing")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            dice = gr.Button("Draw another seed", size="sm")
            kept = gr.File(label="PNG that stores how it was generated", interactive=False, height=80)

    handlers = _Handlers(holder, kinds)
    given = [prompt, canvas, kind, strength, seed]
    # While one image is generated, of all further changes the last one waits, in the browser: nothing queues.
    gr.on(
        [prompt.change, canvas.change, kind.change, strength.change, seed.change],
        limits.refusing(status)(handlers.live), given, [image, status],
        api_name="live", trigger_mode="always_last", **DEVICE,
    )  # fmt: skip
    run = keep.click(
        limits.refusing(status)(handlers.keep), given, [image, kept, status],
        api_visibility="private", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    dice.click(widgets.another_seed, None, seed, **QUICK)
    stop.click(holder.stop, None, status, **QUICK)
    return widgets.Onward(image, kept, [run], status, onward)


class _Handlers:
    """What the tab does.

    Args:
        holder: of the model.
        kinds: of conditions that a drawing may be.
    """

    def __init__(self, holder: Holder, kinds: list[str]):
        self.holder, self.kinds = holder, kinds

    def live(
        self, prompt: str, drawing: Any, kind: str, strength: float, seed: int, person: gr.Request
    ) -> Iterator[tuple[Image.Image, str]]:
        """Generate an image in few steps from a prompt and a drawing.

        Args:
            prompt: what to show.
            drawing: what was drawn.
            kind: what the drawing is: canny, depth, or "" to leave it out.
            strength: of the drawing.
            seed: of the noise.

        Returns:
            the image, and how long it took.
        """
        started = time.perf_counter()
        request = self._request(prompt, drawing, kind, strength, seed)
        with self.holder.busy(person):
            image = self.holder.session.generate(request).images[0]
        yield image, f"Follows in {time.perf_counter() - started:.2f} s, {request.steps} steps."

    def keep(
        self, prompt: str, drawing: Any, kind: str, strength: float, seed: int, person: gr.Request
    ) -> Iterator[tuple[Any, Any, str]]:
        """Generate the image once more, as a file of the history."""
        request = self._request(prompt, drawing, kind, strength, seed)
        for shown in self.holder.make([request], person):
            file = shown.files[0] if shown.files else None
            yield (file, file, shown.status) if shown.over and file else (gr.skip(), gr.skip(), shown.status)

    def _request(self, prompt: str, drawing: Any, kind: str, strength: float, seed: int) -> Request:
        """The request of the tab's state; a blank canvas steers nothing."""
        turbo = self.holder.session.shelf.turbo
        assert turbo is not None
        chosen = limits.choice(kind or "", "the kind", [*self.kinds, ""])
        weight = float(limits.number(strength, "the strength", 0, 3))
        sketch = widgets.read_drawing(drawing) if chosen else None
        controls: tuple[Control, ...] = ()
        if sketch is not None and not sketch.is_blank:
            if sketch.below is None:
                shown, _ = drawn_map(chosen, sketch.image, sketch.strokes)
            else:
                shown, _ = lines_on_black(chosen, sketch.image)
            controls = (Control(chosen, shown, weight),)
        return Request(
            limits.text(prompt), seed=limits.whole(seed, "the seed", 0, 2**31 - 1), steps=turbo[1], turbo=True,
            controls=controls,
        )  # fmt: skip
