"""Training one sparse autoencoder, a batch at a time.

A step is SAeUron's (and sparsify's): decoder rows to norm 1, loss, gradient clipped, the part of the decoder's
gradient along its rows removed, Adam. What differs are the loss (`imgdit.sae.model.LossRules`), the arithmetic
(`imgdit.sae.sparse`), the threshold that is learned for batch_topk, and that inputs may be centred and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from imgdit.sae.model import SparseAutoencoder, auto_lr, geometric_median

ADAM_EPS = 6.25e-10
"""SAeUron's; gradients of a loss that is a ratio are small."""
THRESHOLD_DECAY = 0.99
"""Running mean of the smallest active value of a batch (arXiv 2412.06410 averages over batches too)."""


@dataclass(frozen=True)
class SAETrainConfig:
    """How a sparse autoencoder is trained."""

    lr: float | None = None
    """Learning rate; `None`: 2e-4 / sqrt(num_latents / 2^14)."""
    schedule: str = "linear"
    """A name of `transformers.get_scheduler`."""
    warmup: int = 0
    """Steps in which the rate rises."""
    auxk_alpha: float = 1 / 32
    """Weight of the loss that revives dead features; 0: none."""
    dead_after: int = 10_000_000
    """Rows (maps with sample_topk) without activity after which a feature counts as dead."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    standardize: bool = True
    """Inputs are centred and scaled to a root mean square of 1 by the first batch's statistics, which are folded into
    the saved weights. Few channels of a diffusion transformer are very large; uncentred, they take all features
    (arXiv 2609.39625)."""
    accumulate: int = 1
    """Batches per optimiser step."""
    micro: int = 1
    """Parts that a batch is computed in."""
    paper_compat: bool = False
    """SAeUron's loss with its errors."""

    def __post_init__(self) -> None:
        for name in ("dead_after", "accumulate", "micro"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.auxk_alpha < 0 or self.clip_norm <= 0:
            raise ValueError(f"auxk_alpha and clip_norm must be positive, got {self.auxk_alpha}, {self.clip_norm}")


class SAETraining:
    """A sparse autoencoder and the state of its training."""

    def __init__(self, sae: SparseAutoencoder, config: SAETrainConfig, steps: int) -> None:
        """
        Args:
            sae: with the weights to start from; it is trained in place.
            steps: of the schedule; the batches of the whole run.
        """
        self.sae, self.config = sae.train().requires_grad_(True), config
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=config.lr or auto_lr(sae.config.num_latents), eps=ADAM_EPS, fused=True
        )
        self.schedule = get_scheduler(config.schedule, self.optimizer, config.warmup, steps)
        device = sae.W_dec.device
        self.rows_since_fired = torch.zeros(sae.config.num_latents, dtype=torch.long, device=device)
        self.fired = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=device)
        self.mean = torch.zeros(sae.config.d_in, device=device)
        self.scale = 1.0
        self.continued = False
        self.batches = 0
        self.pending_rows = 0
        self._scores: torch.Tensor | None = None
        self._counts = torch.zeros(sae.config.num_latents, dtype=torch.long, device=device)
        self._counted = 0

    @classmethod
    def continued_from(cls, saved: SparseAutoencoder, config: SAETrainConfig, steps: int) -> SAETraining:
        """Further training of a saved autoencoder. The scale that `trained` folded into its weights is taken out
        again, so that bringing the decoder's rows to norm 1 changes nothing; inputs are divided by it instead.

        Args:
            saved: as it was read; a copy is trained.
        """
        scale = 1.0 if saved.config.input_unit_norm else float(saved.W_dec.norm(dim=1).mean())
        training = cls(saved.rescaled(torch.zeros_like(saved.b_dec), 1 / scale), config, steps)
        training.scale, training.continued = scale, True
        return training

    def step(self, x: torch.Tensor) -> dict[str, float]:
        """Train on rows (N, d), or on maps (m, n, d), which sample_topk needs.

        Returns:
            `fvu`: fraction of variance unexplained; `auxk_loss`, `multi_topk_fvu`; `l0`: mean number of features per
            row that are active; `dead`: fraction of dead features; `threshold`, with batch_topk.

        Raises:
            ValueError: NaN or infinite activations.
        """
        sae, config = self.sae, self.config
        x = x.to(sae.W_dec)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("activations that are NaN or infinite cannot be trained on; nothing was changed")
        if self.batches == 0 and not self.continued:
            self._begin(x)
        x = (x - self.mean) / self.scale
        if sae.config.normalize_decoder:
            sae.normalize_decoder()
        dead = None
        if config.auxk_alpha > 0:
            dead = self.rows_since_fired > config.dead_after
        metrics: dict[str, float] = {}
        parts = x.chunk(config.micro)
        for part in parts:
            metrics = self._micro_batch(part, dead, config.accumulate * len(parts), metrics)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
        self.batches += 1
        self.pending_rows += len(x) if sae.config.activation == "sample_topk" else x.shape[:-1].numel()
        if self.batches % config.accumulate == 0:
            if sae.config.normalize_decoder:
                sae.project_decoder_gradient()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.rows_since_fired += self.pending_rows
            self.rows_since_fired[self.fired] = 0
            self.fired.zero_()
            self.pending_rows = 0
        metrics["dead"] = float((self.rows_since_fired > config.dead_after).float().mean())
        if sae.threshold is not None:
            metrics["threshold"] = sae.threshold
        return {name: value / len(parts) if name in _PER_PART else value for name, value in metrics.items()}

    def _micro_batch(
        self, x: torch.Tensor, dead: torch.Tensor | None, divisor: int, metrics: dict[str, float]
    ) -> dict[str, float]:
        rows = x.shape[:-1].numel()
        shape = (rows, self.sae.config.num_latents)
        if self._scores is None or self._scores.shape != shape:
            self._scores = x.new_empty(shape)
        out = self.sae.loss(
            x,
            dead=dead,
            auxk_alpha=self.config.auxk_alpha,
            paper_compat=self.config.paper_compat,
            scores=self._scores,
        )
        (out.loss / divisor).backward()
        # The reference counts what is selected, also where nothing is left of it.
        indices = out.code.pattern.indices
        active = indices if self.config.paper_compat else indices[out.code.acts > 0]
        self.fired[active] = True
        self._counts += torch.bincount(active, minlength=len(self._counts))
        self._counted += rows
        if self.sae.config.activation == "batch_topk":
            least = float(out.code.acts.detach().amin())
            before = self.sae.threshold
            self.sae.threshold = least if before is None else before + (1 - THRESHOLD_DECAY) * (least - before)
        found = {name: float(getattr(out, name).detach()) for name in _PER_PART}
        return {name: metrics.get(name, 0.0) + value for name, value in found.items()}

    @torch.no_grad()
    def _begin(self, x: torch.Tensor) -> None:
        """Statistics of the first batch, and the decoder's bias in its middle."""
        rows = x.reshape(-1, x.shape[-1])
        # With input_unit_norm the autoencoder standardises each row itself, and nothing could be folded into its
        # weights: rows of another mean are other rows.
        if self.config.standardize and not self.sae.config.input_unit_norm:
            self.mean = rows.mean(0)
            self.scale = float((rows - self.mean).square().mean().sqrt().clamp(min=1e-12))
        if not self.sae.b_dec.any():
            seen = (rows - self.mean) / self.scale
            # The published code takes the middle of the rows as they come, though the bias is of standardised ones.
            seen = seen if self.config.paper_compat else self.sae.normalize(seen)[0]
            self.sae.b_dec.copy_(geometric_median(seen))

    def density(self) -> torch.Tensor:
        """(L,) fraction of rows on which each feature was active since the last call."""
        fraction = self._counts / max(self._counted, 1)
        self._counts.zero_()
        self._counted = 0
        return fraction

    def trained(self) -> SparseAutoencoder:
        """A copy that takes activations as they are."""
        return self.sae.rescaled(self.mean, self.scale).requires_grad_(False).eval()

    # Checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is not a number, by name."""
        moments = {
            f"optimizer/{name}/{kind}": value
            for name, parameter in self.sae.named_parameters()
            for kind, value in self.optimizer.state[parameter].items()
        }
        weights = {f"weights/{name}": value for name, value in self.sae.state_dict().items()}
        own = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor.detach().cpu() for name, tensor in {**weights, **moments, **own}.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest, as JSON takes it."""
        schedule = {name: v for name, v in self.schedule.state_dict().items() if name != "lr_lambdas"}
        own = {name: getattr(self, name) for name in _NUMBERS}
        return {**own, "threshold": self.sae.threshold, "schedule": schedule}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Undo `tensors` and `numbers`."""
        self.sae.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k})
        for name, parameter in self.sae.named_parameters():
            prefix = f"optimizer/{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device) for kind, value in state.items()
            }
        for name in _TENSORS:
            setattr(self, name, tensors[name].to(self.sae.W_dec.device))
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.sae.threshold = numbers["threshold"]
        self.schedule.load_state_dict({**numbers["schedule"], "lr_lambdas": [None]})
        for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr()):
            group["lr"] = lr


_PER_PART = ("fvu", "auxk_loss", "multi_topk_fvu", "l0")
_TENSORS = ("rows_since_fired", "fired", "mean", "_counts")
_NUMBERS = ("scale", "batches", "pending_rows", "_counted")
