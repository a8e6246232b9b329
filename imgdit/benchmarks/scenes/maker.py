"""What `imgdit bench scenes`, `any` and `control` measure: a pipeline as an `AnyMaker`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from imgdit.adapters.condition import Condition
from imgdit.images import to_image
from imgdit.lora.files import find_adapters, legal_name
from imgdit.pipelines.one_diffusion import OneDiffusionPipeline
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.scenes.geometry import intrinsics
from imgdit.scenes.training_frames import scene_poses
from imgdit.scenes.world import Camera
from imgdit.tasks import TASKS, ImageFrame


class PipelineMaker:
    """Makes what the benchmark asks for with one pipeline's components.

    Every image has its own generator, so the batch size changes nothing.

    Args:
        pipe: of a model of the scenes.
        steps: of the sampler.
        guidance: scale where an image is generated.
        perception: scale where a given image tells what is to be generated: its maps, its camera, its other views.
        batch: images at a time.
    """

    def __init__(
        self, pipe: ImgDiTPipeline, steps: int = 28, guidance: float = 3.0, perception: float = 1.0, batch: int = 16
    ):
        self.any: Any = OneDiffusionPipeline(**pipe.components)
        # What a call returns depends on its arguments. OneDiffusion's own backbone has no other pipeline.
        self.text: Any = self.any if self.any.follows_reference else ImgDiTPipeline(**pipe.components)
        for pipe in (self.text, self.any):
            pipe.set_progress_bar_config(disable=True)
        self.positions: dict[str, Any] = {}  # of loaded condition adapters
        self.steps, self.guidance, self.perception, self.batch = steps, guidance, perception, batch

    def load_controls(self, folder: Path) -> list[str]:
        """Load every condition adapter of a folder; their names.

        Raises:
            ValueError: there is none.
        """
        adapters = find_adapters(folder)
        if not adapters:
            raise ValueError(f"{folder} holds no adapter; train some: imgdit train scenes/control_depth")
        for name, adapter in adapters.items():
            report = self.text.load_control(adapter.path, adapter_name=legal_name(name, self.positions))
            self.positions[report.adapter] = report.info.position or "aligned"
        return list(self.positions)

    def images(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        def make(rows: range, options: dict) -> torch.Tensor:
            return self.text([prompts[i] for i in rows], guidance_scale=self.guidance, **options).images

        return self._batches("images", len(prompts), seed, make)

    def condition(self, task: str, prompts: Sequence[str], images: torch.Tensor, seed: int) -> torch.Tensor:
        def make(rows: range, options: dict) -> torch.Tensor:
            clean = ImageFrame.clean(_images(images, rows))
            frames = [clean, ImageFrame.generate(task)]
            output = self.any([prompts[i] for i in rows], frames, guidance_scale=self.perception, **options)
            return output.maps[task]

        return self._batches(f"image → {task}", len(prompts), seed, make)

    def conditioned(self, task: str, prompts: Sequence[str], conditions: torch.Tensor, seed: int) -> torch.Tensor:
        def make(rows: range, options: dict) -> torch.Tensor:
            frames = [ImageFrame.generate(), ImageFrame.clean(_images(conditions, rows), TASKS[task].condition)]
            options |= {"task": task, "guidance_scale": self.guidance}
            return self.any([prompts[i] for i in rows], frames, **options).images

        return self._batches(f"{task} → image", len(prompts), seed, make)

    def views(
        self, prompts: Sequence[str], images: torch.Tensor, cameras: Sequence[tuple[Camera, Camera]], seed: int
    ) -> torch.Tensor:
        focal_length = float(intrinsics(1)[0, 0])

        def make(rows: range, options: dict) -> torch.Tensor:
            poses = torch.stack([scene_poses(cameras[i]) for i in rows])  # (B, 2, 4, 4)
            frames = [
                ImageFrame.clean(_images(images, rows)),
                ImageFrame.clean(poses[:, 0], "rays"),
                ImageFrame.generate(),
                ImageFrame.clean(poses[:, 1], "rays"),
            ]
            options |= {"focal_length": focal_length, "guidance_scale": self.perception}
            return self.any([prompts[i] for i in rows], frames, **options).images

        return self._batches("views", len(prompts), seed, make)

    def controlled(self, prompts: Sequence[str], conditions: Mapping[str, torch.Tensor], seed: int) -> torch.Tensor:
        def make(rows: range, options: dict) -> torch.Tensor:
            inputs = [
                Condition(images[rows.start : rows.stop], name, position=self.positions[name])
                for name, images in conditions.items()
            ]
            options |= {"guidance_scale": self.guidance, "conditions": inputs}
            return self.text([prompts[i] for i in rows], **options).images

        return self._batches(" + ".join(conditions) or "no condition", len(prompts), seed, make)

    def poses(self, prompts: Sequence[str], first: torch.Tensor, second: torch.Tensor, seed: int) -> torch.Tensor:
        def make(rows: range, options: dict) -> torch.Tensor:
            frames = [
                ImageFrame.clean(_images(first, rows)),
                ImageFrame.clean(torch.eye(4), "rays"),
                ImageFrame.clean(_images(second, rows)),
                ImageFrame.generate("rays"),
            ]
            options |= {"focal_length": float(intrinsics(1)[0, 0]), "guidance_scale": self.perception}
            return self.any([prompts[i] for i in rows], frames, **options).cameras[:, 1]

        return self._batches("cameras", len(prompts), seed, make)

    def _batches(self, name: str, count: int, seed: int, make: Callable[[range, dict], torch.Tensor]) -> torch.Tensor:
        generated = []
        for start in tqdm(range(0, count, self.batch), desc=name, disable=None):
            rows = range(start, min(start + self.batch, count))
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in rows]
            options = {"num_inference_steps": self.steps, "generator": generators, "output_type": "pt"}
            generated.append(make(rows, options).float().cpu())
        return torch.cat(generated)


def _images(images: torch.Tensor, rows: range) -> list[Image.Image]:
    return [to_image(images[i]) for i in rows]
