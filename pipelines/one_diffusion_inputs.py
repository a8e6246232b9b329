"""What a call of `OneDiffusionPipeline` says: its frames, however they were told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from imgdit.adapters.pairing import Samples
from imgdit.images.convert import image_size
from imgdit.pipelines.checks import check_size
from imgdit.tasks import TASKS, ImageFrame, check_frames, frames_of_mask, infer_task, task_frames, task_prompt


@dataclass(frozen=True, eq=False)
class FrameSource:
    """The frames of a call, however they were told, by the names of its arguments."""

    frames: Sequence[ImageFrame] | None
    task: str | None
    images: Any
    cameras: Sequence[Any] | torch.Tensor | None
    inverse: bool
    captions: Sequence[str] | None
    legend: Mapping[str, str] | None
    item: str | None
    denoise_mask: Sequence[int] | None

    def read(self, prompt: str | Sequence[str] | None) -> tuple[list[ImageFrame], str | None]:
        """The frames and the task they are of; the task is `None` where the raw prompt says it.

        Raises:
            ValueError: two ways at once, or frames that are not the task's.
        """
        first = (prompt if isinstance(prompt, str) else prompt[0] if prompt else "").lstrip()
        if self.frames is not None:
            frames = self._listed(self.frames)
        elif self.denoise_mask is not None:
            frames = self._of_mask(self.denoise_mask, first)
        elif self.task is None and (self.images is not None or self.cameras is not None):
            raise ValueError("images and cameras are given for a task: add task= or denoise_mask=, or tell frames=")
        else:
            frames = task_frames(
                self.task or "text_to_image",
                () if self.images is None else self.images,
                inverse=self.inverse,
                captions=self.captions,
                legend=self.legend,
                cameras=self._cameras,
            )
        if self.task is None and first.startswith("[["):
            return frames, None
        task = self.task or infer_task(frames)
        if task is None:
            raise ValueError(
                f"these frames ({', '.join(frame.kind for frame in frames)}) could be of several tasks; name it "
                "(task='subject') or begin the prompt with its token"
            )
        check_frames(task, frames)
        return frames, task

    def prompts(
        self,
        prompt: str | Sequence[str] | None,
        task: str | None,
        frames: Sequence[ImageFrame],
        read: Callable[[str], str] = str,
    ) -> list[str] | None:
        """The prompts as the model was taught them; `None` where embeddings hold them.

        Args:
            prompt: of the call, one or several.
            task: of the frames.
            frames: of a sample.
            read: makes a caption of a prompt that is no instruction.

        Raises:
            ValueError: details that cannot be written into embeddings.
        """
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            said = [one if task == "editing" else read(one) for one in prompts]
            return [task_prompt(task, one, frames, self.item) for one in said]
        if self.item is not None or self.captions is not None:
            raise ValueError("item and captions are written into the prompt; prompt_embeds hold it already")
        return None

    @property
    def _cameras(self) -> list[Any] | None:
        return None if self.cameras is None else list(self.cameras)

    def _listed(self, frames: Sequence[ImageFrame]) -> list[ImageFrame]:
        rest = {
            "images": self.images,
            "cameras": self.cameras,
            "denoise_mask": self.denoise_mask,
            "captions": self.captions,
            "legend": self.legend,
            "inverse": self.inverse or None,
        }
        extra = [name for name, value in rest.items() if value is not None]
        if extra:
            raise ValueError(f"frames say everything; leave out {', '.join(extra)}")
        if not frames:
            raise ValueError("frames is empty; give at least one, such as ImageFrame.generate()")
        return list(frames)

    def _of_mask(self, denoise_mask: Sequence[int], first: str) -> list[ImageFrame]:
        """Frames by the raw form, under a first prompt that may begin with the token of views."""
        if self.captions is not None or self.legend is not None or self.inverse:
            raise ValueError("captions, legend and inverse go with task=; denoise_mask takes images and cameras")
        views = self.task == "views" or first.startswith(TASKS["views"].token)
        kind = TASKS[self.task].condition if self.task in TASKS and not views else "image"
        images = self.images
        known = [] if images is None else images if isinstance(images, list | tuple) else [images]
        return frames_of_mask(denoise_mask, known, (self._cameras or ()) if views else self._cameras, kind)


def check_scene(
    frames: Sequence[ImageFrame],
    samples: Samples,
    height: int,
    width: int,
    cell: int,
    transformer: Any,
    texts: bool = False,
) -> None:
    """Refuse frames that neither the task nor the transformer can take.

    Args:
        samples: of the call; latents may be given for each.
        height, width: in pixels.
        cell: pixels per side of a token.
        texts: whether texts are generated about them.
    """
    if not texts and all(frame.is_clean for frame in frames):
        raise ValueError(
            "every frame conditions, so there is nothing to generate; give at least one ImageFrame.generate()"
        )
    for i, frame in enumerate(frames):
        entries, fitting = num_entries(frame), {1, samples.prompts}
        if isinstance(frame.content, torch.Tensor) and frame.kind != "rays":
            called, fitting = "latent grids", fitting | {samples.count}
        else:
            called = "cameras" if frame.kind == "rays" else "images"
        if entries not in (None, *fitting):
            raise ValueError(
                f"frame {i} is given as {entries} {called} for {samples.prompts} prompt(s); give one, or one per "
                "prompt"
            )
    last = getattr(transformer, "max_frames", None)
    if last is not None and len(frames) > last:
        raise ValueError(f"got {len(frames)} frames, the model's positions end at {last}; give fewer")
    if any(frame.kind == "rays" for frame in frames) and height != width:
        raise ValueError(f"views are square, got {height}x{width} pixels; make height and width equal")
    check_size(height, width, cell, transformer.max_grid)
    drawn = [frame for frame in frames if frame.adapter is None and images_of(frame)]
    if any(frame.kind != "image" for frame in drawn):
        sizes = sorted({image_size(image) for frame in drawn for image in images_of(frame)})
        if len(sizes) > 1:
            raise ValueError(
                "an image and what is drawn over it must be of one size, got "
                f"{', '.join(f'{h}x{w}' for h, w in sizes)} pixels; crop them alike"
            )


def num_entries(frame: ImageFrame) -> int | None:
    """Images, latent grids or cameras that a conditioning frame holds; `None` for one to be generated."""
    if not frame.is_clean:
        return None
    if frame.kind == "rays":
        cameras = torch.as_tensor(frame.content)
        return len(cameras) if cameras.ndim == 3 else 1
    if isinstance(frame.content, torch.Tensor):
        return len(frame.content) if frame.content.ndim == 4 else 1
    return len(frame.content) if isinstance(frame.content, list | tuple) else 1


def entry(frame: ImageFrame, sample: int, samples: Samples) -> ImageFrame:
    """The frame as one sample has it, where it is given one per prompt or one per sample."""
    entries = num_entries(frame)
    if entries is None or (entries == 1 and not isinstance(frame.content, list | tuple)):
        return frame
    if frame.kind == "rays":
        content: Any = torch.as_tensor(frame.content)
        content = content if content.ndim == 3 else content[None]
    else:
        content = frame.content
    return replace(frame, content=content[samples.order(entries)[sample]])


def images_of(frame: ImageFrame) -> list[Any]:
    """Images of a conditioning frame that have to be encoded: none of one to be generated, of rays, or of latents."""
    if not frame.is_clean or frame.kind == "rays" or isinstance(frame.content, torch.Tensor):
        return []
    return list(frame.content) if isinstance(frame.content, list | tuple) else [frame.content]
