"""Pictures from sentences, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from imgdit import DiffusionPipeline
from imgdit.data.sheet import contact_sheet

PROMPTS = (
    "a photo of a red cube on a wooden floor",
    "a cartoon of a blue torus under a clear sky",
    "a green pyramid at night, neon style",
    "a mosaic of a yellow sphere and a purple cone at sunset",
    "a pencil sketch of an orange cylinder on a checkered floor",
    "a pink octahedron left of a cyan capsule in a grey studio, photo style",
)
"""What `imgdit generate` shows if nothing is asked for."""


def generate(
    prompts: Sequence[str],
    out: Path,
    model: str | Path,
    *,
    steps: int = 28,
    guidance: float = 3.0,
    seed: int = 0,
    size: int | None = None,
) -> list[Path]:
    """Write a picture per sentence, and a sheet of all of them where there are several.

    Args:
        prompts: sentences.
        out: a file for one sentence, otherwise a folder.
        model: folder or Hub repository of a pipeline.
        steps: of the sampler.
        guidance: scale.
        seed: of the first picture; the others count up, so that each can be made again alone.
        size: pixels per side; what the model was trained at if `None`.

    Returns:
        The files, the sheet last.
    """
    pipe = DiffusionPipeline.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device).set_progress_bar_config(desc="sampling", disable=None)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pictures: list[Image.Image] = pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size,
        width=size,
        generator=generators,
    ).images
    if len(pictures) == 1 and out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures[0].save(out)
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{i:03d}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, files):
        picture.save(file)
    if len(pictures) > 1:
        files.append(out / "sheet.png")
        contact_sheet([([picture], prompt) for picture, prompt in zip(pictures, prompts)]).save(files[-1])
    return files
