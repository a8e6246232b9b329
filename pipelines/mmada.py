"""Images and texts by one masked diffusion over text tokens and image codes: MMaDA (arXiv 2505.15809)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging

from imgdit import compat
from imgdit.hub import INDEX
from imgdit.images.convert import image_size, to_image, to_pixels, to_rgb
from imgdit.images.fitting import check_sides, scale_and_crop
from imgdit.images.masks import mask_values
from imgdit.images.opening import name_of
from imgdit.io.safe_json import read_object
from imgdit.models.magvitv2 import MagViTv2, load_magvitv2
from imgdit.models.masked_lm import load_masked_lm, model_folder
from imgdit.models.masked_text_passes import BlockPasses, FreeRows
from imgdit.naming import check_choice, is_count
from imgdit.pipelines.checks import Texts, check_generators, check_size, check_texts
from imgdit.pipelines.masked_text import Choices, MaskedTextPipeline, MaskedTextPipelineOutput
from imgdit.pipelines.masked_text_inputs import encode_prompts, padded_rows
from imgdit.pipelines.mmada_rows import MMaDARows, MMaDATokens, question_rows, text_to_image_rows
from imgdit.pipelines.options import SamplingOptions
from imgdit.pipelines.text_loading import load_tokenizer
from imgdit.schedulers.masked_text import MaskedTextScheduler, TextDraws

logger = logging.get_logger(__name__)

Fit = Literal["crop", "squash"]
DESCRIBE = "Please describe this image in detail."
"""What captions answer."""
IMAGE_TOKENIZER, IMAGE_CODES = "showlab/magvitv2", 1024
"""Of the published checkpoints: the image tokenizer, and the codes of an image in training."""
IMAGE_RULES: dict[str, Any] = {
    "reveal": "maskgit", "choose": "log_probability", "order_noise": 1.0, "order_noise_decay": "cumulative",
}  # fmt: skip
"""Settings of the scheduler by which published checkpoints generate images."""
TEXT_RULES: dict[str, Any] = {"block_length": 128, "num_inference_steps": 64, "threshold": 2.0}
"""Those by which they write: LLaDA's, two tokens in a step."""


@dataclass
class MMaDAPipelineOutput(BaseOutput):
    """What `MMaDAPipeline` returns."""

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    """Of the output type that was asked for; "latent": the codes."""
    codes: torch.Tensor
    """(B, h, w) int64."""
    texts: list[str] | None = None
    """What was written before the images; `None` without reasoning."""


@dataclass
class _ImageRun:
    """What a call works on: B rows of L places, N of them codes."""

    grid: torch.Tensor
    """(B, L) tokens."""
    places: slice
    """Of the codes."""
    sample: torch.Tensor
    """(B, N) codes, the table's size where nothing is known."""
    passes: BlockPasses
    temperature: float
    sampling_method: str
    order_noise: float | None
    options: SamplingOptions


class MMaDAPipeline(compat.DiffusionPipeline):
    """Images from text, text about images, text, and text that leads to an image, from one masked language model.

    Args:
        model: bidirectional language model of text tokens and image codes, as `load_masked_lm` returns.
        image_tokenizer: images to codes and back.
        tokenizer: of the text; the special tokens are looked up in it, and the codes follow its own ids.
        scheduler: rules by which codes are revealed.
        text_scheduler: rules by which text is revealed.
        image_codes: codes of the images that the model was trained on, a square number.

    Raises:
        ValueError: tokenizers and model that do not belong together.
    """

    model_cpu_offload_seq = "model->image_tokenizer"
    _callback_tensor_inputs = ["codes", "transfer_index", "sampled_tokens", "sampled_probs"]

    model: Any
    image_tokenizer: MagViTv2
    tokenizer: Any
    scheduler: MaskedTextScheduler
    text_scheduler: MaskedTextScheduler

    def __init__(
        self,
        model: Any,
        image_tokenizer: MagViTv2,
        tokenizer: Any,
        scheduler: MaskedTextScheduler,
        text_scheduler: MaskedTextScheduler,
        image_codes: int = IMAGE_CODES,
    ):
        super().__init__()
        self.register_modules(
            model=model, image_tokenizer=image_tokenizer, tokenizer=tokenizer, scheduler=scheduler,
            text_scheduler=text_scheduler,
        )  # fmt: skip
        if math.isqrt(image_codes) ** 2 != image_codes:
            raise ValueError(f"image_codes must be a square number, got {image_codes}")
        self.register_to_config(image_codes=image_codes)
        self.image_processor = VaeImageProcessor(vae_scale_factor=image_tokenizer.factor)
        tokens = self.tokens
        if tokens.mask != model.config.mask_token_id:
            raise ValueError(
                f"the tokenizer's mask token is {tokens.mask}, the model's {model.config.mask_token_id}; take the "
                "tokenizer that the model was trained with"
            )
        self._progress_options: dict[str, Any] = {}
        self._num_timesteps = 0
        self._interrupt = False

    @cached_property
    def tokens(self) -> MMaDATokens:
        """Special tokens and codes."""
        return MMaDATokens.of(self.tokenizer, self.image_tokenizer.codebook_size, self.model.config.vocab_size)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after that step."""
        return self._interrupt

    @property
    def default_size(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return math.isqrt(self.config.image_codes) * self.image_tokenizer.factor

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As in diffusers, for texts too."""
        self._progress_options = kwargs
        super().set_progress_bar_config(**kwargs)

    # Images

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 15,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 512,
        *,
        image: Any = None,
        mask_image: Any = None,
        codes: torch.Tensor | None = None,
        temperature: float = 1.0,
        sampling_method: str = "auto",
        order_noise: float | None = None,
        reasoning_length: int = 0,
        reasoning_options: Mapping[str, Any] | None = None,
    ) -> MMaDAPipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: what to show; one prompt or several.
            negative_prompt: what guidance steers away from; empty by default, as published.
            height, width: in pixels; the size of training by default.
            num_inference_steps: steps in which the codes are revealed.
            guidance_scale: g of u + g (c - u) on the logits; up to 1 is off. MMaDA's own number is g - 1.
            num_images_per_prompt: images for each prompt.
            generator: one, or a list of one per image: an image does not depend on the others then.
            output_type: "pil", "np", "pt", or "latent" for the codes.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`; may return changed "codes"
                (B, N), where -1 is not revealed.
            callback_on_step_end_tensor_inputs: which tensors it gets; `["codes"]` by default.
            max_sequence_length: text tokens that are read; a longer prompt is cut with a warning.
            image, mask_image: inpainting: what is black in the mask stays as the image tokenizer reads it. An image
                of another size is scaled and its middle is taken, the mask with it. One image, or one per prompt.
            codes: (B, h, w) in place of these, -1 where they are to be generated; one, one per prompt, or one per
                image that is generated.
            temperature: of the codes; 0 takes the most probable ones.
            sampling_method: see `MaskedTextScheduler.step`.
            order_noise: scale of the noise on the order in which codes are revealed; `None`: the scheduler's. MMaDA
                calls it temperature.
            reasoning_length: tokens of text that the model writes before each image; 0: none.
            reasoning_options: of `MaskedTextPipeline` for that text.

        Raises:
            ValueError: prompts, images or options that do not fit the model or each other.
        """
        options = SamplingOptions(
            num_inference_steps, None, guidance_scale, num_images_per_prompt=num_images_per_prompt,
            generator=generator, max_sequence_length=max_sequence_length, output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs or ["codes"],
        )  # fmt: skip
        size = (height or self.default_size, width or self.default_size)
        prompts, negatives = self._check(prompt, negative_prompt, size, temperature, options)
        known = self._known_codes(image, mask_image, codes, size, len(prompts), num_images_per_prompt)
        texts = None
        if reasoning_length:
            rows, free, texts = self._reason(
                prompts, negatives, known, {"gen_length": reasoning_length, "generator": generator}
                | dict(reasoning_options or {}),
            )  # fmt: skip
        else:
            rows, free = self._rows(prompts, negatives, known, max_sequence_length + 1)
        device = compat.execution_device(self)
        passes = BlockPasses(
            self.model, None, rows.attention_mask.to(device), guidance_scale, rows.prompt.to(device),
            self.tokens.mask, FreeRows(free.ids.to(device), free.attention_mask.to(device)),
        )  # fmt: skip
        sample = torch.where(known < 0, self.tokens.codebook_size, known).to(device)
        run = _ImageRun(
            rows.ids.to(device), rows.image, sample, passes, temperature, sampling_method, order_noise, options
        )
        codes = self._draw(run).unflatten(1, tuple(side // self.image_tokenizer.factor for side in size))
        images = codes if output_type == "latent" else self.decode_codes(codes, output_type)
        self.maybe_free_model_hooks()
        return MMaDAPipelineOutput(images=images, codes=codes, texts=texts) if return_dict else (images, codes, texts)

    def _check(
        self, prompt: Any, negative_prompt: Any, size: tuple[int, int], temperature: float, options: SamplingOptions
    ) -> tuple[list[str], list[str]]:
        """Prompts and negative prompts of each image, after everything else was checked."""
        prompts = check_texts(Texts(prompt, negative_prompt)) * options.num_images_per_prompt
        check_size(*size, self.image_tokenizer.factor, math.inf)
        check_generators(options.generator, prompts)
        steps = options.num_inference_steps
        if not is_count(steps):
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        unknown = [name for name in options.callback_tensors if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks may ask for {self._callback_tensor_inputs}, got {unknown}")
        positive = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = [negative_prompt or ""] if isinstance(negative_prompt or "", str) else list(negative_prompt)
        negative = negative * len(positive) if len(negative) == 1 else negative
        copies = options.num_images_per_prompt
        return [text for text in positive for _ in range(copies)], [text for text in negative for _ in range(copies)]

    def _rows(
        self, prompts: Sequence[str], negatives: Sequence[str], known: torch.Tensor, most: int
    ) -> tuple[MMaDARows, MMaDARows]:
        """Rows of the prompts and of what guidance steers away from.

        Args:
            known: (B, N) codes, -1 where they are to be generated.
            most: tokens of the part before the image.
        """
        texts = [[self._ids(text) for text in some] for some in (prompts, negatives)]
        longest = max(len(text) for some in texts for text in some) + 3  # the task, the beginning and the end
        if longest > most:
            logger.warning(f"a prompt has {longest} tokens, {most} are read; raise max_sequence_length")
        image_ids = self.tokens.image_ids(known)
        rows, free = (text_to_image_rows(self.tokens, some, image_ids, min(longest, most)) for some in texts)
        self._check_length(rows.ids.shape[1])
        return rows, free

    def _reason(
        self, prompts: Sequence[str], negatives: Sequence[str], known: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[MMaDARows, MMaDARows, list[str] | None]:
        """Rows with text that the model wrote before the image, those of guidance, and the text."""
        tokens = self.tokens
        image_ids = tokens.image_ids(known)
        behind = text_to_image_rows(tokens, [[]] * len(known), image_ids, 3).ids[:, 3:]
        chats = [[tokens.reasoning, *chat] for chat in self._chats(prompts)]
        front, mask = padded_rows(chats, tokens.padding)
        self._check_length(front.shape[1] + options["gen_length"] + behind.shape[1])
        written = self._write(input_ids=front, attention_mask=mask, suffix_ids=behind, **options)
        text = written.sequences.cpu()
        length = front.shape[1] + text.shape[1]
        free = text_to_image_rows(tokens, [self._ids(text) for text in negatives], image_ids, max(length, 3))
        seen = torch.cat([mask.long(), torch.ones_like(text), torch.ones_like(behind)], 1)
        return free._replace(ids=torch.cat([front, text, behind], 1), attention_mask=seen), free, written.texts

    def _draw(self, run: _ImageRun) -> torch.Tensor:
        """Codes (B, N) after all steps."""
        options, scheduler, unknown = run.options, self.scheduler, self.tokens.codebook_size
        scheduler.set_timesteps(options.num_inference_steps, run.grid.device, run.sample.shape[1])
        self._num_timesteps = scheduler.start_block((run.sample == unknown).sum(1))
        self._interrupt = False
        run.passes.begin(run.places.start, run.places.stop)
        drawn = run.sample
        with self.progress_bar(total=self._num_timesteps) as bar:
            for step in range(self._num_timesteps):
                if not (run.sample == unknown).any() or self._interrupt:
                    break
                output = scheduler.step(
                    run.passes(run.grid)[..., self.tokens.codes], step, run.sample, mask_token_id=unknown,
                    temperature=run.temperature, sampling_method=run.sampling_method, threshold=2.0,
                    order_noise=run.order_noise, draws=self._draws(step), generator=options.generator,
                )  # fmt: skip
                drawn = torch.where(run.sample == unknown, output.sampled_tokens, run.sample)
                self._go_on(run, output.prev_sample)
                self._call_back(run, step, output)
                bar.update()
        return torch.where(run.sample == unknown, drawn, run.sample)

    def _draws(self, step: int) -> TextDraws:
        """What a step uses in place of its generator's draws."""
        return TextDraws()

    def _go_on(self, run: _ImageRun, sample: torch.Tensor) -> None:
        """From the next codes (B, N) on."""
        run.sample = sample
        known = torch.where(sample == self.tokens.codebook_size, -1, sample)
        run.grid[:, run.places] = self.tokens.image_ids(known)

    def _call_back(self, run: _ImageRun, step: int, output: Any) -> None:
        """Call back with what the step did, and take changed codes from it."""
        if run.options.callback_on_step_end is None:
            return
        unknown = self.tokens.codebook_size
        known = {
            "codes": torch.where(run.sample == unknown, -1, run.sample),
            "transfer_index": output.transfer_index,
            "sampled_tokens": output.sampled_tokens,
            "sampled_probs": output.sampled_probs,
        }
        asked = {name: known[name] for name in run.options.callback_tensors}
        changed = run.options.callback_on_step_end(self, step, step, asked) or {}
        if "codes" in changed:
            self._go_on(run, torch.where(changed["codes"] < 0, unknown, changed["codes"]))

    # Texts

    @torch.no_grad()
    def answer(
        self,
        images: Any,
        questions: str | Sequence[str],
        *,
        fit: Fit = "crop",
        gen_length: int = 512,
        generator: Any = None,
        **options: Any,
    ) -> MaskedTextPipelineOutput:
        """Answer questions about images.

        Args:
            images: one or several: PIL images, arrays or tensors as `imgdit.images.to_pixels` takes them.
            questions: one for all images, one for each, or several about one image.
            fit: "crop": scale the shorter side and take the middle; "squash": scale both sides, as for charts.
            gen_length: tokens of an answer, at most.
            generator, options: of `MaskedTextPipeline`.

        Raises:
            ValueError: images or questions that cannot be read, or options that do not fit.
        """
        ids, mask = self._ask(images, questions, fit)
        return self._write(input_ids=ids, attention_mask=mask, gen_length=gen_length, generator=generator, **options)

    def choose(
        self, images: Any, questions: str | Sequence[str], choices: Sequence[str], *, fit: Fit = "crop"
    ) -> Choices:
        """Which of some answers is most likely about each image, see `Choices`; other arguments as in `answer`.

        Args:
            choices: at least two answers.

        Raises:
            ValueError: fewer choices, an empty one, or images and questions that do not fit.
        """
        answers = [self._ids(choice) for choice in choices]
        if len(answers) < 2 or not all(answers):
            raise ValueError(f"give at least two choices, none of them empty, got {list(choices)!r}")
        ids, mask = self._ask(images, questions, fit)
        found = self._text_pipeline().choose_answer(ids, mask, [[*answer, self.tokens.eos] for answer in answers])
        self.maybe_free_model_hooks()
        return found

    def caption(self, images: Any, prompt: str = DESCRIBE, **options: Any) -> MaskedTextPipelineOutput:
        """Describe images; arguments as in `answer`."""
        return self.answer(images, prompt, **options)

    def write(
        self, prompt: str | list[str] | None = None, messages: list[Any] | None = None, *, gen_length: int = 512,
        **options: Any,
    ) -> MaskedTextPipelineOutput:  # fmt: skip
        """Answer texts or chats, without an image; arguments as in `MaskedTextPipeline`."""
        return self._write(prompt=prompt, messages=messages, gen_length=gen_length, **options)

    def _ask(self, images: Any, questions: str | Sequence[str], fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask (B, L) of questions about images, see `answer`."""
        check_texts(Texts(questions))
        codes = self.encode_images(images, fit=fit).flatten(1).cpu()
        asked = [questions] * len(codes) if isinstance(questions, str) else list(questions)
        codes = codes.expand(len(asked), -1) if len(codes) == 1 else codes
        if len(asked) != len(codes):
            raise ValueError(f"got {len(asked)} questions for {len(codes)} images; give one, or one for each")
        return question_rows(self.tokens, self._chats(asked), self.tokens.image_ids(codes))

    def _text_pipeline(self) -> MaskedTextPipeline:
        pipe = MaskedTextPipeline(self.model, self.text_scheduler, self.tokenizer)
        pipe.set_progress_bar_config(**self._progress_options)
        return pipe

    def _write(self, **options: Any) -> MaskedTextPipelineOutput:
        """Text by `MaskedTextPipeline`, in which no code occurs unless the options say so."""
        pipe = self._text_pipeline()
        codes = range(self.tokens.first_code, self.model.config.vocab_size)
        defaults = {
            "num_inference_steps": self.text_scheduler.config.num_inference_steps, "forbidden_tokens": tuple(codes),
        }  # fmt: skip
        found: Any = pipe(**defaults | options)
        self.maybe_free_model_hooks()
        return found

    # Parts

    @torch.no_grad()
    def encode_images(
        self, images: Any, height: int | None = None, width: int | None = None, fit: Fit = "crop"
    ) -> torch.Tensor:
        """Codes (B, h, w) of one image or several.

        Args:
            images: PIL images, arrays or tensors as `imgdit.images.to_pixels` takes them.
            height, width: in pixels, which they are brought to; by default the size of training.
            fit: see `answer`.

        Raises:
            ValueError: an image that cannot be read, or of sides that `check_sides` refuses.
        """
        check_choice("fit", fit, get_args(Fit))
        size = (height or self.default_size, width or self.default_size)
        several = images if isinstance(images, (list, tuple)) else [images]
        pixels = [pixels_of(one, size, fit) for image in several for one in rgb_images(image)]
        if not pixels:
            raise ValueError("images is an empty list; give at least one image")
        stacked = torch.stack(pixels).to(compat.execution_device(self), self.image_tokenizer.dtype)
        return self.image_tokenizer.encode(stacked).codes

    def decode_codes(self, codes: torch.Tensor, output_type: str = "pil") -> Any:
        """Images of codes (B, h, w): "pil", "np" or "pt"."""
        return self.image_processor.postprocess(self.image_tokenizer.decode(codes).float(), output_type=output_type)

    def _known_codes(
        self, image: Any, mask_image: Any, codes: torch.Tensor | None, size: tuple[int, int], rows: int,
        copies: int,
    ) -> torch.Tensor:  # fmt: skip
        """(B, N) codes of all images, -1 where they are to be generated.

        Args:
            rows: B.
            copies: images of each prompt.
        """
        factor = self.image_tokenizer.factor
        grid = tuple(side // factor for side in size)
        if (image is None) != (mask_image is None):
            raise ValueError("inpainting takes image and mask_image, got one of them")
        if image is not None:
            if codes is not None:
                raise ValueError("give either image and mask_image, or codes")
            codes = self.encode_images(image, *size).cpu()
            codes = codes.masked_fill(masked_cells(mask_image, image, size, factor), -1)
        if codes is None:
            return torch.full((rows, grid[0] * grid[1]), -1)
        if codes.ndim != 3 or tuple(codes.shape[1:]) != grid or len(codes) not in (1, rows, rows // copies):
            raise ValueError(
                f"codes must be (batch, {grid[0]}, {grid[1]}) for {rows} images of {size[0]}x{size[1]} pixels, one "
                f"for all, for each prompt or for each image; got {tuple(codes.shape)}"
            )
        return codes.flatten(1).cpu().repeat_interleave(rows // len(codes), 0)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _chats(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of questions in the tokenizer's chat template, up to where an answer begins."""
        ids, mask = encode_prompts(self.tokenizer, list(texts), None, True, True, self.tokens.padding)
        return [row[real].tolist() for row, real in zip(ids, mask)]

    def _check_length(self, length: int) -> None:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise ValueError(
                f"text and image have {length} tokens, the model has {positions} positions; make the image smaller or "
                "the text shorter"
            )


def rgb_images(image: Any, name: str | None = None) -> list[PIL.Image.Image]:
    """8-bit images of anything that `to_pixels` takes, of sound sides.

    Args:
        name: what messages call it; by default its file.

    Raises:
        ValueError: it cannot be read, or `check_sides` refuses it.
    """
    if isinstance(image, PIL.Image.Image):
        check_sides(image.size, name or name_of(image))
        return [to_rgb(image, name=name)]
    found = [to_image(one) for one in to_pixels(image)]
    for one in found:
        check_sides(one.size, name or "an image")
    return found


def pixels_of(image: PIL.Image.Image, size: tuple[int, int], fit: Fit = "crop") -> torch.Tensor:
    """An RGB image as (3, H, W) in [-1, 1] of a height and a width.

    Args:
        fit: "crop": scale the shorter side and take the middle; "squash": scale both sides.
    """
    shape = (size[1], size[0])
    fitted = scale_and_crop(image, shape) if fit == "crop" else image.resize(shape, PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def masked_cells(mask: Any, image: Any, size: tuple[int, int], factor: int) -> torch.Tensor:
    """Boolean (h, w): codes any of whose pixels is white in a mask.

    Args:
        image: what the mask belongs to and is fitted with.
        size: height and width in pixels to which they are brought.
        factor: pixels of a code's side.
    """
    values = mask_values(mask)
    first = image[0] if isinstance(image, (list, tuple)) else image
    shape = image_size(first)
    if tuple(values.shape) not in (shape, size):
        raise ValueError(f"mask_image must have the image's {shape[0]}x{shape[1]} pixels, got {tuple(values.shape)}")
    if tuple(values.shape) != size:
        drawn = PIL.Image.fromarray(values.cpu().numpy().astype(np.uint8))
        values = torch.from_numpy(np.array(scale_and_crop(drawn, size[::-1], PIL.Image.Resampling.NEAREST))) > 0
    return values.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).any(3).any(1)


def load_mmada(
    source: str | Path,
    image_tokenizer: str | Path = IMAGE_TOKENIZER,
    *,
    sizes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: Any = None,
) -> MMaDAPipeline:
    """A pipeline of published folders, without remote code, or of what its `save_pretrained` wrote.

    Args:
        source: folder or Hub repository of a language model with its tokenizer, such as "Gen-Verse/MMaDA-8B-MixCoT".
        image_tokenizer: folder or Hub repository of MAGVIT-v2.
        sizes: of the image tokenizer, see `load_magvitv2`.
        dtype: of the weights; `None`: as stored.
        revision, token: of the Hub, for `source`.

    Raises:
        ValueError: no such folder, a model of another kind, no tokenizer, or parts that do not belong together.
    """
    if (Path(source).expanduser() / INDEX).is_file():
        return MMaDAPipeline.from_pretrained(Path(source).expanduser(), dtype=dtype or torch.float32)
    parts = load_tokenizers(source, image_tokenizer, sizes=sizes, dtype=dtype, revision=revision, token=token)
    folder = model_folder(source, None, revision, token)
    return parts.pipeline(load_masked_lm(folder, dtype="auto" if dtype is None else dtype))


class Tokenizers(NamedTuple):
    """What turns texts and images into tokens."""

    tokenizer: Any
    image_tokenizer: MagViTv2
    tokens: MMaDATokens
    image_codes: int
    """Codes of an image in training."""
    image_folder: Path
    """Of the image tokenizer."""

    @property
    def side(self) -> int:
        """Pixels of an image's side in training."""
        return math.isqrt(self.image_codes) * self.image_tokenizer.factor

    def pipeline(self, model: Any) -> MMaDAPipeline:
        """The pipeline of a language model, with the published rules of revealing."""
        return MMaDAPipeline(
            model, self.image_tokenizer, self.tokenizer, MaskedTextScheduler(**IMAGE_RULES),
            MaskedTextScheduler(**TEXT_RULES), image_codes=self.image_codes,
        )  # fmt: skip


def load_tokenizers(
    source: str | Path,
    image_tokenizer: str | Path | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: Any = None,
) -> Tokenizers:
    """Both tokenizers of a model, without its weights; arguments and refusals as in `load_mmada`."""
    saved = Path(source).expanduser()
    if (saved / INDEX).is_file():
        folder = saved / "model"
        values = read_object(folder / "config.json")
        codes = read_object(saved / INDEX).get("image_codes", IMAGE_CODES)
        words, place = load_tokenizer(saved / "tokenizer"), saved / "image_tokenizer"
    else:
        folder = model_folder(source, None, revision, token)
        values = read_object(folder / "config.json")
        if values.get("model_type") != "mmada":
            raise ValueError(
                f"{folder / 'config.json'} is of a model of type {values.get('model_type')!r}, expected 'mmada'"
            )
        codes = values.get("num_vq_tokens", IMAGE_CODES)
        words, place = load_tokenizer(folder), model_folder(image_tokenizer or IMAGE_TOKENIZER, None, None, token)
    images = load_magvitv2(place, sizes=sizes, dtype=dtype)
    if values.get("codebook_size", images.codebook_size) != images.codebook_size:
        raise ValueError(
            f"{folder / 'config.json'} has {values['codebook_size']} codes, the image tokenizer {place} "
            f"{images.codebook_size}; take the one that the model was trained with"
        )
    vocabulary = values.get("embedding_size") or values["vocab_size"]
    return Tokenizers(words, images, MMaDATokens.of(words, images.codebook_size, vocabulary), codes, place)
