"""Options that several groups of commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[Path | None, typer.Option(help="Folder of a pipeline; the embedded model by default.")]
Engine = Annotated[str, typer.Option(help="local, or ray: several processes or machines.")]
Workers = Annotated[int, typer.Option(min=1, help="Of the engine ray.")]
