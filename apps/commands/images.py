"""`imgdit generate`, `control`, `any`, `unlearn`: the commands that generate images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imgdit.apps.commands.options import ImageOptions, with_images, with_loading
from imgdit.apps.console import user_errors
from imgdit.pipelines.load_options import LoadOptions

if TYPE_CHECKING:
    from imgdit.apps.commands.image_command import ImageCommand
    from imgdit.apps.jobs.request import Control

Adapters = Annotated[Path | None, typer.Option(help="Folder of condition adapters; MODEL/adapters by default.")]

IMAGES, CONTROL = Path("outputs/images"), Path("outputs/control.png")
ANY, UNLEARNED = Path("outputs/any.png"), Path("outputs/unlearned.png")
"""Where images go if nothing is said; with a number behind the name where something else is there."""


@with_loading
@with_images
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; six examples if there is none.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File with a message or JSON object per line; - for what is piped in.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A file for one image, otherwise a folder; outputs/images by default."),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="An image of imgdit's that is made again, bit for bit.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="KIND=FILE: an image that steers (depth=d.png).")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to begin at, under noise, instead of at noise.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Of --image: fraction of the steps that run; 0.6."),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    adapters: Adapters = None,
    sheet: Annotated[bool, typer.Option(help="Write sheet.png with all images of a folder.")] = True,
    *,
    options: ImageOptions,
    loading: LoadOptions,
) -> None:
    """Generate images from prompts. An interrupted folder goes on where it stopped."""
    with user_errors():
        from imgdit.apps.jobs.plan import PROMPTS, Plan, at_free_names
        from imgdit.apps.jobs.run import write_sheet

        if like is not None:
            if prompt or prompts or control or image:
                raise ValueError("--like says everything; leave out prompts, --prompts, --control and --image")
            _again(like, out, options, loading)
            return
        if prompt and prompts:
            raise ValueError("give prompts or --prompts, not both")
        steered: dict[str, Any] = {"controls": _controls(control or []), **_beginning(image, strength)}
        plan = Plan(num_images)
        if prompts:
            plan.read(prompts, options.request(**steered))
        else:
            requests = [options.request(text, **steered) for text in prompt or PROMPTS]
            if out is None:
                plan.add_named(requests)
            else:
                for request in requests:
                    plan.add(request)
        command = options.command(loading, adapters=adapters)
        jobs, page = plan.at(out or IMAGES)
        if out is None and not prompts and not options.overwrite:
            jobs = at_free_names(jobs, command.name)
        jobs = command.run(jobs)
        if page is not None and sheet:
            command.name_sheet(write_sheet(jobs, page))


@with_loading
@with_images
def control(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    conditions: Annotated[
        list[str], typer.Option("--with", help="KIND=FILE; may be repeated where there are adapters.")
    ],
    find: Annotated[
        bool, typer.Option("--find/--as-is", help="Find the condition in the file, a photo; or take it as it is.")
    ] = False,
    strength: Annotated[float, typer.Option(min=0.0, help="1: as trained; 0: nothing.")] = 1.0,
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the steps after which it acts.")] = 0.0,
    end: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the steps after which it acts no more.")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="File to write; outputs/control.png by default.")] = None,
    adapters: Adapters = None,
    *,
    options: ImageOptions,
    loading: LoadOptions,
) -> None:
    """Generate an image that follows others: depth, edges, segmentation, a hole to fill, …

    With --find the conditions are written beside the image, as NAME-KIND.png.
    """
    with user_errors():
        from imgdit.apps.jobs.plan import Job

        command = options.command(loading, adapters=adapters)
        controls = _controls(conditions, strength=strength, start=start, end=end)
        if find:
            command.shelf.check(options.request(controls=controls))
            controls = _found(command, controls, options.sides)
        request = options.request(prompt, controls=controls)

        def beside(file: Path) -> dict[Path, tuple[str, Any]]:
            return {file.with_name(f"{file.stem}-{c.kind}.png"): (c.kind, c.image) for c in controls if find}

        jobs = command.jobs(lambda file: [Job(request, file)], out, CONTROL, beside)
        command.run(jobs, beside(jobs[0].file))


@with_loading
@with_images
def any_to_any(
    prompt: Annotated[str, typer.Argument(help="Caption of the image, or the instruction of editing.")] = "",
    conditions: Annotated[
        list[str] | None, typer.Option("--condition", help="KIND=FILE: image=photo.png, depth=d.png.")
    ] = None,
    generate: Annotated[
        list[str] | None, typer.Option(help="Kinds to generate: image, depth, canny, …; or text.")
    ] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help="AZIMUTH,ELEVATION of each view; given images are the first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; outputs/any.png by default.")] = None,
    *,
    options: ImageOptions,
    loading: LoadOptions,
) -> None:
    """Generate any frames from any others: depth of an image, an image of depth, both, or another view.

    With --generate text a text about the image is printed: a caption, the answer if the prompt is a question, or the
    prompt with its holes filled ("a [?] cube").
    """
    with user_errors():
        if "text" in (generate or []):
            typer.echo(_text(prompt, conditions or [], generate or [], options, loading))
            return
        from imgdit.apps.jobs.plan import Job
        from imgdit.apps.jobs.request import frame_row

        if not (prompt or conditions or generate or camera):
            raise ValueError(
                "say what to condition on or what to generate: --condition KIND=FILE, --generate KIND, "
                "--camera AZIMUTH,ELEVATION, or a prompt"
            )
        command = options.command(loading)
        cameras = [_camera(text) for text in camera or []]
        frames = frame_row(_files(conditions or []), generate or [], cameras)
        request = options.request(prompt, frames=frames)
        command.run(command.jobs(lambda file: [Job(request, file)], out, ANY))


@with_loading
@with_images
def unlearn(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    concept: Annotated[list[str], typer.Option(help="Name of a concept to remove; may be repeated.")],
    mode: Annotated[
        str | None,
        typer.Option(help="scale, remove or replace; by default replace where the text is changed, otherwise scale."),
    ] = None,
    multiplier: Annotated[
        float | None, typer.Option(help="Of the mode scale; what was stored with the concept by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, outputs/unlearned.png by default; NAME-plain.png is from the same noise."),
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="Folder of the sparse autoencoders; MODEL/sae by default.")] = None,
    *,
    options: ImageOptions,
    loading: LoadOptions,
) -> None:
    """Generate an image without concepts, and the same with them."""
    with user_errors():
        from imgdit.apps.jobs.plan import Job

        command = options.command(loading, sae=sae)
        plain = options.request(prompt)
        without = options.request(prompt, concepts=tuple(concept), mode=mode, multiplier=multiplier)

        def jobs_at(file: Path) -> list[Job]:
            return [Job(without, file), Job(plain, file.with_name(f"{file.stem}-plain.png"))]

        command.run(command.jobs(jobs_at, out, UNLEARNED))


# What they share


def _again(image: Path, out: Path | None, options: ImageOptions, loading: LoadOptions) -> None:
    """Generate an image again from what its file tells; exits with 1 if a bit differs."""
    from dataclasses import replace

    from imgdit.apps.jobs.plan import first_free
    from imgdit.apps.jobs.png import read_origin, write_png
    from imgdit.apps.jobs.run import check_png, same_pixels
    from imgdit.images import open_image
    from imgdit.pipelines.loading import as_it_was

    origin = read_origin(image)
    if origin is None:
        raise ValueError(f"{image} does not tell how it was made: imgdit writes that into its PNG files only")
    beside: Any = {name: place and Path(place) for name, place in origin.places.items() if name != "model"}
    options = replace(options, model=options.model or origin.places["model"])
    command = options.command(as_it_was(loading, origin.made_with), **beside)
    file = out if out is not None and out.suffix else (out or IMAGES) / f"{image.stem}-again.png"
    check_png(file)

    def usable(file: Path) -> bool:
        there = read_origin(file) if file.exists() else origin
        return there is not None and (there.asked, there.output) == (origin.asked, origin.output)

    if out is None and not options.overwrite:
        file = first_free(file, usable)
    elif not options.overwrite and not usable(file):
        raise ValueError(f"{file} is there and shows something else; take another --out, or --overwrite")
    command.shelf.check(origin.request)
    session = command.session
    session.quiet(None)
    session.read_prompts_as(origin.made_with)
    again = session.generate(origin.request).images[origin.output]
    now = session.made_with
    write_png(again, file, replace(origin, places=command.shelf.places, made_with=now))
    same = same_pixels(open_image(image).convert("RGB"), again.convert("RGB"))
    names = origin.made_with | now
    differs = {n: [origin.made_with.get(n), now.get(n)] for n in names if origin.made_with.get(n) != now.get(n)}
    if options.as_json:
        typer.echo(json.dumps({"file": str(file), "same": same, "differs": differs}))
    else:
        typer.echo(f"wrote {file}, " + ("the same bit for bit" if same else "which is not the same"))
    if not same:
        reasons = "; ".join(f"{name} was {was}, is {current}" for name, (was, current) in differs.items())
        typer.echo(f"not the same: {reasons or 'the machine differs'}", err=True)
        raise typer.Exit(1)


def _controls(
    conditions: Sequence[str], strength: float = 1.0, start: float = 0.0, end: float = 1.0
) -> tuple[Control, ...]:
    from imgdit.apps.jobs.request import Control

    return tuple(Control(kind, image, strength, start, end) for kind, image in _files(conditions))


def _beginning(image: Path | None, strength: float | None) -> dict[str, Any]:
    """The image of a request that its run begins at, and how strongly it is changed."""
    from imgdit.defaults import STRENGTH
    from imgdit.images import open_image

    if image is None:
        if strength is not None:
            raise ValueError("--strength tells how strongly --image is changed; give --image, or leave it out")
        return {}
    return {"image": open_image(image), "strength": STRENGTH if strength is None else strength}


def _text(prompt: str, conditions: list[str], kinds: list[str], options: ImageOptions, loading: LoadOptions) -> str:
    """A text about an image."""
    import torch

    from imgdit.checkpoints import EMBEDDED
    from imgdit.frames import TextFrame
    from imgdit.pipelines.loading import load_pipeline, over_components
    from imgdit.pipelines.one_diffusion import OneDiffusionPipeline
    from imgdit.tasks import ImageFrame

    if kinds != ["text"]:
        raise ValueError(
            f"--generate text is alone: generate images in a call of their own, got --generate {' '.join(kinds)}"
        )
    frames: list[ImageFrame | TextFrame] = [ImageFrame.clean(image, kind) for kind, image in _files(conditions)]
    text = TextFrame.fill(prompt) if "[" in prompt else TextFrame.ask(prompt) if prompt else TextFrame.generate()
    pipe = load_pipeline(options.model or EMBEDDED, loading)
    if not isinstance(pipe, OneDiffusionPipeline):
        pipe = over_components(OneDiffusionPipeline, pipe, loading)
    pipe.set_progress_bar_config(disable=True)
    height, width = options.sides
    generator = torch.Generator().manual_seed(options.seed)
    return pipe(frames=[*frames, text], height=height, width=width, generator=generator).texts[0]


def _files(conditions: Sequence[str]) -> list[tuple[str, Any]]:
    """Kind and image of each KIND=FILE; a file is opened here and nowhere else."""
    from imgdit.images import open_image

    pairs = []
    for text in conditions:
        kind, equals, file = text.partition("=")
        if not (kind and equals and file):
            raise ValueError(f"expected KIND=FILE, such as depth=depth.png, got {text!r}")
        pairs.append((kind, open_image(file)))
    return pairs


def _found(
    command: ImageCommand, controls: Sequence[Control], size: tuple[int | None, int | None]
) -> tuple[Control, ...]:
    """The controls with their photos turned into conditions, for an image of a height and a width."""
    from dataclasses import replace

    from imgdit.apps.jobs.conditions import condition_of

    session = command.session
    session.quiet(None)
    return tuple(replace(one, image=condition_of(session, one.kind, one.image, size=size)) for one in controls)


def _camera(text: str) -> tuple[float, float]:
    try:
        azimuth, elevation = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"a camera is AZIMUTH,ELEVATION in degrees, such as 30,20; got {text!r}") from None
    return azimuth, elevation
