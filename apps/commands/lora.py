"""`imgdit lora`: what is in a LoRA file, the same file by other names, and the file of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgdit.apps.console import user_errors

if TYPE_CHECKING:
    from imgdit.lora.files import AdapterFile

LoraFile = Annotated[Path, typer.Argument(help="A .safetensors file of any trainer, or PEFT's folder.")]

app = typer.Typer(help="Look into LoRA files, convert and make them.", no_args_is_help=True)


@app.command()
def inspect(
    file: LoraFile,
) -> None:
    """Print a LoRA file's names, ranks, modules and settings."""
    from imgdit.lora.files import read_adapter

    with user_errors():
        adapter = read_adapter(file)
    tensors = [tensor for pair in adapter.pairs.values() for tensor in pair]
    kinds = Counter(_kind(name) for name in adapter.pairs)
    of = f" of {adapter.family}" if adapter.family else ""
    typer.echo(f"{file.name}: {adapter.dialect} names{of}, {len(adapter.pairs)} modules")
    _print_keys(adapter)
    typer.echo(f"  rank {', '.join(map(str, adapter.ranks))}, {sum(t.numel() for t in tensors):,} numbers")
    typer.echo(f"  stored as {', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors}))}")
    for kind, count in kinds.items():
        typer.echo(f"  {count:>4} x {kind}")
    if adapter.preset:
        typer.echo(f"  settings of {adapter.preset}:")
    for name, value in asdict(adapter.info).items():
        if value is not None:
            typer.echo(f"  {name}: {value}")


@app.command()
def convert(
    file: LoraFile,
    to: Annotated[str, typer.Option("--to", help="peft (diffusers' names), comfyui or kohya (the repository's).")],
    out: Annotated[Path | None, typer.Option(help="File to write; beside the source by default.")] = None,
) -> None:
    """Write a LoRA file by other names; its settings stay in the header."""
    from imgdit.lora.dialects import DIALECTS
    from imgdit.lora.files import read_adapter, write_adapter
    from imgdit.naming import check_name

    with user_errors():
        check_name("--to", to, DIALECTS)
        adapter = read_adapter(file)
        out = out or file.with_name(f"{file.name.removesuffix('.safetensors')}.{to}.safetensors")
        family = adapter.families[0] if len(adapter.families) == 1 else None
        path = write_adapter(out, adapter.pairs, adapter.info, dialect=to, family=family)
    typer.echo(f"wrote {path}: {len(adapter.pairs)} modules, {adapter.dialect} names to {to}")
    _print_keys(adapter)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run that trained an adapter, or text frames.")],
    out: Annotated[Path, typer.Argument(help="A .safetensors file to write; for text frames a folder.")],
) -> None:
    """Write the adapter of a run's latest checkpoint as a LoRA file, with how it was trained in its header.

    Text frames are a folder: the adapter, the text head and the tokenizer.
    """
    from imgdit.apps.chores.weights import save_adapter, save_texts
    from imgdit.scenes.sources import IMAGE_TEXTS
    from imgdit.training.trained import trained_recipe

    with user_errors():
        save = save_texts if trained_recipe(run).data.name == IMAGE_TEXTS else save_adapter
        save(run, out)
    typer.echo(f"wrote {out}")


def _print_keys(adapter: AdapterFile) -> None:
    """How many of a file's keys were read, and what became of the others."""
    from imgdit.lora.files import counted

    typer.echo(f"  keys: {adapter.used} read, {len(adapter.aside)} set aside, {len(adapter.unread)} not understood")
    for line in counted(adapter.aside):
        typer.echo(f"  set aside: {line}")
    for key in adapter.unread[:10]:
        typer.echo(f"  not a LoRA of the transformer: {key}")
    if len(adapter.unread) > 10:
        typer.echo(f"  not a LoRA of the transformer: {len(adapter.unread) - 10} more")


def _kind(name: str) -> str:
    """A module's name with its block's number as a star."""
    return ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(name.split(".")))
