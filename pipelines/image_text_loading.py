"""From a model's name to a pipeline that writes texts about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.hub import INDEX
from imgdit.io.safe_json import read_object
from imgdit.naming import check_choice
from imgdit.pipelines.image_text import ImageTextPipeline
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import chosen_device, chosen_dtype, load_pipeline, over_components, place
from imgdit.pipelines.mmada import IMAGE_TOKENIZER, load_mmada
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.pipelines.vision_language_loading import is_published, load_vision_language_pipeline, model_type_of


def load_image_text_pipeline(
    source: str | Path = EMBEDDED, options: LoadOptions = AUTO, image_tokenizer: str | Path = IMAGE_TOKENIZER
) -> Any:
    """A pipeline with `caption(images)`, `answer(images, questions)` and `choose(images, questions, choices)`.

    Args:
        source: folder or Hub repository of a pipeline, or published folder of LLaDA-V, LaViDa or MMaDA. Text frames
            beside a pipeline, see `imgdit.pipelines.text_frames`, are loaded too.
        options: of loading.
        image_tokenizer: folder or Hub repository, for a published MMaDA.

    Raises:
        ValueError: there is none, or it writes no text.
    """
    published: Any = None
    if model_type_of(source) == "mmada":
        published = load_mmada(source, image_tokenizer, dtype=chosen_dtype(options))
    elif is_published(source):
        published = load_vision_language_pipeline(source, dtype=chosen_dtype(options))
    if published is not None:
        check_choice("quantize", options.quantize, ("none",))  # of what diffusers loads
        place(published, options, chosen_device(options))
        return published
    _check_parts(SCENES if source == EMBEDDED else Path(source).expanduser())
    pipe = load_pipeline(source, options)
    if isinstance(pipe, ImgDiTPipeline) and not isinstance(pipe, ImageTextPipeline):
        pipe = over_components(ImageTextPipeline, pipe, options)
    if not (hasattr(pipe, "caption") and hasattr(pipe, "answer")):
        raise ValueError(f"{str(source)!r} is a {type(pipe).__name__}, which writes no text about images")
    if isinstance(pipe, ImageTextPipeline):
        pipe.check_text_head()
    return pipe


def _check_parts(folder: Path) -> None:
    """Refuse a pipeline's folder that lacks a part. Some tokenizers are made of nothing, without a word."""
    if not (folder / INDEX).is_file():
        return
    for name, value in read_object(folder / INDEX).items():
        if isinstance(value, list) and len(value) == 2 and value[0] is not None and not (folder / name).is_dir():
            raise ValueError(
                f"{folder} has no folder {name!r} ({value[1]}), which its {INDEX} names; is it the whole pipeline?"
            )


def length_option(pipe: Any, length: int | None) -> dict[str, int]:
    """Tokens that a caption or an answer may have, by the pipeline's own name for it; `None`: its own number. For
    `ImageTextPipeline` the tokens of a question count too."""
    name = "max_length" if isinstance(pipe, ImageTextPipeline) else "gen_length"
    return {} if length is None else {name: length}
