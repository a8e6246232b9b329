"""Tabs: frames of pairs, given or generated, and another view of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from imgdit.apps.demo import examples, limits, widgets
from imgdit.apps.demo.holder import DEVICE, QUICK, Holder
from imgdit.apps.jobs.request import Request, RequestFrame
from imgdit.apps.session import Session
from imgdit.tasks import TASKS

GIVEN, GENERATED = "given", "to be generated"
TURN, RISE = 45.0, 15.0
"""Degrees that the other camera may be away; views were taught up to 40 around."""
ELEVATION = 24.0
"""Of the camera of a given image, in degrees: the middle of what the scenes are seen from."""
UNSAID = "Without a caption the colours of a segmentation are guessed; name what is seen."


def pairs(session: Session) -> list[str]:
    """What the other frame may be."""
    return [name for name in session.shelf.tasks if TASKS[name].frames == (2, 2)]


def knows_views(session: Session) -> bool:
    """Whether the model was taught other views of an image."""
    return "views" in session.shelf.tasks


def build(holder: Holder) -> tuple[widgets.Upload, widgets.Onward]:
    """Lay the tab of pairs out, for a model that knows some; where an image goes, and where its results can go."""
    kinds, of_scenes = pairs(holder.session), examples.of_scenes(holder.session)
    first = "depth" if "depth" in kinds else kinds[0]
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="pair"):
                with gr.Column():
                    image = widgets.upload("Image", height=None, classes=["source"])
                    other = widgets.upload("Other frame", height=None, classes=["source"], visible="hidden")
                    nothing = gr.Markdown(
                        "Nothing is given but the caption: both are generated.", visible=False,
                        elem_classes=["note", "nothing"],
                    )  # fmt: skip
                frames = widgets.results("Frames that were generated", 2, "main-result", "says-frames")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(label="Caption, or the instruction of editing (may be empty)")
                make, stop = widgets.buttons("Make frames")
            onward = widgets.onward_buttons("any")
        with gr.Column(elem_classes="drawers"):
            task = gr.Dropdown(_tasks(kinds), value=f"{first} of an image", label="Task")
            legend = gr.Markdown(examples.legend(), visible=of_scenes and first == "segmentation", elem_classes="note")
            if holder.examples:
                gr.Examples([[file] for file in holder.examples], [image], label="Example images")
            # What the task means; programs give these.
            image_is = gr.Radio([GIVEN, GENERATED], value=GIVEN, label="The image is", visible="hidden")
            kind = gr.Dropdown(kinds, value=first, label="The other frame is a", visible="hidden")
            other_is = gr.Radio([GIVEN, GENERATED], value=GENERATED, label="It is", visible="hidden")
            sampled = widgets.sampling()

    @limits.refusing(status)
    def any_to_any(
        prompt: str, image_is: str, image: str | None, kind: str, other_is: str, other: str | None,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[list[tuple[str, str]], str]]:  # fmt: skip
        """Make frames from others: depth of an image, an image of depth, both from text.

        Args:
            prompt: caption of the image, or the instruction of editing; may be empty.
            image_is: "given" or "to be generated".
            image: if it is given.
            kind: what the other frame is: depth, canny, segmentation, boxes, blur, …
            other_is: "given" or "to be generated".
            other: if it is given.
            steps: of the sampler.
            guidance: scale where an image is generated; maps of a given image are generated without.
            seed: of the noise.

        Returns:
            PNG files of the frames that were generated with their kinds, and how far it is.
        """
        limits.choice(kind, "the other frame", kinds)
        asked = []
        for name, what, role, content in (
            ("image", "the image", image_is, image),
            (kind, f"the {kind}", other_is, other),
        ):
            if limits.choice(role, what, (GIVEN, GENERATED)) == GIVEN and content is None:
                raise limits.Refused(
                    f"{what} is given, but there is no image of it; upload one first, or let it be generated"
                )
            asked.append(RequestFrame(name, limits.image(content, what) if role == GIVEN else None))
        base = widgets.read_sampling(steps, guidance, seed)
        if asked[0].image is not None and TASKS[kind].condition != "image":
            base["guidance"] = None
        generated = [frame.kind for frame in asked if frame.image is None]
        request = Request(limits.text(prompt), frames=tuple(asked), **base)
        unnamed = of_scenes and generated == ["segmentation"] and not request.prompt
        yield from _shown(holder, request, generated, person, [UNSAID] if unnamed else [])

    run = make.click(
        any_to_any, [prompt, image_is, image, kind, other_is, other, *sampled], [frames, status],
        api_name="any_to_any", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)

    meant = [image_is, kind, other_is, image, other, nothing, legend]
    task.change(_task_chosen(kinds, of_scenes), task, meant, **QUICK)
    return image, widgets.Onward(frames, frames, [run], status, onward)


TASK_FORMS = ("{} of an image", "image from {}", "image and {} from a caption")
"""What there is to do with a pair, by which of the two is given."""


def _tasks(kinds: Sequence[str]) -> list[str]:
    """What can be asked for, the maps of images first."""
    return [form.format(kind) for form in TASK_FORMS for kind in kinds]


def _meaning(task: str, kinds: Sequence[str]) -> tuple[str, bool, bool]:
    """Kind of the other frame of a task, and whether the image and the other frame are given."""
    found = {form.format(kind): (kind, i == 0, i == 1) for i, form in enumerate(TASK_FORMS) for kind in kinds}
    return found[limits.choice(task, "the task", found)]


def _task_chosen(kinds: Sequence[str], of_scenes: bool) -> Callable[[str], list[Any]]:
    """What sets the roles of the two frames, their kind, and which of them is asked for."""

    def chosen(task: str) -> list[Any]:
        name, image_given, other_given = _meaning(task, kinds)
        return [
            GIVEN if image_given else GENERATED,
            name,
            GIVEN if other_given else GENERATED,
            gr.update(visible=True if image_given else "hidden"),
            gr.update(visible=True if other_given else "hidden", label=f"The {name}"),
            gr.update(visible=not (image_given or other_given)),
            gr.update(visible=of_scenes and name == "segmentation"),
        ]

    return chosen


def build_views(holder: Holder) -> tuple[widgets.Upload, widgets.Onward]:
    """Lay the tab of views out; see `build`."""
    with gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="stage"):
            with gr.Row(elem_classes="pair"):
                image = widgets.upload("Image seen from the front", height=None, classes=["source"])
                views = widgets.results("The other view", 1, "main-result", "says-view")
            status = widgets.status()
            with gr.Row(elem_classes="composer"):
                prompt = widgets.prompt_box(label="Caption (may be empty)")
                make, stop = widgets.buttons("Show view")
            onward = widgets.onward_buttons("views")
        with gr.Column(elem_classes="drawers"):
            if holder.examples:
                gr.Examples([[file] for file in holder.examples], [image], label="Example images")
            with gr.Group():
                turn = gr.Slider(-TURN, TURN, 25, step=1, label="Turn (degrees around)")
                rise = gr.Slider(-RISE, RISE, 0, step=1, label="Rise (degrees up)")
            dial = gr.HTML(_dial(25, 0), label="Camera")
            sampled = widgets.sampling()

    @limits.refusing(status)
    def other_view(
        prompt: str, image: str | None, turn: float, rise: float,
        steps: int, guidance: float, seed: int, person: gr.Request,
    ) -> Iterator[tuple[list[tuple[str, str]], str]]:  # fmt: skip
        """Generate an image from another camera.

        Args:
            prompt: caption; may be empty.
            image: as the first camera sees it.
            turn: degrees that the other camera is around.
            rise: degrees that it is higher.
            steps: of the sampler.
            guidance: not used: the image tells what there is.
            seed: of the noise.

        Returns:
            PNG file of the view, and how far it is.
        """
        seen = limits.image(image, "the image")
        if seen is None:
            raise limits.Refused("upload an image first, which is then seen from elsewhere")
        around = float(limits.number(turn, "the turn", -TURN, TURN))
        higher = float(limits.number(rise, "the rise", -RISE, RISE))
        frames = (
            RequestFrame("image", seen),
            RequestFrame("rays", camera=(0.0, ELEVATION)),
            RequestFrame("image"),
            RequestFrame("rays", camera=(around, ELEVATION + higher)),
        )
        base = widgets.read_sampling(steps, guidance, seed) | {"guidance": None}
        request = Request(limits.text(prompt), frames=frames, **base)
        yield from _shown(holder, request, [f"{around:g}° around, {higher:g}° up"], person)

    run = make.click(
        other_view, [prompt, image, turn, rise, *sampled], [views, status],
        api_name="other_view", trigger_mode="once", **DEVICE,
    )  # fmt: skip
    stop.click(holder.stop, None, status, **QUICK)
    for slider in (turn, rise):
        slider.input(_dial, [turn, rise], dial, **QUICK)
    return image, widgets.Onward(views, views, [run], status, onward)


def _shown(
    holder: Holder, request: Request, captions: list[str], person: gr.Request, remarks: Sequence[str] = ()
) -> Iterator[tuple[list[tuple[str, str]], str]]:
    for shown in holder.make([request], person, remarks):
        yield list(zip(shown.files, captions)), shown.status


def _dial(turn: Any, rise: Any) -> str:
    """Where the two cameras stand, seen from above, as SVG."""
    around, up = (float(value) if isinstance(value, (int, float)) else 0.0 for value in (turn, rise))

    def at(degrees: float, radius: float) -> tuple[float, float]:
        return 60 + radius * math.sin(math.radians(degrees)), 60 + radius * math.cos(math.radians(degrees))

    (x, y), (first_x, first_y) = at(around, 42), at(0, 42)
    return f"""<svg viewBox="0 0 120 120" width="140" role="img"
 aria-label="Cameras from above: the other one {around:g} degrees around, {up:g} up">
<circle cx="60" cy="60" r="42" fill="none" stroke="currentColor" stroke-opacity="0.3"/>
<rect x="54" y="54" width="12" height="12" fill="currentColor" fill-opacity="0.5"/>
<circle cx="{first_x:.1f}" cy="{first_y:.1f}" r="5" fill="none" stroke="currentColor"/>
<line x1="{x:.1f}" y1="{y:.1f}" x2="60" y2="60" stroke="var(--color-accent)" stroke-dasharray="3 3"/>
<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 + up / 5:.1f}" fill="var(--color-accent)"/></svg>"""
