"""One-step runs of the scenes' recipes with small models, for tests of what stands on them."""

import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from imgdit.apps.chores.weights import assemble
from imgdit.pipelines.loading import load_pipeline
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes import latents
from imgdit.scenes import training_frames as scene_frames
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.sources import training_batches

STAGES = [8, 8, 8, 16]
SMALL = {
    "autoencoder": {
        "attention_head_dim": 8,
        "encoder_block_out_channels": STAGES,
        "decoder_block_out_channels": STAGES,
    },
    "text_encoder": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32},
    "probe": {"channels": [8, 8, 16, 16]},
}
QUICK = {"batch_size": 1, "mixed_precision": "no", "evaluate_every": 0, "tracker": "none"}


def small_runs(folder):
    """Autoencoder, text encoder and probe of one step each; the arguments of `SceneFrames` that name them."""
    for name, arguments in SMALL.items():
        recipe = load_recipe(f"scenes/{name}")
        recipe = recipe.replace(
            run={**QUICK, "folder": str(folder / name)}, model={"arguments": {**recipe.model.arguments, **arguments}}
        )
        train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], stop_at=1)
    return {
        "latents": str(folder / "latents"),
        "scenes": 4,
        "autoencoder": str(folder / "autoencoder"),
        "text_encoder": str(folder / "text_encoder"),
    }


def small_backbone(recipe, runs):
    """The recipe scenes/transformer with two small blocks, on small runs."""
    size = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "mup_base_width": 64}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32}
    return recipe.replace(
        run=QUICK,
        model={"arguments": {**recipe.model.arguments, **size, **text}},
        data={"arguments": {**runs, "tokens": 256}},
    )


@contextmanager
def small_cache():
    """Shards of two scenes."""
    with (
        patch.object(latents, "SHARD", 2),
        patch.object(scene_frames, "SHARD", 2),
        patch.object(scene_frames, "HELD_OUT", 2),
    ):
        yield


def small_pipeline(folder):
    """Folder `pipeline` in a folder: assembled from one-step runs, which lie there too. Whoever trains on with the
    runs' latents is within `small_cache` as well."""
    shutil.copytree(_made_once().name, folder, dirs_exist_ok=True)
    return folder / "pipeline"


@cache
def _made_once():
    """The runs of a process, in a folder that is removed when the process ends."""
    made = TemporaryDirectory()
    folder = Path(made.name)
    with small_cache():
        recipe = small_backbone(load_recipe("scenes/transformer"), small_runs(folder))
        recipe = recipe.replace(run={"folder": str(folder / "transformer")})
        train(recipe, model=build_model(recipe), batches=training_batches(recipe)[0], stop_at=1)
        assemble(folder / "transformer", folder / "pipeline")
    return made


def with_concepts(folder, side=None):
    """A pipeline's folder that gets a sparse autoencoder with the concepts neon and photo, learned at some size."""
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    hookpoint = "transformer.transformer_blocks.0"
    learner = ConceptUnlearner(
        {hookpoint: SparseAutoencoder(SAEConfig(pipe.transformer.inner_dim, 32, 4, hookpoint=hookpoint))}
    )
    call = {"num_inference_steps": 1, "height": side, "width": side}
    learner.learn(pipe, {"neon": ["a neon cube"], "photo": ["a photo"]}, top_n=2, **call)
    learner.save_pretrained(folder / "sae")
    return folder
