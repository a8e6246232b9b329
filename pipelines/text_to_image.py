"""Text to image and image to image with `MMDiT`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.options import ConditionOptions, Mode
from imgdit.adapters.pairing import Pairing, Samples, Target
from imgdit.adapters.prepare import prepare_run
from imgdit.adapters.run import ConditionRun, Progress
from imgdit.adapters.sharing import push_adapter, with_base
from imgdit.cards import CardDetails
from imgdit.frames import Frame
from imgdit.images.latents import cell_size, decode_latents
from imgdit.kernels import prefer_onednn
from imgdit.layout import FrameLayout, put_rows, take_rows
from imgdit.lora.files import AdapterInfo, LoadReport, adapter_pairs, load_adapter
from imgdit.models.functional import pack, unpack
from imgdit.models.mmdit import MMDiT
from imgdit.pipelines.checks import Texts, check_call, check_latents, check_size
from imgdit.pipelines.image_to_image import StartImage, late_start
from imgdit.pipelines.lora_loader import LoraLoaderMixin
from imgdit.pipelines.options import SamplingOptions
from imgdit.pipelines.texts import JoinedText, join_halves, unknown_words
from imgdit.prompts import PromptWords, read_prompt, remark
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.schedulers.schedule import set_schedule, step_options

logger = logging.get_logger(__name__)


@dataclass
class ImgDiTPipelineOutput(BaseOutput):
    """What `ImgDiTPipeline` returns."""

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    """Images of the output type asked for: a list, (B, H, W, 3) in [0, 1], (B, 3, H, W) in [0, 1], or latents."""


Predict = Callable[[dict[str, Any], torch.Tensor, float, bool], torch.Tensor]
"""`predict(state, t, level, guided)`: the velocity at a timestep, which is given as a tensor and as a number."""


@dataclass(eq=False)
class _Run:
    """What stays the same over the steps of a call."""

    image: Frame
    """The frame that is generated."""
    conditions: ConditionRun | None
    text: JoinedText
    places: torch.Tensor | None
    """Numbers of the tokens that are generated, on the device; `None`: all."""
    options: dict[str, Any]
    """Of the transformer."""
    layouts: dict[int, FrameLayout] = field(default_factory=dict)
    """Of the image alone, by the length of the text, which callbacks may change."""
    rows: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    """Pooled text and mask of a step, by its number of texts."""

    def layout(self, text_length: int) -> FrameLayout:
        """Of a step without conditions."""
        if text_length not in self.layouts:
            self.layouts[text_length] = FrameLayout.build([self.image], text_length)
        return self.layouts[text_length]

    def of_texts(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pooled text and mask of the last `count` texts: the same tensors in every step, so that they are known again
        without being compared."""
        if count not in self.rows:
            pooled, mask = self.text.pooled, self.text.mask
            self.rows[count] = (pooled[-count:], None if mask is None else mask[-count:])
        return self.rows[count]


class ImgDiTPipeline(compat.DiffusionPipeline, LoraLoaderMixin):
    """Images from prompts, and from prompts and an image to begin at.

    Args:
        scheduler: flow-matching schedule.
        vae: one of diffusers' autoencoders; its `scaling_factor` and `shift_factor`, if any, are applied.
        text_encoder: a T5-like encoder; its output is the text, its masked mean the pooled text.
        tokenizer: the encoder's.
        transformer: the backbone.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    names_unknown_words = True
    """Whether words that the model does not know are warned of; who says more of them sets it to false."""
    prompt_words: PromptWords | None
    """Facts about the captions that the model was trained on, by which prompts are read; its tokenizer has them.
    `None`: prompts are taken as they are written."""

    scheduler: MultiFrameFlowMatchScheduler
    vae: AutoencoderKL | AutoencoderDC
    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    transformer: MMDiT

    def __init__(
        self,
        scheduler: MultiFrameFlowMatchScheduler,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: MMDiT,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
        self.vae_scale_factor = cell_size(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * self.patch_size)
        self._guidance_scale = self._true_cfg_scale = 1.0
        self._current_timestep: torch.Tensor | None = None
        self._num_timesteps = 0
        self._interrupt = False
        self._infos: dict[str, AdapterInfo] = {}  # how condition adapters were trained
        self._progress = Progress(0, 1)
        self._named_words: set[str] = set()  # unknown words that a warning has named
        self.prompt_words = PromptWords.of_tokenizer(tokenizer)

    # Properties that callbacks and step caches read

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a second prediction guides."""
        return self._cfg_scale > 1.0

    @property
    def _cfg_scale(self) -> float:
        """Scale between two predictions; models that were distilled to take the guidance scale have another."""
        return self._true_cfg_scale if self.transformer.config.guidance_embeds else self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def patch_size(self) -> int:
        """Latent cells per side of a token."""
        if self.transformer is None or self.vae is None:
            return 2
        return math.isqrt(self.transformer.token_channels // self.vae.config.latent_channels)

    # Conditions

    def load_control(
        self,
        source: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        **hub: Any,
    ) -> LoadReport:
        """Load a condition adapter, which acts on the tokens of its conditions only; see `OmniControl.load`."""
        report = load_adapter(self, source, weight_name, adapter_name, hotswap=hotswap, **hub)
        self._infos[report.adapter] = report.info
        return report

    def push_control(self, repository: str, adapter_name: str, details: CardDetails | None = None, **hub: Any) -> str:
        """Upload a condition adapter with a model card, see `OmniControl.push_to_hub`."""
        pairs = adapter_pairs(self.transformer, adapter_name)
        info = with_base(self._infos.get(adapter_name), self)
        return push_adapter(repository, adapter_name, pairs, info, details, own=True, **hub)

    # Text

    def read_prompts(self, prompt: Any) -> Any:
        """One prompt or several as captions that the model was trained on, if `prompt_words` tells what those are. A
        caption, a prompt that begins with the token of a task, and `None` stay as they are."""
        words = self.prompt_words
        if words is None or prompt is None:
            return prompt
        if not isinstance(prompt, str):
            return [self.read_prompts(one) for one in prompt]
        if prompt.lstrip().startswith("[["):
            return prompt
        reading = read_prompt(words, prompt)
        new = [note for note in reading.notes if note.said not in self._named_words]
        self._named_words.update(note.said for note in new)
        said = remark(words, new)
        if said is not None and self.names_unknown_words:
            logger.warning(said)
        return reading.prompt

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        max_sequence_length: int = 256,
        device: torch.device | None = None,
    ) -> tuple[Any, ...]:
        """Prompts to what the transformer reads. Arguments that are given already are passed through.

        Returns:
            `prompt_embeds` (B, T, J), `negative_prompt_embeds`, `pooled_prompt_embeds` (B, P),
            `negative_pooled_prompt_embeds`, `prompt_embeds_mask` (B, T) boolean, `negative_prompt_embeds_mask`; the
            negative ones `None` without guidance. B counts `num_images_per_prompt` images for each prompt.
        """
        options = (num_images_per_prompt, max_sequence_length, device or compat.execution_device(self))
        prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask = self._encode(
            prompt, prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask, *options
        )
        if do_classifier_free_guidance:
            negative = negative_prompt or ""
            if negative_prompt_embeds is None and isinstance(negative, str):
                negative = [negative] * (len(prompt_embeds) // num_images_per_prompt)
            negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask = self._encode(
                negative, negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask, *options
            )
        else:
            negative_prompt_embeds = negative_pooled_prompt_embeds = negative_prompt_embeds_mask = None
        # By these names the values can be passed to `__call__`.
        return (
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
        )

    def _encode(
        self,
        text: Any,
        embeds: torch.Tensor | None,
        pooled: torch.Tensor | None,
        mask: torch.Tensor | None,
        copies: int,
        max_sequence_length: int,
        device: torch.device,
    ) -> tuple[Any, ...]:
        """Embeddings, pooled text and mask, each computed where it is not given, `copies` of each sample."""
        if embeds is None:
            prompts = [text] if isinstance(text, str) else list(text)
            embeds, mask = self._encode_text(prompts, max_sequence_length, device)
        elif mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        assert mask is not None
        if pooled is None:
            weight = mask[..., None].to(embeds)
            pooled = (embeds * weight).sum(1) / weight.sum(1).clamp(min=1)
        return tuple(x.repeat_interleave(copies, dim=0) for x in (embeds, pooled, mask.bool()))

    def _encode_text(
        self, prompt: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, J) and mask (B, T); T is the longest prompt's length."""
        tokens = self.tokenizer(
            prompt, padding="longest", truncation=True, max_length=max_sequence_length, return_tensors="pt"
        )
        for text in prompt:
            self._warn_of_cut_text(text, max_sequence_length)
            if self.names_unknown_words:
                self._warn_of_unknown_words(text)
        mask = tokens.attention_mask.to(device)
        embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return embeds.to(dtype=self.transformer.dtype if self.transformer is not None else None), mask.bool()

    def _warn_of_cut_text(self, prompt: str, max_sequence_length: int) -> None:
        whole = self.tokenizer(prompt, truncation=False).input_ids
        if len(whole) > max_sequence_length:
            cut = self.tokenizer.decode(whole[max_sequence_length - 1 :], skip_special_tokens=True)
            logger.warning(f"the prompt has {len(whole)} tokens, {max_sequence_length} are read; cut off: {cut!r}")

    def _warn_of_unknown_words(self, prompt: str) -> None:
        """Say, once each, which words the text encoder was never taught and reads letter by letter."""
        new = [word for word in unknown_words(self.tokenizer, prompt) if word not in self._named_words]
        if new:
            self._named_words.update(new)
            logger.warning(f"words that the model has never seen, spelled in bytes: {', '.join(new)}")

    # Input

    def check_inputs(
        self, texts: Texts, options: SamplingOptions, height: int, width: int, latents: torch.Tensor | None
    ) -> Samples:
        """Refuse what cannot work before anything is computed; the samples of the call.

        Args:
            texts, options: of the call.
            height, width: in pixels.
            latents: starting noise, or `None`.
        """
        check_size(height, width, self.vae_scale_factor * self.patch_size, self.transformer.max_grid)
        samples = check_call(self, texts, options)
        check_latents(latents, self._latent_shape(samples.count, height, width))
        return samples

    def _latent_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        channels = self.vae.config.latent_channels
        return (batch_size, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    @property
    def default_size(self) -> int:
        """Side in pixels of an image nobody gave a size for: what the transformer was trained on."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    # The run

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.0,
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
        max_sequence_length: int = 256,
        conditions: Condition | Sequence[Condition] = (),
        main_adapter: str | Sequence[str] | None = None,
        mode: Mode | None = None,
        cache: bool | None = None,
        image_guidance_scale: float = 1.0,
        region: Any = None,
        condition_generator: torch.Generator | None = None,
        true_cfg_scale: float = 1.0,
        image: Any = None,
        strength: float = 0.6,
    ) -> ImgDiTPipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: what to show; one prompt or several; see `read_prompts`.
            negative_prompt: what to steer away from; empty by default.
            height, width: in pixels; the transformer's training size by default.
            num_inference_steps: steps of the sampler.
            sigmas: noise levels of the steps, falling from 1, before the scheduler's shift; instead of
                `num_inference_steps`.
            guidance_scale: 1 and below: no guidance. Above: `v = v_neg + scale * (v - v_neg)` (arXiv 2207.12598), both
                computed in one batch; for guidance-distilled models an input.
            guidance_interval: noise levels (low, high) between which guidance acts; elsewhere one prediction serves
                (arXiv 2404.07724).
            num_images_per_prompt: images for each prompt.
            generator: source of the noise; one, or a list of one per image.
            latents: starting noise (B, C, h, w) of any floating-point type, instead of drawing it.
            prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask: as `encode_prompt` returns them, and negative.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an `ImgDiTPipelineOutput` or a tuple.
            joint_attention_kwargs: {"scale": LoRA scale}.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`; may return changed tensors.
            callback_on_step_end_tensor_inputs: which tensors it gets; `["latents"]` by default.
            max_sequence_length: text tokens that are read; a longer prompt is cut with a warning.
            conditions: images that steer, one or several, each through its loaded adapter.
            main_adapter, mode, cache, image_guidance_scale, region: see `ConditionOptions`.
            condition_generator: draws the conditions' latents from the posterior; `None` takes its mode.
            true_cfg_scale: the formula of `guidance_scale` for guidance-distilled models, with a negative prompt, as
                in diffusers' `FluxPipeline`; 1: one prediction.
            image: image that the run begins at, under noise, instead of at noise alone; one, or one per prompt or
                sample. Scaled and cut to the size.
            strength: of `image`: fraction of the steps that run, above 0 and at most 1. The larger, the less is left
                of the image; at 1 nothing is.

        Raises:
            ValueError: texts, counts, sizes, options or a scheduler that do not fit; nothing has been computed.
        """
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        texts = Texts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
            negative_pooled_prompt_embeds, prompt_embeds_mask, negative_prompt_embeds_mask,
        )  # fmt: skip
        options = SamplingOptions(
            num_inference_steps, sigmas, guidance_scale, true_cfg_scale, guidance_interval, num_images_per_prompt,
            generator, max_sequence_length, output_type, joint_attention_kwargs, callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        conditioning = ConditionOptions(main_adapter, mode, cache, image_guidance_scale, region, condition_generator)
        samples = self.check_inputs(texts, options, height, width, latents)
        start = None if image is None else StartImage.read(image, strength, (height, width), samples)
        texts = texts._replace(prompt=self.read_prompts(prompt))
        run = self._encode_conditions(conditions, conditioning, (height, width), samples) if conditions else None
        self._begin(options)
        text = self._encode_texts(texts, options)

        device = compat.execution_device(self)
        if latents is None:
            # Float32 whatever the model's dtype: the same seed gives the same start, and steps do not round.
            shape = self._latent_shape(samples.count, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        size = (latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size)
        frame = Frame(size, mask=None if run is None else run.region)

        places = None if frame.mask is None else frame.mask.flatten().nonzero().flatten().to(device)
        steps = _Run(frame, run, text, places, {"joint_attention_kwargs": joint_attention_kwargs})
        timesteps = set_schedule(self.scheduler, num_inference_steps, sigmas, frame.length, device)
        if start is not None:
            timesteps, sigma = late_start(self.scheduler, timesteps, start.strength)
            latents = start.under_noise(self.vae, latents, sigma)
        latents = self._denoise(latents, text, timesteps, options, partial(self._predict, steps))
        if run is not None:
            latents = self._complete(latents, frame, run)
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImgDiTPipelineOutput(images=images) if return_dict else (images,)

    def _encode_conditions(
        self,
        conditions: Condition | Sequence[Condition],
        options: ConditionOptions,
        size: tuple[int, int],
        samples: Samples,
    ) -> ConditionRun | None:
        """The conditions of a call for images of a height and a width in pixels."""
        return prepare_run(
            self,
            self.transformer,
            self._infos,
            conditions,
            options,
            progress=lambda: self._progress,
            target=Target.of(size, self.vae_scale_factor * self.patch_size, samples),
        )

    def _begin(self, options: SamplingOptions) -> None:
        """What callbacks and step caches may read, as a call begins."""
        if isinstance(compat.unwrapped(self.transformer), MMDiT):  # NextDiT's numbers are held to its reference's
            prefer_onednn(self.transformer)
        self._guidance_scale, self._true_cfg_scale = options.guidance_scale, options.true_cfg_scale
        self._interrupt = False

    def _encode_texts(self, texts: Texts, options: SamplingOptions) -> JoinedText:
        """The texts of a call, with those of guidance where there is any."""
        halves = self.encode_prompt(
            **texts._asdict(),
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_images_per_prompt=options.num_images_per_prompt,
            max_sequence_length=options.max_sequence_length,
            device=compat.execution_device(self),
        )
        return join_halves(*halves)

    def _denoise(
        self,
        latents: torch.Tensor,
        text: JoinedText,
        timesteps: torch.Tensor,
        options: SamplingOptions,
        predict: Predict,
        generated: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """The latents after all steps.

        Args:
            latents: (B, C, h, w) or (B, F, C, h, w) float32 at the first noise level.
            text: of the call.
            timesteps: in [0, 1000].
            options: of the call.
            predict: velocity of the generated latents; guided, of the batch twice, first under the negative texts.
            generated: the frames that are generated; `None`: all latents.
        """
        # What callbacks may see and change, by the names of `_callback_tensor_inputs`.
        state: dict[str, Any] = {
            "latents": latents,
            "prompt_embeds": text.embeds,
            "negative_prompt_embeds": text.negative_embeds,
        }
        draws = step_options(self.scheduler, options.generator)
        order = self.scheduler.order  # predictions per step
        low, high = options.guidance_interval
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, (t, level) in enumerate(zip(timesteps, timesteps.tolist(), strict=True)):
                if self.interrupt:
                    continue
                self._current_timestep = t
                self._progress = Progress(i // order, math.ceil(len(timesteps) / order))
                guided = self.do_classifier_free_guidance and low <= level / 1000 <= high
                velocity = predict(state, t, level, guided)
                if guided:
                    negative, positive = velocity.chunk(2)
                    velocity = negative + self._cfg_scale * (positive - negative)
                latents = state["latents"] if generated is None else take_rows(state["latents"], generated)
                (latents,) = self.scheduler.step(velocity, t, latents, **draws, return_dict=False)
                state["latents"] = latents if generated is None else put_rows(state["latents"], generated, latents)

                if options.callback_on_step_end is not None:
                    seen = {name: state[name] for name in options.callback_tensors}
                    state |= options.callback_on_step_end(self, i, t, seen) or {}
                progress_bar.update()
        self._current_timestep = None
        return state["latents"]

    def _predict(
        self, steps: _Run, state: dict[str, Any], t: torch.Tensor, level: float, guided: bool
    ) -> torch.Tensor:
        """Velocity (k * B, C, h, w) float32 of the latents (B, C, h, w) under k * B texts, in one batch."""
        config, dtype, run = self.transformer.config, self.transformer.dtype, steps.conditions
        latents, embeds = state["latents"], state["prompt_embeds"]
        if guided:
            embeds = torch.cat([state["negative_prompt_embeds"], embeds])
        copies = embeds.shape[0] // latents.shape[0]
        pooled, mask = steps.of_texts(embeds.shape[0])
        has_pooled = config.pooled_projection_dim is not None
        tokens = pack(latents.to(dtype), self.patch_size).repeat(copies, 1, 1)
        if steps.places is not None:
            tokens = tokens[:, steps.places]
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full((tokens.shape[0],), self.guidance_scale, device=tokens.device)
        step_cache = getattr(self.transformer, "is_cache_enabled", False)

        def velocity(empty: bool) -> torch.Tensor:
            cache, joined = None, tokens
            if run is None:
                layout = steps.layout(embeds.shape[1])
            else:
                pairing = Pairing(len(tokens), run.samples)
                _, layout, riders, cache = run.arrange(
                    (steps.image,), embeds.shape[1], pairing, pooled, step_cache=step_cache, empty=empty
                )
                joined = tokens if riders is None else torch.cat([tokens, riders.to(tokens)], dim=1)
            # Calls that differ in batch or content, which step caches must keep apart.
            name = ("guided" if copies > 1 else "plain") + (" empty" if empty else "")
            with self.transformer.cache_context(name):
                out, *_ = self.transformer(
                    hidden_states=joined,
                    encoder_hidden_states=embeds.to(dtype),
                    pooled_projections=pooled.to(dtype) if has_pooled else None,
                    timestep=(t / config.timestep_scale).expand(len(tokens)),
                    guidance=guidance,
                    encoder_attention_mask=mask,
                    layout=layout,
                    cache=cache,
                    return_dict=False,
                    **steps.options,
                )
            if cache is not None:
                cache.freeze()
            return out.float()

        out = velocity(empty=False)
        if run is not None and run.image_guidance_scale != 1.0:
            black = velocity(empty=True)
            out = black + run.image_guidance_scale * (out - black)
        if steps.places is not None:  # zeros where nothing is generated
            whole = out.new_zeros(out.shape[0], math.prod(steps.image.size), out.shape[2])
            whole[:, steps.places] = out
            out = whole
        return unpack(out, self.patch_size, steps.image.size)

    def _complete(self, latents: torch.Tensor, image: Frame, run: ConditionRun) -> torch.Tensor:
        """The latents with what complement conditions know in its place."""
        if image.mask is None:
            return latents
        known = run.known(Pairing(len(latents), run.samples))  # (B, N, C)
        known = unpack(known.to(latents), self.patch_size, image.size)
        generated = image.mask.repeat_interleave(self.patch_size, 0).repeat_interleave(self.patch_size, 1)
        return torch.where(generated.to(latents.device), latents, known)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Latents (B, C, h, w) to images."""
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)


compat.register_pipeline(ImgDiTPipeline)
