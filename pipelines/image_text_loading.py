"""From a model's name to a pipeline that writes texts about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imgdit.checkpoints import EMBEDDED
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import load_pipeline, over_components
from imgdit.pipelines.text_to_image import ImgDiTPipeline


def load_image_text_pipeline(source: str | Path = EMBEDDED, options: LoadOptions = AUTO) -> Any:
    """A pipeline with `caption(images)` and `answer(images, questions)`.

    Args:
        source: folder or Hub repository of a pipeline.

    Raises:
        ValueError: there is none, or it writes no text.
    """
    pipe = load_pipeline(source, options)
    if isinstance(pipe, ImgDiTPipeline) and not isinstance(pipe, ImageTextPipeline):
        pipe = over_components(ImageTextPipeline, pipe, options)
    if not (hasattr(pipe, "caption") and hasattr(pipe, "answer")):
        raise ValueError(f"{str(source)!r} is a {type(pipe).__name__}, which writes no text about images")
    if isinstance(pipe, ImageTextPipeline):
        pipe.check_text_head()
    return pipe
