"""`imgdit convert`: checkpoints of other projects into diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imgdit.apps.console import user_errors

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""What is copied as it is."""

app = typer.Typer(help="Turn published checkpoints into folders of diffusers and transformers.", no_args_is_help=True)

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


@app.command()
def llada(
    source: Annotated[str, typer.Argument(help="Published folder or Hub id: LLaDA, iLLaDA, Dream, LLaDA-V, MMaDA.")],
    out: Out,
) -> None:
    """A diffusion language model to a folder that transformers loads without remote code, in the stored precision."""
    import shutil

    from imgdit.models.masked_lm import load_masked_lm, model_folder

    with user_errors():
        folder = model_folder(source, None, None, None)
        if out.exists() and out.resolve() == folder.resolve():
            raise ValueError(f"{out} is the folder that is read; name another one to write")
        model = load_masked_lm(folder, dtype="auto")
        model.save_pretrained(out)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, out)
    typer.echo(f"wrote {out}: {type(model).__name__} of {model.num_parameters():,} parameters")


def _convert(convert: Any, checkpoint: Path, out: Path, head_dim: int, base_width: int, output_mult: float) -> None:
    from imgdit.models.published_mup import read_checkpoint

    with user_errors():
        weights = read_checkpoint(checkpoint)
        model = convert(weights, head_dim=head_dim, base_width=base_width, output_mult=output_mult)
    model.save_pretrained(out)
    typer.echo(f"wrote {out}: {type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")
