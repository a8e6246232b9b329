"""Texts about images from masked diffusion language models that see: LLaDA-V and LaViDa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import BlockRefinementScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from imgdit import compat
from imgdit.models.image_rows import JoinedRows, join_rows
from imgdit.models.image_tokens import ImageProjector, tower_features
from imgdit.models.masked_text_passes import CacheKind
from imgdit.naming import is_count
from imgdit.pipelines.dialogues import FILL, GAP, SpecialTokens
from imgdit.pipelines.masked_text import Choices, MaskedTextPipeline, MaskedTextPipelineOutput
from imgdit.pipelines.masked_text_inputs import Prompts, TextOptions, new_tokens
from imgdit.pipelines.vision_language_inputs import Answers, Row, SeenImage, listed, read_rows
from imgdit.schedulers.masked_text import Generators

CAPTION = "Describe the image in detail."
"""What a caption is the answer to."""


GEN_LENGTH = 64
"""New tokens where nobody says how many."""


class VisionLanguagePipeline(MaskedTextPipeline):
    """Answers about images by masked diffusion: images' vectors stand in the prompt, the answer is revealed in blocks.

    Args:
        model: a bidirectional language model of transformers, such as `load_masked_lm` returns.
        vision_tower: transformers' `SiglipVisionModel`, of the layers that are used.
        projector: from its features to the language model's.
        scheduler: rules of revealing.
        tokenizer: of the language model, with its chat template.

    Raises:
        ValueError: parts that do not fit together.
    """

    model_cpu_offload_seq = "vision_tower->projector->model"
    _optional_components: list[str] = []
    _callback_tensor_inputs = [*MaskedTextPipeline._callback_tensor_inputs, "answer"]
    steps_per_token = 1.0
    """Default steps of a block, per token."""

    vision_tower: Any
    projector: ImageProjector

    def __init__(
        self,
        model: Any,
        vision_tower: Any,
        projector: ImageProjector,
        scheduler: BlockRefinementScheduler,
        tokenizer: Any,
    ):
        super().__init__(model, scheduler, tokenizer)
        self.register_modules(vision_tower=vision_tower, projector=projector)
        self.special = SpecialTokens.of(tokenizer)
        if (highest := max(*self.special, len(tokenizer) - 1)) >= self._vocabulary:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has tokens up to {highest}, the language model "
                f"{model.name_or_path!r} has embeddings of {self._vocabulary}; they are of different models"
            )
        if self.mask_token_id != self.special.mask:
            raise ValueError(
                f"the mask token is {self.special.mask} in the tokenizer {tokenizer.name_or_path!r} and "
                f"{self.mask_token_id} in the model's configuration; they are of different models"
            )
        sizes = {"vision_tower": (vision_tower.config.hidden_size, projector.config.vision_size)}
        sizes["model"] = (model.config.hidden_size, projector.config.hidden_size)
        for name, (has, reads) in sizes.items():
            if has != reads:
                raise ValueError(f"{name} is of {has} features, the projector is made for {reads}")

    @property
    def mask_token_id(self) -> int:
        found = getattr(self.model.config, "mask_token_id", None)
        return self.special.mask if found is None else found

    @property
    def eos_token_id(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.special.eos, self.special.turn]

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        """Tokens that are not revealed by default."""
        return ()

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        prompt: str | list[str] | None = None,
        messages: list[Any] | None = None,
        input_ids: list[list[int]] | None = None,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        temperature: float = 0.0,
        sampling_method: str = "gumbel",
        threshold: float | None = None,
        guidance_scale: float = 1.0,
        cache: CacheKind | None = None,
        remasking: str | None = None,
        forbidden_tokens: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        suffix: str | None = None,
        draft: str | list[str] | torch.Tensor | None = None,
        gap_length: int = 16,
        eos_early_stop: bool = True,
        allow_mask_token: bool = False,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> MaskedTextPipelineOutput | tuple:
        """Answer questions about images.

        Args: see `docs/vision-language.md`.
            images: of each row, an image (path, PIL image, array, tensor), a `Video`, a list of these, or `None` for a
                row of text. One image is for all rows.
            prompt: a question for each row, or one for all; "<image>" says where an image stands, by default in front.
            messages: one dialogue, or one for each row, in place of `prompt`.
            input_ids: rows of tokens, -200 where an image stands, in place of both.
            gen_length: new tokens G of a row; `None`: as many as a draft has, else 64.
            block_length: tokens that are revealed together; `None`: all.
            num_inference_steps: steps of each block; `None`: `steps_per_token` of its tokens.
            temperature, sampling_method, threshold, remasking, eos_early_stop, allow_mask_token, generator: as in
                `MaskedTextPipeline`.
            guidance_scale: above 1, steer away from the prediction with all vectors of the prompt replaced by that
                of the mask; LLaDA-V's `cfg_scale` plus 1.
            cache: "prompt" (LaViDa): the prompt sees itself only and is computed once; "prefix", "dual" (Fast-dLLM).
            forbidden_tokens: never revealed; `None`: the property of this name.
            stop_strings: a row ends before one of them; masks behind it are revealed no more.
            suffix: a text that stands fixed behind the answer, such as " The answer is".
            draft: the answer as far as it is known: mask tokens in it are revealed, and the token of a gap
                ("<|reserved_token_1|>") stands for any text of at most `gap_length` tokens. Tensor (B, D), D <= G.
            gap_length: tokens.
            callback_on_step_end: after each step, with `answer` (B, …), the answer so far, for streaming.

        Raises:
            ValueError: images, prompts or options that do not fit the model or each other.
        """
        rows = self._rows(images, prompt, messages, input_ids)
        answers = self._answers(len(rows), gen_length, draft, gap_length, suffix)
        block = answers.draft.shape[1] if block_length is None else block_length
        steps = max(1, int(block * self.steps_per_token)) if num_inference_steps is None else num_inference_steps
        forbidden = self.forbidden_tokens if forbidden_tokens is None else tuple(forbidden_tokens)
        stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        options = TextOptions(
            block, steps, temperature, None, None, sampling_method, threshold, None, 0, 1, guidance_scale, cache,
            remasking, forbidden, (), allow_mask_token, eos_early_stop, generator, output_type,
            tuple(tuple(self._ids(stop)) for stop in stops),
        )  # fmt: skip
        mask_id, eos_ids = self._special_tokens(None, None, options)
        wanted = self._wanted(callback_on_step_end, callback_on_step_end_tensor_inputs)
        prompts = self._see(rows, sum(part.shape[1] for part in answers))
        run = self._prepare(prompts, *answers, options, mask_id, eos_ids, callback_on_step_end, wanted)
        self._write(run)
        output = self._output(run, prompts)
        output.sequences = torch.cat([output.sequences, run.grid[:, run.stop :]], 1)
        if output.texts is not None:
            output.texts = [_cut(text, stops) + (suffix or "") for text in output.texts]
        self.maybe_free_model_hooks()
        return output if return_dict else (output.sequences, output.texts)

    def caption(self, images: Any, prompt: str = CAPTION, **options: Any) -> MaskedTextPipelineOutput:
        """Describe images; `options` are those of a call."""
        return self(listed(images), prompt, **options)  # type: ignore[return-value]

    def answer(self, images: Any, questions: str | list[str], **options: Any) -> MaskedTextPipelineOutput:
        """Answer a question about images, or one about each; `options` are those of a call."""
        return self(listed(images), questions, **options)  # type: ignore[return-value]

    @torch.no_grad()
    def choose(
        self, images: Any, questions: str | Sequence[str], choices: Sequence[str], *, cache: CacheKind | None = None
    ) -> Choices:
        """Which of some answers is most likely about each image, see `Choices`.

        Args:
            images, questions: as in `answer`.
            choices: at least two answers.
            cache: "prompt", or `None`.

        Raises:
            ValueError: fewer choices, an empty one, or images and questions that do not fit.
        """
        tokens = [[*self._ids(choice), self.special.turn] for choice in choices]
        if len(choices) < 2 or any(len(one) < 2 for one in tokens):
            raise ValueError(f"give at least two choices, none of them empty, got {list(choices)!r}")
        rows = self._rows(listed(images), questions, None, None)
        longest = max(map(len, tokens))
        prompts = self._see(rows, longest)
        found = self._choices(prompts, tokens, cache)
        self.maybe_free_model_hooks()
        return found

    def _rows(self, images: Any, prompt: Any, messages: Any, input_ids: Any) -> list[Row]:
        return read_rows(self, images, prompt, messages, input_ids, self.special, self._vocabulary)

    def _answers(self, rows: int, gen_length: int | None, draft: Any, gap_length: int, suffix: str | None) -> Answers:
        """What follows each row's prompt."""
        drafts = self._drafts(rows, draft, gap_length)
        longest = max(map(len, drafts))
        if gen_length is None:
            if min(map(len, drafts)) != longest:
                raise ValueError(
                    f"drafts have {min(map(len, drafts))} to {longest} tokens, gaps spread out; give gen_length"
                )
            gen_length = longest or GEN_LENGTH
        if not is_count(gen_length, max(1, longest)):
            raise ValueError(
                f"gen_length must be a whole number of at least {max(1, longest)} (tokens of the draft), got "
                f"{gen_length!r}"
            )
        behind = self._ids(suffix) if suffix else []
        mask = self.mask_token_id
        filled = [[*row, *[mask] * (gen_length - len(row))] for row in drafts]
        return Answers(torch.tensor(filled), torch.tensor([behind] * rows, dtype=torch.long))

    def _drafts(self, rows: int, draft: Any, gap_length: int) -> list[list[int]]:
        """Known and masked tokens of each row's answer, gaps spread out."""
        if draft is None:
            return [[]] * rows
        if isinstance(draft, torch.Tensor):
            found = (draft if draft.ndim == 2 else draft[None]).tolist()
        else:
            found = [self._ids(one) for one in ([draft] if isinstance(draft, str) else draft)]
        if len(found) not in (1, rows):
            raise ValueError(f"got {len(found)} drafts for {rows} rows; give one, or as many")
        wrong = [token for row in found for token in row if not 0 <= token < self._vocabulary]
        if wrong:
            raise ValueError(f"a draft has token {wrong[0]}; expected tokens in 0..{self._vocabulary - 1}")
        if not is_count(gap_length):
            raise ValueError(f"gap_length must be a whole number of at least 1, got {gap_length!r}")
        gap, spread = self.special.gap, [self.mask_token_id] * gap_length
        if not isinstance(draft, torch.Tensor):
            found = [[one for token in row for one in ([*spread, gap] if token == gap else [token])] for row in found]
        return found * rows if len(found) == 1 else found

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found:
            raise ValueError(f"{text!r} has no token; leave it out")
        return found

    def _see(self, rows: Sequence[Row], follow: int) -> Prompts:
        """Prompts with the vectors of their images; so many tokens follow. Lengths are checked before an image is
        computed."""
        lengths = [[image.length for image in row.images] for row in rows]
        joined = join_rows([row.ids for row in rows], lengths, self.special.eos, left=True)
        joined = JoinedRows(*(part.to(compat.execution_device(self)) for part in joined))
        order = torch.arange(joined.ids.shape[1], device=joined.ids.device).expand(joined.ids.shape)
        prompts = Prompts(joined.ids, joined.real, torch.zeros_like(joined.real), False, order)
        new_tokens(follow, prompts, getattr(self.model.config, "max_position_embeddings", None))
        seen = [id(image) for row in rows for image in row.images]  # one image may be of all rows
        if not seen:
            return prompts
        each = {id(image): image for row in rows for image in row.images}
        vectors = dict(zip(each, self.encode_images(list(each.values()))))
        return prompts._replace(images=joined.vectors([vectors[one] for one in seen]))

    def encode_images(self, images: Sequence[SeenImage]) -> list[torch.Tensor]:
        """Vectors (N, d) of each image."""
        tiles = [image.tiles(self.projector.tiling) for image in images]
        together = torch.cat(tiles).to(compat.execution_device(self))
        features = tower_features(self.vision_tower, together).split([len(one) for one in tiles])
        return self.projector(features, [image.shown for image in images])


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text without marks of gaps, before the first stop string."""
    text = text.replace(GAP, "").replace(FILL, "")
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop in text)])]


class LLaDAVPipeline(VisionLanguagePipeline):
    """LLaDA-V (arXiv 2505.16933). End tokens of texts and marks of headers are not revealed by default."""

    @property
    def forbidden_tokens(self) -> tuple[int, ...]:
        special = self.special
        return (special.eos, special.bos, special.start, special.end)


class LaViDaPipeline(VisionLanguagePipeline):
    """LaViDa (arXiv 2505.16839), with half as many steps as tokens by default."""

    steps_per_token = 0.5
