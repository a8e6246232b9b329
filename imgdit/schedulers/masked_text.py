"""How masked text is revealed: which tokens are drawn, which of them are kept, and how many per step.

Masked diffusion starts from mask tokens and reveals them in steps. Published samplers differ in three choices, which
are settings here: how tokens are drawn (`sampling_method` of `step`), how many a step reveals (`reveal`), and which
ones (`choose`). LLaDA arXiv 2502.09992, Fast-dLLM arXiv 2505.22618, Dream arXiv 2508.15487, LaViDa arXiv 2505.16839,
MaskGIT arXiv 2202.04200, MDLM arXiv 2406.07524.

B rows, L places of a block, V vocabulary, S steps of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import BlockRefinementScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput

from imgdit import compat
from imgdit.naming import check_choice
from imgdit.schedulers.mask_schedule import check_schedule, masked_fraction

Reveal = Literal["even", "cosine", "shift", "logit_normal", "time", "threshold", "factor", "owed", "maskgit"]
Choose = Literal["probability", "log_probability", "margin", "entropy", "random", "ancestral"]
Sampling = Literal["auto", "greedy", "multinomial", "gumbel", "filtered", "categorical"]
NoiseDecay = Literal["none", "linear", "cumulative"]
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all rows, or one per row, so that a row's draws do not depend on the others."""
ENTROPY_EPS = 1e-10
"""Dream's, inside the logarithm."""
TINY = 1e-10
"""MDLM's, keeps the logarithms of a categorical draw finite."""


@dataclass(frozen=True)
class TextDraws:
    """What a step of `MaskedTextScheduler` may use in place of its generator's draws. `None`: drawn."""

    gumbel: torch.Tensor | None = None
    """(B, L, V) uniform numbers of the tokens' Gumbel noise."""
    order: torch.Tensor | None = None
    """(B, L) uniform numbers of the order: of `choose` "random" and "ancestral", and of `order_noise`."""
    tokens: torch.Tensor | None = None
    """(B, L) tokens."""
    revealed: torch.Tensor | None = None
    """Boolean (B, L): the masks to reveal, in place of the rule, in rows that have any."""


class _Drawn(NamedTuple):
    tokens: torch.Tensor
    """(B, L)."""
    probability: torch.Tensor
    """(B, L) of these tokens."""
    distribution: torch.Tensor
    """(B, L, V) float64, from which confidences are computed."""


@dataclass(frozen=True)
class _Options:
    """Arguments of one step."""

    step: int
    mask_token_id: int
    temperature: float
    top_p: float | None
    top_k: int | None
    sampling_method: str
    threshold: float
    editing_threshold: float | None
    prompt_mask: torch.Tensor | None
    fillable: torch.Tensor | None
    forbid_mask: bool
    late: tuple[int, ...]
    choose: str
    order_noise: float
    draws: TextDraws
    generator: Generators
    rows: torch.Tensor
    """Boolean (B,), rows that have masks to reveal."""


class MaskedTextScheduler(BlockRefinementScheduler):
    """`BlockRefinementScheduler` with the rules of published masked diffusion. With its default settings it is its
    parent, bit for bit.

    Args:
        block_length, num_inference_steps, threshold, editing_threshold, minimal_topk: of the parent.
        reveal: how many masks of a row a step reveals.
            "even": as many in each step, the remainder in the first ones (LLaDA); more where more than that exceed
            the threshold (LLaDA2, the parent's rule; a threshold above 1 turns that off).
            "cosine": few at first and many at last (MaskGIT), "shift": by a t / (1 + (a - 1) t), where a = 1/3
            reveals many at first and a = 1 is linear, and "logit_normal": by its distribution function, few at first
            and at last; all three as LaViDa counts them.
            "time": a fraction 1 - s/t of those left when time goes from t to s, rounded down (Dream).
            "threshold": those whose probability is at least the threshold, and the best one (Fast-dLLM).
            "factor": the n best for the largest n with c_n >= 1 - factor / (n + 1) for all of them, and the best one
            (Fast-dLLM).
            "owed": those that an even split owes by now, as far as they reach the threshold, and the best one
            (Fast-dLLM's Dream). The last three go on until nothing is masked.
            "maskgit": so many that after step k of S a fraction of all places, by `mask_schedule` at k / S and rounded
            down, is still masked, at least one; the last step reveals all. Equal confidences go together (MaskGIT,
            as MMaDA has it).
        shift: a of "shift".
        choose: which masks are revealed first: by the "probability" of the drawn token, its "log_probability" (the
            same order, unless noise is added), the "margin" between the best two, the negative "entropy", or at
            "random" (LLaDA's random remasking); "ancestral": each one on its own with the probability that `reveal`
            gives, which is how MDLM and Dream's "origin" sample.
        order_noise: scale of Gumbel noise on that confidence; Dream's `alg_temp`, and MaskGIT's temperature with
            "log_probability".
        order_noise_decay: how its scale falls over the S steps. "linear": by 1 - k / S in step k, from 1 (MaskGIT);
            "cumulative": by the product of these factors so far (MMaDA).
        mask_schedule: of "maskgit", see `masked_fraction`.
        factor: of "factor".
        factor_takes_last: also reveal the least confident mask if it alone fails the rule of "factor", as the
            published code does.
        eps: last time of "time".
        noise_removal: a further step, behind those that are asked for, reveals what is left then, each by its most
            probable token (MDLM). Without it the last step reveals all.
    """

    @register_to_config
    def __init__(
        self,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.95,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
        reveal: Reveal = "even",
        shift: float = 1 / 3,
        choose: Choose = "probability",
        order_noise: float = 0.0,
        factor: float = 1.0,
        factor_takes_last: bool = False,
        eps: float = 1e-3,
        noise_removal: bool = False,
        order_noise_decay: NoiseDecay = "none",
        mask_schedule: str = "cosine",
    ):
        super().__init__(block_length, num_inference_steps, threshold, editing_threshold, minimal_topk)
        check_choice("reveal", reveal, get_args(Reveal))
        check_choice("choose", choose, get_args(Choose))
        check_choice("order_noise_decay", order_noise_decay, get_args(NoiseDecay))
        check_schedule(mask_schedule)
        if shift <= 0 or order_noise < 0 or factor <= 0 or not 0 < eps < 1:
            raise ValueError(
                "expected shift > 0, order_noise >= 0, factor > 0 and 0 < eps < 1, got "
                f"{shift}, {order_noise}, {factor} and {eps}"
            )
        if noise_removal and reveal != "time":
            raise ValueError(f"noise_removal follows a schedule that leaves masks: reveal='time', got {reveal=}")
        if choose == "ancestral" and reveal in ("threshold", "factor", "owed", "maskgit"):
            raise ValueError(f"choose='ancestral' draws by a schedule, which reveal={reveal!r} does not have")
        self._counts: torch.Tensor | None = None  # (B, S) of the block in progress
        self._masks: torch.Tensor | None = None  # (B,) at its start
        self._planned = False  # whether `start_block` was called for the next step 0
        self._own_rules = False  # whether it was called at all

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, block_length)
        self._counts = self._masks = None
        self._planned = self._own_rules = False

    def start_block(self, masks: torch.Tensor) -> int:
        """Plan a block by its own masks, of which rows may hold different numbers; after `set_timesteps`. Without it,
        a step 0 plans the block from the masks it finds, unless all settings are the parent's.

        Args:
            masks: (B,) number of masks in each row.

        Returns:
            The number of steps after which nothing more can happen, at most.
        """
        self._plan(masks)
        self._planned = self._own_rules = True
        return self.max_steps(int(masks.max()))

    def _plan(self, masks: torch.Tensor) -> None:
        self._counts = torch.stack([self.counts(int(n)) for n in masks.tolist()]).to(masks.device)
        self._masks = masks

    def max_steps(self, masks: int) -> int:
        """Steps after which a row that began with so many masks is done. Rules without a schedule take as many as
        they need, at least one mask a step."""
        if self.config.reveal in ("threshold", "factor"):
            return masks
        return self.num_inference_steps + self._extra + (masks if self.config.reveal == "owed" else 0)

    @property
    def _extra(self) -> int:
        """Steps behind those that are asked for."""
        return int(self.config.noise_removal)

    def counts(self, masks: int) -> torch.Tensor:
        """Masks (S,) that each step reveals of a number of masks; for "time" the expected even split."""
        steps = self.num_inference_steps
        if self.config.reveal not in ("cosine", "shift", "logit_normal"):
            return self.get_num_transfer_tokens(masks, steps)
        if not masks:
            return torch.zeros(steps, dtype=torch.long)
        # LaViDa's way to count: at least one a step, what is too much is taken from the front, and the list reversed.
        used = min(steps, masks)
        times = torch.linspace(0, 1, used + 1)  # float32, which decides where a product is a whole number
        if self.config.reveal == "shift":
            done = self.config.shift * times / (1 + (self.config.shift - 1) * times)
        elif self.config.reveal == "logit_normal":
            done = torch.special.ndtr(torch.logit(times))
        else:
            done = (1 - torch.cos(math.pi * times)) / 2
        done[-1] = 1  # the formula's last value is 1, its floating-point number may be less
        found = (masks * done).floor().long().diff().clamp(min=1)
        while (excess := int(found.sum()) - masks) > 0:
            for k in (found > 1).nonzero().flatten().tolist()[:excess]:
                found[k] -= 1
        return torch.cat([found.flip(0), torch.zeros(steps - used, dtype=torch.long)])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: torch.Tensor | None = None,
        fillable: torch.Tensor | None = None,
        forbidden: tuple[int, ...] = (),
        forbid_mask: bool = False,
        late: tuple[int, ...] = (),
        choose: str | None = None,
        order_noise: float | None = None,
        draws: TextDraws | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Reveal some of a block's masks.

        Args:
            model_output: (B, L, V) logits.
            timestep: number of the step within the block, from 0.
            sample: (B, L) tokens.
            mask_token_id: the mask token; `None`: the parent's uniform noise, with default settings only.
            temperature, top_p, top_k: how tokens are drawn.
            sampling_method: "auto" (at temperature 0 greedy, else multinomial), "greedy" and "multinomial" as in the
                parent; "gumbel": the best of logits + temperature · Gumbel noise in float64, with the confidence of
                the clean logits (LLaDA); "filtered": temperature, then top_p, then top_k, at temperature 0 too, with
                the confidence of that distribution (Dream); "categorical", with `choose` "ancestral": token and mask
                token in one draw, in which the mask token has the probability of staying masked (MDLM).
            threshold, editing_threshold, prompt_mask, return_dict: of the parent. The editing threshold is compared
                with the probability of a token that would replace another one.
            minimal_topk: of the parent, which does not read it.
            fillable: boolean (B, L): masks that may be revealed; `None`: all.
            forbidden: tokens of logit -inf (LLaDA's `logits_eos_inf`).
            forbid_mask: never draw the mask token. Probabilities stay those of the model.
            late: tokens that are revealed last: their confidence is 0, that of others is renormalised without them
                (LLaDA's `confidence_eos_eot_inf`).
            choose, order_noise: in place of the settings.
            draws: in place of the generator's.

        Raises:
            ValueError: no mask token with settings of this class, or an unknown name.
        """
        choose = self.config.choose if choose is None else choose
        order_noise = self.config.order_noise if order_noise is None else order_noise
        check_choice("sampling_method", sampling_method, get_args(Sampling))
        check_choice("choose", choose, get_args(Choose))
        if sampling_method == "categorical" and choose != "ancestral":
            raise ValueError(f"sampling_method='categorical' draws which masks go: choose='ancestral', got {choose=}")
        if forbidden:
            model_output = without_tokens(model_output, forbidden)
        own_settings = (self.config.reveal, choose, order_noise) != ("even", "probability", 0)
        own_sampling = sampling_method in ("gumbel", "filtered", "categorical")
        own_call = own_sampling or forbid_mask or late or draws or fillable is not None
        if not (own_settings or own_call or self._own_rules):
            return super().step(
                model_output, timestep, sample, mask_token_id=mask_token_id, temperature=temperature, top_p=top_p,
                top_k=top_k, sampling_method=sampling_method, threshold=threshold, editing_threshold=editing_threshold,
                minimal_topk=minimal_topk, prompt_mask=prompt_mask, generator=generator, return_dict=return_dict,
            )  # fmt: skip
        if mask_token_id is None:
            raise ValueError("these settings of MaskedTextScheduler need a mask token; give mask_token_id")
        masked = sample == mask_token_id
        options = _Options(
            int(timestep), mask_token_id, temperature, top_p, top_k, sampling_method,
            self.config.threshold if threshold is None else threshold,
            self.config.editing_threshold if editing_threshold is None else editing_threshold,
            prompt_mask, fillable, forbid_mask, late, choose, order_noise, draws or TextDraws(), generator,
            (masked if fillable is None else masked & fillable).any(1),
        )  # fmt: skip
        output = self._reveal(model_output, sample, options)
        return output if return_dict else output.to_tuple()

    def _reveal(self, logits: torch.Tensor, sample: torch.Tensor, options: _Options) -> BlockRefinementSchedulerOutput:
        masked = sample == options.mask_token_id
        fillable = masked if options.fillable is None else masked & options.fillable
        if self._counts is None or (options.step == 0 and not self._planned):
            self._plan(fillable.sum(1))
        self._planned = False
        if self._extra and options.step >= self.num_inference_steps:
            options = replace(options, sampling_method="greedy", forbid_mask=True)
        if options.sampling_method == "categorical":
            drawn = self._draw_categorical(logits, self._fraction(fillable.sum(1), options.step), options)
            chosen = (drawn.tokens != options.mask_token_id) & fillable
        else:
            drawn = self._draw(logits, options)
            chosen = self._chosen(self._confidence(drawn, options), drawn.probability, fillable, options) & fillable
        if (revealed := options.draws.revealed) is not None:
            chosen = torch.where(revealed.any(1, keepdim=True), revealed & fillable, chosen)
        edited = torch.zeros_like(chosen)
        if options.editing_threshold is not None and options.editing_threshold > 0:
            editable = ~masked if options.prompt_mask is None else ~masked & ~options.prompt_mask
            edited = editable & (drawn.tokens != sample) & (drawn.probability > options.editing_threshold)
        return BlockRefinementSchedulerOutput(
            prev_sample=torch.where(chosen | edited, drawn.tokens, sample),
            transfer_index=chosen,
            editing_transfer_index=edited,
            sampled_tokens=drawn.tokens,
            sampled_probs=drawn.probability.float(),
            pred_logits=logits,
        )

    def _draw(self, logits: torch.Tensor, options: _Options) -> _Drawn:
        """Tokens for all places, and their probabilities."""
        method, temperature = options.sampling_method, options.temperature
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if method == "auto":
            method = "multinomial" if temperature else "greedy"
        exact = logits.double()
        if method == "filtered":
            exact = exact / temperature if temperature else exact
            exact = compat.top_k_logits(compat.top_p_logits(exact, options.top_p), options.top_k)
        distribution = without_tokens(exact, options.late).softmax(-1) if options.late else exact.softmax(-1)
        allowed = without_tokens(exact, (options.mask_token_id,)) if options.forbid_mask else exact
        if options.draws.tokens is not None:
            tokens = options.draws.tokens
        elif method == "gumbel" and temperature:
            noise = options.draws.gumbel
            if noise is None:
                noise = draw_uniform(exact.shape, exact.device, options.generator, torch.float64, options.rows)
            # The best of exp(l) / (-ln u)^T, by its logarithm, which does not overflow.
            tokens = (allowed - temperature * (-noise.double().log()).log()).argmax(-1)
        elif method == "multinomial" and temperature:
            draw_from = without_tokens(logits, (options.mask_token_id,)) if options.forbid_mask else logits
            tokens, probability = _by_rows(
                lambda rows, source: compat.sample_tokens(rows, temperature, options.top_k, options.top_p, source),
                draw_from,
                options.generator,
                options.rows,
            )
            if not options.late:
                return _Drawn(tokens, probability, distribution)
        elif method == "filtered" and temperature:
            (tokens,) = _by_rows(_multinomial, allowed.softmax(-1), options.generator, options.rows)
        else:
            tokens = allowed.argmax(-1)
        return _Drawn(tokens, distribution.gather(-1, tokens[..., None])[..., 0], distribution)

    def _draw_categorical(self, logits: torch.Tensor, fraction: torch.Tensor, options: _Options) -> _Drawn:
        """Tokens for all places, the mask token where a mask stays.

        Args:
            fraction: (B,), with which a mask goes.
        """
        exact, mask, noise = logits.double(), options.mask_token_id, options.draws.gumbel
        if options.temperature:
            exact = compat.top_k_logits(compat.top_p_logits(exact / options.temperature, options.top_p), options.top_k)
        distribution = without_tokens(exact, (mask,)).softmax(-1)
        if not options.temperature:
            distribution = torch.zeros_like(distribution).scatter(-1, distribution.argmax(-1, keepdim=True), 1.0)
        fraction = fraction.double().to(exact.device)[:, None]
        weights = distribution * fraction[..., None]
        weights[..., mask] = 1 - fraction
        if noise is None:
            noise = draw_uniform(exact.shape, exact.device, options.generator, torch.float64, options.rows)
        tokens = (weights / (TINY - (noise.double() + TINY).log())).argmax(-1)
        return _Drawn(tokens, weights.gather(-1, tokens[..., None])[..., 0], distribution)

    def _confidence(self, drawn: _Drawn, options: _Options) -> torch.Tensor:
        """(B, L): the larger, the earlier a mask is revealed."""
        distribution, choose = drawn.distribution, options.choose
        if choose == "margin":
            best = distribution.topk(2, dim=-1).values
            confidence = best[..., 0] - best[..., 1]
        elif choose == "entropy":
            confidence = (distribution * (distribution + ENTROPY_EPS).log()).sum(-1)
        elif choose in ("random", "ancestral"):
            return self._order_uniforms(drawn.tokens, options)
        else:
            confidence = drawn.probability.double()
            confidence = confidence.log() if choose == "log_probability" else confidence
        if options.order_noise or self.config.reveal == "maskgit":  # which draws at scale 0 too, as MMaDA does
            noise = self._order_uniforms(drawn.tokens, options)
            confidence = confidence - self._noise_scale(options) * (-noise.log()).log()
        return confidence

    def _noise_scale(self, options: _Options) -> float:
        """Scale of the order's noise in this step."""
        scale, steps = options.order_noise, self.num_inference_steps
        if self.config.order_noise_decay == "linear":
            return scale * max(1 - (options.step + 1) / steps, 0.0)
        if self.config.order_noise_decay == "cumulative":
            for step in range(min(options.step + 1, steps)):
                scale *= 1 - (step + 1) / steps
        return scale

    def _order_uniforms(self, like: torch.Tensor, options: _Options) -> torch.Tensor:
        if options.draws.order is not None:
            return options.draws.order.double()
        # In float32, as LLaDA and Dream draw them; a 0 would be a mask that is never revealed.
        return draw_uniform(like.shape, like.device, options.generator, torch.float32, options.rows).double()

    def _chosen(
        self, confidence: torch.Tensor, probability: torch.Tensor, fillable: torch.Tensor, options: _Options
    ) -> torch.Tensor:
        """Boolean (B, L): the masks that the rule reveals.

        Args:
            confidence: (B, L), which decides the order.
            probability: (B, L), which is compared with thresholds.
            fillable: boolean (B, L).
        """
        reveal, open_ = self.config.reveal, fillable.sum(1)  # (B,)
        if options.choose == "ancestral":
            fraction = self._fraction(open_, options.step)[:, None]
            return (confidence.float() < fraction) | (fraction >= 1)
        if reveal == "maskgit":
            return self._above_cut(confidence, fillable, options.step)
        confidence = confidence.masked_fill(~fillable, -math.inf)
        rank = confidence.argsort(-1, descending=True).argsort(-1)  # (B, L), 0 is the best
        if reveal == "factor":
            return rank < self._by_factor(confidence, open_)[:, None]
        certain = probability >= options.threshold
        if reveal == "threshold":
            return certain | (rank == 0)
        number = self._number(open_, options.step)
        if reveal == "owed":
            return (rank < number[:, None]) & (certain | (rank == 0))
        chosen = rank < number[:, None]
        if reveal == "even":
            certain = fillable & (probability > options.threshold)
            chosen = torch.where(certain.sum(1, keepdim=True) >= number[:, None], certain, chosen)
        return chosen

    def _above_cut(self, confidence: torch.Tensor, fillable: torch.Tensor, step: int) -> torch.Tensor:
        """Boolean (B, L): the masks that are no less certain than the most certain one that the schedule keeps."""
        steps, length = self.num_inference_steps, fillable.shape[1]
        if step >= steps - 1:
            return fillable
        fraction = masked_fraction(torch.tensor((step + 1) / steps), self.config.mask_schedule)
        kept = (length * fraction).floor().long().to(fillable.device)
        kept = torch.minimum(fillable.sum(1) - 1, kept).clamp(min=1)  # (B,)
        confidence = confidence.masked_fill(~fillable, math.inf)
        cut = confidence.sort(-1).values.gather(1, kept.clamp(max=length - 1)[:, None])
        return confidence >= cut

    def _number(self, open_: torch.Tensor, step: int) -> torch.Tensor:
        """Masks (B,) that a step reveals of those left, by the schedule."""
        last = step >= self.num_inference_steps - 1 + self._extra
        if self.config.reveal == "time":
            return open_ if last else (open_.float() * self._time_fraction(step).to(open_.device)).long()
        assert self._counts is not None and self._masks is not None
        if self.config.reveal == "owed":
            return self._counts[:, : step + 1].sum(1) - (self._masks - open_)
        return self._counts[:, min(step, self._counts.shape[1] - 1)]

    def _fraction(self, open_: torch.Tensor, step: int) -> torch.Tensor:
        """Probability (B,) with which a mask goes in this step."""
        if step >= self.num_inference_steps - 1 + self._extra:
            return torch.ones(len(open_), device=open_.device)
        if self.config.reveal == "time":
            return self._time_fraction(step).to(open_.device).expand(len(open_))
        assert self._counts is not None
        return self._counts[:, step] / self._counts[:, step:].sum(1).clamp(min=1)  # now, of what is still to come

    def _time_fraction(self, step: int) -> torch.Tensor:
        """1 - s/t, computed in float32 as Dream does."""
        times = torch.linspace(1, self.config.eps, self.num_inference_steps + 1)
        return 1 - times[step + 1] / times[step]

    def _by_factor(self, confidence: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
        """Masks (B,) that Fast-dLLM's factor rule reveals."""
        best = confidence.sort(-1, descending=True).values  # (B, L)
        n = torch.arange(1, best.shape[1] + 1, device=best.device)
        passes = (best >= 1 - self.config.factor / (n + 1)) & (n <= open_[:, None])
        passes[:, :1] = open_[:, None] > 0
        number = passes.long().cumprod(-1).sum(-1)
        if self.config.factor_takes_last:
            number = torch.where(number == open_ - 1, open_, number)
        return number


def without_tokens(logits: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits (…, V) of a vocabulary in which some tokens cannot occur."""
    logits = logits.clone()
    logits[..., list(tokens)] = -math.inf
    return logits


def _multinomial(probabilities: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor]:
    flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return (flat.view(probabilities.shape[:-1]),)


def _by_rows(
    draw: Callable[[torch.Tensor, torch.Generator | None], tuple[torch.Tensor, ...]],
    values: torch.Tensor,
    generator: Generators,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Draws for all rows at once by one generator, or for each of `rows` by its own; for others by a new one."""
    if generator is None or isinstance(generator, torch.Generator):
        return draw(values, generator)
    check_generators(generator, len(values))
    found = [
        draw(row, source if asked else torch.Generator(values.device))
        for row, source, asked in zip(values.split(1), generator, rows.tolist())
    ]
    return tuple(torch.cat(part) for part in zip(*found))


def draw_uniform(
    shape: Any, device: Any, generator: Generators, dtype: torch.dtype, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Uniform numbers in (0, 1) from a generator of any device, or from one per row of the shape's first axis.

    Args:
        rows: boolean (B,): of generators per row, only these are asked, so that a row's later numbers do not depend
            on how long others take. `None`: all.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        check_generators(generator, shape[0])
        drawn = torch.full(shape, 0.5, dtype=dtype, device=device)
        for n in range(len(generator)) if rows is None else rows.nonzero().flatten().tolist():
            drawn[n] = draw_uniform(shape[1:], device, generator[n], dtype)
        return drawn
    source = device if generator is None else generator.device
    found = torch.rand(shape, dtype=dtype, device=source, generator=generator).to(device)
    return found.clamp(min=torch.finfo(dtype).tiny)


def check_generators(generator: Any, rows: int) -> None:
    """Refuse what is neither a generator, nor one per row, nor `None`."""
    each = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    wrong = [type(one).__name__ for one in each if not isinstance(one, torch.Generator)]
    if wrong:
        raise ValueError(f"generator must be a torch.Generator or a list of one per text, got {wrong[0]}")
    if isinstance(generator, (list, tuple)) and len(generator) != rows:
        raise ValueError(f"a list of generators needs one per text, got {len(generator)} for {rows} texts")
