"""What a call of `OneDiffusionPipeline` says: its frames, however they were told, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..tasks import TASKS, PictureFrame, check_frames, frames_of_mask, infer_task, task_frames
from .frame_pictures import picture_size


def read_scene(
    prompt: str | list[str] | None,
    frames: Sequence[PictureFrame] | None,
    task: str | None,
    images: Any,
    cameras: Sequence[Any] | torch.Tensor | None,
    inverse: bool,
    captions: Sequence[str] | None,
    legend: Mapping[str, str] | None,
    denoise_mask: Sequence[int] | None,
) -> tuple[list[PictureFrame], str | None]:
    """The frames of a call and the task they are of; the task is `None` where the raw prompt says it.

    Raises:
        ValueError: two ways at once, or frames that are not the task's.
    """
    cameras = None if cameras is None else list(cameras)
    first = (prompt if isinstance(prompt, str) else prompt[0] if prompt else "").lstrip()
    if frames is not None:
        rest = {
            "images": images,
            "cameras": cameras,
            "denoise_mask": denoise_mask,
            "captions": captions,
            "legend": legend,
            "inverse": inverse or None,
        }
        extra = [name for name, value in rest.items() if value is not None]
        if extra:
            raise ValueError(f"frames say everything; leave out {', '.join(extra)}")
        if not frames:
            raise ValueError("frames is empty; give at least one, such as PictureFrame.make()")
        read = list(frames)
    elif denoise_mask is not None:
        if captions is not None or legend is not None or inverse:
            raise ValueError("captions, legend and inverse go with task=; denoise_mask takes images and cameras")
        views = task == "views" or first.startswith(TASKS["views"].token)
        kind = TASKS[task].condition if task in TASKS and not views else "image"
        known = [] if images is None else images if isinstance(images, list | tuple) else [images]
        read = frames_of_mask(denoise_mask, known, (cameras or ()) if views else cameras, kind)
    elif task is None and (images is not None or cameras is not None):
        raise ValueError("images and cameras are given for a task: add task= or denoise_mask=, or tell frames=")
    else:
        given = () if images is None else images
        read = task_frames(
            task or "text_to_image", given, inverse=inverse, captions=captions, legend=legend, cameras=cameras
        )
    if task is None and first.startswith("[["):
        return read, None
    task = task or infer_task(read)
    if task is None:
        raise ValueError(
            f"these frames ({', '.join(frame.kind for frame in read)}) could be of several tasks; name it "
            "(task='subject') or begin the prompt with its token"
        )
    check_frames(task, read)
    return read, task


def check_scene(
    frames: Sequence[PictureFrame], prompts: int, height: int, width: int, cell: int, transformer: Any
) -> None:
    """Refuse frames that neither the task nor the transformer can take.

    Args:
        prompts: how many the call has.
        height, width: in pixels.
        cell: pixels per side of a token.
    """
    if all(frame.is_given for frame in frames):
        raise ValueError("every frame is given, so there is nothing to make; give at least one PictureFrame.make()")
    for i, frame in enumerate(frames):
        pictures = len(pictures_of(frame))
        if pictures not in (0, 1, prompts):
            raise ValueError(
                f"frame {i} is given as {pictures} pictures for {prompts} prompt(s); give one, or one per prompt"
            )
    last = getattr(transformer, "max_frames", None)
    if last is not None and len(frames) > last:
        raise ValueError(f"got {len(frames)} frames, the model's positions end at {last}; give fewer")
    if any(frame.kind == "rays" for frame in frames) and height != width:
        raise ValueError(f"views are square, got {height}x{width} pixels; make height and width equal")
    if height < cell or width < cell or height % cell or width % cell:
        near = f"{max(height // cell, 1) * cell}x{max(width // cell, 1) * cell}"
        raise ValueError(f"height and width must be multiples of {cell} pixels, got {height}x{width}; try {near}")
    if max(height, width) // cell > transformer.max_grid:
        raise ValueError(
            f"{height}x{width} pixels are {height // cell}x{width // cell} tokens, "
            f"the model's positions end at {transformer.max_grid}"
        )
    drawn = [frame for frame in frames if frame.adapter is None and pictures_of(frame)]
    if any(frame.kind != "image" for frame in drawn):
        sizes = sorted({picture_size(picture) for frame in drawn for picture in pictures_of(frame)})
        if len(sizes) > 1:
            raise ValueError(
                "a picture and what is drawn over it must be of one size, got "
                f"{', '.join(f'{h}x{w}' for h, w in sizes)} pixels; crop them alike"
            )


def pictures_of(frame: PictureFrame) -> list[Any]:
    """Pictures of a given frame that have to be encoded: none of one to be made, of rays, or of latents."""
    if not frame.is_given or frame.kind == "rays" or isinstance(frame.content, torch.Tensor):
        return []
    return list(frame.content) if isinstance(frame.content, list | tuple) else [frame.content]


def check_texts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    embeds: torch.Tensor | None,
    negative_embeds: torch.Tensor | None,
) -> int:
    """Refuse texts that do not fit each other; the number of samples they ask for."""
    if (prompt is None) == (embeds is None):
        raise ValueError("give either prompt or prompt_embeds" + ("" if prompt is None else ", not both"))
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = text if isinstance(text, list | tuple) else [] if text is None else [text]
        if not all(isinstance(one, str) for one in texts) or (text is not None and not texts):
            raise ValueError(f"{name} must be a string or a list of strings, got {text!r}")
    if embeds is not None:
        batch = embeds.shape[0]
    else:
        batch = 1 if isinstance(prompt, str) else len(prompt or ())
    if isinstance(negative_prompt, list | tuple) and len(negative_prompt) != batch:
        raise ValueError(f"got {len(negative_prompt)} negative prompts for {batch} prompts; give one, or as many")
    if negative_prompt is not None and negative_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    return batch
