"""What a call of `OneDiffusionPipeline` says: its frames, however they were told, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from imgdit.images.convert import image_size
from imgdit.pipelines.checks import check_size
from imgdit.tasks import TASKS, PictureFrame, check_frames, frames_of_mask, infer_task, task_frames


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
    frames: Sequence[PictureFrame],
    prompts: int,
    samples: int,
    height: int,
    width: int,
    cell: int,
    transformer: Any,
) -> None:
    """Refuse frames that neither the task nor the transformer can take.

    Args:
        prompts: how many the call has.
        samples: how many it makes of all prompts; latents may be given for each.
        height, width: in pixels.
        cell: pixels per side of a token.
    """
    if all(frame.is_given for frame in frames):
        raise ValueError("every frame is given, so there is nothing to make; give at least one PictureFrame.make()")
    for i, frame in enumerate(frames):
        entries, fitting = num_entries(frame), {1, prompts}
        if isinstance(frame.content, torch.Tensor) and frame.kind != "rays":
            called, fitting = "latent grids", fitting | {samples}
        else:
            called = "cameras" if frame.kind == "rays" else "pictures"
        if entries not in (None, *fitting):
            raise ValueError(
                f"frame {i} is given as {entries} {called} for {prompts} prompt(s); give one, or one per prompt"
            )
    last = getattr(transformer, "max_frames", None)
    if last is not None and len(frames) > last:
        raise ValueError(f"got {len(frames)} frames, the model's positions end at {last}; give fewer")
    if any(frame.kind == "rays" for frame in frames) and height != width:
        raise ValueError(f"views are square, got {height}x{width} pixels; make height and width equal")
    check_size(height, width, cell, transformer.max_grid)
    drawn = [frame for frame in frames if frame.adapter is None and pictures_of(frame)]
    if any(frame.kind != "image" for frame in drawn):
        sizes = sorted({image_size(picture) for frame in drawn for picture in pictures_of(frame)})
        if len(sizes) > 1:
            raise ValueError(
                "a picture and what is drawn over it must be of one size, got "
                f"{', '.join(f'{h}x{w}' for h, w in sizes)} pixels; crop them alike"
            )


def num_entries(frame: PictureFrame) -> int | None:
    """Pictures, latent grids or cameras that a given frame holds; `None` for one to be made."""
    if not frame.is_given:
        return None
    if frame.kind == "rays":
        cameras = torch.as_tensor(frame.content)
        return len(cameras) if cameras.ndim == 3 else 1
    if isinstance(frame.content, torch.Tensor):
        return len(frame.content) if frame.content.ndim == 4 else 1
    return len(frame.content) if isinstance(frame.content, list | tuple) else 1


def entry(frame: PictureFrame, sample: int, prompts: int, samples: int) -> PictureFrame:
    """The frame as one sample has it, where it is given one per prompt or one per sample."""
    entries = num_entries(frame)
    if entries is None or (entries == 1 and not isinstance(frame.content, list | tuple)):
        return frame
    if frame.kind == "rays":
        content: Any = torch.as_tensor(frame.content)
        content = content if content.ndim == 3 else content[None]
    else:
        content = frame.content
    place = 0 if entries == 1 else sample if entries == samples else sample * prompts // samples
    return replace(frame, content=content[place])


def pictures_of(frame: PictureFrame) -> list[Any]:
    """Pictures of a given frame that have to be encoded: none of one to be made, of rays, or of latents."""
    if not frame.is_given or frame.kind == "rays" or isinstance(frame.content, torch.Tensor):
        return []
    return list(frame.content) if isinstance(frame.content, list | tuple) else [frame.content]
