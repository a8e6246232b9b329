"""`imgdit generate`, `control`, `any`, `unlearn`: the commands that make pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imgdit.apps.load_options import LoadOptions
from imgdit.defaults import STEPS

from ..console import calm, one_sentence
from .options import with_loading

if TYPE_CHECKING:
    from ..generate import Job, Result
    from ..request import Control, Request
    from ..studio import Studio

Model = Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model by default.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Guidance = Annotated[float | None, typer.Option(min=0.0, help="Scale; 3, or 1 for maps and views of a given picture.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the first picture; the others count up.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, or one number for both.")]
Negative = Annotated[str, typer.Option(help="What to steer away from.")]
Adapters = Annotated[Path | None, typer.Option(help="Folder of condition adapters; MODEL/adapters by default.")]
Overwrite = Annotated[bool, typer.Option(help="Make pictures anew that are there already.")]
Json = Annotated[bool, typer.Option("--json", help="A JSON object per picture on the standard output.")]


PICTURES = Path("outputs/pictures")
"""Where pictures go if nothing is said."""


@with_loading
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Sentences; six examples if there is none.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File with a sentence or JSON object per line; - for what is piped in.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A file for one picture, otherwise a folder; outputs/pictures by default."),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="A picture of imgdit's that is made again, bit for bit.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="KIND=FILE: a picture that steers (depth=d.png).")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of each sentence.")] = 1,
    model: Model = None,
    adapters: Adapters = None,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    seed: Seed = 0,
    size: Size = None,
    negative: Negative = "",
    sheet: Annotated[bool, typer.Option(help="Write sheet.png with all pictures of a folder.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    loading: LoadOptions,
) -> None:
    """Make pictures from sentences. An interrupted folder goes on where it stopped."""
    with one_sentence():
        from ..generate import PROMPTS, Line, at_free_names, named, plan, read_lines, write_sheet
        from ..request import Request

        if like is not None:
            if prompt or prompts or control:
                raise ValueError("--like says everything; leave out sentences, --prompts and --control")
            _again(like, out or PICTURES, model, as_json, loading)
            return
        if prompt and prompts:
            raise ValueError("give sentences or --prompts, not both")
        height, width = _size(size)
        base = Request(
            negative_prompt=negative, seed=seed, steps=steps, guidance=guidance, height=height, width=width,
            controls=_controls(control or []),
        )  # fmt: skip
        if prompts:
            lines = list(read_lines(prompts, base))
        else:
            asked = [_saying(base, text) for text in prompt or PROMPTS]
            lines = named(asked) if out is None else [Line(request) for request in asked]
        jobs, page = plan(lines, out or PICTURES, num_images)
        if out is None and not prompts and not overwrite:
            jobs = at_free_names(jobs, _name(model, loading))
        results = _run(jobs, _name(model, loading), _studio(model, adapters, None, loading), overwrite, as_json)
        if page is not None and sheet:
            write_sheet(results, page)
            _say(f"wrote {page}", as_json)


@with_loading
def control(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    given: Annotated[list[str], typer.Option("--with", help="KIND=FILE; may be repeated where there are adapters.")],
    find: Annotated[
        bool, typer.Option("--find/--as-is", help="Find the condition in the file, a photo; or take it as it is.")
    ] = False,
    strength: Annotated[float, typer.Option(min=0.0, help="1: as trained; 0: nothing.")] = 1.0,
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps after which it acts.")] = 0.0,
    end: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps after which it acts no more.")
    ] = 1.0,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("outputs/control.png"),
    model: Model = None,
    adapters: Adapters = None,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    seed: Seed = 0,
    size: Size = None,
    negative: Negative = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    loading: LoadOptions,
) -> None:
    """Make a picture that follows others: depth, edges, segmentation, a hole to fill, …

    With --find the conditions are written beside the picture, as NAME-KIND.png.
    """
    with one_sentence():
        from ..generate import Job
        from ..request import Request

        height, width = _size(size)
        controls = _controls(given, strength=strength, start=start, end=end)
        studio = _studio(model, adapters, None, loading)
        if find:
            controls = _found(studio(), controls, out)
        request = Request(prompt, negative, seed, steps, guidance, height, width, controls=controls)
        _run([Job(request, out)], _name(model, loading), studio, overwrite, as_json)


@with_loading
def any_to_any(
    prompt: Annotated[str, typer.Argument(help="Caption of the picture, or the instruction of editing.")] = "",
    given: Annotated[list[str] | None, typer.Option(help="KIND=FILE: image=photo.png, depth=d.png.")] = None,
    make: Annotated[list[str] | None, typer.Option(help="Kinds to make: image, depth, canny, …")] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help="AZIMUTH,ELEVATION of each view; given pictures are the first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("outputs/any.png"),
    model: Model = None,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    seed: Seed = 0,
    size: Size = None,
    negative: Negative = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    loading: LoadOptions,
) -> None:
    """Make any frames from any others: depth of a picture, a picture of depth, both, or another view."""
    with one_sentence():
        from ..frames import frame_row
        from ..generate import Job
        from ..request import Request

        height, width = _size(size)
        cameras = [_camera(text) for text in camera or []]
        frames = frame_row(_files(given or []), make or [], cameras)
        request = Request(prompt, negative, seed, steps, guidance, height, width, frames=frames)
        _run([Job(request, out)], _name(model, loading), _studio(model, None, None, loading), overwrite, as_json)


@with_loading
def unlearn(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    concept: Annotated[list[str], typer.Option(help="Name of a concept to remove; may be repeated.")],
    mode: Annotated[str, typer.Option(help="scale, remove or replace.")] = "scale",
    multiplier: Annotated[
        float | None, typer.Option(help="Of the mode scale; what was stored with the concept by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write; NAME-plain.png is made from the same noise.")] = Path(
        "outputs/unlearned.png"
    ),
    sae: Annotated[Path | None, typer.Option(help="Folder of the sparse autoencoders; MODEL/sae by default.")] = None,
    model: Model = None,
    steps: Steps = STEPS,
    guidance: Guidance = None,
    seed: Seed = 0,
    size: Size = None,
    negative: Negative = "",
    overwrite: Overwrite = False,
    as_json: Json = False,
    *,
    loading: LoadOptions,
) -> None:
    """Make a picture without concepts, and the same with them."""
    with one_sentence():
        from dataclasses import replace

        from ..generate import Job
        from ..request import Request

        height, width = _size(size)
        plain = Request(prompt, negative, seed, steps, guidance, height, width)
        without = replace(plain, concepts=tuple(concept), mode=mode, multiplier=multiplier)
        jobs = [Job(without, out), Job(plain, out.with_name(f"{out.stem}-plain.png"))]
        _run(jobs, _name(model, loading), _studio(model, None, sae, loading), overwrite, as_json)


# What they share


def _again(picture: Path, out: Path, model: str | None, as_json: bool, loading: LoadOptions) -> None:
    """Make a picture again from what it tells; exits with 1 if a bit differs."""
    from dataclasses import replace

    from imgdit.images import open_image

    from ..generate import same_pixels
    from ..request import read_origin, write_png

    origin = read_origin(picture)
    if origin is None:
        raise ValueError(f"{picture} does not tell how it was made: imgdit writes that into its PNG files only")
    beside = {name: None if place is None else Path(place) for name, place in origin.places.items() if name != "model"}
    studio = _studio(model or origin.places["model"], **beside, loading=_as_it_was(loading, origin.made_with))()
    studio.quiet(None)
    made = studio.make(origin.request).pictures[origin.output]
    file = out if out.suffix else out / f"{picture.stem}-again.png"
    write_png(made, file, replace(origin, places=studio.places, made_with=studio.made_with))
    same = same_pixels(open_image(picture).convert("RGB"), made.convert("RGB"))
    now = studio.made_with
    differs = {name: [was, now.get(name)] for name, was in origin.made_with.items() if was != now.get(name)}
    if as_json:
        typer.echo(json.dumps({"file": str(file), "same": same, "differs": differs}))
    else:
        typer.echo(f"wrote {file}, " + ("the same bit for bit" if same else "which is not the same"))
    if not same:
        told = "; ".join(f"{name} was {was}, is {current}" for name, (was, current) in differs.items())
        typer.echo(f"not the same: {told or 'the machine differs'}", err=True)
        raise typer.Exit(1)


def _as_it_was(loading: LoadOptions, made_with: dict[str, Any]) -> LoadOptions:
    """Options of loading, with the precision and the bits that a picture was made in where nobody asks for others."""
    from dataclasses import replace

    from ..loading import DTYPES

    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    was: dict[str, Any] = {"dtype": names.get(made_with.get("dtype", "")), "quantize": made_with.get("quantize")}
    return replace(
        loading,
        **{
            name: value
            for name, value in was.items()
            if value is not None and getattr(loading, name) == getattr(LoadOptions, name)
        },
    )


def _name(model: str | None, loading: LoadOptions) -> str:
    """What answers a request: the model, in the precision and bits that were asked for."""
    from imgdit.checkpoints import SCENES

    return " ".join([model or str(SCENES), *loading.asked])


def _studio(model: str | None, adapters: Path | None, sae: Path | None, loading: LoadOptions) -> Callable[[], Studio]:
    """Loads the model when it is first needed."""
    from functools import lru_cache

    @lru_cache(maxsize=1)
    def load() -> Studio:
        calm()
        from imgdit.checkpoints import SCENES

        from ..studio import Studio

        return Studio(model or SCENES, adapters=adapters, sae=sae, loading=loading)

    return load


def _run(jobs: Sequence[Job], model: str, load: Callable[[], Studio], overwrite: bool, as_json: bool) -> list[Result]:
    """Make the pictures and tell each file.

    Args:
        model: see `_name`.
    """
    from tqdm import tqdm

    from ..generate import run

    single = len(jobs) == 1

    def opened() -> Studio:
        loaded = load()
        loaded.quiet(None if single else True)
        return loaded

    def bar(left: Sequence[Job]) -> Any:
        return left if single else tqdm(left, desc="pictures", disable=None)

    results = []
    for result in run(opened, model, jobs, overwrite=overwrite, bar=bar):
        results.append(result)
        if as_json:
            values = {
                "file": str(result.file), "prompt": result.request.prompt, "seed": result.request.seed,
                "seconds": round(result.seconds, 3), "made": result.made,
            }  # fmt: skip
            typer.echo(json.dumps(values))
    if not as_json:
        there = sum(not result.made for result in results)
        _say(f"{there} of {len(results)} were there already", as_json or not there)
        for result in results[-2:] if len(results) > 2 else results:
            _say(f"wrote {result.file}" if result.made else f"found {result.file}", as_json)
    return results


def _say(line: str, silent: bool) -> None:
    if not silent:
        typer.echo(line)


def _saying(base: Request, prompt: str) -> Request:
    from dataclasses import replace

    return replace(base, prompt=prompt)


def _controls(
    given: Sequence[str], strength: float = 1.0, start: float = 0.0, end: float = 1.0
) -> tuple[Control, ...]:
    from ..request import Control

    return tuple(Control(kind, picture, strength, start, end) for kind, picture in _files(given))


def _files(given: Sequence[str]) -> list[tuple[str, Any]]:
    """Kind and picture of each KIND=FILE."""
    from imgdit.images import open_image

    pairs = []
    for text in given:
        kind, equals, file = text.partition("=")
        if not (kind and equals and file):
            raise ValueError(f"expected KIND=FILE, such as depth=depth.png, got {text!r}")
        pairs.append((kind, open_image(file)))
    return pairs


def _found(studio: Studio, controls: Sequence[Control], out: Path) -> tuple[Control, ...]:
    """The controls with their photos turned into conditions, which are written beside the picture."""
    from dataclasses import replace

    from ..prepare import condition_of

    studio.quiet(None)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for control in controls:
        picture = condition_of(studio, control.kind, control.picture)
        picture.save(out.with_name(f"{out.stem}-{control.kind}.png"))
        found.append(replace(control, picture=picture))
    return tuple(found)


def _camera(text: str) -> tuple[float, float]:
    try:
        azimuth, elevation = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"a camera is AZIMUTH,ELEVATION in degrees, such as 30,20; got {text!r}") from None
    return azimuth, elevation


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Height and width."""
    if text is None:
        return None, None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 128x96; got {text!r}")
    return int(numbers[-1]), int(numbers[0])
