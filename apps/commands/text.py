"""`imgdit write` and `imgdit embed`: text from language models, and vectors of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from imgdit.apps.console import user_errors
from imgdit.pipelines.load_options import Dtype, LoadOptions

CacheKind = Literal["prefix", "dual"]
Model = Annotated[str, typer.Option(help="Folder or Hub id; the embedded model by default.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or Hub id of the tokenizer; the model's by default.")]
Precision = Annotated[Dtype, typer.Option(help="Precision; auto: bf16 on CUDA, fp32 elsewhere.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: CUDA where there is one.")]


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
    seed: Annotated[int, typer.Option(min=0, help="Of the first text; the others count up.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per text on the standard output.")] = False,
    model: Model = "embedded",
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Write text: continue prompts, or fill their holes."""
    with user_errors():
        import torch

        from imgdit.pipelines.masked_text import MaskedTextPipeline
        from imgdit.pipelines.text_loading import with_holes

        pipe = _load(model, tokenizer, LoadOptions(dtype=dtype, device=device))
        generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
        if isinstance(pipe, MaskedTextPipeline):
            given = [with_holes(pipe, text) for text in prompts] if fill else prompts
            texts: Any = pipe(
                given, gen_length=None if fill else length, block_length=block, num_inference_steps=steps or block,
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


def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts, at least one.")],
    out: Annotated[Path | None, typer.Option(help="A .safetensors file; similarities are printed without it.")] = None,
    pooling: Annotated[str, typer.Option(help="mean, weighted_mean or last_token.")] = "mean",
    model: Model = "embedded",
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Turn texts into vectors (DiffEmbed), of which the cosine says how alike they are."""
    with user_errors():
        from imgdit.models.text_embeddings import embed_texts
        from imgdit.pipelines.masked_text import MaskedTextPipeline

        pipe = _load(model, tokenizer, LoadOptions(dtype=dtype, device=device))
        if not isinstance(pipe, MaskedTextPipeline):
            raise ValueError(f"{model} is no masked language model: block diffusion sees no later block")
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


def _load(model: str, tokenizer: str | None, options: LoadOptions) -> Any:
    from imgdit.apps.console import calm
    from imgdit.pipelines.loading import chosen_device, chosen_dtype
    from imgdit.pipelines.text_loading import load_text_pipeline

    calm()
    pipe = load_text_pipeline(model, tokenizer=tokenizer, dtype=chosen_dtype(options))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(chosen_device(options))
