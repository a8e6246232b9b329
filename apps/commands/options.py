"""Options that several groups of commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imgdit.defaults import STEPS
from imgdit.naming import warn_renamed
from imgdit.pipelines.load_options import Dtype, LoadOptions, Offload, Quantize

if TYPE_CHECKING:
    from imgdit.apps.commands.image_command import ImageCommand
    from imgdit.apps.jobs.request import Request

ModelFolder = Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")]
Engine = Annotated[str, typer.Option(help="local, or ray: several processes or machines.")]
Workers = Annotated[int, typer.Option(min=1, help="Of the engine ray.")]


def model_folder(model: Path | None) -> Path:
    """The folder that a benchmark measures: of files beside the pipeline it needs some, so it must be here.

    Raises:
        ValueError: there is none.
    """
    from imgdit.checkpoints import SCENES
    from imgdit.hub import find_pipeline

    found = Path(find_pipeline(str(model or SCENES)))
    if not found.is_dir():
        raise ValueError(f"benchmarks read a folder of this machine; download {str(model)!r} first")
    return found


LOADING: dict[str, Any] = {
    "dtype": Annotated[Dtype, typer.Option(help="Precision; auto: bf16 on CUDA, fp32 elsewhere.")],
    "device": Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: CUDA where there is one.")],
    "offload": Annotated[
        Offload, typer.Option(help="Keep in main memory: whole models (model), or layers (sequential, group).")
    ],
    "quantize": Annotated[
        Quantize, typer.Option(help="Bits of the denoiser; all but int8 need the extra `quantized`.")
    ],
    "compile": Annotated[bool, typer.Option("--compile", help="Compile the blocks: for many images of one size.")],
    "lora": Annotated[
        list[str], typer.Option("--lora", help="FILE or FILE:WEIGHT of a LoRA for all tokens; may be repeated.")
    ],
}
"""How a model is loaded: an option for each field of `LoadOptions`."""


def collected(
    argument: str, kind: type, options: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of a dataclass, in the place of one argument.

    Args:
        argument: of the command; gets the dataclass.
        kind: the dataclass, whose defaults are the options'.
        options: field -> its annotation for typer.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in options if name in values}
            command(**values, **{argument: kind(**chosen)})

        parameters = [
            one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != argument
        ]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(kind, name), annotation=annotation)
            for name, annotation in options.items()
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in parameters}
        return called

    return decorated


with_loading = collected("loading", LoadOptions, LOADING)
"""Gives a command the options of `LOADING` in the place of its argument `loading`."""


def old_options(**names: str) -> dict[str, Any]:
    """Settings of a command that takes options of earlier versions until version 0.3, which no help lists.

    Args:
        names: option as it was -> as it is, both without dashes.
    """

    def today(name: str) -> str:
        if name in names:
            warn_renamed(f"--{name}", f"--{names[name]}")
        return names.get(name, name)

    return {"token_normalize_func": today}


@dataclass(frozen=True)
class ImageOptions:
    """What every command that generates images can be told."""

    model: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    size: str | None = None
    negative: str = ""
    overwrite: bool = False
    as_json: bool = False
    show: bool = False
    turbo: bool = False

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Height and width in pixels.

        Raises:
            ValueError: no size.
        """
        if self.size is None:
            return None, None
        numbers = self.size.lower().split("x")
        if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 128x96; got {self.size!r}")
        return int(numbers[-1]), int(numbers[0])

    def request(self, prompt: str = "", **more: Any) -> Request:
        """What a command asks for, under these options."""
        from imgdit.apps.jobs.request import Request

        height, width = self.sides
        steps = (self._turbo_steps if self.turbo else STEPS) if self.steps is None else self.steps
        if self.turbo:
            more["turbo"] = True
        return Request(prompt, self.negative, self.seed, steps, self.guidance, height, width, **more)

    @property
    def _turbo_steps(self) -> int:
        """Of the model's few-step LoRA; where there is none, that is said when the request is checked."""
        from imgdit.checkpoints import EMBEDDED
        from imgdit.pipelines.few_steps import steps_of, turbo_file

        file = turbo_file(self.model or EMBEDDED)
        return STEPS if file is None else steps_of(file)

    def command(self, loading: LoadOptions, **folders: Path | None) -> ImageCommand:
        """The command itself, with the folders that it reads."""
        from imgdit.apps.commands.image_command import ImageCommand

        return ImageCommand(
            self.model, loading, **folders, overwrite=self.overwrite, as_json=self.as_json, show=self.show
        )


with_images = collected(
    "options",
    ImageOptions,
    {
        "model": Annotated[str | None, typer.Option(help="Folder or Hub id; the embedded model by default.")],
        "steps": Annotated[
            int | None, typer.Option(min=1, help=f"Steps of the sampler; {STEPS}, or those that --turbo is for.")
        ],
        "guidance": Annotated[
            float | None, typer.Option(min=0.0, help="Scale; 3, or 1 for maps and views of a given image.")
        ],
        "seed": Annotated[int, typer.Option(min=0, help="Of the first image; the others count up.")],
        "size": Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, or one number for both.")],
        "negative": Annotated[str, typer.Option(help="What to steer away from.")],
        "overwrite": Annotated[bool, typer.Option(help="Generate images anew that are there already.")],
        "show": Annotated[bool, typer.Option("--open", help="Open the result in the system's viewer.")],
        "turbo": Annotated[
            bool, typer.Option("--turbo", help="Few steps, by turbo.safetensors in the model's folder.")
        ],
        "as_json": Annotated[bool, typer.Option("--json", help="A JSON object per image on the standard output.")],
    },
)
"""Gives a command the options of `ImageOptions` in the place of its argument `options`."""
