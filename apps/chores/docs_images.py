"""The images and numbers of docs/, made by the embedded model or a folder like it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from imgdit.apps.jobs.conditions import condition_of
from imgdit.apps.jobs.plan import PROMPTS
from imgdit.apps.jobs.request import Control, Request, RequestFrame
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.session import Session
from imgdit.benchmarks.scenes import run as scene_bench
from imgdit.benchmarks.scenes.text_to_image import held_out
from imgdit.checkpoints import SCENE_PROBE, SCENES
from imgdit.images import to_image
from imgdit.images.sheet import contact_sheet
from imgdit.scenes.render import render
from imgdit.scenes.world import OBJECTS

QUALITY = 90
"""Of JPEG files: the large sheets, whose pixels nobody counts."""
STRENGTHS = (0.0, 0.5, 1.0)
CONTROLLED = (
    "a cartoon of a blue cube under a clear sky",
    "a green cube at night, neon style",
    "a mosaic of a yellow cube",
)
"""Other images of the first prompt's object."""
UNLEARNED = ("neon", "sketch", "mosaic", "cube", "sphere", "cone")
"""Concepts of the sheet, as far as the sparse autoencoder knows them."""
TURNS = (-40.0, -20.0, 20.0, 40.0)
"""Degrees between the given image's camera and the others'."""
VIEWED = 3
"""Scenes that are looked at from around."""


def make_images(out: Path, *, model: Path = SCENES, count: int = 100, steps: int = 28) -> Iterator[Path]:
    """Make the sheets and the benchmark's numbers; each file as it is written.

    Args:
        out: folder; the sheets go into its `images`.
        model: folder of a pipeline of the scenes. Sheets that need adapters or a sparse autoencoder are made where
            its folder has them.
        count: images of each kind of the benchmark.
        steps: of the sampler.
    """
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    session = Session(Shelf(model))
    session.quiet()
    made = [session.generate(Request(text, seed=i, steps=steps)).images[0] for i, text in enumerate(PROMPTS)]
    yield _save(contact_sheet([([image], text) for image, text in zip(made, PROMPTS)]), images / "generate.png")
    yield _save(_any_sheet(session, made[:3], steps), images / "any.png")
    yield _save(_views_sheet(session, steps), images / "views.png")
    if session.shelf.adapter_for("depth") is not None:
        yield _save(_control_sheet(session, made[0], steps), images / "control.png")
    if session.shelf.has_sae:
        yield _save(_unlearn_sheet(session, steps), images / "unlearn.png")
    yield from _benchmark(out, model, count, steps)


def _benchmark(out: Path, model: Path, count: int, steps: int) -> Iterator[Path]:
    """The numbers of `imgdit bench scenes` and its sheets, as JPEG."""
    work = out / "bench"
    scene_bench.run(model, SCENE_PROBE, work, count, steps, 3.0)
    yield (work / "scenes.json").replace(out / "bench-scenes.json")
    for sheet in sorted(work.glob("*.png")):
        yield _save(Image.open(sheet), out / "images" / f"{sheet.stem}.jpg")
    shutil.rmtree(work)


def _any_sheet(session: Session, images: list[Image.Image], steps: int) -> Image.Image:
    """Each image, what is found in it, and another image of its depth."""
    tiles = []
    for image, text in zip(images, PROMPTS):
        given = RequestFrame(image=image)
        found = {
            kind: session.generate(Request(frames=(given, RequestFrame(kind)), steps=steps)).images[0]
            for kind in ("depth", "canny", "segmentation")
        }
        frames = (RequestFrame(), RequestFrame("depth", found["depth"]))
        again = session.generate(Request(text, seed=100, steps=steps, frames=frames)).images[0]
        tiles.append(([image, *found.values(), again], f"{text}: depth, edges, segmentation; depth to image"))
    return contact_sheet(tiles, columns=1)


def _views_sheet(session: Session, steps: int) -> Image.Image:
    """Scenes from around them: as they are, and as the model makes them of the first view."""
    held = held_out(VIEWED, objects=1)
    told = ", ".join(f"{turn:+.0f}" for turn in TURNS)
    tiles = []
    for scene, text, rgb in zip(held.scenes, held.prompts, held.rendering.rgb):
        start = scene.camera
        truth = render([scene.with_camera(start.orbit(azimuth=turn)) for turn in TURNS]).rgb
        given = to_image(rgb)
        made = []
        for turn in TURNS:
            cameras = [RequestFrame("rays", camera=(start.azimuth + t, start.elevation)) for t in (0.0, turn)]
            frames = (RequestFrame(image=given), cameras[0], RequestFrame(), cameras[1])
            made.append(session.generate(Request(text, steps=steps, frames=frames)).images[0])
        tiles.append(([given, *map(to_image, truth)], f"a view; the camera turned by {told} degrees"))
        tiles.append(([given, *made], "the same view; made from it and the cameras"))
    return contact_sheet(tiles, columns=1)


def _control_sheet(session: Session, image: Image.Image, steps: int) -> Image.Image:
    """A depth map, and images that follow it more and more."""
    depth = condition_of(session, "depth", image)
    tiles = []
    for i, text in enumerate(CONTROLLED):
        controls = [Control("depth", depth, strength) for strength in STRENGTHS]
        made = [session.generate(Request(text, seed=i, steps=steps, controls=(c,))).images[0] for c in controls]
        tiles.append(([depth, *made], f"{text}: depth; strength {', '.join(map(str, STRENGTHS))}"))
    return contact_sheet(tiles, columns=1)


def _unlearn_sheet(session: Session, steps: int) -> Image.Image:
    """Images of concepts, and the same noise without them."""
    tiles = []
    for concept in (name for name in UNLEARNED if name in session.unlearner.concepts):
        thing = concept in OBJECTS
        text = f"a blue {concept} on a wooden floor, photo style" if thing else f"a red torus, {concept} style"
        plain, without = (
            session.generate(Request(text, steps=steps, concepts=concepts)).images[0] for concepts in ((), (concept,))
        )
        tiles.append(([plain, without], f"{text}; without {concept}"))
    return contact_sheet(tiles, columns=3)


def _save(image: Image.Image, file: Path) -> Path:
    image.convert("RGB").save(file, quality=QUALITY)
    return file
