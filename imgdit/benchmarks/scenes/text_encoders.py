"""A diffusion language model as the text encoder of an image model, against a T5 encoder of equal size.

Training the image model anew for each encoder costs more than a CPU has. Here only what reads the text is fitted: the
two linear layers that read tokens and the pooled text get new weights, by least squares, with which they give the
image model what they gave it of the features of the encoder it was trained with. So a score says what can be read
linearly off an encoder's features, not what an image model trained with it would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from imgdit import DiffusionPipeline
from imgdit.benchmarks.scenes.language import contrastive_recipe
from imgdit.benchmarks.scenes.maker import PipelineMaker
from imgdit.benchmarks.scenes.run import write
from imgdit.benchmarks.scenes.text_to_image import Score, expected, fraction_score, held_out, mean_score, read
from imgdit.checkpoints import SCENES
from imgdit.models.masked_lm import load_masked_lm
from imgdit.models.mmdit import MMDiT
from imgdit.models.text_embeddings import cosines, pool
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.scenes.captions import caption
from imgdit.scenes.probe import SceneProbe
from imgdit.scenes.render import render
from imgdit.scenes.world import Scene
from imgdit.training import train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches
from imgdit.training.trained import load_trained

RIDGE = 1e-3
"""Of the least squares, relative to the mean square of the features."""
PAIRS = (("left object", "left colour", "right object", "right colour"), ("left object", "right object"))
"""Questions of two objects that have to be right together: colours bound to sides and kinds, and kinds to sides."""


class TextFeatures(NamedTuple):
    """What an encoder makes of texts."""

    tokens: torch.Tensor
    """(tokens of all texts, J)."""
    pooled: torch.Tensor
    """(texts, J)."""


class Linear(NamedTuple):
    """A linear map of features."""

    weight: torch.Tensor
    """(out, J)."""
    bias: torch.Tensor
    """(out,)."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight.T + self.bias


@torch.no_grad()
def text_features(encoder: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> TextFeatures:
    """Features of an encoder's tokens and their means, as `ImgDiTPipeline` computes both."""
    tokens, pooled = [], []
    for first in range(0, len(texts), batch_size):
        rows = tokenizer(list(texts[first : first + batch_size]), padding="longest", return_tensors="pt")
        features = encoder(rows.input_ids, attention_mask=rows.attention_mask)[0]
        tokens.append(features[rows.attention_mask.bool()])
        pooled.append(pool(features, rows.attention_mask))
    return TextFeatures(torch.cat(tokens), torch.cat(pooled))


def least_squares(features: torch.Tensor, targets: torch.Tensor) -> Linear:
    """The linear map of features (N, J) that comes closest to targets (N, out)."""
    x, y = features.double(), targets.double()
    mean, goal = x.mean(0), y.mean(0)
    x, y = x - mean, y - goal
    gram = x.T @ x + RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return Linear(weight.float(), (goal - weight @ mean).float())


def unexplained(found: torch.Tensor, targets: torch.Tensor) -> float:
    """Fraction of the variance of targets (N, out) that is not in what was found."""
    return float((found - targets).square().sum() / (targets - targets.mean(0)).square().sum())


@torch.no_grad()
def with_encoder(
    pipe: ImgDiTPipeline, encoder: Any, texts: Sequence[str], unseen: Sequence[str]
) -> tuple[ImgDiTPipeline, float]:
    """The pipeline with another encoder, whose features its image model reads by layers fitted to texts; and the
    fraction of what it read of unseen texts' tokens before that it does not read now."""
    transformer: Any = pipe.transformer
    size = encoder.config.hidden_size
    changed: Any = MMDiT.from_config(
        dict(transformer.config) | {"joint_attention_dim": size, "pooled_projection_dim": size}
    )
    read_tokens, read_pooled = (
        (model.context_embedder, model.time_text_embed.text_embedder.linear_1) for model in (transformer, changed)
    )
    names = ("context_embedder.", "time_text_embed.text_embedder.linear_1.")
    kept = {name: value for name, value in transformer.state_dict().items() if not name.startswith(names)}
    changed.load_state_dict(kept, strict=False)
    before, after = (text_features(one, pipe.tokenizer, texts) for one in (pipe.text_encoder, encoder))
    tests = [text_features(one, pipe.tokenizer, unseen).tokens for one in (pipe.text_encoder, encoder)]
    for old, new, given, found in zip(read_tokens, read_pooled, before, after):
        fitted = least_squares(found, old(given))
        new.weight.copy_(fitted.weight)
        new.bias.copy_(fitted.bias)
    lost = unexplained(read_pooled[0](tests[1]), read_tokens[0](tests[0]))
    return ImgDiTPipeline(**pipe.components | {"transformer": changed.eval(), "text_encoder": encoder}), lost


def encoders(out: Path, steps: int) -> Iterator[tuple[str, Any]]:
    """Names and encoders: the packaged language model, the same after contrastive steps, and a T5 encoder of equal
    size after as many."""
    packaged = load_masked_lm(SCENES / "text" / "model")
    yield "masked language model", packaged.model
    for name, kind in (("masked", "masked language model"), ("T5", "T5 encoder")):
        recipe = contrastive_recipe(name, "mean", out, 1, steps).replace(model={"start_from": None})
        model = build_model(recipe)
        if name == "masked":
            model.load_state_dict(packaged.state_dict())
        train(recipe, model=model, batches=training_batches(recipe)[0], resume=True)
        trained = load_trained(recipe.run.folder)
        yield f"{kind}, {steps} contrastive steps", getattr(trained, "model", trained)


class Shown(NamedTuple):
    """Captions, and what a probe answers about images of their scenes."""

    captions: list[str]
    answers: torch.Tensor
    """(captions, choices of all questions) probabilities."""


def shown(probe: SceneProbe, scenes: Sequence[Scene]) -> Shown:
    """Captions and renders of scenes."""
    return Shown([caption(scene, Random(n)) for n, scene in enumerate(scenes)], _answers(probe, scenes))


def retrieval(encoder: Any, tokenizer: Any, known: Shown, held: Shown) -> list[bool]:
    """Whether a held-out caption finds its image among all of them: by the cosine of what a probe answers about an
    image and what is read of that off the pooled text, by least squares on known captions and images."""
    texts = [text_features(encoder, tokenizer, some.captions).pooled for some in (known, held)]
    middle = known.answers.mean(0)
    found = least_squares(texts[0], known.answers - middle)(texts[1])
    nearest = cosines(found, held.answers - middle).argmax(1)
    return (nearest == torch.arange(len(nearest))).tolist()


@torch.no_grad()
def _answers(probe: SceneProbe, scenes: Sequence[Scene], batch: int = 64) -> torch.Tensor:
    """Probabilities (scenes, choices of all questions) that a probe gives about renders."""
    rows = []
    for first in range(0, len(scenes), batch):
        images = render(scenes[first : first + batch]).rgb
        answers = probe(images * 2 - 1).answers
        rows.append(torch.cat([logits.softmax(-1) for logits in answers.values()], -1))
    return torch.cat(rows)


def encoder_scores(
    out: Path, probe_folder: Path, contrastive: int, captions: int, count: int, steps: int, guidance: float
) -> list[Score]:
    """Each encoder as that of the embedded model; `out` gets a folder per run and text_encoders.json.

    Args:
        contrastive: steps of training before.
        captions: that the layers are fitted to, and half as many with their images for retrieval.
        count: images of two objects, which the probe reads; and held-out captions of retrieval, twice as many.
        steps, guidance: of images.
    """
    pipe: Any = DiffusionPipeline.from_pretrained(SCENES)
    probe = SceneProbe.from_pretrained(probe_folder).eval()
    texts = [caption(Scene.sample(n, "train"), Random(n)) for n in range(captions)]
    held = held_out(count, objects=2)
    truth = [expected(scene) for scene in held.scenes]
    scores: list[Score] = []
    settings = {"contrastive": contrastive, "captions": captions, "steps": steps, "guidance": guidance}
    known = shown(probe, [Scene.sample(n, "train") for n in range(captions // 2)])
    unknown = shown(probe, held_out(2 * count).scenes)
    named = [("embedded T5 encoder", pipe.text_encoder), *encoders(out, contrastive)]
    for name, encoder in named:
        changed, lost = with_encoder(pipe, encoder, texts, held.prompts)
        task = f"{name} ({sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M)"
        scores.append(mean_score(task, "variance of the text that is not read", torch.tensor([lost])))
        right = retrieval(encoder, pipe.tokenizer, known, unknown)
        scores.append(fraction_score(task, "recall@1 of images by captions", right))
        said = read(probe, PipelineMaker(changed, steps, guidance).images(held.prompts, seed=0)).answers
        for questions, what in zip(PAIRS, ("both objects right, each at its side", "both kinds right")):
            right = [all(a[q] == b[q] for q in questions) for a, b in zip(said, truth)]
            scores.append(fraction_score(task, what, right))
        write(out / "text_encoders.json", scores, settings)
    return scores
