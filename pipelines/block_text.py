"""Text in blocks from BD3-LM, and in one block from MDLM and SEDD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch

from imgdit import compat
from imgdit.models.bd3lm import BD3LM, BlockCache
from imgdit.naming import check_choice, is_count
from imgdit.pipelines.masked_text import MaskedTextPipelineOutput
from imgdit.pipelines.masked_text_inputs import MOST_STEPS
from imgdit.schedulers.masked_text import Generators, check_generators, draw_uniform
from imgdit.schedulers.text_noise import loglinear_sigma

Sampler = Literal["first_hitting", "ancestral"]
ENTROPY_TOKENS = 256
"""Latest tokens whose entropy tells a text that repeats itself (BD3-LM, arXiv 2503.09573, section 6.2)."""
LAST_TIME = 1e-5
"""At which SEDD's sampler reveals what is still masked."""
TINY = 1e-10
"""Keeps logarithms of the Gumbel noise finite, as published."""


class TextEnd(NamedTuple):
    """Where a text ends."""

    stops: bool
    """Whether to write no more."""
    length: int
    """Tokens that are kept."""
    entropy: float
    """Nats per token of the histogram of the latest tokens."""


def text_end(
    tokens: torch.Tensor,
    eos_token_ids: Sequence[int] = (),
    *,
    ends: int | None = None,
    min_entropy: float | None = 4.0,
    cut: bool = True,
) -> TextEnd:
    """Whether a text (L,) is at its end: by its end tokens, or because it repeats itself.

    Args:
        ends: number of end tokens that end it, the last one is kept; BD3-LM's texts begin with one and end with the
            second. `None`: they do not end it.
        min_entropy: nats of the latest `ENTROPY_TOKENS` tokens below which it repeats itself; shorter texts are not
            asked. `None`: none.
        cut: leave out these tokens then.
    """
    latest = tokens[-ENTROPY_TOKENS:]
    fraction = latest.unique(return_counts=True)[1].double() / max(len(latest), 1)
    entropy = float(-(fraction * fraction.log()).sum())
    stops, length = False, len(tokens)
    places = torch.isin(tokens, torch.tensor(list(eos_token_ids), dtype=tokens.dtype, device=tokens.device)).nonzero()
    if ends is not None and len(places) >= ends:
        stops, length = True, int(places[ends - 1]) + 1
    if min_entropy is not None and len(tokens) >= ENTROPY_TOKENS and entropy < min_entropy:
        stops, length = True, min(length, len(tokens) - ENTROPY_TOKENS if cut else length)
    return TextEnd(stops, length, entropy)


@dataclass
class _BlockTextRun:
    """What a call works on: B rows of N places, whole blocks."""

    grid: torch.Tensor
    """(B, N) tokens."""
    prompts: list[int]
    """Prompt tokens of each row."""
    finished: torch.Tensor
    """Boolean (B,)."""
    cache: BlockCache | None
    sampler: Sampler
    steps: int
    temperature: float
    top_p: float | None
    generator: Generators
    callback: Callable[..., Any] | None
    callback_inputs: Sequence[str]
    calls: int = 0


class BlockTextPipeline(compat.DiffusionPipeline):
    """Texts by block diffusion: a block is revealed while it sees the blocks before it, then the next one begins.

    Keys and values of finished blocks are cached, which is exact: they see no later block. Texts may be longer than
    those of training; a block then sees the latest `model_length` tokens.

    Args:
        model: a BD3-LM, or an MDLM or SEDD whose one block is the whole text.
        tokenizer: of the model; without it, give `input_ids`.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["block_x", "transfer_index", "sampled_tokens"]

    model: BD3LM
    tokenizer: Any

    def __init__(self, model: BD3LM, tokenizer: Any | None = None):
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after that step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        input_ids: torch.Tensor | list[torch.Tensor] | None = None,
        gen_length: int | None = None,
        num_inference_steps: int = 32,
        sampler: Sampler = "first_hitting",
        temperature: float = 1.0,
        top_p: float | None = None,
        cache: bool = True,
        eos_early_stop: bool = True,
        min_entropy: float | None = None,
        eos_token_id: int | list[int] | None = None,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> MaskedTextPipelineOutput | tuple:
        """Continue texts.

        Args:
            prompt: texts, "" for none; the tokenizer's first token is put before them.
            input_ids: (B, P), or rows of different lengths, in place of `prompt`, beginning with that token.
            gen_length: new tokens G; `None`: as many as the model's texts have places for.
            num_inference_steps: steps of each block, of "ancestral"; of SEDD, of the text.
            sampler: "first_hitting" reveals one token per pass and needs no steps; "ancestral" each one by chance,
                with the probability that time leaves. SEDD has a sampler of its own.
            temperature: divides log-probabilities; 0 takes the most probable token.
            top_p: only tokens whose probabilities sum up to at most this, and the most probable one.
            cache: keep keys and values of finished blocks. Results are the same without.
            eos_early_stop: a row ends with the first end token among the new ones.
            min_entropy: stop rows whose latest 256 tokens have less entropy, in nats (published: 4).
            generator: one, or one per row.
            callback_on_step_end: called as `callback(pipe, step, time, tensors)` after each step.

        Returns:
            `sequences` (B, G), new tokens, filled with the end token behind a row's end. Rows of a run that was
            interrupted keep their masks.

        Raises:
            ValueError: prompts or options that do not fit the model or each other.
        """
        check_choice("sampler", sampler, get_args(Sampler))
        check_choice("output_type", output_type, ("text", "seq"))
        if self.model.config.parameterization == "autoregressive":
            raise ValueError("this model is autoregressive and writes from left to right: use write_autoregressively")
        if not is_count(num_inference_steps) or num_inference_steps > MOST_STEPS:
            expected = f"a whole number from 1 to {MOST_STEPS}"
            raise ValueError(f"num_inference_steps must be {expected}, got {num_inference_steps!r}")
        if not 0 <= temperature < math.inf or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"expected a finite temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
        wanted = callback_on_step_end_tensor_inputs or ["block_x"]
        if set(wanted) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks may ask for {self._callback_tensor_inputs}, got {wanted}")
        rows = self._rows(prompt, input_ids)
        check_generators(generator, len(rows))
        grid, new = self._grid(rows, gen_length)
        room = self.model.config.model_length - self.model.config.block_size
        kept = BlockCache(room) if cache and self.model.config.cross_attn else None
        run = _BlockTextRun(
            grid, [len(row) for row in rows], torch.zeros(len(rows), dtype=torch.bool, device=grid.device), kept,
            sampler, num_inference_steps, temperature, top_p, generator, callback_on_step_end, wanted,
        )  # fmt: skip
        eos_ids = self._eos_ids(eos_token_id)
        self._write(run, new, eos_ids if eos_early_stop else (), min_entropy)
        self.maybe_free_model_hooks()
        return self._output(run, new, eos_ids, eos_early_stop, min_entropy, output_type, return_dict)

    def _eos_ids(self, eos_token_id: int | list[int] | None) -> tuple[int, ...]:
        found = getattr(self.tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        return () if found is None else (found,) if isinstance(found, int) else tuple(found)

    def _rows(self, prompt: Any, input_ids: Any) -> list[torch.Tensor]:
        """Prompt tokens of each row, at least one."""
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        if input_ids is not None:
            rows = list(input_ids)
        elif self.tokenizer is None or self.tokenizer.bos_token_id is None:
            raise ValueError("prompts need a tokenizer with a token that begins texts (bos_token); give input_ids")
        else:
            texts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
            bos = self.tokenizer.bos_token_id
            tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            rows = [torch.tensor([bos, *row]) for row in tokens]
        if not all(isinstance(row, torch.Tensor) for row in rows):
            raise ValueError(f"input_ids must be rows of tokens as tensors, got {input_ids!r}")
        if not rows or any(row.ndim != 1 or not len(row) or row.dtype != torch.long for row in rows):
            raise ValueError("input_ids must be rows of at least one int64 token each")
        highest = max(int(row.max()) for row in rows)
        if highest >= self.model.config.vocab_size or min(int(row.min()) for row in rows) < 0:
            raise ValueError(f"input_ids must lie in 0..{self.model.config.vocab_size - 1}, got {highest}")
        if any((row == self.model.mask_token_id).any() for row in rows):
            raise ValueError("a prompt has mask tokens; this pipeline continues texts and fills no holes")
        return rows

    def _grid(self, rows: list[torch.Tensor], gen_length: int | None) -> tuple[torch.Tensor, int]:
        """Rows of whole blocks, masked behind the prompts, and G."""
        config = self.model.config
        longest = max(map(len, rows))
        new = config.model_length - longest if gen_length is None else gen_length
        if not is_count(new):
            expected = "a whole number of at least 1"
            raise ValueError(f"gen_length must be {expected}, got {new!r} for {longest} prompt tokens")
        if not config.cross_attn and longest + new > config.model_length:
            raise ValueError(
                f"this model sees {config.model_length} tokens at once and continues no further; got {longest} prompt "
                f"tokens and gen_length={new}"
            )
        size = config.block_size
        # A row's blocks are always whole, so that they do not depend on the rows beside it.
        grid = torch.full((len(rows), -(-(longest + new) // size) * size), self.model.mask_token_id)
        for row, tokens in zip(grid, rows):
            row[: len(tokens)] = tokens
        return grid.to(compat.execution_device(self)), new

    def _write(self, run: _BlockTextRun, new: int, eos_ids: tuple[int, ...], min_entropy: float | None) -> None:
        size, total = self.model.config.block_size, run.grid.shape[1]
        first = min(run.prompts) // size * size  # blocks before are given in all rows
        self._interrupt = False
        if run.cache is not None and first:
            self.model(run.grid[:, max(0, first - run.cache.longest) : first], cache=run.cache, store=True)
        with self.progress_bar(total=(total - first) // size) as bar:
            for start in range(first, total, size):
                self._write_block(run, start, start + size)
                self._find_finished(run, start + size, new, eos_ids, min_entropy)
                bar.update()
                if run.finished.all() or self._interrupt:
                    break
                if run.cache is not None and start + size < total:
                    self.model(run.grid[:, start : start + size], cache=run.cache, store=True)

    def _find_finished(
        self, run: _BlockTextRun, stop: int, new: int, eos_ids: tuple[int, ...], min_entropy: float | None
    ) -> None:
        for n, (row, prompt) in enumerate(zip(run.grid, run.prompts)):
            written = row[prompt : min(stop, prompt + new)]
            if (written == self.model.mask_token_id).any():  # it has ended before, or the run was interrupted
                continue
            ended = bool(eos_ids) and text_end(written, eos_ids, ends=1, min_entropy=None).stops
            ended |= min_entropy is not None and text_end(row[:stop], min_entropy=min_entropy).stops
            run.finished[n] |= ended or stop >= prompt + new

    def _write_block(self, run: _BlockTextRun, start: int, stop: int) -> None:
        """Reveal all masks of a block."""
        if self.model.config.parameterization == "score":
            self._by_score(run, stop)
        elif run.sampler == "first_hitting":
            self._by_first_hitting(run, start, stop)
        else:
            self._by_ancestors(run, start, stop)

    def _masked(self, run: _BlockTextRun, start: int, stop: int) -> torch.Tensor:
        """Boolean (B, block) masks of rows that are still written."""
        return (run.grid[:, start:stop] == self.model.mask_token_id) & ~run.finished[:, None]

    def _by_first_hitting(self, run: _BlockTextRun, start: int, stop: int) -> None:
        """One token per pass, any mask with the same chance. The time at which that happens, the largest of the
        masks' times, is told to the callback; the model does not see it (arXiv 2409.02908, section 4.1)."""
        time = torch.ones(len(run.grid), device=run.grid.device)
        while (masked := self._masked(run, start, stop)).any() and not self._interrupt:
            number = masked.sum(1)  # (B,)
            time = time * self._hitting_times(run, number > 0) ** (1 / number.clamp(min=1))
            tokens = self._tokens(run, self._probabilities(run, start, stop), masked.any(1))
            rank = masked.long().cumsum(1) - 1
            chosen = masked & (rank == self._hitting_places(run, number)[:, None])
            self._reveal(run, start, stop, chosen, tokens, time)

    def _by_ancestors(self, run: _BlockTextRun, start: int, stop: int) -> None:
        """From time t to s = t - 1 / steps a mask stays one with probability s / t; the last step reveals all."""
        steps, mask = run.steps, self.model.mask_token_id
        probabilities = None
        for time in torch.linspace(1, 0, steps, device=run.grid.device) if steps > 1 else torch.zeros(1):
            masked = self._masked(run, start, stop)
            if not masked.any() or self._interrupt:
                break
            if probabilities is None:
                probabilities = self._probabilities(run, start, stop)
            stays = self._stay(time, 1 / steps)
            mixed = probabilities * (1 - stays)
            mixed[..., mask] = stays
            tokens = self._tokens(run, mixed, masked.any(1))
            chosen = masked & (tokens != mask)
            self._reveal(run, start, stop, chosen, tokens, time.expand(len(run.grid)))
            if chosen.any():
                probabilities = None  # they are the same while nothing is revealed

    def _stay(self, time: torch.Tensor, step: float) -> torch.Tensor:
        """Probability of staying masked from a time on for a step; 0 at time 0, where nothing may."""
        return (time - step).clamp(min=0) / time.clamp(min=step)

    def _by_score(self, run: _BlockTextRun, stop: int) -> None:
        """SEDD's analytic sampler, then a step that leaves no mask (arXiv 2310.16834, section 4.2)."""
        mask = self.model.mask_token_id
        times = torch.linspace(1, LAST_TIME, run.steps + 1, device=run.grid.device)
        levels = torch.cat([loglinear_sigma(times), torch.zeros(1, device=run.grid.device)])
        for n, (sigma, after) in enumerate(pairwise(levels)):
            masked = self._masked(run, 0, stop)
            if not masked.any() or self._interrupt:
                break
            grid = run.grid[:, :stop]
            levels = sigma.expand(len(grid))
            scores = self.model.log_probs(self.model(grid, levels).logits, grid, levels).double().exp()
            scores[..., mask] = 0
            mixed = scores * torch.expm1((sigma - after).double())
            mixed[..., mask] = 1 - mixed.sum(-1) if n < run.steps else 0
            tokens = self._tokens(run, mixed, masked.any(1))
            self._reveal(run, 0, stop, masked & (tokens != mask), tokens, times[n].expand(len(grid)))

    def _probabilities(self, run: _BlockTextRun, start: int, stop: int) -> torch.Tensor:
        """(B, block, V) float64, of a block's tokens given those before."""
        block = run.grid[:, start:stop]
        if run.cache is not None:
            logits = self.model(block, cache=run.cache).logits
        else:
            first = max(0, stop - self.model.config.model_length)
            logits = self.model(run.grid[:, first:stop]).logits[:, start - first :]
        found = self.model.log_probs(logits, block).double()
        if run.temperature == 0:
            return torch.zeros_like(found).scatter(-1, found.argmax(-1, keepdim=True), 1.0)
        found = (found / run.temperature).softmax(-1)
        return found if run.top_p in (None, 1.0) else nucleus(found, run.top_p)

    def _tokens(self, run: _BlockTextRun, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) drawn with probabilities that are proportional to weights (B, L, V), in rows (B,)."""
        uniforms = self._token_uniforms(run, weights.shape, rows)
        return (weights / (TINY - (uniforms + TINY).log())).argmax(-1)

    def _reveal(
        self, run: _BlockTextRun, start: int, stop: int, chosen: torch.Tensor, tokens: torch.Tensor, time: torch.Tensor
    ) -> None:
        run.grid[:, start:stop] = torch.where(chosen, tokens, run.grid[:, start:stop])
        run.calls += 1
        if run.callback is None:
            return
        known = {"block_x": run.grid[:, :stop], "transfer_index": chosen, "sampled_tokens": tokens}
        run.callback(self, run.calls - 1, time, {name: known[name] for name in run.callback_inputs})

    # Random draws, of the rows (B,) that are still written

    def _token_uniforms(self, run: _BlockTextRun, shape: torch.Size, rows: torch.Tensor) -> torch.Tensor:
        return draw_uniform(shape, run.grid.device, run.generator, torch.float64, rows)

    def _hitting_times(self, run: _BlockTextRun, rows: torch.Tensor) -> torch.Tensor:
        return draw_uniform((len(rows),), run.grid.device, run.generator, torch.float32, rows)

    def _hitting_places(self, run: _BlockTextRun, number: torch.Tensor) -> torch.Tensor:
        """Which one (B,) of so many masks (B,)."""
        drawn = draw_uniform((len(number),), run.grid.device, run.generator, torch.float32, number > 0)
        return (drawn * number).long().clamp(max=number - 1)

    def _output(
        self, run: _BlockTextRun, new: int, eos_ids: tuple[int, ...], stops: bool, min_entropy: float | None,
        output_type: str, return_dict: bool,
    ) -> Any:  # fmt: skip
        filler = eos_ids[0] if eos_ids else self.model.mask_token_id
        sequences = torch.full((len(run.grid), new), filler, device=run.grid.device)
        kept = []
        for n, (row, prompt) in enumerate(zip(run.grid, run.prompts)):
            whole = row[: prompt + new]
            if run.finished[n]:  # masks of others, whose run was interrupted, stay where they are
                whole = whole[whole != self.model.mask_token_id]
                if min_entropy is not None:
                    whole = whole[: max(text_end(whole, min_entropy=min_entropy).length, prompt)]
            tokens = whole[prompt:]
            end = len(tokens)
            if stops and eos_ids:
                end = text_end(tokens, eos_ids, ends=1, min_entropy=None).length
            if run.finished[n]:
                tokens = tokens[:end]
            sequences[n, : len(tokens)] = tokens
            kept.append(tokens[:end])
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
        output = MaskedTextPipelineOutput(sequences=sequences, texts=texts)
        return output if return_dict else (output.sequences, output.texts)


@torch.no_grad()
def write_autoregressively(model: BD3LM, ids: torch.Tensor, gen_length: int, generator: Generators = None) -> Any:
    """Texts (B, P + G) from an autoregressive model, token by token, each drawn with its probability.

    Args:
        ids: (B, P).
    """
    for _ in range(gen_length):
        logits = model(ids[:, -model.config.model_length :]).logits[:, -1]
        found = model.log_probs(logits, ids[:, -1:])
        uniforms = draw_uniform(found.shape, ids.device, generator, torch.float64)
        ids = torch.cat([ids, (found - (-uniforms.log()).log()).argmax(-1)[:, None]], 1)
    return ids


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities (…, V) of the most probable tokens, whose sum is at most `top_p`; the first one always stays."""
    ordered, order = probabilities.sort(-1, descending=True)
    kept = ordered.cumsum(-1) <= top_p
    kept[..., 0] = True
    ordered = ordered * kept
    return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))
