"""Model cards of sparse autoencoders and of the concepts that were selected with them."""

from __future__ import annotations

from collections.abc import Mapping

from imgdit.cards import CardDetails, ModelCard
from imgdit.sae.concepts import ConceptBook
from imgdit.sae.config import SAEConfig

TAGS = ("sparse-autoencoder",)


def sae_card(
    name: str,
    configs: Mapping[str, SAEConfig],
    books: Mapping[str, ConceptBook] = {},
    details: CardDetails | None = None,
    saes: str | None = None,
) -> ModelCard:
    """The card of autoencoders and of concepts.

    Args:
        name: repository or folder that they are in.
        configs, books: by hookpoint; hookpoints of `books` are among those of `configs`.
        details: what the files do not say.
        saes: where the autoencoders lie, if not in the same folder.
    """
    details = details or CardDetails()
    settings = {
        f"autoencoder at {place}": f"reads the {config.reads} of width {config.d_in}, {config.num_latents} features, "
        f"{config.activation} with k {config.k}"
        for place, config in configs.items()
    }
    found = [(place, selection) for place, book in books.items() for selection in book.selections.values()]
    for place, one in found:
        settings[f"concept {one.name} at {place}"] = (
            f"{len(one.features)} features, {len(one.timesteps)} timesteps, multiplier {one.multiplier:g}"
        )
    if saes is not None:
        settings["autoencoders"] = f"in {saes}; here are the concepts alone"
    title, tags = name.rpartition("/")[2], (*TAGS, "concept-unlearning") if found else TAGS
    summary = "Sparse autoencoders of the activations of a diffusion model"
    summary += ", and the features that belong to concepts." if found else "."
    usage = _usage(name, next(iter(configs)), found[0][1].name if found else None, details.base_model)
    return ModelCard(title, summary, usage, details, settings, tags, pipeline_tag=None)


def _usage(name: str, place: str, concept: str | None, base_model: str | None) -> str:
    if concept is None:
        return f"from imgdit.sae.model import load_sae\n\nsae = load_sae({name!r}, {place!r})"
    return (
        "from imgdit import ConceptUnlearner, DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base_model or 'owner/pipeline'!r})\n"
        f"unlearner = ConceptUnlearner.from_pretrained({name!r})\n"
        f'with unlearner.attach(pipe, [{concept!r}]):\n    image = pipe("a prompt").images[0]'
    )
