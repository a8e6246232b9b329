"""Rows of frames for any-to-any, from what was given and what is to be made."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from imgdit.apps.jobs.request import AskedFrame
from imgdit.tasks import TASKS


def frame_row(
    given: Sequence[tuple[str, Image.Image]],
    make: Sequence[str],
    cameras: Sequence[tuple[float, float]] = (),
) -> tuple[AskedFrame, ...]:
    """The frames in the order that tasks have them: the picture first; of views, each with its camera.

    Args:
        given: kind and picture; the other one of a pair of pictures is called by its task (blur, mask, …).
        make: kinds; nothing: the picture, unless it is given.
        cameras: azimuth and elevation in degrees of each view; the first given pictures are of the first of them.

    Raises:
        ValueError: views of anything but pictures, or two pictures of which nobody can tell the task.
    """
    if cameras:
        if any(kind != "image" for kind, _ in given) or any(kind != "image" for kind in make):
            raise ValueError("views are of pictures; give image=FILE and cameras, and nothing to make")
        if len(given) > len(cameras):
            raise ValueError(f"got {len(given)} pictures for {len(cameras)} cameras; give a camera for each view")
        pictures = [picture for _, picture in given] + [None] * (len(cameras) - len(given))
        return tuple(
            frame
            for picture, camera in zip(pictures, cameras)
            for frame in (AskedFrame("image", picture), AskedFrame("rays", camera=camera))
        )
    frames = [AskedFrame(kind, picture) for kind, picture in given]
    made = list(make) or ([] if any(kind == "image" for kind, _ in given) else ["image"])
    frames += [AskedFrame(kind) for kind in made]
    if len(frames) == 2 and all(frame.kind == "image" for frame in frames):
        pairs = ", ".join(name for name, task in TASKS.items() if task.condition == "image" and task.frames == (2, 2))
        raise ValueError(f"call one of two pictures by what it is to the other: {pairs}")
    # The picture comes first whatever the order it was told in.
    return tuple(sorted(frames, key=lambda frame: frame.kind != "image"))
