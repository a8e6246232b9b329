"""Text from masked diffusion language models: LLaDA, Dream and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import BlockRefinementScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput, logging

from imgdit import compat
from imgdit.models.image_rows import ImageVectors
from imgdit.models.masked_text_passes import APPROXIMATE, BlockPasses, CacheKind, answer_likelihood
from imgdit.pipelines.masked_text_inputs import (
    Prompts,
    TextOptions,
    check_ids,
    encode_prompts,
    find_holes,
    new_tokens,
)
from imgdit.schedulers.masked_text import Generators, MaskedTextScheduler, TextDraws, check_generators

logger = logging.get_logger(__name__)

_SCORED = TextOptions(
    1, 1, 0.0, None, None, "greedy", 2.0, None, 0, 1, 1.0, None, None, (), (), False, False, None, "seq"
)  # fmt: skip
"""Of the passes that score an answer."""


@dataclass
class MaskedTextPipelineOutput(BaseOutput):
    """What `MaskedTextPipeline` returns."""

    sequences: torch.Tensor
    """(B, G) new tokens; where a prompt has holes the whole rows (B, P + G), the prompt included."""
    texts: list[str] | None = None
    """The same as texts, each cut after the first end token among the new tokens; `None` without a tokenizer."""


class Choices(NamedTuple):
    """Which of some answers is most likely. C choices."""

    best: list[int]
    """Number of each row's most likely choice."""
    log_likelihoods: torch.Tensor
    """(B, C) float64, in nats, of all tokens of a choice and the end token behind it. They are revealed one by one,
    the most probable first, which is exact for choices of one token."""


class Block(NamedTuple):
    """Places of the grid that are revealed together."""

    start: int
    stop: int
    count_from: int
    """Masks from here to `stop` are counted, to decide how many a step reveals."""


@dataclass
class _MaskedTextRun:
    """What a call works on: B rows of N = P + G + S places."""

    grid: torch.Tensor
    """(B, N) tokens."""
    fillable: torch.Tensor
    """Boolean (B, N), the places that may be revealed."""
    prompt_length: int
    stop: int
    """Where the new tokens end and the suffix begins."""
    passes: BlockPasses
    options: TextOptions
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    finished: torch.Tensor
    """Boolean (B,), rows whose text has ended."""
    stopped: torch.Tensor
    """(B,) place of each row's first stop string; N where there is none."""
    ends_from: torch.Tensor
    """(B,) place from which an end token ends a row: behind all of its answer that is known beforehand."""
    callback: Callable[..., Any] | None
    callback_inputs: Sequence[str]
    calls: int = 0

    def find_finished(self) -> None:
        """Rows with an end token or a stop string among the new tokens and no mask before it. Masks behind a stop
        string are revealed no more, wherever it is."""
        new = self.grid[:, self.prompt_length : self.stop]
        whole = (new == self.mask_token_id).cumsum(1) == 0
        if self.options.eos_early_stop and self.eos_token_ids:
            self.finished = self.finished | (self.ends(new) & whole).any(1)
        for stop in self.options.stops:
            if len(stop) > new.shape[1]:
                continue
            starts = (new.unfold(1, len(stop), 1) == new.new_tensor(stop)).all(-1)  # (B, G - stop + 1)
            first = self.prompt_length + starts.long().argmax(1)
            self.stopped = torch.where(starts.any(1) & (first < self.stopped), first, self.stopped)
        if self.options.stops:
            places = torch.arange(self.grid.shape[1], device=self.grid.device)
            self.fillable &= places < self.stopped[:, None]
            left = ((self.grid == self.mask_token_id) & self.fillable).any(1)
            self.finished = self.finished | ((self.stopped < self.grid.shape[1]) & ~left)

    def ends(self, new: torch.Tensor) -> torch.Tensor:
        """Boolean (B, G), which of the new tokens (B, G) end their row."""
        places = torch.arange(self.prompt_length, self.stop, device=new.device)
        return is_any_of(new, self.eos_token_ids) & (places >= self.ends_from[:, None])


def is_any_of(tokens: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
    """Boolean, which of the tokens are among some."""
    return torch.isin(tokens, torch.tensor(some, dtype=tokens.dtype, device=tokens.device))


def _is_token(token: Any, vocabulary: int) -> bool:
    """Whether it is a whole number of a vocabulary."""
    return hasattr(token, "__index__") and not isinstance(token, bool) and 0 <= token < vocabulary


class MaskedTextPipeline(compat.DiffusionPipeline):
    """Texts by masked diffusion. Arguments, callback keys and outputs are those of diffusers' `LLaDA2Pipeline`.

    Unlike there, blocks begin where the prompt ends, the model always sees the whole masked text (as LLaDA samples),
    steps are counted by the masks that each row really has, and padding changes nothing.

    Args:
        model: a bidirectional language model of transformers, such as `load_masked_lm` returns.
        scheduler: rules of revealing; a `BlockRefinementScheduler` is taken with its settings.
        tokenizer: of the model; without it, give `input_ids`.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = [
        "block_x", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs", "active_block",
    ]  # fmt: skip

    model: Any
    scheduler: MaskedTextScheduler
    tokenizer: Any

    def __init__(self, model: Any, scheduler: BlockRefinementScheduler, tokenizer: Any | None = None):
        super().__init__()
        if not isinstance(scheduler, MaskedTextScheduler):
            scheduler = MaskedTextScheduler.from_config(scheduler.config)
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        self._num_timesteps = 0
        self._interrupt = False
        self._named_caches: set[str] = set()  # caches that a warning has named

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after that step."""
        return self._interrupt

    @property
    def mask_token_id(self) -> int | None:
        """The model's; tokenizers of published models do not name it."""
        found = getattr(self.model.config, "mask_token_id", None)
        return getattr(self.tokenizer, "mask_token_id", None) if found is None else found

    @property
    def eos_token_id(self) -> int | list[int] | None:
        found = getattr(self.tokenizer, "eos_token_id", None)
        return getattr(self.model.config, "eos_token_id", None) if found is None else found

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: list[Any] | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        use_chat_template: bool = True,
        add_generation_prompt: bool = True,
        gen_length: int | None = None,
        block_length: int | None = None,
        num_inference_steps: int = 32,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        max_post_steps: int = 16,
        minimal_topk: int = 1,
        eos_early_stop: bool = True,
        eos_token_id: int | list[int] | None = None,
        mask_token_id: int | None = None,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        *,
        infill_mask: torch.Tensor | None = None,
        suffix_ids: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        cache: CacheKind | None = None,
        remasking: str | None = None,
        forbidden_tokens: Sequence[int] = (),
        late_tokens: Sequence[int] = (),
        allow_mask_token: bool = False,
    ) -> MaskedTextPipelineOutput | tuple:
        """Write texts, or fill the holes of given ones.

        Args: see `docs/text.md` for a table; what `LLaDA2Pipeline` has means the same.
            prompt, messages, input_ids: one of them; B rows. Mask tokens among them are holes, which are filled.
            attention_mask: (B, P) of `input_ids`, 0 on padding, left, right or between.
            gen_length: new tokens G; `None`: 2048, or as many as the model has positions for, or 0 where a prompt has
                holes. The last block is shorter if blocks do not divide it.
            num_inference_steps: steps of each block.
            block_length, threshold, editing_threshold: `None`: the scheduler's.
            eos_early_stop: a row ends with an end token before which nothing is masked; masks behind it become that.
            generator: one, or a list of one per row: a row's text does not depend on the others then.
            infill_mask: (B, P), true on the holes, in place of the mask tokens. All else stays as it is.
            suffix_ids: (S,) or (B, S), tokens that stay behind the new ones, such as "The answer is"; masks too.
            guidance_scale: above 1, steer away from the prediction with a masked prompt; LLaDA's `cfg_scale` plus 1.
            cache: "prefix" or "dual" (Fast-dLLM): approximate but for each block's first pass. "prompt" (LaViDa): the
                prompt sees itself only and is computed once.
            remasking: "low_confidence", "random" (LLaDA) or a name of the scheduler's `choose`; `None`: its own.
            forbidden_tokens, late_tokens: LLaDA's `logits_eos_inf` and `confidence_eos_eot_inf`, for any tokens.
            allow_mask_token: let the model predict the mask token, as published samplers do; such masks are left over.

        Raises:
            ValueError: prompts or options that do not fit the model or each other.
        """
        options = TextOptions(
            self.scheduler.config.block_length if block_length is None else block_length, num_inference_steps,
            temperature, top_p, top_k, sampling_method, threshold, editing_threshold, max_post_steps, minimal_topk,
            guidance_scale, cache, remasking, tuple(forbidden_tokens), tuple(late_tokens),
            allow_mask_token, eos_early_stop, generator, output_type,
        )  # fmt: skip
        mask_id, eos_ids = self._special_tokens(mask_token_id, eos_token_id, options)
        if input_ids is not None and (prompt is not None or messages is not None):
            raise ValueError("give one of prompt, messages or input_ids, got input_ids and another")
        if input_ids is None:
            input_ids, attention_mask = encode_prompts(
                self.tokenizer, prompt, messages, use_chat_template, add_generation_prompt, (*eos_ids, 0)[0]
            )
        prompts = self._prompts(input_ids, attention_mask, infill_mask, mask_id)
        suffix = self._suffix(suffix_ids, prompts.ids)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        new = new_tokens(gen_length, prompts, None if positions is None else positions - suffix.shape[1])
        wanted = self._wanted(callback_on_step_end, callback_on_step_end_tensor_inputs)
        draft = torch.full((len(prompts.ids), new), mask_id)
        run = self._prepare(prompts, draft, suffix, options, mask_id, eos_ids, callback_on_step_end, wanted)
        self._write(run)
        output = self._output(run, prompts)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.sequences, output.texts)

    @torch.no_grad()
    def choose_answer(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, answers: Sequence[Sequence[int]]
    ) -> Choices:
        """Which of some answers is most likely behind each prompt, see `Choices`.

        Args:
            input_ids: (B, P) prompts.
            attention_mask: (B, P), 0 on padding of any side.
            answers: tokens of each, with the token that ends it.

        Raises:
            ValueError: fewer than two answers, or an empty one.
        """
        mask, _ = self._special_tokens(None, None, _SCORED)
        found = self._choices(self._prompts(input_ids, attention_mask, None, mask), answers)
        self.maybe_free_model_hooks()
        return found

    def _choices(self, prompts: Prompts, answers: Sequence[Sequence[int]], cache: CacheKind | None = None) -> Choices:
        if len(answers) < 2 or not all(answers):
            raise ValueError(f"give at least two answers, none of them empty, got {list(answers)!r}")
        found = [self._likelihood(prompts, torch.tensor(answer), replace(_SCORED, cache=cache)) for answer in answers]
        likelihoods = torch.stack(found, 1)
        return Choices(likelihoods.argmax(1).tolist(), likelihoods)

    def _likelihood(self, prompts: Prompts, answer: torch.Tensor, options: TextOptions) -> torch.Tensor:
        """Log-likelihood (B,) of an answer (A,), its tokens revealed one by one, the most probable first."""
        rows, (mask, _) = len(prompts.ids), self._special_tokens(None, None, options)
        draft = torch.full((rows, len(answer)), mask)
        run = self._prepare(prompts, draft, prompts.ids[:, :0], options, mask, (), None, ())
        first = run.prompt_length
        run.passes.begin(first, first + len(answer))
        places = torch.arange(first, first + len(answer), device=run.grid.device).expand(rows, -1)
        return answer_likelihood(run.passes, run.grid, places, answer, mask)

    def _prompts(self, input_ids: Any, attention_mask: Any, infill_mask: Any, mask_id: int) -> Prompts:
        ids, mask = check_ids(input_ids, attention_mask, self._vocabulary)
        device = compat.execution_device(self)
        return find_holes(ids.to(device), mask.to(device), infill_mask, mask_id)

    def _suffix(self, suffix_ids: Any, prompt: torch.Tensor) -> torch.Tensor:
        """(B, S) tokens behind the new ones of prompts (B, P); S may be 0."""
        if suffix_ids is None:
            return prompt[:, :0]
        suffix = check_ids(suffix_ids, None, self._vocabulary, "suffix_ids")[0].to(prompt.device)
        if len(suffix) not in (1, len(prompt)):
            raise ValueError(f"suffix_ids must be one row, or one per prompt, got {len(suffix)} for {len(prompt)}")
        return suffix.expand(len(prompt), -1)

    def _wanted(self, callback: Any, names: list[str] | None) -> list[str]:
        """Names of the tensors that a callback is given."""
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be callable, got {callback!r}")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        unknown = [name for name in names or () if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callbacks may ask for {self._callback_tensor_inputs}, got {unknown}")
        return names or ["block_x"]

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def _special_tokens(self, mask: int | None, eos: Any, options: TextOptions) -> tuple[int, tuple[int, ...]]:
        """The mask token and the end tokens, checked."""
        config = self.model.config
        if getattr(config, "model_type", "") in ("llama", "qwen2") and getattr(config, "is_causal", True) is not False:
            raise ValueError(
                f"this {config.model_type} model is causal: config.is_causal is not false, so that no place sees what "
                "follows it. Load a masked language model, by load_masked_lm"
            )
        mask = self.mask_token_id if mask is None else mask
        if mask is None:
            raise ValueError(
                "neither model.config nor the tokenizer names a mask_token_id; give mask_token_id=…, or use a masked "
                "language model"
            )
        eos = self.eos_token_id if eos is None else eos
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        named = {"mask_token_id": (mask,), "eos_token_id": eos_ids}
        named |= {"forbidden_tokens": options.forbidden_tokens, "late_tokens": options.late_tokens}
        for name, tokens in named.items():
            wrong = [token for token in tokens if not _is_token(token, self._vocabulary)]
            if wrong:
                raise ValueError(f"{name} must lie in 0..{self._vocabulary - 1}, the vocabulary, got {wrong}")
        if mask in eos_ids:
            raise ValueError(f"token {mask} is mask_token_id and eos_token_id: every masked text would be at its end")
        if len({mask, *options.forbidden_tokens}) == self._vocabulary:
            raise ValueError("forbidden_tokens are the whole vocabulary; leave out at least one token")
        return mask, eos_ids

    def _prepare(
        self, prompts: Prompts, draft: torch.Tensor, suffix: torch.Tensor, options: TextOptions, mask_id: int,
        eos_ids: tuple[int, ...], callback: Any, callback_inputs: Sequence[str],
    ) -> _MaskedTextRun:  # fmt: skip
        rows, length = prompts.ids.shape
        check_generators(options.generator, rows)
        device = prompts.ids.device
        if options.cache == "prompt" and prompts.holes.any():
            raise ValueError(
                "cache='prompt' computes the prompt once, so that its holes cannot be filled; use cache=None"
            )
        draft, suffix = draft.to(device), suffix.to(device)
        grid = torch.cat([prompts.ids, draft, suffix], 1)
        behind = torch.ones_like(suffix, dtype=torch.bool)
        fillable = torch.cat([prompts.holes, draft == mask_id, ~behind], 1)
        real = torch.cat([prompts.mask, torch.ones_like(draft, dtype=torch.bool), behind], 1)
        images, follow = prompts.images, draft.shape[1] + suffix.shape[1]
        if images is not None:  # none are in the answer
            vectors = torch.nn.functional.pad(images.vectors, (0, 0, 0, follow))
            images = ImageVectors(vectors, torch.nn.functional.pad(images.places, (0, follow)))
        asked = torch.nn.functional.pad(prompts.ids != mask_id, (0, follow))
        passes = BlockPasses(
            self.model, options.cache, None if real.all() else real.long(), options.guidance_scale, prompt=asked,
            mask_token_id=mask_id, images=images, prompt_length=length,
        )  # fmt: skip
        if options.cache is not None and options.cache not in self._named_caches:
            self._named_caches.add(options.cache)
            logger.warning(
                f"cache={options.cache!r} is approximate: {APPROXIMATE[options.cache]}, though they depend on the "
                "tokens revealed since; cache=None is exact"
            )
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        stopped = torch.full((rows,), grid.shape[1], device=device)
        known = (draft != mask_id) & ~is_any_of(draft, eos_ids)
        places = torch.arange(1, draft.shape[1] + 1, device=device)
        ends_from = length + torch.nn.functional.pad(known * places, (1, 0)).amax(1)
        return _MaskedTextRun(
            grid, fillable, length, length + draft.shape[1], passes, options, mask_id, eos_ids, finished, stopped,
            ends_from, callback, callback_inputs,
        )  # fmt: skip

    def _blocks(self, run: _MaskedTextRun) -> list[Block]:
        """Blocks in the order in which they are revealed: all holes of the prompts, then the new tokens."""
        first, total, size = run.prompt_length, run.stop, run.options.block_length
        holes = [Block(0, first, 0)] if run.fillable[:, :first].any() else []
        starts = range(first, total, size)
        return holes + [Block(start, min(start + size, total), start) for start in starts]

    def _write(self, run: _MaskedTextRun) -> None:
        blocks = self._blocks(run)
        self._num_timesteps = run.options.steps * len(blocks)
        self._interrupt = False
        with self.progress_bar(total=len(blocks)) as bar:
            for block in blocks:
                if run.finished.all() or self._interrupt:
                    break
                self._write_block(run, block)
                bar.update()

    def _write_block(self, run: _MaskedTextRun, block: Block) -> None:
        """Reveal a block's masks, then edit its tokens if the scheduler does. Ends after a known number of steps."""
        options, scheduler = run.options, self.scheduler
        start, stop, count_from = block
        fillable = run.fillable[:, start:stop]
        editing = options.editing_threshold or scheduler.config.editing_threshold or 0.0
        scheduler.set_timesteps(options.steps, run.grid.device, stop - start)
        counted = (run.grid == run.mask_token_id) & run.fillable & ~run.finished[:, None]
        limit = scheduler.start_block(counted[:, count_from:stop].sum(1))
        run.passes.begin(start, stop)
        outside = run.passes.first_is_outside
        limit += int(outside is not None)  # the first pass reveals one token only
        active, edits, step = counted[:, start:stop].any(1), torch.zeros_like(run.finished, dtype=torch.long), 0
        while active.any() and not self._interrupt:
            tokens = run.grid[:, start:stop]
            masked = ((tokens == run.mask_token_id) & fillable).any(1)
            if step >= limit:
                active = active & ~masked  # those that predict the mask token for ever
                if not active.any():
                    break
            open_ = (tokens == run.mask_token_id) & fillable & active[:, None]
            first = None
            if outside is not None and step == 0:
                first = open_ & outside[:, None] & (torch.arange(stop - start, device=open_.device) == 0)
            output = scheduler.step(
                run.passes(run.grid), step, tokens, mask_token_id=run.mask_token_id, temperature=options.temperature,
                top_p=options.top_p, top_k=options.top_k, sampling_method=options.sampling_method,
                threshold=options.threshold, editing_threshold=editing, prompt_mask=~fillable | ~active[:, None],
                fillable=open_, forbidden=options.forbidden_tokens, forbid_mask=not options.allow_mask_token,
                late=options.late_tokens, choose=options.choose, draws=self._draws(run, step, first),
                generator=options.generator,
            )  # fmt: skip
            run.grid[:, start:stop] = output.prev_sample
            step += 1
            edits = edits + (active & ~masked)
            self._call_back(run, block, step - 1, output, tokens)
            run.find_finished()
            left = ((run.grid[:, start:stop] == run.mask_token_id) & fillable).any(1)
            again = left | masked | (output.editing_transfer_index.any(1) & (edits <= options.max_post_steps))
            active = active & ~run.finished & (again if editing > 0 else left)

    def _draws(self, run: _MaskedTextRun, step: int, revealed: torch.Tensor | None) -> TextDraws:
        """What a step uses in place of its generator's draws.

        Args:
            revealed: places that are revealed whatever the rule. With a cache, a model that predicts a token at the
                place before it predicts a block's first one in the first pass only, which reveals just that.
        """
        return TextDraws(revealed=revealed)

    def _call_back(self, run: _MaskedTextRun, block: Block, step: int, output: Any, before: torch.Tensor) -> None:
        """Call back with what the step did, and take a changed `block_x` from it."""
        run.calls += 1
        if run.callback is None:
            return
        known = {
            "block_x": run.grid[:, : block.stop],
            "transfer_index": output.transfer_index,
            "editing_transfer_index": output.editing_transfer_index,
            "sampled_tokens": output.sampled_tokens,
            "sampled_probs": output.sampled_probs,
            "active_block": before == run.mask_token_id,
            "answer": run.grid[:, run.prompt_length :],
        }
        changed = run.callback(self, run.calls - 1, step, {name: known[name] for name in run.callback_inputs})
        if changed is not None and not isinstance(changed, dict):
            raise ValueError(
                f"callback_on_step_end must return tensors by name in a dictionary, or None, got {changed!r}"
            )
        if changed and "block_x" in changed:
            run.grid[:, : block.stop] = changed["block_x"]

    def _output(self, run: _MaskedTextRun, prompts: Prompts) -> MaskedTextPipelineOutput:
        new = run.grid[:, run.prompt_length : run.stop]
        if run.eos_token_ids:  # what is masked behind the end is never read
            places = torch.arange(run.prompt_length, run.stop, device=new.device)
            behind = (new == run.mask_token_id) & run.finished[:, None]
            new[behind | (places >= run.stopped[:, None])] = run.eos_token_ids[0]
        texts = None
        if run.options.output_type == "text" and self.tokenizer is not None:
            ends = [row.nonzero() for row in run.ends(new)]
            kept = [tokens[: int(end[0]) + 1] if len(end) else tokens for tokens, end in zip(new, ends)]
            if prompts.infills:
                filled = run.grid[:, : run.prompt_length]
                kept = [torch.cat([row[real], tokens]) for row, real, tokens in zip(filled, prompts.mask, kept)]
            texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        if not prompts.infills:
            return MaskedTextPipelineOutput(sequences=new, texts=texts)
        filled = prompts.on_their_side(run.grid[:, : run.prompt_length])
        return MaskedTextPipelineOutput(sequences=torch.cat([filled, new], 1), texts=texts)
