"""Tasks as frames: which of them condition, which are generated, and what the prompt says of them (OneDiffusion,
arXiv 2411.16318).

A task is a row of frames, the image first, and a token at the beginning of the prompt that says what the frames are
to each other. Which of them condition is free. So every task has an inverse, and all of its frames may be generated at
once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from imgdit.display import Shown
from imgdit.moved import renamed
from imgdit.naming import check_name, nearest, old_names

TASK_TOKENS = {
    "text_to_image": "[[text2image]]",
    "canny": "[[canny2image]]",
    "depth": "[[depth2image]]",
    "segmentation": "[[semanticmap2image]]",
    "boxes": "[[boundingbox2image]]",
    "blur": "[[deblurring]]",
    "grey": "[[colorization]]",
    "mask": "[[image_inpainting]]",
    "super_resolution": "[[super_resolution]]",
    "subject": "[[subject_driven]]",
    "style_reference": "[[style_transfer]]",
    "editing": "[[image_editing]]",
    "views": "[[multiview]]",
}
"""What a prompt begins with to say what the frames are to each other (OneDiffusion, arXiv 2411.16318), by task. The
inverse of a task has its token: the frames tell which is given. Those for colours, sizes and styles are ours."""

COLOURS = {
    "red": "#FF0000",
    "lime": "#00FF00",
    "blue": "#0000FF",
    "yellow": "#FFFF00",
    "magenta": "#FF00FF",
    "cyan": "#00FFFF",
    "orange": "#FFA500",
    "purple": "#800080",
    "brown": "#A52A2A",
    "green": "#008000",
    "pink": "#FFC0CB",
    "teal": "#008080",
    "darkorange": "#FF8C00",
    "blueviolet": "#8A2BE2",
    "darkgreen": "#006400",
    "orangered": "#FF4500",
    "navy": "#000080",
    "gold": "#FFD700",
    "turquoise": "#40E0D0",
    "orchid": "#DA70D6",
}
"""The colours that OneDiffusion's segmentations and boxes are told in; any object may have any of them."""

KINDS = ("image", "canny", "depth", "hed", "pose", "segmentation", "boxes", "rays")
"""What a frame may show. Photographs of every sort, blurred or masked ones too, are images."""

_MAPS = KINDS[1:-1]  # drawn over the image, pixel by pixel
_WORDS = {"segmentation": "mask", "boxes": "boundingbox"}


@old_names(given="clean", make="generate", is_given="is_clean")
@dataclass(frozen=True, eq=False)
class ImageFrame(Shown):
    """A frame as `OneDiffusionPipeline` takes it: what it shows, and whether it conditions or is generated.

    In the transformer it becomes an `imgdit.Frame`.

    Write `ImageFrame.clean(photo)` and `ImageFrame.generate("depth")`.
    """

    kind: str = "image"
    """One of `KINDS`."""
    content: Any = None
    """What it conditions on: an image (PIL of any mode, or an array (H, W) or (H, W, C); `imgdit.images.convert` says
    what its values mean), or a list of them, one per prompt; latents (C, h, w) or (B, C, h, w) as a tensor; for
    rays a camera-to-world matrix (4, 4), OpenCV's axes, or an
    array (P, 4, 4) of one per prompt. `None`: to be generated."""
    caption: str | None = None
    """Its own caption, for tasks that tell frames apart by theirs (subject, identity)."""
    legend: Mapping[str, str] | None = None
    """Colour of each object of a segmentation or of boxes: {"cat": "cyan", "sofa": "#FFA500"}."""
    adapter: str | None = None
    """Name of a loaded LoRA that reads this frame and no other (OminiControl's conditions); MMDiT only."""
    sees: Literal["all", "joint", "self"] = "all"
    """What its tokens attend to; see `imgdit.Frame`. "self" lets a conditioning frame be computed once per run, and
    needs a model that was trained so."""
    index: float | None = None
    """First position coordinate; `None`: its number among the frames."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Rows and columns, in tokens, added to its positions."""

    def __post_init__(self) -> None:
        check_name("kind of frame", self.kind, KINDS)
        if self.legend is not None:
            if self.kind not in _WORDS:
                raise ValueError(
                    f"a legend belongs to a segmentation or to boxes, this frame is of kind {self.kind!r}"
                )
            for colour in self.legend.values():
                hex_colour(colour)

    @classmethod
    def generate(cls, kind: str = "image", **options: Any) -> ImageFrame:
        """A frame to be generated."""
        return cls(kind, **options)

    @classmethod
    def clean(cls, content: Any, kind: str = "image", **options: Any) -> ImageFrame:
        """A conditioning frame, of which the content is known."""
        if content is None:
            raise ValueError(
                f"a conditioning frame of kind {kind!r} needs its content, got None; write ImageFrame.generate()"
            )
        return cls(kind, content, **options)

    @property
    def is_clean(self) -> bool:
        """Whether it conditions; otherwise it is generated."""
        return self.content is not None


@dataclass(frozen=True)
class Task:
    """What a task's frames are and how its prompt begins."""

    name: str
    token: str
    condition: str
    """Kind of the frames after the image."""
    frames: tuple[int, int]
    """Fewest and most frames."""
    about: str
    captions: bool = False
    """Whether the prompt always tells the frames apart by captions of their own."""


TASKS = {
    task.name: task
    for task in (
        Task("text_to_image", TASK_TOKENS["text_to_image"], "image", (1, 1), "text → image"),
        Task("canny", TASK_TOKENS["canny"], "canny", (2, 2), "edges, white on black ↔ image"),
        Task("depth", TASK_TOKENS["depth"], "depth", (2, 2), "depth, near is white ↔ image"),
        Task("hed", "[[hed2img]]", "hed", (2, 2), "soft edges ↔ image"),
        Task("pose", "[[pose2image]]", "pose", (2, 2), "stick figures ↔ image"),
        Task("segmentation", TASK_TOKENS["segmentation"], "segmentation", (2, 2), "a colour per object ↔ image"),
        Task("boxes", TASK_TOKENS["boxes"], "boxes", (2, 2), "a coloured frame per object ↔ image"),
        Task("blur", TASK_TOKENS["blur"], "image", (2, 2), "blurred image → sharp one"),
        Task("grey", TASK_TOKENS["grey"], "image", (2, 2), "grey image → coloured one"),
        Task("mask", TASK_TOKENS["mask"], "image", (2, 2), "image with a hole → whole one"),
        Task("super_resolution", TASK_TOKENS["super_resolution"], "image", (2, 2), "coarse image → fine one"),
        Task("editing", TASK_TOKENS["editing"], "image", (2, 2), "image and instruction → changed image"),
        Task("subject", TASK_TOKENS["subject"], "image", (2, 2), "a thing elsewhere → an image with it"),
        Task("style_reference", TASK_TOKENS["style_reference"], "image", (2, 2), "an image → another in its style"),
        Task("identity", "[[faceid]]", "image", (2, 4), "1 to 3 portraits → another of the person", captions=True),
        Task("views", TASK_TOKENS["views"], "rays", (2, 24), "images and their cameras, any of them given"),
    )
}
"""The tasks by name. The tokens of grey, super_resolution and style_reference are ours: OneDiffusion's published
weights have not seen them."""


def hex_colour(colour: str) -> str:
    """ "#RRGGBB" of a colour's name or of itself.

    Raises:
        ValueError: a name that is not in `COLOURS`.
    """
    if re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
        return colour.upper()
    check_name("colour", colour, COLOURS)
    return COLOURS[colour]


@old_names(pictures="images")
def task_frames(
    task: str,
    images: Any = (),
    *,
    inverse: bool = False,
    captions: Sequence[str] | None = None,
    legend: Mapping[str, str] | None = None,
    cameras: Sequence[Any] | None = None,
) -> list[ImageFrame]:
    """The frames of a task.

    Args:
        task: its name, of `TASKS`.
        images: what is given, one or several; the references of subject and identity; the known images of views in
            their order, `None` for one to be generated.
        inverse: the image conditions, the rest is generated: depth of a photo.
        captions: of the given images, for tasks that tell frames apart by them (subject, identity).
        legend: of segmentation and boxes: the colour of each object.
        cameras: of views only: a camera-to-world matrix (4, 4) per view, `None` for one to be found. `None`: all of
            them, for as many views as images.

    Raises:
        ValueError: an unknown task, more or fewer images than it takes, or details that it has no use for.
    """
    check_name("task", task, TASKS)
    it = TASKS[task]
    contents = list(images) if isinstance(images, list | tuple) else [images]
    if captions is not None and task not in ("subject", "identity"):
        raise ValueError(f"captions of given images are for the tasks 'subject' and 'identity', got some for {task!r}")
    if task == "views":
        return _view_frames(contents, cameras, inverse)
    if cameras is not None:
        raise ValueError(f"cameras are for the task 'views', got some for {task!r}")
    fewest, most = (1, 1) if inverse else (it.frames[0] - 1, it.frames[1] - 1)
    if not fewest <= len(contents) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"the task {task!r} ({it.about}) takes {wanted} given image(s), got {len(contents)}")
    if inverse:
        if it.frames == (1, 1):
            raise ValueError(f"the task {task!r} has one frame and so no inverse")
        return [ImageFrame.clean(contents[0]), ImageFrame.generate(it.condition, legend=legend)]
    if captions is not None and len(captions) != len(contents):
        raise ValueError(f"got {len(captions)} captions for {len(contents)} given images; give one for each")
    each: Sequence[str | None] = captions if captions is not None else [None] * len(contents)
    conditions = [
        ImageFrame.clean(image, it.condition, caption=caption, legend=legend)
        for image, caption in zip(contents, each, strict=True)
    ]
    return [ImageFrame.generate(), *conditions]


def _view_frames(images: list[Any], cameras: Sequence[Any] | None, inverse: bool) -> list[ImageFrame]:
    if inverse:
        raise ValueError("views have no inverse; give images or cameras as None where they are to be generated")
    views = [None] * len(images) if cameras is None else list(cameras)
    if len(images) > len(views):
        raise ValueError(f"got {len(images)} images for {len(views)} cameras; give a camera, or None, per view")
    images = images + [None] * (len(views) - len(images))
    frames = []
    for image, camera in zip(images, views, strict=True):
        frames += [ImageFrame("image", image), ImageFrame("rays", camera)]
    return frames


@old_names(pictures="images")
def frames_of_mask(
    denoise_mask: Sequence[int],
    images: Sequence[Any] = (),
    cameras: Sequence[Any] | None = None,
    kind: str = "image",
) -> list[ImageFrame]:
    """Frames by the raw form: 1 is generated, 0 conditions; what is known fills the zeros in order.

    Args:
        denoise_mask: one number per frame.
        images: for the zeros; with cameras, for the zeros at even places.
        cameras: frames alternate between image and rays, and these fill the zeros at odd places; `None`: no rays.
        kind: of the frames after the first, without cameras.

    Raises:
        ValueError: as many zeros as images or cameras there are not; nothing is repeated.
    """
    if not denoise_mask or any(value not in (0, 1) for value in denoise_mask):
        raise ValueError(
            f"denoise_mask has a 1 for each frame to be generated and a 0 for each other, got {denoise_mask}"
        )
    kinds = ["image" if i == 0 or cameras is not None else kind for i in range(len(denoise_mask))]
    if cameras is not None:
        kinds[1::2] = ["rays"] * len(kinds[1::2])
    frames = [ImageFrame.generate(k) for k in kinds]
    for name, contents, is_rays in (("images", images, False), ("cameras", cameras or (), True)):
        places = [i for i, m in enumerate(denoise_mask) if m == 0 and (kinds[i] == "rays") == is_rays]
        if len(places) != len(contents):
            raise ValueError(
                f"denoise_mask {list(denoise_mask)} has {len(places)} places for {name}, got {len(contents)}"
            )
        for place, content in zip(places, contents, strict=True):
            frames[place] = ImageFrame.clean(content, kinds[place])
    return frames


def infer_task(frames: Sequence[ImageFrame]) -> str | None:
    """The task that the frames' kinds tell; `None` where they could be of several (two images, for one)."""
    kinds = [frame.kind for frame in frames if frame.adapter is None]
    if kinds == ["image"]:
        return "text_to_image"
    if "rays" in kinds:
        return "views"
    if len(kinds) == 2 and kinds[0] == "image" and kinds[1] in _MAPS:
        return kinds[1]
    return None


def check_frames(task: str, frames: Sequence[ImageFrame]) -> None:
    """Refuse frames that are not the task's: too many or too few, of other kinds, in another order."""
    check_name("task", task, TASKS)
    it = TASKS[task]
    frames = [frame for frame in frames if frame.adapter is None]
    kinds, (fewest, most) = [frame.kind for frame in frames], it.frames
    if not fewest <= len(frames) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"the task {task!r} ({it.about}) has {wanted} frames, got {len(frames)}")
    if task == "views":
        if len(frames) % 2 or kinds != ["image", "rays"] * (len(frames) // 2):
            raise ValueError(f"views are pairs of an image and its rays, in this order; got {', '.join(kinds)}")
    elif kinds != ["image", *[it.condition] * (len(frames) - 1)]:
        raise ValueError(f"the task {task!r} has an image first and then {it.condition}; got {', '.join(kinds)}")


def task_prompt(task: str | None, prompt: str, frames: Sequence[ImageFrame], item: str | None = None) -> str:
    """The prompt as the model was taught it: the task's token, the legend or the frames' captions, the caption.

    A prompt that begins with a token is taken as it is.

    Args:
        task: `None`: nothing but the prompt says it.
        prompt: caption of the image, or the instruction of editing.
        frames: with their captions and legends.
        item: what the subject is called.

    Raises:
        ValueError: an unknown token, or one of another task than the one named.
    """
    raw = re.match(r"\s*(\[\[\w+\]\])", prompt)
    if raw:
        tokens = {known.token: name for name, known in TASKS.items()}
        if raw[1] not in tokens:
            raise ValueError(f"unknown task token {nearest(raw[1], tokens)}")
        if task is not None and raw[1] != TASKS[task].token:
            raise ValueError(
                f"the prompt begins with {raw[1]}, the token of {tokens[raw[1]]!r}, but the frames are of {task!r} "
                f"({TASKS[task].token}); leave the token out or give other frames"
            )
        if item is not None or any(frame.caption for frame in frames):
            raise ValueError("a prompt that begins with a token is read as it is; write item and captions into it")
        return prompt
    if task is None:
        return prompt
    parts = [TASKS[task].token]
    if item is not None:
        if task != "subject":
            raise ValueError(f"item names what the task 'subject' keeps, got item={item!r} for the task {task!r}")
        parts.append(f"<item: {item}>")
    for frame in frames:
        for thing, colour in (frame.legend or {}).items():
            code = hex_colour(colour)
            name = next((name for name, known in COLOURS.items() if known == code), "")
            parts.append(f"<{' '.join(filter(None, (code, name)))} {_WORDS[frame.kind]}: {thing}>")
    if TASKS[task].captions or item is not None or any(frame.caption for frame in frames):
        captions = [frame.caption or "" for frame in frames if frame.adapter is None]
        captions[0] = captions[0] or prompt
        parts += [f"[[img{i}]] {caption}".strip() for i, caption in enumerate(captions)]
    else:
        parts.append(prompt)
    return " ".join(part for part in parts if part)


def task_caption(caption: str, task: str | None = None) -> str:
    """A caption behind the token of a task, as training prompts are written."""
    return " ".join(part for part in (TASK_TOKENS[task] if task else "", caption) if part)


def __getattr__(name: str) -> Any:
    """Names of version 0.1; they go with version 0.3."""
    return renamed(__name__, name)
