"""Any frames from any frames, with `NextDiT` (OneDiffusion's published weights, arXiv 2411.16318) or `MMDiT`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imgdit import compat
from imgdit.adapters.pairing import Samples
from imgdit.attention.cache import KVCache
from imgdit.cameras import FOCAL_LENGTH, cameras_of_rays, ray_frames, rays_of_frames, relative_rays
from imgdit.frames import Frame, TextFrame
from imgdit.images.convert import image_size
from imgdit.images.latents import decode_latents, encode_images
from imgdit.layout import FrameLayout, take_rows
from imgdit.models.functional import pack, unpack
from imgdit.models.mmdit import MMDiT
from imgdit.models.nextdit import NextDiT, TextMemory
from imgdit.naming import old_names
from imgdit.pipelines.checks import Texts, check_call, check_generators, check_latents
from imgdit.pipelines.frame_images import (
    bucket_size,
    depth_of_images,
    labels_of_images,
    pixels_of_images,
)
from imgdit.pipelines.frame_texts import SplitFrames, TextWriter, split_frames
from imgdit.pipelines.one_diffusion_inputs import FrameSource, check_scene, entry, images_of, num_entries
from imgdit.pipelines.options import FrameOptions, SamplingOptions
from imgdit.pipelines.text_frames import TextFramesMixin, load_text_frames
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.pipelines.texts import JoinedText
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.schedulers.schedule import set_schedule
from imgdit.tasks import ImageFrame

PUBLISHED_SIZE = 512
"""Side in pixels at which the published weights make anything but images from text."""

Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class OneDiffusionPipelineOutput(BaseOutput):
    """What `OneDiffusionPipeline` made. What was not asked for is `None`; P images, sample by sample."""

    images: Images
    """Frames of kind "image", of the output type asked for."""
    latents: torch.Tensor | None
    """(B, F, C, h, w) all frames; `None` of an image that was generated together with a text."""
    maps: dict[str, Images] | None = None
    """Frames of the other kinds as images, by kind; never rays."""
    depth: np.ndarray | None = None
    """(P, H, W) nearness in [0, 1], 1 the nearest, of the frames of kind "depth"."""
    labels: np.ndarray | None = None
    """(P, H, W) number in `legend`, from 1, of what a segmentation with a legend shows; 0 is nothing."""
    legend: dict[str, str] | None = None
    """Colour of each object of `labels`."""
    texts: list[str] | None = None
    """Texts that were generated, sample by sample."""
    cameras: torch.Tensor | None = None
    """(B, V, 4, 4) camera-to-world matrices of all views, in the frame of the first known camera; OpenCV's axes."""


@dataclass
class _Texts:
    """The texts of the steps that predict for as many at a time, and what the transformer keeps of such a step."""

    sources: list[torch.Tensor]
    """What `text` was made of; callbacks may put other ones in their place."""
    text: torch.Tensor | TextMemory
    cache: KVCache | None
    """Keys and values of the conditioning frames that see only themselves."""


class _FramesRun(NamedTuple):
    """What stays the same over a run."""

    layout: FrameLayout
    rest: FrameLayout
    """The layout without what is read from a cache."""
    pooled: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]
    texts: dict[bool, _Texts]
    """By whether a step is guided."""


class OneDiffusionPipeline(TextFramesMixin, ImgDiTPipeline):
    """Frames from frames: any frame of a scene may condition, any may be generated.

    Loads its own folders and the published one, whose `model_index.json` does not name the transformer.

    Args:
        scheduler: flow-matching schedule; diffusers' Euler is replaced by ours with its configuration.
        vae: autoencoder.
        text_encoder, tokenizer: of the prompts.
        transformer: `NextDiT` or `MMDiT`. With `NextDiT` the reference's rules hold: conditioning frames stand at the
            schedule's last noise level, their latents are drawn from the autoencoder's distribution (and noise that
            nothing uses before them, so that seeds agree), an autoencoder's `shift_factor` is ignored, and images
            that are bright all over are stretched. `MMDiT`'s conditioning frames are the most likely latents without
            noise.
    """

    transformer: MMDiT | NextDiT
    text_tokenizer: PreTrainedTokenizerBase | None = None
    """Of texts that are generated; `None`: `tokenizer`."""

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: MMDiT | NextDiT,
    ):
        if type(scheduler) is FlowMatchEulerDiscreteScheduler:
            scheduler = MultiFrameFlowMatchScheduler.from_config(scheduler.config)
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)

    @property
    def follows_reference(self) -> bool:
        """Whether OneDiffusion's rules hold; see the class."""
        return isinstance(self.transformer, NextDiT)

    @property
    def default_size(self) -> int:
        """Side in pixels of an image nobody gave a size for: what the transformer was trained on."""
        if isinstance(self.transformer, NextDiT):
            return self.transformer.config.input_size[1] * self.vae_scale_factor
        return super().default_size

    @old_names(given_level="conditioning_level")
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        frames: Sequence[ImageFrame | TextFrame] | None = None,
        task: str | None = None,
        images: Any = None,
        cameras: Sequence[Any] | torch.Tensor | None = None,
        inverse: bool = False,
        captions: Sequence[str] | None = None,
        legend: Mapping[str, str] | None = None,
        item: str | None = None,
        denoise_mask: Sequence[int] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        crop: bool = True,
        focal_length: float | torch.Tensor = FOCAL_LENGTH,
        conditioning_level: Literal["last", "clean"] | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        noise_scale: float = 1.0,
        scale_factor: float = 1.0,
        scale_watershed: float = 1.0,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 300,
    ) -> OneDiffusionPipelineOutput | tuple:
        """Generate frames.

        Which frames condition and which are generated is set in one of three ways: `frames`; or `task` with `images`
        and what belongs to it (`imgdit.tasks.task_frames`); or, raw, a prompt that begins with a token and
        `denoise_mask` with `images` and `cameras` (`imgdit.tasks.frames_of_mask`). With none of them an image is
        generated from the prompt.

        Args:
            prompt: caption of the image, or the instruction of editing; one or several. The library puts the task's
                token and its details before it; a prompt that begins with a token is taken as it is.
            frames: the scene, frame by frame. A clean `TextFrame` is the prompt; one that is generated is written
                about the conditioning image (`TextFrame.generate`, `fill`, `ask`), or together with the one that is
                generated; see `imgdit.pipelines.frame_texts`.
            task: name of the task, of `imgdit.tasks.TASKS`; found by the frames' kinds where they tell.
            images: given images of a task, one or several.
            cameras: of views: a camera-to-world matrix (4, 4) each, `None` for one to be found. Positions are taken
                as they are; `imgdit.cameras.scale_positions` puts them at the distance OneDiffusion was trained at.
            inverse: whether the image conditions and the rest is generated.
            captions: of the given images (subject, identity).
            legend: colour of each object (segmentation, boxes).
            item: what the subject is called.
            denoise_mask: 1 for each frame to be generated, 0 for each conditioning frame.
            negative_prompt: what to steer away from, as the model reads it, without a token; empty by default.
            height, width: in pixels. By default as the given latents; for a `NextDiT` as large as the published one
                the bucket of the first given image, 512 for views; otherwise the transformer's training size.
            crop: see `pixels_of_images`.
            focal_length: of the cameras, in image widths, or intrinsics; see `imgdit.cameras.relative_rays`.
            conditioning_level: noise level of conditioning frames: "last", the lowest of the schedule, as the
                reference; or "clean", 0, as the paper. `None`: "last" for `NextDiT`, "clean" for `MMDiT`.
            num_inference_steps: steps of the sampler; 28 by default, 50 for a `NextDiT` as published.
            sigmas: noise levels of the steps, falling from 1, before the scheduler's shift; instead of
                `num_inference_steps`.
            noise_scale: factor of the generated tokens by which the schedule is shifted.
            scale_factor, scale_watershed: see `NextDiT.forward`; for frames larger or more than it was trained on.
            guidance_scale: 1 and below: no guidance. Above: `v = v_neg + scale * (v - v_neg)`. 3 by default, 4 for a
                `NextDiT` as published.
            guidance_interval: noise levels (low, high) between which guidance acts.
            num_images_per_prompt: scenes for each prompt.
            generator: source of every draw; one, or a list of one per scene.
            latents: starting noise (B, F, C, h, w) of all frames, of any floating-point type, instead of drawing it;
                the places of conditioning frames are not read. (B, C, h, w) will do for one frame.
            prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask: as `encode_prompt` returns them, and negative.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an `OneDiffusionPipelineOutput` or a tuple, `images` and `latents` first.
            joint_attention_kwargs: {"scale": LoRA scale}.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`; may return changed tensors.
            callback_on_step_end_tensor_inputs: which tensors it gets; `["latents"]` by default.
            max_sequence_length: text tokens that are read; a longer prompt is cut with a warning.

        Raises:
            ValueError: frames, texts or options that do not fit; nothing is repeated, dropped or guessed.
        """
        split = split_frames(frames, prompt)
        prompt = split.prompt
        texts = Texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
            negative_pooled_prompt_embeds, prompt_embeds_mask, negative_prompt_embeds_mask,
        )  # fmt: skip
        steps, scale = (50, 4.0) if self.follows_reference else (28, 3.0)
        options = SamplingOptions(
            steps if num_inference_steps is None else num_inference_steps, sigmas,
            scale if guidance_scale is None else guidance_scale, 1.0, guidance_interval, num_images_per_prompt,
            generator, max_sequence_length, output_type, joint_attention_kwargs, callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        framing = FrameOptions(crop, focal_length, conditioning_level, noise_scale, scale_factor, scale_watershed)
        source = FrameSource(split.images, task, images, cameras, inverse, captions, legend, item, denoise_mask)
        if split.texts:
            call = (split, options, framing, (height, width), latents, guidance_scale, num_inference_steps)
            return self._write_texts(*call) if return_dict else self._write_texts(*call).to_tuple()
        samples = check_call(self, texts, options, "scenes")
        frames, task = source.read(prompt)
        height, width = self._size(frames, height, width)
        check_scene(frames, samples, height, width, self.vae_scale_factor * self.patch_size, self.transformer)
        self._check_framing(framing)
        cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = self._checked_latents(latents, (samples.count, len(frames), self.vae.config.latent_channels, *cells))
        self._begin(options)
        texts = texts._replace(prompt=source.prompts(prompt, task, frames, self.read_prompts))
        text = self._encode_texts(texts, options)
        latents = self.prepare_latents(frames, samples, cells, framing, generator, latents)  # (B, F, C, h, w) float32
        grid = (cells[0] // self.patch_size, cells[1] // self.patch_size)
        num_tokens = noise_scale * sum(not frame.is_clean for frame in frames) * grid[0] * grid[1]
        device = compat.execution_device(self)
        timesteps = set_schedule(self.scheduler, options.num_inference_steps, sigmas, num_tokens, device)
        run = self._prepare(frames, grid, text, float(timesteps[-1]) / 1000, framing, joint_attention_kwargs)
        moving = run.layout.predicted_frames
        latents = self._denoise(latents, text, timesteps, options, partial(self._velocity, run), moving)
        output = self._output(frames, latents, output_type, focal_length)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    # Texts

    def load_text_frames(self, folder: str | Path) -> None:
        """Load what generates text beside the transformer; see `imgdit.pipelines.text_frames`. Without it the folder
        `text_frames` beside the pipeline's parts is loaded by the first call that needs it."""
        self.text_adapter, self.text_tokenizer, self.text_questions = load_text_frames(self, folder)

    def _write_texts(
        self,
        split: SplitFrames,
        options: SamplingOptions,
        framing: FrameOptions,
        size: tuple[int | None, int | None],
        latents: torch.Tensor | None,
        guidance_scale: float | None,
        steps: int | None,
    ) -> OneDiffusionPipelineOutput:
        """Texts about the conditioning image, or together with the one that is generated."""
        images, generator = split.images or [], options.generator
        if latents is not None:
            raise ValueError("texts begin with masks: leave latents out; an image's are ImageFrame.clean(latents)")
        writer = TextWriter.over(self)
        call = writer.options(
            options.callback_on_step_end, num_inference_steps=steps,
            guidance_scale=1.0 if guidance_scale is None else guidance_scale, generator=generator,
            callback_on_step_end_tensor_inputs=options.callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        copies = options.num_images_per_prompt
        if images and not images[0].is_clean:
            call["max_length"] = split.texts[0].length or None
            both = writer.writer.joint(copies, options.output_type, **call)
            return OneDiffusionPipelineOutput(both.images, None, texts=both.texts)
        for frame in split.texts:
            writer.check(frame)
        clean = None
        if images:
            entries = [num_entries(images[0]) or 1, *(frame.entries for frame in split.texts)]
            samples = Samples.of_prompts(max(entries), copies)
            height, width = self._size(images, *size)
            check_scene(
                images, samples, height, width, self.vae_scale_factor * self.patch_size, self.transformer, True
            )
            check_generators(generator, samples.count, "texts")
            cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
            clean = self.prepare_latents(images, samples, cells, framing, generator)
        self._begin(options)
        texts = [writer.write(frame, None if clean is None else clean[:, 0], call) for frame in split.texts]
        return OneDiffusionPipelineOutput([], clean, texts=[text for one in zip(*texts) for text in one])

    # Input

    def _size(self, scene: list[ImageFrame], height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, where they are not both given."""
        for frame in scene:
            if isinstance(frame.content, torch.Tensor) and frame.kind != "rays":
                rows, columns = (n * self.vae_scale_factor for n in frame.content.shape[-2:])
                return rows if height is None else height, columns if width is None else width
        default = (self.default_size, self.default_size)
        if self.follows_reference and min(default) >= PUBLISHED_SIZE:  # one that was trained on less has its own size
            images = [image for frame in scene for image in images_of(frame)]
            if any(frame.kind == "rays" for frame in scene):
                default = (PUBLISHED_SIZE, PUBLISHED_SIZE)
            elif images:
                default = bucket_size(*image_size(images[0]))
        return default[0] if height is None else height, default[1] if width is None else width

    def _check_framing(self, options: FrameOptions) -> None:
        """Refuse options that this scheduler or this transformer has no use for."""
        if options.noise_scale != 1.0 and not self.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(
                f"noise_scale={options.noise_scale} changes a dynamic shift, this scheduler's is fixed; leave it out"
            )
        if not self.follows_reference and set(options.scaling.values()) != {1.0}:
            raise ValueError(
                "scale_factor and scale_watershed change NextDiT's positions; got "
                f"{options.scale_factor} and {options.scale_watershed} for {type(self.transformer).__name__}"
            )

    # Latents

    @staticmethod
    def _checked_latents(latents: Any, shape: tuple[int, ...]) -> Any:
        """Starting noise (B, F, C, h, w); (B, C, h, w) will do for one frame."""
        if isinstance(latents, torch.Tensor) and latents.ndim == 4 and shape[1] == 1:
            latents = latents[:, None]
        check_latents(latents, shape, "scenes, frames, channels, h, w")
        return latents

    def prepare_latents(
        self,
        frames: Sequence[ImageFrame],
        samples: Samples,
        cells: tuple[int, int],
        options: FrameOptions,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where the run starts: conditioning frames as latents, noise in the places of the others.

        Args:
            frames: of each sample.
            samples: of the call; those of one prompt share one entry of a list of images.
            cells: rows and columns of the latents.
            options: of the frames.
            generator: source of the noise; one, or a list of one per sample.
            latents: starting noise, instead of drawing it.

        Returns:
            (B, F, C, h, w) float32, whatever the model's dtype: the same seed gives the same start.
        """
        shape = (self.vae.config.latent_channels, *cells)
        full = (samples.count, len(frames), *shape)
        if isinstance(generator, list):  # sample by sample, so that each is what it would be alone
            parts = []
            for i, one in enumerate(generator):
                mine = [entry(frame, i, samples) for frame in frames]
                noise = None if latents is None else latents[i : i + 1]
                parts.append(self.prepare_latents(mine, Samples.of_prompts(1), cells, options, one, noise))
            return torch.cat(parts)

        device = compat.execution_device(self)
        images = {i: images_of(frame) for i, frame in enumerate(frames) if images_of(frame)}
        drawn = {"generator": generator, "device": device, "dtype": torch.float32}
        latents_of: dict[int, torch.Tensor] = {}
        if images:
            if self.follows_reference:
                randn_tensor((samples.count, *shape), **drawn)  # the reference draws it and throws it away
            pixels = pixels_of_images(
                [image for some in images.values() for image in some],
                cells[0] * self.vae_scale_factor,
                cells[1] * self.vae_scale_factor,
                crop=options.crop,
                stretch_bright=self.follows_reference,
            )
            encoded = self._encode_images(pixels.to(device), drawn)
            latents_of = dict(zip(images, encoded.split([len(some) for some in images.values()]), strict=True))
        noise = randn_tensor(full, **drawn) if latents is None else latents.to(device, torch.float32)
        rays = self._ray_latents(frames, cells, options.focal_length)
        start = noise.clone()
        for i, frame in enumerate(frames):
            if frame.is_clean:
                value = latents_of.get(i, rays.get(i, frame.content))
                start[:, i] = self._spread(value.to(device, torch.float32), i, full, samples)
        return start

    def _spread(self, value: torch.Tensor, place: int, full: tuple[int, ...], samples: Samples) -> torch.Tensor:
        """A conditioning frame's latents (C, h, w), (1, …), one per prompt or one per sample, as (B, C, h, w)."""
        value = value if value.ndim == 4 else value[None]
        if value.shape[1:] != full[2:] or value.shape[0] not in (1, samples.prompts, samples.count):
            raise ValueError(
                f"frame {place} is given as {value.shape[0]} grids of {tuple(value.shape[1:])}, the run has "
                f"{samples.prompts} prompt(s) and grids of {full[2:]}; give one for all, or one per prompt"
            )
        return value[list(samples.order(len(value)))]

    def _encode_images(self, pixels: torch.Tensor, drawn: dict[str, Any]) -> torch.Tensor:
        """Images (P, 3, H, W) in [-1, 1] to latents (P, C, h, w)."""
        if not self.follows_reference or isinstance(self.vae, AutoencoderDC):  # which has no distribution to draw from
            return encode_images(self.vae, pixels)
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        noise = randn_tensor(posterior.mean.shape, **drawn)
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    def _ray_latents(
        self, scene: Sequence[ImageFrame], cells: tuple[int, int], focal_length: float | torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Latents (P, C, h, w) of the given rays by their places, P one or the prompts; all are relative to the first
        of them."""
        places = [i for i, frame in enumerate(scene) if frame.kind == "rays" and frame.is_clean]
        if not places:
            return {}
        poses = [torch.as_tensor(scene[i].content, dtype=torch.float32) for i in places]
        poses = [matrices if matrices.ndim == 3 else matrices[None] for matrices in poses]
        prompts = max(len(matrices) for matrices in poses)
        if any(m.shape[1:] != (4, 4) or len(m) not in (1, prompts) for m in poses):
            shapes = ", ".join(str(tuple(m.shape)) for m in poses)
            raise ValueError(f"a camera is a matrix (4, 4), or (P, 4, 4) with one for each prompt; got {shapes}")
        views = torch.stack([matrices.expand(prompts, 4, 4) for matrices in poses], dim=1)  # (P, V, 4, 4)
        rays = torch.stack([ray_frames(relative_rays(cameras, cells[0], focal_length)) for cameras in views])
        return dict(zip(places, rays.unbind(1), strict=True))

    # The run

    def _prepare(
        self,
        frames: Sequence[ImageFrame],
        grid: tuple[int, int],
        text: JoinedText,
        last: float,
        options: FrameOptions,
        joint_attention_kwargs: dict[str, Any] | None,
    ) -> _FramesRun:
        """What stays the same over a run, for frames of so many rows and columns of tokens; `last` is the lowest noise
        level of the schedule."""
        at_last = options.conditioning_level == "last" or (
            options.conditioning_level is None and self.follows_reference
        )
        layout = FrameLayout.build(
            [
                Frame(
                    grid,
                    sigma=(last if at_last else 0.0) if frame.is_clean else None,
                    adapter=frame.adapter,
                    sees=frame.sees,
                    index=i if frame.index is None else frame.index,
                    offset=frame.offset,
                )
                for i, frame in enumerate(frames)
            ],
            text.embeds.shape[1],
        )
        extra: dict[str, Any] = {"joint_attention_kwargs": joint_attention_kwargs}
        if self.follows_reference:
            extra |= options.scaling
        return _FramesRun(layout, layout.without_frozen(), text.pooled, text.mask, extra, {})

    def _velocity(
        self, run: _FramesRun, state: dict[str, Any], t: torch.Tensor, level: float, guided: bool
    ) -> torch.Tensor:
        """Velocity (k * B, M, C, h, w) float32 of the M frames being generated, under k texts for each scene."""
        config, dtype = self.transformer.config, self.transformer.dtype
        sources = [state[name] for name in (["negative_prompt_embeds"] if guided else []) + ["prompt_embeds"]]
        rows = slice(-sum(len(source) for source in sources), None)
        mask = None if run.mask is None else run.mask[rows]
        texts = run.texts.get(guided)
        if texts is None or any(a is not b for a, b in zip(texts.sources, sources, strict=True)):
            embeds = torch.cat(sources).to(dtype)
            text = TextMemory(embeds, mask) if self.follows_reference else embeds
            # A step cache compares tokens over steps, so the same frames are in every one.
            keeps = run.layout.frozen and not getattr(self.transformer, "is_cache_enabled", False)
            texts = run.texts[guided] = _Texts(sources, text, KVCache() if keeps else None)
        timestep = (t / config.timestep_scale).expand(len(sources) * state["latents"].shape[0])
        layout, options = run.layout, dict(run.options)
        rotation = self._rotation(run, level)
        if rotation is not None:  # so the model need not read the level from the device
            options["scale_watershed"] = 0.0 if rotation[0] == 1.0 else math.inf
        if texts.cache is not None and texts.cache.mode == "read":
            if rotation not in (None, texts.cache.rotation):  # the level crossed scale_watershed
                texts.cache.clear()
            else:
                layout = run.rest

        latents = take_rows(state["latents"], layout.live_frames).to(dtype)  # (B, F, C, h, w)
        tokens = pack(latents.flatten(0, 1), self.patch_size).unflatten(0, latents.shape[:2]).flatten(1, 2)
        tokens = tokens.repeat(len(sources), 1, 1)  # (k * B, N, C * p * p)
        if config.guidance_embeds:
            options["guidance"] = torch.full((tokens.shape[0],), self.guidance_scale, device=tokens.device)
        # A guided and a plain step differ in batch size, so step caches keep them apart.
        with self.transformer.cache_context("guided" if guided else "plain"):
            velocity, *_ = self.transformer(
                hidden_states=tokens,
                encoder_hidden_states=texts.text,
                pooled_projections=run.pooled[rows].to(dtype),
                timestep=timestep,
                encoder_attention_mask=None if isinstance(texts.text, TextMemory) else mask,
                layout=layout,
                cache=texts.cache,
                return_dict=False,
                **options,
            )
        if texts.cache is not None:
            texts.cache.freeze()
        generated = len(layout.predicted_lengths)
        grid = layout.frames[0].size
        cells = unpack(velocity.float().unflatten(1, (generated, -1)).flatten(0, 1), self.patch_size, grid)
        return cells.unflatten(0, (-1, generated))

    def _rotation(self, run: _FramesRun, level: float) -> tuple[float, float] | None:
        """`NextDiT.rotation` of a step, by its timestep as a number; `None` where it is the same in all."""
        if run.options.get("scale_factor", 1.0) == 1.0:
            return None
        timestep = torch.tensor([level]) / self.transformer.config.timestep_scale
        scaling = run.options["scale_factor"], run.options["scale_watershed"]
        return self.transformer.rotation(run.layout, timestep, *scaling)

    # Output

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Latents (P, C, h, w) to images."""
        if not self.follows_reference:
            pixels = decode_latents(self.vae, latents)
        else:
            pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _output(
        self,
        scene: Sequence[ImageFrame],
        latents: torch.Tensor,
        output_type: str,
        focal_length: float | torch.Tensor,
    ) -> OneDiffusionPipelineOutput:
        """Each frame that was made, as what it is."""
        output = OneDiffusionPipelineOutput(images=[], latents=latents)
        for kind in dict.fromkeys(frame.kind for frame in scene if not frame.is_clean and frame.kind != "rays"):
            places = [i for i, frame in enumerate(scene) if frame.kind == kind and not frame.is_clean]
            grids = latents[:, places].flatten(0, 1)  # (P, C, h, w)
            if output_type == "latent":
                images: Any = grids
            else:
                tensor = self.decode_latents(grids, "pt")  # (P, 3, H, W) in [0, 1]
                images = self._of_type(tensor, output_type)
                if kind == "depth":
                    output.depth = depth_of_images(tensor)
                legend = next((scene[i].legend for i in places if scene[i].legend), None)
                if kind == "segmentation" and legend:
                    output.labels, output.legend = labels_of_images(tensor, legend), dict(legend)
            if kind == "image":
                output.images = images
            else:
                output.maps = {**(output.maps or {}), kind: images}
        views = [i for i, frame in enumerate(scene) if frame.kind == "rays"]
        if views:
            frames = latents[:, views].flatten(0, 1)
            found = cameras_of_rays(rays_of_frames(frames), focal_length).camera_to_world
            output.cameras = found.unflatten(0, (latents.shape[0], len(views)))
        return output

    def _of_type(self, images: torch.Tensor, output_type: str) -> Images:
        if output_type == "pt":
            return images
        array = self.image_processor.pt_to_numpy(images)
        return array if output_type == "np" else self.image_processor.numpy_to_pil(array)


compat.register_pipeline(OneDiffusionPipeline)
