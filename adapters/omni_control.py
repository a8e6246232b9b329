"""Conditions in any diffusers pipeline whose transformer has a family with `conditions`; it keeps its own forward."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.encoding import token_side
from imgdit.adapters.hooks import NAME, ModelInputHook, Passing, hook_blocks, hook_edges, model_hooks, unhook
from imgdit.adapters.options import ConditionOptions, Mode
from imgdit.adapters.pairing import Samples, Target
from imgdit.adapters.prepare import blocks_of, prepare_run
from imgdit.adapters.references import Cached, References
from imgdit.adapters.run import ConditionRun, Progress
from imgdit.adapters.sharing import push_adapter, with_base
from imgdit.cards import CardDetails
from imgdit.family import find_family, known_classes
from imgdit.kernels import prefer_onednn
from imgdit.lora.files import (
    AdapterInfo,
    LoadReport,
    adapter_pairs,
    load_adapter,
    loaded_adapters,
    write_adapter,
)
from imgdit.naming import nearest

logger = logging.getLogger(__name__)
_USE_LOCK = threading.Lock()
"""Held while `use` begins: two threads may ask for it on one transformer."""


class OmniControl:
    """Lets condition tokens ride through a pipeline.

        control = OmniControl(pipe)
        control.load("Yuanshi/OminiControl", weight_name="experimental/canny.safetensors", adapter_name="canny")
        with control.use([Condition(edges, adapter="canny")]):
            image = pipe("a lighthouse at dusk").images[0]

    Make it before a step cache is enabled or the blocks are compiled if you can; offloading may come before or after.
    Pipelines made by `from_pipe` share the transformer, so `use` reaches them as well, also in other threads.

    Args:
        pipe: a diffusers pipeline whose transformer is FLUX.1's, SD3's or of another family that has `conditions`
            (`imgdit.family`); a modular one with its transformer and autoencoder loaded.

    Raises:
        ValueError: its transformer takes no conditions, or it has none.
    """

    def __init__(self, pipe: Any):
        missing = [name for name in ("transformer", "vae") if getattr(pipe, name, None) is None]
        if isinstance(pipe, diffusers.ModularPipeline) and missing:
            raise ValueError(
                f"OmniControl got a {type(pipe).__name__} without {' and '.join(missing)}; load it by "
                "load_components() or give it by update_components(), in a pipeline whose blocks use it"
            )
        transformer = compat.unwrapped(getattr(pipe, "transformer", None))
        family = find_family(transformer)
        if family is None or family.conditions is None or family.tokens is None:
            raise ValueError(
                f"OmniControl needs a pipeline whose transformer is a {' or '.join(known_classes('conditions'))}, got "
                f"{type(pipe).__name__} with {type(transformer).__name__}"
                + ("; ImgDiTPipeline takes conditions= itself" if type(transformer).__name__ == "MMDiT" else "")
            )
        reason = family.conditions.refused.get(type(pipe).__name__)
        if reason is not None:
            raise ValueError(f"OmniControl got a {type(pipe).__name__}, which cannot have conditions: {reason}")
        self.pipe = pipe
        self.transformer: Any = transformer
        self._conditions, self._tokens = family.conditions, family.tokens
        self.run: ConditionRun | None = None
        """The conditions in use."""
        self.reference_error: float | None = None
        """Of the last run with `references(cached="approximate")`: |cached - computed| / |computed|, of the model's
        result in the first step that read the cache. `None`: there was none."""
        self._schedule: tuple[torch.Tensor, list[float]] | None = None
        """Timesteps of the scheduler that was asked last, and the same as numbers, read once."""
        others = model_hooks(transformer)
        self.infos: dict[str, AdapterInfo] = others[0].control.infos if others else {}
        """How each adapter that `load` loaded was trained."""
        self._loaded: dict[str, weakref.ref] = others[0].control._loaded if others else {}
        """A layer of each of them, which another adapter of that name does not have."""
        self._name = f"{NAME}_{id(self)}"
        self._passing = others[0].passing if others else Passing()
        compat.insert_hook(transformer, ModelInputHook(self, transformer, family, self._passing), self._name)
        if not others:
            hook_blocks(transformer, self._conditions, self._passing)

    # Adapters

    def load(
        self,
        source: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        **hub: Any,
    ) -> LoadReport:
        """Load a condition adapter. It acts on its conditions' tokens only: a plain run does not change.

        Args:
            source: a safetensors file, a folder, or a repository on the Hub, by any trainer's names (docs/files.md).
            weight_name: file in the folder or repository.
            adapter_name: what conditions call it; the file's name with `_` for dots by default.
            hotswap: take the place of the loaded adapter of that name without compiling again.
            hub: options of `hf_hub_download`.

        Raises:
            ValueError: the file is for another model, of another kind or damaged, or the name is taken; the pipeline
                is what it was.
        """
        if self.run is not None and not hotswap:
            raise ValueError("load adapters before use(): their layers would come under the hooks of the run")
        report = load_adapter(self.pipe, source, weight_name, adapter_name, hotswap=hotswap, **hub)
        self.infos[report.adapter] = report.info
        self._loaded[report.adapter] = weakref.ref(self._layer(report.adapter))
        if self.run is not None:  # a compiled model's weights are swapped without a trace
            self.run.forget()
        return report

    def _layer(self, adapter: str) -> Any:
        """A layer of an adapter; `None`: it is not loaded."""
        layers = (part for part in self.transformer.modules() if isinstance(part, LoraLayer))
        return next((layer.lora_A[adapter] for layer in layers if adapter in layer.lora_A), None)

    def _forget_replaced(self) -> None:
        """Drop what is known of adapters that were deleted and whose names others have now, loaded by diffusers."""
        for name, layer in list(self._loaded.items()):
            found = self._layer(name)
            if found is not None and found is not layer():
                self.infos.pop(name, None)
                del self._loaded[name]

    def save(self, path: str | Path, adapter_name: str, info: AdapterInfo | None = None) -> Path:
        """Write an adapter as a PEFT file with its settings in the header."""
        self._forget_replaced()
        info = info or self.infos.get(adapter_name)
        return write_adapter(path, adapter_pairs(self.transformer, adapter_name), info)

    def push_to_hub(self, repository: str, adapter_name: str, details: CardDetails | None = None, **hub: Any) -> str:
        """Upload an adapter with a model card; `load(repository)` gets it back.

        Args:
            repository: owner/name on the Hub.
            adapter_name: of a loaded adapter.
            details: licence, image, recipe, metrics and description of the card.
            hub: `private`, `token`, `message` of `imgdit.hub.push_folder`.

        Returns:
            The repository's address.

        Raises:
            ValueError: there is no such adapter, or the Hub cannot be reached or refuses.
        """
        self._forget_replaced()
        pairs = adapter_pairs(self.transformer, adapter_name)
        return push_adapter(
            repository, adapter_name, pairs, with_base(self.infos.get(adapter_name), self.pipe), details, **hub
        )

    def unload(self, adapter_name: str) -> None:
        """Take an adapter off the transformer."""
        if self.run is not None:
            raise ValueError("unload adapters outside of use()")
        if adapter_name not in loaded_adapters(self.transformer):
            raise ValueError(f"there is no adapter {nearest(adapter_name, loaded_adapters(self.transformer))}")
        self.transformer.delete_adapters(adapter_name)
        self.infos.pop(adapter_name, None)
        if not loaded_adapters(self.transformer):
            self.transformer.unload_lora()

    def remove(self) -> None:
        """Take the hooks and the adapters that `load` loaded off: the pipeline is what it was."""
        if self.run is not None:
            raise ValueError("remove() ends what use() began; leave the `with` block first")
        compat.remove_hook(self.transformer, self._name)
        if model_hooks(self.transformer):
            return
        unhook(block.module for block in blocks_of(self.transformer))
        for name in [name for name in self.infos if name in loaded_adapters(self.transformer)]:
            self.unload(name)

    # Conditions

    def use(
        self,
        conditions: Condition | Sequence[Condition],
        *,
        main_adapter: str | Sequence[str] | None = None,
        mode: Mode | None = None,
        cache: bool | None = None,
        image_guidance_scale: float = 1.0,
        region: Any = None,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        samples: int | Samples | None = None,
        references: References | None = None,
    ) -> AbstractContextManager[OmniControl]:
        """Let conditions act in the pipeline's calls, in this thread and in others until the context ends.

        Args:
            conditions: what steers, one or several; a condition of strength 0 is left out.
            main_adapter, mode, cache, image_guidance_scale, region, generator: see `ConditionOptions`.
            height, width: in pixels, of the images that are generated, which conditions are fitted to. `None`: seen in
                the pipeline's first step, where a condition of another size is encoded again.
            samples: images that a call generates, prompts times `num_images_per_prompt`, for conditions of several
                images. `None`: seen in the pipeline's first step.
            references: settings of the pipeline's own reference images; see `references`.

        Raises:
            ValueError: an option that does not fit, before anything runs; a number of images that does not, in the
                pipeline's first step where `samples` is not given.
        """
        options = ConditionOptions(main_adapter, mode, cache, image_guidance_scale, region, generator)
        return self.apply(conditions, options, (height, width), samples, references)

    def references(
        self,
        strength: float | Sequence[float] = 1.0,
        *,
        start: float = 0.0,
        end: float = 1.0,
        mask: Any = None,
        cached: Cached = False,
    ) -> AbstractContextManager[OmniControl]:
        """Set how much the model sees of the reference images that the pipeline is given (`pipe(image=…)` of FLUX.2,
        Kontext or Qwen-Image-Edit), without an adapter. The defaults change nothing.

            with control.references(strength=0.4, end=0.6):
                image = pipe(prompt="the same chair in a garden", image=chair).images[0]

        Args:
            strength, start, end, mask, cached: see `References`; together with conditions by `use(…, references=…)`.

        Raises:
            ValueError: a value that no reference can have; in the pipeline's first step, a call without references or
                with another number of them.
        """
        return self.use((), references=References(strength, start, end, mask, cached))

    @contextmanager
    def apply(
        self,
        conditions: Condition | Sequence[Condition],
        options: ConditionOptions,
        size: tuple[int | None, int | None] = (None, None),
        samples: int | Samples | None = None,
        references: References | None = None,
    ) -> Iterator[OmniControl]:
        """`use` with its options in one object.

        Args:
            conditions: what steers, one or several; a condition of strength 0 is left out.
            options: of all of them.
            size: height and width of `use`.
            samples: of `use`.
            references: of `use`.

        Raises:
            ValueError: see `use`.
        """
        if self._name not in getattr(getattr(self.transformer, "_diffusers_hook", None), "hooks", {}):
            raise ValueError("this OmniControl was removed; make a new one")
        self._refuse_second_use()
        if references is not None and self._conditions.references is None:
            raise ValueError(
                f"a {type(self.transformer).__name__} {self._conditions.without_references}; give the image as a "
                "condition"
            )
        if references is not None and references.cached:
            self._check_cached(references, conditions, options)
        self._forget_replaced()
        side = token_side(self.transformer, self.pipe.vae)
        samples = Samples(samples) if isinstance(samples, int) else samples
        run = prepare_run(
            self.pipe,
            self.transformer,
            self.infos,
            conditions,
            options,
            target=Target.of(size, side, samples),
            references=references,
        )
        if run is None:
            yield self
            return
        with _USE_LOCK:
            self._refuse_second_use()
            self.run, self.reference_error = run, None
            everywhere = any(item.frame.everywhere for item in run.conditions)
            hooked = hook_edges(self.transformer, self._conditions, everywhere=everywhere)
        leave_onednn = prefer_onednn(self.transformer)
        try:
            yield self
        finally:
            leave_onednn()
            self.run = None
            unhook(hooked)

    def _check_cached(self, references: References, conditions: Any, options: ConditionOptions) -> None:
        name, timeless = type(self.transformer).__name__, self._conditions.timeless
        if references.cached is True:
            if timeless is None or not timeless(self.transformer):
                raise ValueError(
                    f"references(cached=True) keeps what does not depend on the timestep, and in this {name} every "
                    "block of the references does; leave cached out"
                    + ("" if timeless is not None else ', or use cached="approximate", which changes results')
                )
        elif timeless is not None:
            raise ValueError(f'a {name} has no cached="approximate"; got it, expected True or False')
        elif conditions or options.image_guidance_scale != 1.0:
            raise ValueError(
                'references of cached="approximate" are for runs without conditions; leave it out beside conditions'
            )

    def _refuse_second_use(self) -> None:
        if any(hook.control.run is not None for hook in model_hooks(self.transformer)):
            raise ValueError(
                "conditions are in use already on this transformer; pass all of them to one use(), in which pipelines "
                "may run in several threads"
            )

    def note_reference_error(self, error: float, written: int, step: int) -> None:
        """Log the error of cached references, and keep the largest of a run.

        Args:
            error: relative, of the model's result.
            written, step: steps whose references are read, and in which, from 0.
        """
        self.reference_error = max(error, self.reference_error or 0.0)
        logger.warning(
            "reading the references of step %d changes the model's result of step %d by %.2g of its norm",
            written + 1,
            step + 1,
            error,
        )

    def progress(self, timestep: float, dtype: torch.dtype = torch.float32) -> Progress:
        """Where the pipeline that calls is, by its scheduler.

        Args:
            timestep: in [0, 1000].
            dtype: that pipelines round it to.

        Raises:
            ValueError: the scheduler is not at this timestep.
        """
        pipe = compat.calling_pipeline(self.transformer) or self.pipe
        scheduler = pipe.scheduler
        begin, index = getattr(scheduler, "begin_index", None), getattr(scheduler, "step_index", None)
        first = begin or 0
        index = first if index is None else index
        if self._schedule is None or self._schedule[0] is not scheduler.timesteps:
            self._schedule = (scheduler.timesteps, scheduler.timesteps.tolist())
        timesteps = self._schedule[1]
        near = 1e-3 + 2 * torch.finfo(dtype).eps * 1000.0
        started = getattr(scheduler, "num_inference_steps", None) is not None and index < len(timesteps)
        if not started or abs(timesteps[index] - timestep) > near:
            raise ValueError(
                f"start and end of a condition are counted by the scheduler of the {type(pipe).__name__}, which is "
                f"not at the timestep {timestep:g} of this call; step that scheduler, or use start=0 and end=1"
            )
        return Progress(index - first, len(timesteps) - first)
