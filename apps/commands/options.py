"""Options that several groups of commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.pipelines.load_options import Dtype, LoadOptions, Offload, Quantize

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
}
"""How a model is loaded: an option for each field of `LoadOptions`."""


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `LOADING` in the place of its argument `loading`."""

    @functools.wraps(command)
    def called(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in LOADING if name in values}
        command(**values, loading=LoadOptions(**chosen))

    parameters = [
        one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "loading"
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(LoadOptions, name), annotation=kind)
        for name, kind in LOADING.items()
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called
