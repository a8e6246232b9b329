"""diffusers' FLUX.1 and SD3 text-to-image pipelines with a `conditions=` argument."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux import FluxPipelineOutput

from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.encoding import token_side
from imgdit.adapters.omni_control import OmniControl
from imgdit.adapters.options import ConditionOptions, Mode
from imgdit.adapters.pairing import Pairing, Samples
from imgdit.cards import CardDetails
from imgdit.images.latents import unscale_latents
from imgdit.lora.files import LoadReport
from imgdit.pipelines.checks import Texts, check_count, check_generators, check_latents, check_texts


class _Conditions(compat.SafetensorsOnly):
    """What the pipelines share: an `OmniControl` of their own, made when it is first needed."""

    _control: OmniControl | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The arguments of a call are those of the diffusers pipeline, and then ours."""
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            return
        inner = cls.__call__

        @functools.wraps(inner)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self, *args, **kwargs)

        theirs = signature(super().__call__)  # type: ignore[misc]
        ours = [one for one in signature(_Conditions.__call__).parameters.values() if one.kind is one.KEYWORD_ONLY]
        __call__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *ours])  # type: ignore[attr-defined]
        cls.__call__ = __call__  # type: ignore[method-assign]

    @property
    def control(self) -> OmniControl:
        """Loads, saves and removes the condition adapters of this pipeline."""
        if self._control is None or self._control.transformer is not compat.unwrapped(self.transformer):  # type: ignore[attr-defined]
            self._control = OmniControl(self)
        return self._control

    def load_control(
        self, source: str | Path, weight_name: str | None = None, adapter_name: str | None = None, **options: Any
    ) -> LoadReport:
        """`OmniControl.load`."""
        return self.control.load(source, weight_name, adapter_name, **options)

    def push_control(self, repository: str, adapter_name: str, details: CardDetails | None = None, **hub: Any) -> str:
        """`OmniControl.push_to_hub`."""
        return self.control.push_to_hub(repository, adapter_name, details, **hub)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' `load_lora_weights`; a style beside adapters of conditions is nothing to warn of."""
        with compat.several_adapters():
            super().load_lora_weights(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        conditions: Condition | Sequence[Condition] = (),
        main_adapter: str | Sequence[str] | None = None,
        mode: Mode | None = None,
        cache: bool | None = None,
        image_guidance_scale: float = 1.0,
        region: Any = None,
        condition_generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate images under conditions.

        Args:
            args, kwargs: of the diffusers pipeline this one extends.
            conditions: what steers; none gives what that pipeline gives.
            main_adapter, mode, cache, image_guidance_scale, region: see `ConditionOptions`.
            condition_generator: its `generator`, for the conditions' latents.

        Raises:
            ValueError: texts, generators or latents that do not fit each other.
        """
        options = ConditionOptions(main_adapter, mode, cache, image_guidance_scale, region, condition_generator)
        conditions = (conditions,) if isinstance(conditions, Condition) else conditions
        call = signature(super().__call__).bind_partial(*args, **kwargs).arguments  # type: ignore[misc]
        call |= {name: list(text) for name, text in call.items() if "prompt" in name and isinstance(text, tuple)}
        samples = self._check_counts(call, conditions)
        if not conditions:
            return super().__call__(**call)  # type: ignore[misc]
        with self.control.apply(conditions, options, self._target_size(call, conditions), samples) as control:
            return self._sample(control, **call)

    def _check_counts(self, call: Mapping[str, Any], conditions: Sequence[Condition]) -> Samples:
        """Refuse lists of other lengths than the prompts, and latents of another shape; the samples of the call."""
        prompts = check_texts(Texts(*(call.get(name) for name in Texts._fields)))
        for name, text in call.items():
            if re.fullmatch(r"(negative_)?prompt_[23]", name) and isinstance(text, (list, tuple)):
                check_count(name, text, prompts)
        samples = Samples.of_prompts(prompts, call.get("num_images_per_prompt", 1))
        check_generators(call.get("generator"), samples.count)
        for side in ("height", "width"):
            if call.get(side) == 0:  # which diffusers takes for the default
                raise ValueError(f"{side} is a positive number of pixels, got 0; leave it out for the default")
        if not any(condition.complement for condition in conditions):  # whose size may be the image's to complete
            height, width = self._sizes(call)
            check_latents(call.get("latents"), *self._latent_shape(samples.count, height, width))
        return samples

    def _sizes(self, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the images of a call, in pixels."""
        default = self.default_sample_size * self.vae_scale_factor  # type: ignore[attr-defined]
        return call.get("height") or default, call.get("width") or default

    def _target_size(self, call: Mapping[str, Any], conditions: Sequence[Condition]) -> tuple[int | None, int | None]:
        """Height and width that conditions are fitted to."""
        return self._sizes(call)

    def _latent_shape(self, images: int, height: int, width: int) -> tuple[tuple[int, ...], str]:
        """Shape of the starting noise, and what its numbers count."""
        raise NotImplementedError

    def _sample(self, control: OmniControl, **call: Any) -> Any:
        return super().__call__(**call)  # type: ignore[misc]


class StableDiffusion3OmniControlPipeline(_Conditions, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with conditions; made by `from_pretrained`, or by `from_pipe` of a pipeline."""

    def _latent_shape(self, images: int, height: int, width: int) -> tuple[tuple[int, ...], str]:
        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        return (images, self.transformer.config.in_channels, rows, columns), "batch, channels, h, w"


class FluxOmniControlPipeline(_Conditions, FluxPipeline):
    """`FluxPipeline` with conditions; made by `from_pretrained`, or by `from_pipe` of a pipeline."""

    def _latent_shape(self, images: int, height: int, width: int) -> tuple[tuple[int, ...], str]:
        side = token_side(compat.unwrapped(self.transformer), self.vae)
        tokens = (height // side) * (width // side)
        return (images, tokens, self.transformer.config.in_channels), "batch, tokens, channels of a token"

    def _target_size(self, call: Mapping[str, Any], conditions: Sequence[Condition]) -> tuple[int | None, int | None]:
        """`None`: an image is completed at its own size where the call gives none."""
        completes = any(item.complement for item in conditions) and not (call.get("height") and call.get("width"))
        return (None, None) if completes else self._sizes(call)

    def _sample(self, control: OmniControl, **kwargs: Any) -> Any:
        """Where complements show what is known, only the other tokens are sampled, and the schedule counts them."""
        run = control.run
        if run is None or run.region is None:
            return super()._sample(control, **kwargs)
        output_type, return_dict = kwargs.pop("output_type", "pil"), kwargs.pop("return_dict", True)
        rows, columns = run.region.shape
        side = run.side
        height, width = kwargs.setdefault("height", rows * side), kwargs.setdefault("width", columns * side)
        if (height, width) != (rows * side, columns * side):
            raise ValueError(
                f"got height={height} and width={width}, but the image to complete is {rows * side}x{columns * side}"
            )
        latents = kwargs.pop("latents", None)
        if latents is None:
            assert run.samples is not None
            latents, _ = self.prepare_latents(
                run.samples.count,
                self.vae.config.latent_channels,
                height,
                width,
                self.transformer.dtype,
                compat.execution_device(self),
                kwargs.get("generator"),
            )
        generated = run.region.flatten()
        sampled = super()._sample(
            control, **kwargs, latents=latents[:, generated], output_type="latent", return_dict=False
        )[0]
        image = run.known(Pairing(len(sampled), run.samples)).to(sampled)
        image[:, generated] = sampled
        if output_type != "latent":
            image = compat.flux_latents(self, image, height, width)
            image = unscale_latents(self.vae, image)
            image = self.vae.decode(image.to(self.vae.dtype), return_dict=False)[0]
            image = self.image_processor.postprocess(image, output_type=output_type)
            self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=image) if return_dict else (image,)


compat.register_pipeline(StableDiffusion3OmniControlPipeline)
compat.register_pipeline(FluxOmniControlPipeline)
