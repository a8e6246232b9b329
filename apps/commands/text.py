"""`imgdit write` and `imgdit embed`: text from language models, and vectors of texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from imgdit.apps.commands.options import LOADING, collected
from imgdit.apps.console import user_errors
from imgdit.pipelines.load_options import Dtype, LoadOptions

CacheKind = Literal["prefix", "dual"]


@dataclass(frozen=True)
class TextModel:
    """The model of a command, and how it is loaded."""

    model: str = "embedded"
    tokenizer: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"

    def load(self) -> Any:
        """Its pipeline."""
        from imgdit.apps.console import calm
        from imgdit.pipelines.loading import chosen_device, chosen_dtype
        from imgdit.pipelines.text_loading import load_text_pipeline

        calm()
        options = LoadOptions(dtype=self.dtype, device=self.device)
        pipe = load_text_pipeline(self.model, tokenizer=self.tokenizer, dtype=chosen_dtype(options))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(chosen_device(options))


with_text_model = collected(
    "source",
    TextModel,
    {
        "model": Annotated[
            str, typer.Option(help="Folder or Hub id, or blocks: block diffusion; the embedded model by default.")
        ],
        "tokenizer": Annotated[
            str | None, typer.Option(help="Folder or Hub id of the tokenizer; the model's by default.")
        ],
        "dtype": LOADING["dtype"],
        "device": LOADING["device"],
    },
)
"""Gives a command the options of `TextModel` in the place of its argument `source`."""


@with_text_model
def write(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue, or with --fill to complete.")],
    fill: Annotated[
        bool, typer.Option("--fill", help="Fill the holes of the prompts, each a word _ of its own.")
    ] = False,
    length: Annotated[int, typer.Option(min=1, help="New tokens.")] = 24,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a block; block diffusion has its own.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each block; one per token by default.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most probable tokens.")] = 1.0,
    cache: Annotated[CacheKind | None, typer.Option(help="prefix or dual: faster and approximate.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the first text; the others count up.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per text on the standard output.")] = False,
    *,
    source: TextModel,
) -> None:
    """Write text: continue prompts, or fill their holes."""
    with user_errors():
        import torch

        from imgdit.pipelines.masked_text import MaskedTextPipeline
        from imgdit.pipelines.text_loading import with_holes

        pipe = source.load()
        generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
        if isinstance(pipe, MaskedTextPipeline):
            inputs = [with_holes(pipe, text) for text in prompts] if fill else prompts
            texts: Any = pipe(
                inputs, gen_length=None if fill else length, block_length=block, num_inference_steps=steps or block,
                temperature=temperature, cache=cache, generator=generators, threshold=2.0,
                use_chat_template=chat and not fill, return_dict=False,
            )[1]  # fmt: skip
        elif fill or cache:
            raise ValueError("block diffusion fills no holes, and its cache is exact and always used")
        else:
            options: Any = {"gen_length": length, "temperature": temperature, "generator": generators}
            texts = pipe(prompts, **options, return_dict=False)[1]
    for prompt, text in zip(prompts, texts):
        whole = text if fill else f"{prompt} {text}".strip()
        typer.echo(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if as_json else whole)


@with_text_model
def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts, at least one.")],
    out: Annotated[Path | None, typer.Option(help="A .safetensors file; similarities are printed without it.")] = None,
    pooling: Annotated[str, typer.Option(help="mean, weighted_mean or last_token.")] = "mean",
    *,
    source: TextModel,
) -> None:
    """Turn texts into vectors (DiffEmbed), of which the cosine says how alike they are."""
    with user_errors():
        from imgdit.models.text_embeddings import embed_texts
        from imgdit.pipelines.masked_text import MaskedTextPipeline

        pipe = source.load()
        if not isinstance(pipe, MaskedTextPipeline):
            raise ValueError(f"{source.model} is no masked language model: block diffusion sees no later block")
        vectors = embed_texts(pipe.model, pipe.tokenizer, texts, pooling=pooling)  # type: ignore[arg-type]
        if out is not None:
            from imgdit.io.atomic import write_tensors

            out.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(out, {"embeddings": vectors})
            typer.echo(f"wrote {out}: {len(texts)} vectors of {vectors.shape[1]} features")
            return
    similar = vectors @ vectors.T
    for row, text in zip(similar.tolist(), texts):
        typer.echo(" ".join(f"{value:6.3f}" for value in row) + f"  {text}")
