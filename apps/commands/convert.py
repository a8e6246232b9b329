"""`imgdit convert`: checkpoints of other projects into diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.console import user_errors

app = typer.Typer(help="Turn published checkpoints into diffusers folders.", no_args_is_help=True)

Checkpoint = Annotated[Path, typer.Argument(help="The published torch file.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Features of an attention head.")]
BaseWidth = Annotated[int, typer.Option(min=1, help="μP's base width.")]
OutputMult = Annotated[float, typer.Option(help="μP's output multiplier.")]


@app.command("dit-mup")
def dit_mup(
    checkpoint: Checkpoint,
    out: Out,
    head_dim: HeadDim = 72,
    base_width: BaseWidth = 288,
    output_mult: OutputMult = 1.0,
) -> None:
    """DiT-μP (GSAI-ML/DiT-muP, DiT-XL-2) to a DiTTransformer2DModel with the readout factor folded in.

    diffusers' DiT computes timestep features with slightly other frequencies than the original; call
    `imgdit.models.published_mup.original_timesteps` on the loaded model for the original's numbers.
    """
    from imgdit.models.published_mup import convert_dit

    _convert(convert_dit, checkpoint, out, head_dim, base_width, output_mult)


@app.command("pixart-mup")
def pixart_mup(
    checkpoint: Checkpoint,
    out: Out,
    head_dim: HeadDim = 72,
    base_width: BaseWidth = 288,
    output_mult: OutputMult = 1.0,
) -> None:
    """PixArt-α-μP (GSAI-ML/DiT-muP) to a PixArtTransformer2DModel with the readout factor folded in."""
    from imgdit.models.published_mup import convert_pixart

    _convert(convert_pixart, checkpoint, out, head_dim, base_width, output_mult)


def _convert(convert: Any, checkpoint: Path, out: Path, head_dim: int, base_width: int, output_mult: float) -> None:
    from imgdit.models.published_mup import read_checkpoint

    with user_errors():
        weights = read_checkpoint(checkpoint)
        model = convert(weights, head_dim=head_dim, base_width=base_width, output_mult=output_mult)
    model.save_pretrained(out)
    typer.echo(f"wrote {out}: {type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")
