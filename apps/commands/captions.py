"""`imgdit caption` and `imgdit answer`: texts about images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.commands.options import with_loading
from imgdit.apps.console import at_work
from imgdit.pipelines.load_options import LoadOptions

Model = Annotated[str, typer.Option(help="Folder or Hub id of a pipeline that writes; the embedded model by default.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps; the pipeline's own number by default.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0: the most probable tokens.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens at most; the pipeline's own number by default.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the first text; the others count up.")]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object per text on the standard output.")]


@with_loading
def caption(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Model = "embedded",
    steps: Steps = None,
    temperature: Temperature = None,
    length: Length = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    *,
    loading: LoadOptions,
) -> None:
    """Say what images show."""
    with at_work():
        from imgdit.pipelines.image_text_loading import length_option

        for path in images:
            if path.is_dir():
                raise ValueError(
                    f"{path} is a folder; `imgdit data caption {path}` writes a caption beside each of its images"
                )
        shown = [_read(path) for path in images]
        pipe = _load(model, loading)
        options = chosen_options(steps, temperature) | length_option(pipe, length)
        texts = pipe.caption(shown, generator=_generators(seed, len(shown)), **options).texts
    for path, text in zip(images, texts):
        line = f"{path}: {text}" if len(images) > 1 else text
        typer.echo(json.dumps({"image": str(path), "text": text}, ensure_ascii=False) if as_json else line)


@with_loading
def answer(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    questions: Annotated[list[str], typer.Argument(help="Questions about it.")],
    model: Model = "embedded",
    steps: Steps = None,
    temperature: Temperature = None,
    length: Length = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    *,
    loading: LoadOptions,
) -> None:
    """Answer questions about an image."""
    with at_work():
        from imgdit.pipelines.image_text_loading import length_option

        shown = _read(image)
        pipe = _load(model, loading)
        options = chosen_options(steps, temperature) | length_option(pipe, length)
        copies = [shown] * len(questions)
        texts = pipe.answer(copies, questions, generator=_generators(seed, len(questions)), **options).texts
    for question, text in zip(questions, texts):
        line = {"image": str(image), "question": question, "answer": text}
        typer.echo(json.dumps(line, ensure_ascii=False) if as_json else text)


def chosen_options(steps: int | None, temperature: float | None) -> dict[str, Any]:
    """Options of a call that were given on the command line."""
    named = {"num_inference_steps": steps, "temperature": temperature}
    return {name: value for name, value in named.items() if value is not None}


def _read(path: Path) -> Any:
    from imgdit.images import open_image, to_rgb

    return to_rgb(open_image(path))


def _load(model: str, loading: LoadOptions) -> Any:
    from imgdit.pipelines.image_text_loading import load_image_text_pipeline

    pipe = load_image_text_pipeline(model, loading)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generators(seed: int, count: int) -> list[Any]:
    import torch

    return [torch.Generator().manual_seed(seed + n) for n in range(count)]
