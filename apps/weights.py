"""From the runs of the recipes to the folders of `imgdit.checkpoints`."""

from __future__ import annotations

from pathlib import Path

from transformers import T5EncoderModel

from imgdit import ImgDiTPipeline
from imgdit.data.words import caption_tokenizer
from imgdit.training.config import build_scheduler, load_recipe
from imgdit.training.scene_frames import latent_scale
from imgdit.training.trained import load_trained


def assemble(runs: Path, out: Path, latents: Path | None = None) -> ImgDiTPipeline:
    """Save the pipeline of the runs `runs`/{autoencoder, text_encoder, transformer} in half precision.

    Args:
        runs: folder of the runs.
        out: folder of the pipeline.
        latents: cached latents that the transformer was trained on; `runs`/latents if `None`.

    Raises:
        ValueError: a run has no checkpoint.
    """
    vae = load_trained(runs / "autoencoder")
    vae.register_to_config(scaling_factor=latent_scale(latents or runs / "latents"))
    encoder: T5EncoderModel = load_trained(runs / "text_encoder").encoder
    pipe = ImgDiTPipeline(
        scheduler=build_scheduler(load_recipe("scenes/transformer")),
        vae=vae.half(),
        text_encoder=encoder,  # float32: transformers would compute in whatever is stored
        tokenizer=caption_tokenizer(),
        transformer=load_trained(runs / "transformer").half(),
    )
    pipe.save_pretrained(out)
    return pipe


def save_probe(run: Path, out: Path) -> None:
    """Save a probe's run in half precision.

    Raises:
        ValueError: the run has no checkpoint.
    """
    load_trained(run).half().save_pretrained(out)
