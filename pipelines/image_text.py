"""Texts about images, and images with their texts, from an `MMDiT` with a text head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imgdit import compat
from imgdit.frames import Frame, TextFrame
from imgdit.images import fit_pixels, to_image, to_pixels
from imgdit.images.fitting import check_sides, square
from imgdit.images.latents import encode_images
from imgdit.images.opening import name_of
from imgdit.layout import FrameLayout
from imgdit.models.functional import pack, unpack
from imgdit.models.mmdit import MMDiT
from imgdit.naming import check_choice, check_name, is_count
from imgdit.pipelines.checks import check_size
from imgdit.pipelines.image_text_inputs import (
    HOLE,
    Rows,
    WritingCall,
    WritingOptions,
    empty_rows,
    filling_rows,
    mask_token_of,
    question_rows,
    texts_of,
)
from imgdit.pipelines.image_text_reading import (
    AnswerPart,
    ImageTextReader,
    answer_likelihoods,
    reads_as_dual_diffusion,
)
from imgdit.pipelines.masked_text import Choices, MaskedTextPipeline
from imgdit.pipelines.masked_text_inputs import check_ids
from imgdit.pipelines.options import OUTPUT_TYPES
from imgdit.pipelines.text_frames import (
    TextFrames,
    TextFramesMixin,
    find_text_frames,
    load_text_frames,
    loaded_text_frames,
)
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.schedulers.masked_text import MaskedTextScheduler, TextDraws, check_generators
from imgdit.schedulers.schedule import set_schedule, step_options

QUESTION = "Q: {} A: "
"""How Dual Diffusion asks; its tokenizer drops the last blank."""
DRAWN_STEPS, JOINT_STEPS = 16, 28
"""Steps by default: of Dual Diffusion's answers, and of images with their texts."""
TINY = 1e-30
"""Least probability of a choice whose logarithm is taken."""
LAST_TIME = 1e-5
"""Last time of Dual Diffusion's sampler."""


@dataclass
class ImageTextPipelineOutput(BaseOutput):
    """What `ImageTextPipeline` wrote, one text for each row."""

    texts: list[str] | None
    """Captions, answers without their questions, or filled texts, each up to its end token; `None` for "seq"."""
    sequences: torch.Tensor
    """(B, L) whole rows of tokens."""
    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    """Of `joint`, of the output type asked for."""


class _Confirmed(NamedTuple):
    """What confirms the claim of a question."""

    choice: int
    """Number of the one of two choices that the confirming answer begins with."""
    told: AnswerPart
    """What follows it."""


class _Shown(NamedTuple):
    """The images of a call."""

    values: torch.Tensor
    """(n, 3, H, W) pixels in [-1, 1], or latents (n, C, h, w)."""
    encoded: bool
    """Whether they are latents."""
    rows: int
    """B; one image may be that of several."""


class _Writer(MaskedTextPipeline):
    """Reveals the masks of one call; recorded draws may stand in the place of the generator's."""

    draws_of: Callable[[int], TextDraws] | None = None

    def _draws(self, run: Any, step: int, revealed: torch.Tensor | None) -> TextDraws:
        return super()._draws(run, step, revealed) if self.draws_of is None else self.draws_of(step)


class ImageTextPipeline(TextFramesMixin, ImgDiTPipeline):
    """Captions, answers and fillings for images, images for prompts (`__call__`), and both at once.

    Loads its own folders, those of `ImgDiTPipeline` and the published ones of Dual Diffusion (`DualDiffSD3Pipeline`),
    whose rules then hold (arXiv 2501.00289): T5 reads masked texts, without a mask over padding; the text sees the
    image and is modulated by the image's timestep; prompts are padded to their full length; answers follow `Q: … A: `.
    Otherwise the text is a frame: its tokens have embeddings and positions of their own, its noise level is its
    fraction of masks, and the image, which sees only itself, is computed once.

    Args:
        scheduler: flow-matching schedule of images; diffusers' Euler is replaced by ours with its configuration.
        vae, text_encoder, tokenizer: see `ImgDiTPipeline`.
        transformer: an `MMDiT`; all but `__call__` need one with a text head.
        text_scheduler: how masks are revealed. `None`: for Dual Diffusion ancestral sampling, else the most probable
            tokens first.
        text_tokenizer: of the texts that are written; `None`: `tokenizer`.
        text_length: tokens of a row by default.
        question_template: what stands around a question, "{}"; `None`: `Q: {} A: ` for Dual Diffusion, else nothing.
    """

    _optional_components = ["text_scheduler", "text_tokenizer"]
    _text_callback_tensor_inputs = ["block_x", "transfer_index", "sampled_tokens", "sampled_probs"]
    text_scheduler: MaskedTextScheduler
    text_tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: MMDiT,
        text_scheduler: MaskedTextScheduler | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        text_length: int = 64,
        question_template: str | None = None,
    ):
        if type(scheduler) is FlowMatchEulerDiscreteScheduler:
            scheduler = MultiFrameFlowMatchScheduler.from_config(scheduler.config)
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        if text_scheduler is None and reads_as_dual_diffusion(transformer):
            text_scheduler = MaskedTextScheduler(reveal="time", choose="ancestral", eps=LAST_TIME, noise_removal=True)
        self.register_modules(text_scheduler=text_scheduler or MaskedTextScheduler(), text_tokenizer=text_tokenizer)
        self.register_to_config(text_length=text_length, question_template=question_template)

    @property
    def follows_reference(self) -> bool:
        """Whether Dual Diffusion's rules hold; see the class."""
        return reads_as_dual_diffusion(self.transformer)

    # Texts

    def caption(self, images: Any = None, **options: Unpack[WritingCall]) -> ImageTextPipelineOutput:
        """Say what images show.

        Args:
            images: one or several, of any kind that `imgdit.images` reads; or `latents` among the options.
            options: see `WritingOptions`.

        Raises:
            ValueError: a model without a text head, or images or options that do not fit; nothing has been computed.
        """
        call = self._options(options)
        shown = self._images(images, call)
        return self._write(empty_rows(shown.rows, self._length(call), self.mask_token_id), shown, call)

    def answer(
        self, images: Any = None, questions: Any = None, **options: Unpack[WritingCall]
    ) -> ImageTextPipelineOutput:
        """Answer questions about images.

        Args:
            images: see `caption`; one image may have several questions.
            questions: one for all images, or one for each.
            options: see `WritingOptions`.

        Raises:
            ValueError: as `caption`, and for questions that are empty, too long, of another number, or that text
                frames were not trained to answer.
        """
        call = self._options(options)
        if questions is None:
            raise ValueError("answer needs questions: a text, or one for each image")
        asked = self.check_questions(questions)
        shown = self._images(images, call, asked)
        asked = asked * (shown.rows // len(asked))
        length, mask = self._length(call), self.mask_token_id
        rows = question_rows(self._text_tokenizer, asked, self._template, length, mask)
        return self._write(rows, shown, call)

    @torch.no_grad()
    def choose(self, images: Any, questions: Any, choices: Sequence[str], **options: Unpack[WritingCall]) -> Choices:
        """Which of some answers is most likely about each image, see `Choices`.

        A question that makes a claim may have answers that say what is shown behind "yes" or "no" (`confirmations` of
        `QuestionForms`). Of two choices the one with which the confirming answer begins then has the likelihood of
        what follows it there, whichever of the two stands before it, and the other one the rest.

        Args:
            images, questions: see `answer`.
            choices: at least two answers.
            options: see `WritingOptions`; of those, how texts are drawn does not matter.

        Raises:
            ValueError: as `answer`, and for fewer choices, empty ones, and ones that leave no place for an end token.
        """
        call = self._options(options)
        asked = self.check_questions(questions)
        said = texts_of("choices", choices)
        self.check_known_words(self._text_tokenizer, said)
        answers = [[*self._text_tokenizer(one, add_special_tokens=False)["input_ids"], self._eos] for one in said]
        if len(answers) < 2:
            raise ValueError(f"give at least two choices, got {list(choices)!r}")
        shown = self._images(images, call, asked)
        asked = asked * (shown.rows // len(asked))
        length, mask = self._length(call), self.mask_token_id
        rows = question_rows(self._text_tokenizer, asked, self._template, length, mask)
        confirmed = [self._confirmed(question, answers) for question in asked]
        longest = max([*map(len, answers), *(one.told.stop for one in confirmed if one is not None)])
        if max(rows.starts) + longest > length:
            raise ValueError(
                f"a question of {max(rows.starts)} tokens and a choice of {longest} with its end token exceed "
                f"max_length={length}; raise it"
            )
        reader = self._reader(rows, self._encoded(shown), call)
        parts = [AnswerPart(0, tokens) for tokens in answers]
        likelihoods = torch.stack([answer_likelihoods(reader, rows, [part] * len(asked)) for part in parts], 1)
        told = answer_likelihoods(reader, rows, [None if one is None else one.told for one in confirmed])
        for row, one, known in zip(likelihoods, confirmed, told.tolist()):
            if one is not None:
                row[one.choice], row[1 - one.choice] = known, math.log(max(-math.expm1(known), TINY))
        self.maybe_free_model_hooks()
        return Choices(likelihoods.argmax(1).tolist(), likelihoods)

    def _confirmed(self, question: str, choices: Sequence[Sequence[int]]) -> _Confirmed | None:
        """What confirms a question's claim, where one of two choices (tokens with an end token) begins to say so."""
        answer = None if self.text_questions is None else self.text_questions.confirmation(question)
        if answer is None or len(choices) != 2:
            return None
        tokens = [*self._text_tokenizer(answer, add_special_tokens=False)["input_ids"], self._eos]
        begun = [n for n, (*said, _) in enumerate(choices) if len(said) < len(tokens) and tokens[: len(said)] == said]
        if len(begun) != 1:
            return None
        place = len(choices[begun[0]]) - 1
        return _Confirmed(begun[0], AnswerPart(place, tokens[place:]))

    def fill(self, text: Any, images: Any = None, **options: Unpack[WritingCall]) -> ImageTextPipelineOutput:
        """Fill the holes of texts about images.

        Args:
            text: "a [?] cube on a [?] floor", `[?3]` for three tokens; one for all images, or one for each.
            images: see `caption`; `None`: there is no image, for models that write without one.
            options: see `WritingOptions`.

        Raises:
            ValueError: as `caption`, and for texts that are empty or too long, have no hole, unknown placeholders, or
                words that text frames were not trained on.
        """
        call = self._options(options)
        texts = self.check_fillings(text)
        shown = self._images_or_none(images, call, texts)
        texts = texts * (1 if shown is None else shown.rows // len(texts))
        tokenizer = self._text_tokenizer
        rows = filling_rows(tokenizer, texts, self._length(call), self.mask_token_id, self._eos)
        return self._write(rows, shown, call, forbidden=(self._eos,))  # what follows a hole would be cut off

    def complete(
        self,
        input_ids: torch.Tensor,
        holes: torch.Tensor | None = None,
        images: Any = None,
        **options: Unpack[WritingCall],
    ) -> ImageTextPipelineOutput:
        """Fill masks of rows of tokens, for prompts that are assembled otherwise.

        Args:
            input_ids: (B, L) int64.
            holes: boolean (B, L), places to fill; `None`: the mask tokens.
            images: see `fill`.
            options: see `WritingOptions`; without `max_length`, which is L.

        Raises:
            ValueError: as `fill`, and for ids that the text head does not know.
        """
        call = self._options(options)
        if call.max_length is not None:
            raise ValueError(f"rows of input_ids have their length, leave max_length={call.max_length} out")
        input_ids, _ = check_ids(input_ids, None, len(self._text_tokenizer))
        mask = self.mask_token_id
        where = input_ids == mask if holes is None else holes.bool()
        if where.shape != input_ids.shape:
            raise ValueError(f"holes must be {tuple(input_ids.shape)} like input_ids, got {tuple(where.shape)}")
        shown = self._images_or_none(images, call, list(input_ids))
        if shown is not None and shown.rows != len(input_ids):
            raise ValueError(f"got {len(input_ids)} row of input_ids for {shown.rows} images; give one for each")
        return self._write(Rows(input_ids.masked_fill(where, mask), where, [0] * len(input_ids)), shown, call)

    @torch.no_grad()
    def joint(
        self, count: int = 1, image_output: str = "pil", **options: Unpack[WritingCall]
    ) -> ImageTextPipelineOutput:
        """Generate images and texts that belong together.

        Both become clean step by step in the same passes and see each other. A model that never saw both noisy writes
        the text without an image and then generates the image for it: Dual Diffusion, and text frames that were
        trained beside images that stay what they are (`text_adapter`). Those draw texts at temperature 1.

        Args:
            count: pairs.
            image_output: "pil", "np", "pt" or "latent".
            options: see `WritingOptions`; `num_inference_steps` are those of both, `resolution` is of the images.

        Raises:
            ValueError: as `caption`.
        """
        call = self._options(options)
        steps = call.num_inference_steps or JOINT_STEPS
        call = replace(call, num_inference_steps=steps)
        check_choice("image_output", image_output, OUTPUT_TYPES)
        if not is_count(count):
            raise ValueError(f"count must be a whole number of at least 1, got {count!r}")
        if call.latents is not None or call.guidance_scale > 1:
            raise ValueError("joint begins with noise alone: leave out latents and guidance_scale")
        check_generators(call.generator, count)
        rows = empty_rows(count, self._length(call), self.mask_token_id)
        side = self.default_size if call.resolution is None else call.resolution
        check_size(side, side, self.vae_scale_factor * self.patch_size, self.transformer.max_grid)
        if self.follows_reference or self.text_adapter is not None:
            return self._text_then_image(rows, side, call, steps, image_output)
        latents, ids = self._denoise_both(rows, side, call)
        images = latents if image_output == "latent" else self.decode_latents(latents, image_output)
        self.maybe_free_model_hooks()
        return ImageTextPipelineOutput(self._texts(ids, rows, call), ids, images)

    def _text_then_image(
        self, rows: Rows, side: int, options: WritingOptions, steps: int, image_output: str
    ) -> ImageTextPipelineOutput:
        """Texts written without an image, and the image of each."""
        if options.temperature is None and self.text_adapter is not None:
            options = replace(options, temperature=1.0)  # greedy, all rows would be the same
        written = self._write(rows, None, options)
        prompt: dict[str, Any]
        if self.follows_reference:
            embeds = self._embed(written.sequences)
            prompt = {"prompt_embeds": embeds, "max_sequence_length": embeds.shape[1]}
        else:
            prompt = {"prompt": self._texts(written.sequences, rows, replace(options, output_type="text"))}
        generator: Any = options.generator
        (images,) = self(
            **prompt, height=side, width=side, num_inference_steps=steps, generator=generator,
            output_type=image_output, return_dict=False,
        )  # fmt: skip
        return ImageTextPipelineOutput(written.texts, written.sequences, images)

    def _denoise_both(self, rows: Rows, side: int, options: WritingOptions) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, C, h, w) and tokens (B, L)."""
        device, config = compat.execution_device(self), self.transformer.config
        ids, holes = rows.ids.to(device), rows.holes.to(device)
        steps = options.num_inference_steps or JOINT_STEPS
        shape = self._latent_shape(len(ids), side, side)
        latents = randn_tensor(shape, generator=options.generator, device=device, dtype=torch.float32)
        grid = (shape[2] // self.patch_size, shape[3] // self.patch_size)
        caption = TextFrame(ids.shape[1], sigma=None, adapter=self.text_adapter)
        layout = FrameLayout.build([caption, Frame(grid)])
        pooled = self._empty_pooled(device)
        timesteps = set_schedule(self.scheduler, steps, None, grid[0] * grid[1], device)
        scheduler, sampling = self.text_scheduler, self._sampling(options)
        scheduler.set_timesteps(steps, device, ids.shape[1])
        limit = scheduler.start_block(holes.sum(1))
        self._interrupt, last = False, len(timesteps) - 1
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                masked = (ids == self.mask_token_id) & holes
                text = self._embed(ids).to(self.transformer.dtype)
                output = self.transformer(
                    pack(latents.to(text), self.patch_size),
                    text,
                    None if pooled is None else pooled.to(text).expand(len(ids), -1),
                    (t / config.timestep_scale).expand(len(ids)),
                    guidance=text.new_ones(len(ids)) if config.guidance_embeds else None,
                    layout=layout,
                    text_timestep=masked.sum(1) / holes.sum(1) * (1000.0 / config.timestep_scale),
                )
                velocity = unpack(output.sample.float(), self.patch_size, grid)
                draws = step_options(self.scheduler, options.generator)
                (latents,) = self.scheduler.step(velocity, t, latents, **draws, return_dict=False)
                for step in (i,) if i < last else range(i, max(limit, i + 1)):
                    found = scheduler.step(
                        output.text_logits, step, ids, mask_token_id=self.mask_token_id, fillable=masked,
                        forbid_mask=True, generator=options.generator, **sampling,
                    )  # fmt: skip
                    ids = found.prev_sample
                    masked = (ids == self.mask_token_id) & holes
                bar.update()
        return latents, ids

    @property
    def _draws_order(self) -> bool:
        """Whether the text scheduler draws which masks go."""
        return bool(self.text_scheduler.config.choose == "ancestral")

    def _sampling(self, options: WritingOptions) -> dict[str, Any]:
        """How the text scheduler draws tokens."""
        draws = self._draws_order
        default = 1.0 if draws else 0.0
        return {
            "temperature": default if options.temperature is None else options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "sampling_method": "categorical" if draws else "auto",
        }

    def _options(self, call: WritingCall) -> WritingOptions:
        """Of a call, after the model has been asked whether it writes at all."""
        known = WritingOptions.__dataclass_fields__
        for name in call:
            check_name("option", name, known)
        self.check_text_head()
        options = WritingOptions(**call)
        names = options.callback_on_step_end_tensor_inputs
        if isinstance(options.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            names = options.callback_on_step_end.tensor_inputs
        unknown = [name for name in names or () if name not in self._text_callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks may ask for {self._text_callback_tensor_inputs}, got {unknown}")
        words = len(self._text_tokenizer)
        if words > self.transformer.config.text_vocab_size:
            raise ValueError(
                f"the tokenizer of texts has {words} tokens, the text head predicts "
                f"{self.transformer.config.text_vocab_size}; take the one that the head was trained with"
            )
        return replace(options, callback_on_step_end_tensor_inputs=names)

    def load_text_frames(self, folder: str | Path) -> None:
        """Load what writes text beside a transformer without a text head; see `imgdit.pipelines.text_frames`. Without
        this call the folder `text_frames` beside the pipeline's parts is loaded when it is needed."""
        self._take(load_text_frames(self, folder))

    def _take(self, frames: TextFrames) -> None:
        self.text_adapter, tokenizer, self.text_questions = frames
        self.register_modules(text_tokenizer=tokenizer)
        self.register_to_config(text_length=tokenizer.model_max_length)

    def check_text_head(self) -> None:
        """Refuse a model that writes no text.

        Raises:
            ValueError: says which ones do.
        """
        loaded = loaded_text_frames(self)
        if loaded is not None and self.text_adapter is None:
            self._take(loaded)
        if self.transformer.config.text_vocab_size is not None:
            return
        folder = find_text_frames(self)
        if folder is None:
            raise ValueError(
                "this transformer has no text head (text_vocab_size is None) and writes no text. Dual Diffusion's "
                "folders have one, and MMDiT models that were trained on texts about images"
            )
        self.load_text_frames(folder)

    @property
    def _text_tokenizer(self) -> Any:
        return self.tokenizer if self.text_tokenizer is None else self.text_tokenizer

    @property
    def mask_token_id(self) -> int:
        """The mask of texts."""
        return mask_token_of(self._text_tokenizer)

    @property
    def _eos(self) -> int:
        found = self._text_tokenizer.eos_token_id
        if found is None:
            raise ValueError("the tokenizer of texts has no eos_token, with which texts end")
        return int(found)

    @property
    def _template(self) -> str:
        template = self.config.question_template
        return template or (QUESTION if self.follows_reference else "{}")

    def check_questions(self, questions: Any) -> list[str]:
        """A question or several, that the model may be asked.

        Raises:
            ValueError: see `answer`.
        """
        asked = texts_of("questions", questions)
        if self.text_questions is not None:
            for one in asked:
                self.text_questions.check(one)
        self.check_known_words(self._text_tokenizer, asked)
        return asked

    def check_fillings(self, text: Any) -> list[str]:
        """A text with holes or several, of words that the model knows.

        Raises:
            ValueError: see `fill`.
        """
        texts = texts_of("text", text)
        self.check_known_words(self._text_tokenizer, [HOLE.sub(" ", one) for one in texts])
        return texts

    def _length(self, options: WritingOptions) -> int:
        return int(self.config.text_length) if options.max_length is None else options.max_length

    def _images(self, images: Any, options: WritingOptions, texts: Sequence[Any] = ("",)) -> _Shown:
        """The images of a call, not encoded yet, as many as there are texts if these are several."""
        channels = self.vae.config.latent_channels
        if (images is None) == (options.latents is None):
            raise ValueError("give images, or latents= of them" + ("" if images is None else ", not both"))
        if options.latents is not None:
            values = options.latents
            if values.ndim != 4 or values.shape[1] != channels or not len(values):
                raise ValueError(f"latents must be (batch, {channels}, h, w), got {tuple(values.shape)}")
        else:
            listed = list(images) if isinstance(images, (list, tuple)) else [images]
            if not listed:
                raise ValueError("images is an empty list; give at least one image")
            values = torch.cat([self.preprocess_image(image, options.resolution) for image in listed])
        count = max(len(values), len(texts))
        if count % len(values) or count % len(texts) or 1 < min(len(values), len(texts)) < count:
            raise ValueError(f"got {len(texts)} texts for {len(values)} images; give one text, or one for each image")
        return _Shown(values, options.latents is not None, count)

    def _images_or_none(self, images: Any, options: WritingOptions, texts: Sequence[Any]) -> _Shown | None:
        if images is not None or options.latents is not None:
            return self._images(images, options, texts)
        if self.follows_reference and not self.transformer.config.null_image_tokens:
            raise ValueError("this model needs an image (null_image_tokens=0); give images")
        return None

    def _encoded(self, shown: _Shown) -> torch.Tensor:
        """Latents (B, C, h, w), each image encoded on its own."""
        values = shown.values.to(compat.execution_device(self))
        if not shown.encoded:
            values = torch.cat([encode_images(self.vae, one) for one in values.split(1)])
        return values.repeat_interleave(shown.rows // len(values), dim=0)

    def preprocess_image(self, image: Any, resolution: int | None = None) -> torch.Tensor:
        """An image of any kind as pixels (n, 3, H, W) in [-1, 1]: a square of the side that the model reads.

        Args:
            image: what `imgdit.images.to_pixels` takes.
            resolution: side in pixels; `None`: that of training.

        Raises:
            ValueError: a side that the model has no positions for, or an image that is too small or too narrow.
        """
        side = self.default_size if resolution is None else resolution
        cell = self.vae_scale_factor * self.patch_size
        if side % cell or side // cell > self.transformer.max_grid:
            raise ValueError(
                f"resolution must be a multiple of {cell} pixels and at most {cell * self.transformer.max_grid:g}, "
                f"got {side}"
            )
        pixels = to_pixels(image)
        check_sides((pixels.shape[3], pixels.shape[2]), name_of(image))
        if self.follows_reference:
            found = torch.cat([to_pixels(square(to_image(one), side)) for one in pixels])
        else:
            found = fit_pixels(image, (side, side))
        return found * 2 - 1

    @torch.no_grad()
    def _write(
        self, rows: Rows, shown: _Shown | None, options: WritingOptions, forbidden: tuple[int, ...] = ()
    ) -> ImageTextPipelineOutput:
        device = compat.execution_device(self)
        check_generators(options.generator, len(rows.ids))
        reader = self._reader(rows, None if shown is None else self._encoded(shown), options)
        writer = _Writer(reader, self.text_scheduler)
        writer.draws_of = self._draws_of
        writer.set_progress_bar_config(disable=True)
        self._interrupt = False
        steps = options.num_inference_steps
        if steps is None:
            steps = DRAWN_STEPS if self._draws_order else rows.ids.shape[1]
        self._num_timesteps = steps
        with self.progress_bar(total=steps) as bar:
            sequences, _ = writer(
                input_ids=rows.ids.to(device), infill_mask=rows.holes.to(device), gen_length=0,
                block_length=rows.ids.shape[1], num_inference_steps=steps,
                **self._sampling(options), mask_token_id=self.mask_token_id, eos_early_stop=False,
                generator=options.generator, output_type="seq", return_dict=False, forbidden_tokens=forbidden,
                callback_on_step_end=self._after_step(writer, options, bar),
                callback_on_step_end_tensor_inputs=self._text_callback_tensor_inputs,
            )  # fmt: skip
            if not self._interrupt:  # the others had nothing left to reveal
                bar.update(bar.total - bar.n)
        self.maybe_free_model_hooks()
        return ImageTextPipelineOutput(self._texts(sequences, rows, options), sequences)

    def _reader(self, rows: Rows, latents: torch.Tensor | None, options: WritingOptions) -> ImageTextReader:
        """What predicts the texts of rows."""
        device = compat.execution_device(self)
        return ImageTextReader(
            self.transformer, self._embed, latents, self._empty_pooled(device), rows.holes.to(device),
            self.mask_token_id, options.guidance_scale, self.text_adapter, device, options.cache,
        )  # fmt: skip

    _draws_of: Callable[[int], TextDraws] | None = None
    """Of a step: what is taken in place of the generator's draws."""

    def _after_step(self, writer: _Writer, options: WritingOptions, bar: Any) -> Callable[..., Any]:
        """What follows a step: progress, and the callback of the call."""
        callback, names = options.callback_on_step_end, options.callback_on_step_end_tensor_inputs or ["block_x"]

        def after(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            if callback is None:
                return {}
            changed = callback(self, step, timestep, {name: tensors[name] for name in names}) or {}
            writer._interrupt = self._interrupt
            return changed

        return after

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) of a text that is written as the transformer reads them, (B, L, J)."""
        if getattr(self.transformer.config, "text_embeds", False):
            return self.transformer.text_embedder(ids)
        return self.text_encoder(ids)[0]

    def _empty_pooled(self, device: torch.device) -> torch.Tensor | None:
        """(1, P) pooled text of the empty prompt, with which texts are written."""
        if self.follows_reference:
            return None
        return self.encode_prompt("", do_classifier_free_guidance=False, device=device)[2]

    def _texts(self, ids: torch.Tensor, rows: Rows, options: WritingOptions) -> list[str] | None:
        """What stands in rows (B, L) from where their text starts to its end token."""
        if options.output_type != "text":
            return None
        eos, texts = self._text_tokenizer.eos_token_id, []
        for tokens, start in zip(ids.tolist(), rows.starts):
            kept = tokens[start:]
            kept = kept[: kept.index(eos)] if eos in kept else kept
            texts.append(str(self._text_tokenizer.decode(kept, skip_special_tokens=True)).strip())
        return texts

    # Images from prompts

    def _encode_text(
        self, prompt: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.follows_reference:
            return super()._encode_text(prompt, max_sequence_length, device)
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=max_sequence_length, return_tensors="pt"
        ).input_ids.to(device)
        for text in prompt:
            self._warn_of_cut_text(text, max_sequence_length)
        embeds = self.text_encoder(tokens)[0].to(self.transformer.dtype)
        return embeds, torch.ones_like(tokens, dtype=torch.bool)


compat.register_pipeline(ImageTextPipeline)
