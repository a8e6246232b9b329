"""`imgdit judge`: questions about images, answered by a model that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from imgdit.apps.commands.options import with_loading
from imgdit.apps.console import at_work
from imgdit.pipelines.load_options import LoadOptions


@with_loading
def judge(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    questions: Annotated[Path | None, typer.Option(help="A file with {question, choices, expected} per line.")] = None,
    model: Annotated[
        str, typer.Option(help="Folder or Hub id of what reads the images; the embedded model by default.")
    ] = "embedded",
    ask: Annotated[list[str] | None, typer.Option(help="A question of yes or no; any number of times.")] = None,
    image_tokenizer: Annotated[str, typer.Option(help="Folder or Hub id, of a published MMaDA.")] = "showlab/magvitv2",
    batch: Annotated[int, typer.Option(min=1, help="Images that are read at once.")] = 8,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the report; printed without it.")] = None,
    *,
    loading: LoadOptions,
) -> None:
    """Answer questions about images by the likelihood of each choice, as a JSON report."""
    with at_work():
        from imgdit.apps.jobs.judge import Question, check_questions, read_questions, report
        from imgdit.apps.jobs.judge import judge as answers
        from imgdit.io.atomic import write_text
        from imgdit.pipelines.image_text_loading import load_image_text_pipeline

        asked = [] if questions is None else read_questions(questions)
        asked += [Question(text) for text in ask or ()]
        if not asked:
            raise ValueError("nothing is asked: give --questions FILE or --ask QUESTION")
        check_questions(asked)
        files = _files(images)
        pipe = load_image_text_pipeline(model, loading, image_tokenizer)
        pipe.set_progress_bar_config(disable=True)
        broken: list[str] = []
        found = report(model, asked, list(answers(pipe, files, asked, batch, broken)), broken)
        for line in broken:
            typer.echo(f"left out {line}", err=True)
        if len(broken) == len(files):
            raise ValueError("no image could be read")
        text = json.dumps(found, ensure_ascii=False, indent=1)
        if out is None:
            typer.echo(text)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
        for one in found["questions"]:
            counts = ", ".join(f"{choice} {count}" for choice, count in one["answers"].items())
            right = f"; {one['right']} of {one['images']} right" if "right" in one else ""
            typer.echo(f"{one['question']} {counts}{right}")
        typer.echo(f"wrote {out}")


def _files(images: list[Path]) -> list[Path]:
    """Image files of files and folders."""
    from imgdit.data.listing import list_folder

    found = []
    for path in images:
        found += [path / name for name in list_folder(path).images] if path.is_dir() else [path]
    if not found:
        raise ValueError(f"there is no image in {', '.join(map(str, images))}")
    return found
