"""`imgdit sae train`: several autoencoders at once, from a pipeline's activations to files that load.

<folder>/saes/<hookpoint>/                   the autoencoders, with their concepts
<folder>/metrics.jsonl, checkpoints/         see `imgdit.training.run_folder`
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imgdit import compat
from imgdit.hub import find_pipeline
from imgdit.io.checkpoints import read_state, read_tensors
from imgdit.io.lock import only_writer
from imgdit.io.order import DataOrder, compare_rows, mixed_seed, text_rows
from imgdit.recipes import parse_as
from imgdit.sae.activations import ActivationRecorder, RecordedActivations, ShuffleBuffer, stream_activations
from imgdit.sae.config import SAEConfig
from imgdit.sae.hooks import find_hookpoints, hooked
from imgdit.sae.model import DeviceCopies, SparseAutoencoder, load_sae
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.training import SAETraining
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.training.progress import Progress
from imgdit.training.run_folder import RunFolder, is_due
from imgdit.training.sae_recipe import SAERecipe


class SAERunResult(NamedTuple):
    """What a run gave."""

    folder: Path
    """Of the autoencoders, see `ConceptUnlearner.from_pretrained`."""
    step: int
    """Training steps done."""
    metrics: dict[str, dict[str, float]]
    """Last metrics by hookpoint."""


def load_pipeline(recipe: SAERecipe) -> Any:
    """The pipeline of a recipe, on the GPU if there is one."""
    path = find_pipeline(recipe.pipeline.pretrained)
    pipe = compat.DiffusionPipeline.from_pretrained(path, dtype=getattr(torch, recipe.pipeline.dtype))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_saes(
    recipe: SAERecipe, *, pipe: Any = None, resume: bool = False, stop_at: int | None = None
) -> SAERunResult:
    """Train an autoencoder for each hookpoint of a recipe, and select its concepts.

    Args:
        pipe: `None`: the recipe's.
        resume: go on from the folder's latest checkpoint, if there is one.
        stop_at: stop with a checkpoint after this step.

    Raises:
        ValueError: the folder holds a run and `resume` is false, another process writes it, or something of the recipe
            does not fit the pipeline.
    """
    with only_writer(recipe.run.folder):
        return SAETrainingRun(recipe, load_pipeline(recipe) if pipe is None else pipe, resume).train(stop_at)


def activation_recorder(recipe: SAERecipe, pipe: Any) -> ActivationRecorder:
    """What writes the activations that a recipe is trained on into its `data.shards`.

    Raises:
        ValueError: the recipe keeps no activations on disk, or a hookpoint is unknown.
    """
    if recipe.data.shards is None:
        raise ValueError("data.shards is not set: the recipe keeps no activations on disk")
    return ActivationRecorder(
        pipe,
        _prompts(recipe)[0],
        find_hookpoints(pipe, recipe.sae.hookpoints),
        recipe.data.shards,
        source=recipe.sae.source,
        batch_size=recipe.pipeline.batch_size,
        seed=mixed_seed(recipe.run.seed, 2, 0),
        **recipe.pipeline.call,
    )


def _prompts(recipe: SAERecipe) -> tuple[list[str], list[str]]:
    """Those to train on, and those held out."""
    prompts = recipe.data.all_prompts(recipe.run.seed)
    count = len(prompts) - recipe.data.held_out
    return prompts[:count], prompts[count:]


class SAETrainingRun:
    """The state of a run; `train` is the loop."""

    def __init__(self, recipe: SAERecipe, pipe: Any, resume: bool) -> None:
        self.recipe, self.pipe = recipe, pipe
        self.folder = RunFolder(recipe.run.folder, recipe.run.keep)
        checkpoint = self.folder.resumed_checkpoint(resume)
        self.hookpoints = find_hookpoints(pipe, recipe.sae.hookpoints)
        self.prompts, self.held_out = _prompts(recipe)
        self.step = 0
        self.data: _Streamed | _Recorded
        if recipe.data.shards is None:
            self.data = _Streamed(recipe, pipe, self.hookpoints, self.prompts)
        else:
            self.data = _Recorded(recipe, pipe, self.hookpoints)
        self.trainings = {hookpoint: self._new(hookpoint) for hookpoint in self.hookpoints}
        if checkpoint is not None:
            self._load(checkpoint)

    def _new(self, hookpoint: str) -> SAETraining:
        config, device = self.recipe.sae, compat.execution_device(self.pipe)
        if config.pretrained is not None:
            saved = load_sae(config.pretrained, hookpoint).to(device)
            if saved.config.transcode or saved.config.time_embed_dim is not None:
                raise ValueError(
                    f"{config.pretrained}: {hookpoint} is a transcoder or conditioned on the timestep, which can be "
                    "used but not trained further; start from a sparse autoencoder of a module's output"
                )
            return SAETraining.continued_from(saved, self.recipe.train, self.recipe.run.steps)
        width = self.data.width(hookpoint)
        options = {name: getattr(config, name) for name in ("k", "activation", "input_unit_norm", "multi_topk")}
        latents = config.num_latents or width * config.expansion_factor
        generator = torch.Generator().manual_seed(mixed_seed(self.recipe.run.seed, 1))
        whole = SAEConfig(width, latents, hookpoint=hookpoint, source=config.source, **options)
        sae = SparseAutoencoder(whole, generator=generator)
        return SAETraining(sae.to(device), self.recipe.train, self.recipe.run.steps)

    def train(self, stop_at: int | None) -> SAERunResult:
        run = self.recipe.run
        last = run.steps if stop_at is None else min(stop_at, run.steps)
        metrics: dict[str, dict[str, float]] = {}
        self.folder.begin_log(self.step)
        progress = Progress(self.folder.path.name, run.steps, self.step)
        while self.step < last:
            batch = self.data.next()
            metrics = {hookpoint: self.trainings[hookpoint].step(rows) for hookpoint, rows in batch.items()}
            self.step += 1
            progress.update()
            if is_due(self.step, run.log_every, last):
                for hookpoint, values in metrics.items():
                    density = self.trainings[hookpoint].density()
                    self._log(hookpoint, {**values, "density_median": float(density.median())})
                unexplained = sum(values["fvu"] for values in metrics.values()) / len(metrics)
                progress.note(self.step, f"fvu {unexplained:.4f}", last=self.step == last)
            if is_due(self.step, run.checkpoint_every, last):
                self._save()
        progress.close()
        unlearner = ConceptUnlearner({name: training.trained() for name, training in self.trainings.items()})
        if self.step == run.steps:
            for hookpoint, sae in unlearner.saes.items() if self.held_out else ():
                distance = {"picture_distance": self._distance(hookpoint, sae)}
                metrics.setdefault(hookpoint, {}).update(distance)
                self._log(hookpoint, distance)
            self._learn_concepts(unlearner)
        folder = self.folder.path / "saes"
        unlearner.save_pretrained(folder)
        return SAERunResult(folder, self.step, metrics)

    def _learn_concepts(self, unlearner: ConceptUnlearner) -> None:
        """Select the recipe's concepts among the features."""
        concepts = self.recipe.concepts
        for prompts in concepts.kinds():
            unlearner.learn(
                self.pipe,
                prompts,
                top_n=concepts.top_n,
                percentile=concepts.percentile,
                floor=concepts.floor,
                multiplier=concepts.multiplier,
                seed=concepts.seed,
                batch_size=self.recipe.pipeline.batch_size,
                **self.recipe.pipeline.call,
            )

    def _distance(self, hookpoint: str, sae: SparseAutoencoder) -> float:
        # The noise of the held-out images was never trained on either.
        seed = self.recipe.run.seed + len(self.prompts)
        return reconstruction_distance(
            self.pipe, {hookpoint: sae}, self.held_out, seed=seed, batch_size=self.recipe.pipeline.batch_size,
            **self.recipe.pipeline.call,
        )  # fmt: skip

    # What is written

    def _log(self, hookpoint: str, values: dict[str, float]) -> None:
        self.folder.log(self.step, {"hookpoint": hookpoint, **values})

    def _save(self) -> None:
        tensors = {hookpoint: training.tensors() for hookpoint, training in self.trainings.items()}
        state = {
            "recipe": self.recipe.to_dict(),
            "saes": {hookpoint: training.numbers() for hookpoint, training in self.trainings.items()},
            "data": self.data.numbers(),
        }
        tensors["data"] = self.data.tensors()
        tensors["prompts"] = {"rows": self._prompt_rows()}
        self.folder.save(self.step, tensors, state)

    def _prompt_rows(self) -> torch.Tensor:
        """A fingerprint of the prompts, see `compare_rows`: their file may be another one when the run goes on."""
        return text_rows(self.prompts)

    def _load(self, checkpoint: Path) -> None:
        state = read_state(checkpoint, ("recipe",))
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # an earlier version's names
            before = parse_as(SAERecipe, state["recipe"], str(checkpoint))
        for section in ("pipeline", "data", "sae", "train"):
            if getattr(before, section) != getattr(self.recipe, section):
                raise ValueError(f"{checkpoint} was made with another {section} section; restore it or start anew")
        if "prompts.safetensors" in state["files"]:  # earlier versions told nothing of them
            rows = read_tensors(checkpoint / "prompts.safetensors")["rows"]
            if (differ := compare_rows(rows, self._prompt_rows())) is not None:
                raise ValueError(
                    f"{checkpoint} was made with other prompts: {differ}. Bring back what "
                    f"{self.recipe.data.prompts_file} said, or start anew"
                )
        for hookpoint, training in self.trainings.items():
            training.load(read_tensors(checkpoint / f"{hookpoint}.safetensors"), state["saes"][hookpoint])
        self.data.load(read_tensors(checkpoint / "data.safetensors"), state["data"])
        self.step = state["step"]


# Where the vectors come from


class _Streamed:
    """Images are generated while training goes on; a buffer for each hookpoint mixes their vectors."""

    def __init__(self, recipe: SAERecipe, pipe: Any, hookpoints: Sequence[str], prompts: Sequence[str]) -> None:
        self.recipe, self.pipe, self.hookpoints, self.prompts = recipe, pipe, hookpoints, prompts
        self.drawn = 0  # prompts so far, over all rounds
        self.buffers: dict[str, ShuffleBuffer] = {}
        self._fill()

    def width(self, hookpoint: str) -> int:
        return self.buffers[hookpoint].rows.shape[1]

    def next(self) -> dict[str, torch.Tensor]:
        """A batch for each hookpoint; the buffers stay at least half full."""
        batch = {hookpoint: buffer.take(self.recipe.run.batch_size) for hookpoint, buffer in self.buffers.items()}
        if min(buffer.filled for buffer in self.buffers.values()) < self.recipe.data.buffer // 2:
            self._fill()
        return batch

    def _fill(self) -> None:
        half = self.recipe.data.buffer // 2
        while not self.buffers or min(b.filled for b in self.buffers.values()) < max(half, self.recipe.run.batch_size):
            # A round over the prompts begins with noise nobody has seen.
            rounds, start = divmod(self.drawn, len(self.prompts))
            recording = next(
                stream_activations(
                    self.pipe,
                    self.prompts,
                    self.hookpoints,
                    source=self.recipe.sae.source,
                    batch_size=self.recipe.pipeline.batch_size,
                    seed=mixed_seed(self.recipe.run.seed, 2, rounds),
                    start=start,
                    **self.recipe.pipeline.call,
                )
            )
            self.drawn += recording.prompts
            for found in recording.maps:
                if found.hookpoint not in self.buffers:
                    # The same seed for all: every autoencoder sees the same images in the same order.
                    shape = found.values.shape[-1:]
                    seed = self.recipe.run.seed
                    self.buffers[found.hookpoint] = ShuffleBuffer(self.recipe.data.buffer, shape, seed=seed)
                self.buffers[found.hookpoint].add(found.values.flatten(0, 1))

    def numbers(self) -> dict[str, Any]:
        return {"made": self.drawn}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{h}/{name}": t for h, buffer in self.buffers.items() for name, t in buffer.state().items()}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        self.drawn = numbers["made"]
        for hookpoint, buffer in self.buffers.items():
            buffer.load({name: tensors[f"{hookpoint}/{name}"] for name in ("rows", "generator")})


class _Recorded:
    """Maps on disk, recorded first if they are not there; each epoch in a new order."""

    def __init__(self, recipe: SAERecipe, pipe: Any, hookpoints: Sequence[str]) -> None:
        recorder = activation_recorder(recipe, pipe)
        recorder.record_all()
        self.maps = {hookpoint: RecordedActivations(recorder.folder, hookpoint) for hookpoint in hookpoints}
        first = self.maps[hookpoints[0]]
        self.order = DataOrder(len(first), recipe.run.seed)
        tokens = first[0].shape[0]
        if recipe.run.batch_size % tokens:
            raise ValueError(f"run.batch_size={recipe.run.batch_size} must divide by the {tokens} tokens of a map")
        self.per_batch = recipe.run.batch_size // tokens
        self.position = 0

    def width(self, hookpoint: str) -> int:
        return self.maps[hookpoint][0].shape[1]

    def next(self) -> dict[str, torch.Tensor]:
        numbers = [self.order[self.position + i] for i in range(self.per_batch)]
        self.position += self.per_batch
        return {hookpoint: torch.stack([maps[n] for n in numbers]) for hookpoint, maps in self.maps.items()}

    def numbers(self) -> dict[str, Any]:
        return {"position": self.position}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        self.position = numbers["position"]


@torch.no_grad()
def reconstruction_distance(
    pipe: Any,
    saes: dict[str, SparseAutoencoder],
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    batch_size: int = 4,
    **call: Any,
) -> float:
    """How far images move when activations are replaced by their reconstructions.

    Returns:
        Root mean square difference of the latents at equal noise, over their standard deviation.
    """

    def functions(sae: SparseAutoencoder) -> Any:
        whole = DeviceCopies(sae)
        return lambda tokens: whole.on(tokens.values.device)(tokens.encoded, tokens.call.timestep)

    source = {hookpoint: sae.config.reads for hookpoint, sae in saes.items()}
    total = count = spread = 0.0
    for batch in prompt_batches(prompts, batch_size, seed):
        plain = torch.as_tensor(batch.run(pipe, **call).images)
        with hooked(pipe, {hookpoint: functions(sae) for hookpoint, sae in saes.items()}, source=source):
            changed = torch.as_tensor(batch.run(pipe, **call).images)
        total += float((changed - plain).square().sum())
        spread += float((plain - plain.mean()).square().sum())
        count += plain.numel()
    return math.sqrt((total / count) / (spread / count))
