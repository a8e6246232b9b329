"""A transformer that keeps its own forward, called on frames while it is trained: an image, and conditions behind it.

B batch, n tokens of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.encoding import EncodedCondition
from imgdit.adapters.hooks import ModelInputHook, Passing, hook_blocks, hook_edges, model_hooks, other_layers, unhook
from imgdit.adapters.pairing import Pairing, Samples
from imgdit.adapters.prepare import refuse_processors
from imgdit.adapters.run import ConditionRun
from imgdit.family import Family, NoisyImages, find_family, known_classes
from imgdit.frames import Frame
from imgdit.layout import FrameLayout
from imgdit.lora.files import AdapterInfo

_NAME = "imgdit_training"


@dataclass(eq=False)
class _Owner:
    """What the hook of a transformer asks, in the place of an `OmniControl`."""

    run: ConditionRun | None = None
    infos: dict[str, AdapterInfo] = field(default_factory=dict)
    _loaded: dict[str, Any] = field(default_factory=dict)
    pipe: Any = field(default_factory=lambda: SimpleNamespace(vae=None))


class _FramesHook(ModelInputHook):
    """On the transformer: each pass has the conditions that it is called with."""

    def __init__(self, frames: StockFrames, family: Family, passing: Passing):
        super().__init__(frames.owner, frames.model, family, passing)
        self.frames = frames

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.control.run
        if run is None:
            return self._plain(module, *args, **kwargs)
        arguments = self._arguments(module, args, kwargs)
        return self._pass(module, run, arguments, run.active(), empty=False)


class StockFrames:
    """Calls a transformer of another library on frames, for training. Make it when the adapter is on the model and
    before the model is wrapped for distributed training; `of` finds it again.

    Args:
        model: the bare transformer.

    Raises:
        ValueError: its class is not trained this way, or an attention processor would leave conditions out.
    """

    def __init__(self, model: Any):
        family = find_family(model)
        if family is None or family.training is None or family.conditions is None:
            raise ValueError(f"a {type(model).__name__} is not trained on frames; expected {trained_classes()}")
        refuse_processors(model)
        self.model, self.training, self.conditions = model, family.training, family.conditions
        self.owner = _Owner()
        self._layouts: dict[tuple, FrameLayout] = {}
        others = model_hooks(model)
        passing = others[0].passing if others else Passing()
        compat.insert_hook(model, _FramesHook(self, family, passing), _NAME)
        if not others:
            hook_blocks(model, family.conditions, passing)

    @staticmethod
    def of(model: Any) -> StockFrames | None:
        """That of a bare transformer; `None`: it has none."""
        return next((hook.frames for hook in model_hooks(model) if isinstance(hook, _FramesHook)), None)

    def velocity(
        self, call: Callable[..., Any], images: NoisyImages, conditions: Sequence[tuple[Frame, torch.Tensor]] = ()
    ) -> torch.Tensor:
        """Velocity (B, N, C) of the images.

        Args:
            call: the transformer, wrapped for distributed training or not.
            images: without the conditions.
            conditions: frames at noise level 0 that an adapter reads, and the clean tokens (B, n, C) of each.

        Raises:
            ValueError: another kind of frame, or an adapter on layers that condition tokens do not pass.
        """
        arguments = self.training.arguments(self.model, images)
        if not conditions:
            return self.training.velocity(call(**arguments, return_dict=False)[0])
        self.owner.run = self._run(conditions)
        edges = hook_edges(self.model, self.conditions, everywhere=False)
        try:
            out = call(**arguments, return_dict=False)[0]
        finally:
            unhook(edges)
            self.owner.run = None
        return self.training.velocity(out)

    def prepare(self, images: NoisyImages, conditions: Sequence[tuple[Frame, torch.Tensor]]) -> None:
        """Make what a pass keeps for others of its shapes, and which needs real tensors, without the model's weights.

        Args:
            images, conditions: as of `velocity`, of any values.
        """
        arguments = self.training.arguments(self.model, images)
        call = self.conditions.call(self.model, arguments)
        if conditions:
            run = self._run(conditions)
            pairing = Pairing(len(images.tokens), run.samples)
            layout = run.arrange(call.frames, call.text_length, pairing, call.cached_by, step_cache=False).layout
            _ = layout.groups, layout.image_groups

    def _run(self, conditions: Sequence[tuple[Frame, torch.Tensor]]) -> ConditionRun:
        encoded = []
        for frame, tokens in conditions:
            if frame.sigma != 0.0 or frame.adapter is None or frame.sees == "all":
                raise ValueError(
                    f"a {type(self.model).__name__} is trained on one image and on conditions, which are held at "
                    f"sigma=0.0 and read by an adapter; got Frame(sigma={frame.sigma}, adapter={frame.adapter!r}, "
                    f"sees={frame.sees!r})"
                )
            encoded.append(EncodedCondition(Condition(None, frame.adapter), frame, tokens, None, frame.size))
        self._check_layers({frame.adapter for frame, _ in conditions})
        samples = Samples(len(conditions[0][1]))
        return ConditionRun(encoded, None, cached=False, lora_layers=(), samples=samples, _layouts=self._layouts)

    def _check_layers(self, adapters: set[str | None]) -> None:
        """Refuse an adapter on layers that would act on all tokens while it is trained, and on none of them later."""
        edges = tuple(self.conditions.edges(self.model))
        others = {id(layer) for layer in other_layers(self.model) if adapters & layer.lora_A.keys()}
        for name, module in self.model.named_modules():
            if id(module) in others and not any(f"{name}.".startswith(f"{edge}.") for edge in edges):
                raise ValueError(
                    f"the adapter has a LoRA on {name!r}, which no condition token passes; take it out of "
                    "adapter.targets"
                )


def trained_classes() -> str:
    """Names of the classes that are trained this way."""
    return " or ".join(known_classes("training"))
