"""From a model's name to a pipeline that writes texts about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imgdit.checkpoints import EMBEDDED
from imgdit.naming import check_choice
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import chosen_device, chosen_dtype, load_pipeline, over_components, place
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.pipelines.vision_language_loading import is_published, load_vision_language_pipeline


def load_image_text_pipeline(source: str | Path = EMBEDDED, options: LoadOptions = AUTO) -> Any:
    """A pipeline with `caption(images)` and `answer(images, questions)`.

    Args:
        source: folder or Hub repository of a pipeline, or published folder of LLaDA-V or LaViDa. Text frames beside
            a pipeline, see `imgdit.pipelines.text_frames`, are loaded too.

    Raises:
        ValueError: there is none, or it writes no text.
    """
    if is_published(source):
        check_choice("quantize", options.quantize, ("none",))  # of what diffusers loads
        pipe = load_vision_language_pipeline(source, dtype=chosen_dtype(options))
        place(pipe, options, chosen_device(options))
        return pipe
    pipe = load_pipeline(source, options)
    if isinstance(pipe, ImgDiTPipeline) and not isinstance(pipe, ImageTextPipeline):
        pipe = over_components(ImageTextPipeline, pipe, options)
    if not (hasattr(pipe, "caption") and hasattr(pipe, "answer")):
        raise ValueError(f"{str(source)!r} is a {type(pipe).__name__}, which writes no text about images")
    if isinstance(pipe, ImageTextPipeline):
        pipe.check_text_head()
    return pipe


def length_option(pipe: Any, length: int | None) -> dict[str, int]:
    """Tokens that a caption or an answer may have, by the pipeline's own name for it; `None`: its own number. For
    `ImageTextPipeline` the tokens of a question count too."""
    name = "max_length" if isinstance(pipe, ImageTextPipeline) else "gen_length"
    return {} if length is None else {name: length}
