"""The sparse autoencoder and its training loss.

N rows (tokens), L latents, d features, n non-zeros.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers.models.embeddings import get_timestep_embedding

from imgdit import kernels
from imgdit.cards import CardDetails, write_card
from imgdit.hub import push_folder
from imgdit.io.atomic import write_tensors, write_text
from imgdit.io.fingerprints import sampled_hash, weights_hash
from imgdit.moved import renamed
from imgdit.sae.cards import sae_card
from imgdit.sae.config import SAEConfig
from imgdit.sae.files import CONFIG, WEIGHTS, check_tensors, read_autoencoder
from imgdit.sae.sparse import Pattern, Selection, SparseCode, above, decode, select, selected_scores

UNIT_NORM_EPS = 1e-5
_SAMPLE = "sample:"
"""What a fingerprint begins with, and how many weights of each tensor it looks at."""


class RowScale(NamedTuple):
    """What `input_unit_norm` took from each row."""

    mean: torch.Tensor
    """(N, 1)"""
    std: torch.Tensor
    """(N, 1)"""


@dataclasses.dataclass(frozen=True)
class LossRules:
    """Where the published losses differ from each other. The defaults are Gao et al.'s (arXiv 2406.04093)."""

    aux_reversed: bool = False
    """The dead features learn reconstruction - x instead of x - reconstruction."""
    aux_detached: bool = True
    """No gradient of the auxiliary loss reaches the error it explains."""
    aux_bias: bool = False
    """The decoder's bias is added to what the dead features say."""
    extra_trains_encoder: bool = True
    """Gradients of the auxiliary and the multi-top-k loss reach the encoder."""
    returns_last: bool = False
    """With multi-top-k, the result holds the pass with 4k features instead of the one with k."""


CORRECT = LossRules()
SAEURON = LossRules(aux_reversed=True, aux_detached=False, aux_bias=True, returns_last=True)
"""The published code (cywinski/SAeUron 1a4302a)."""
SPARSIFY = LossRules(aux_bias=True, extra_trains_encoder=False, returns_last=True)
"""EleutherAI's sparsify, whose fused encoder gives its pre-activations no gradient."""


class SAELoss(NamedTuple):
    """One training pass. All errors are in the units after `input_unit_norm`."""

    loss: torch.Tensor
    """fvu + auxk_alpha * auxk_loss + multi_topk_fvu / 8."""
    fvu: torch.Tensor
    """Fraction of variance unexplained: squared error over squared distance to the batch's mean."""
    auxk_loss: torch.Tensor
    """The same for the error as explained by dead features; 0 without."""
    multi_topk_fvu: torch.Tensor
    """fvu of the pass with 4k features; 0 without."""
    l2_loss: torch.Tensor
    """Mean squared error per entry."""
    l0: torch.Tensor
    """Mean number of features per row that are selected and positive."""
    positive: torch.Tensor
    """Mean number of positive features per row before the selection (the reference logs it as l0)."""
    explained_variance: torch.Tensor
    """(N,) 1 - squared error over squared distance to the batch's mean, of each row."""
    sae_out: torch.Tensor
    """(N, d) reconstruction, in the units of the input."""
    code: SparseCode
    """Activations behind it."""


class SparseAutoencoder(nn.Module):
    """relu((x - b_dec) W_enc^T + b_enc), of which k survive, times W_dec, plus b_dec.

    Files are folders with `cfg.json` and `sae.safetensors`, see `imgdit.sae.files`.
    """

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        """New weights: uniform encoder rows as torch's Linear, the decoder equal to them at norm 1, no biases."""
        super().__init__()
        self.config = config
        self.threshold = config.threshold
        self.modulation: TimeModulation | None = None
        d, latents = config.d_in, config.num_latents
        self.encoder = nn.utils.skip_init(nn.Linear, d, latents)
        with torch.no_grad():
            bound = d**-0.5
            self.encoder.weight.uniform_(-bound, bound, generator=generator)
            self.encoder.bias.zero_()
        self.W_dec = nn.Parameter(self.encoder.weight.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(d))
        if config.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(d, d))
        if config.feature_thresholds:
            self.thresholds = nn.Parameter(torch.zeros(latents), requires_grad=False)
        if config.normalize_decoder:
            self.normalize_decoder()

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, subfolder: str | None = None) -> SparseAutoencoder:
        """Read a sparse autoencoder, float32 on the CPU.

        Args:
            path_or_repo: folder, or Hub repository.
            subfolder: of a hookpoint, as in "unet.up_blocks.1.attentions.1".

        Raises:
            ValueError: files missing, pickled, damaged or of other shapes than the configuration says.
        """
        config, tensors, folder = read_autoencoder(path_or_repo, subfolder)
        with torch.random.fork_rng(devices=[]):
            sae = autoencoder_of(config)
        check_tensors(folder, tensors, {name: tuple(t.shape) for name, t in sae.state_dict().items()})
        sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return sae.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a sparse autoencoder; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()})
        config = dataclasses.replace(self.config, threshold=self.threshold)
        write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=1))

    def push_to_hub(self, repository: str, card: CardDetails | None = None, **options: Any) -> str:
        """Save in a folder called by the hookpoint, with a model card, in a repository on the Hub.

        Args:
            card: what it says beside sizes and rules.
            options: see `push_folder`.

        Returns:
            The repository's address.

        Raises:
            ValueError: the configuration names no hookpoint; see also `push_folder`.
        """
        place = self.config.hookpoint
        if place is None:
            raise ValueError("the SAE names no hookpoint; set config.hookpoint to the module path that it reads")
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder / place)
            write_card(folder, sae_card(repository, {place: self.config}, details=card))
            return push_folder(folder, repository, **options)

    # The map

    def normalize(self, x: torch.Tensor, timestep: float | None = None) -> tuple[torch.Tensor, RowScale | None]:
        """Rows (N, d) as the weights expect them; what is needed to go back.

        Args:
            timestep: in [0, 1000]; only `TimeConditionedAutoencoder` needs it.
        """
        if self.modulation is not None:
            return self.modulation(x, timestep), None
        if not self.config.input_unit_norm:
            return x, None
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        # On the way back SAeUron multiplies by the standard deviation alone; a row without any is its mean again.
        return (x - mean) / (std + UNIT_NORM_EPS), RowScale(mean, std)

    def scores(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Pre-activations (N, L) of normalised rows (N, d)."""
        return kernels.product(self._centred(x), self.encoder.weight, self.encoder.bias, out)

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.b_dec if self.config.subtracts_b_dec else x

    @property
    def cutoff(self) -> float | torch.Tensor | None:
        """Pre-activation above which a feature is active at inference: of all features, or (L,) of each; `None`: the k
        largest are."""
        return self.thresholds if self.config.feature_thresholds else self.threshold

    def active(self, scores: torch.Tensor) -> Pattern:
        """Features that are active at inference."""
        if self.cutoff is not None:
            return above(scores, self.cutoff)
        return select(scores, self.config.k, "groupmax" if self.config.activation == "groupmax" else "topk")

    def encode(self, x: torch.Tensor) -> SparseCode:
        """Code of normalised rows (N, d) at inference."""
        with torch.no_grad():
            scores = self.scores(x)
        pattern = self.active(scores)
        active = selected_scores(scores, pattern, self._centred(x), self.encoder.weight, self.encoder.bias)
        return SparseCode(active.relu(), pattern)

    def decode(self, code: SparseCode) -> torch.Tensor:
        """Normalised rows (N, d) of a code."""
        return decode(code, self.W_dec) + self.b_dec

    def forward(self, x: torch.Tensor, timestep: float | None = None) -> torch.Tensor:
        """Reconstruction of activations (..., d), in their units and dtype; a transcoder's is of the module's output.
        Gradients reach x and the weights.

        Args:
            timestep: see `normalize`.
        """
        rows, scale = self.normalize(x.reshape(-1, self.config.d_in).to(self.W_dec.dtype), timestep)
        out = self.decode(self.encode(rows))
        if self.config.skip_connection:
            out = out + rows @ self.W_skip.t()
        if scale is not None:
            out = out * scale.std + scale.mean
        return out.view(x.shape).to(x.dtype)

    # Training

    def loss(
        self,
        x: torch.Tensor,
        *,
        target: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        auxk_alpha: float = 1 / 32,
        paper_compat: bool = False,
        rules: LossRules | None = None,
        scores: torch.Tensor | None = None,
    ) -> SAELoss:
        """The training loss.

        Args:
            x: (N, d) rows, or (maps, tokens, d), which sample_topk needs.
            target: what the output should be, for transcoders; `None`: x.
            dead: boolean (L,), features that have not been active for long and learn the rest of the error.
            auxk_alpha: weight of that.
            paper_compat: SAeUron's loss with its errors (the sign of the dead features' target).
            rules: instead of `paper_compat`, all of the differences.
            scores: (N, L) memory to reuse.
        """
        rules = rules or (SAEURON if paper_compat else CORRECT)
        config = self.config
        tokens = x.shape[-2] if x.ndim == 3 else 1
        if config.activation == "sample_topk" and x.ndim != 3:
            raise ValueError(f"sample_topk selects per map: give (maps, tokens, d), got {tuple(x.shape)}")
        x, scale = self.normalize(x.reshape(-1, config.d_in))
        target = x if target is None else target.reshape(-1, config.d_in)
        spread = (target - target.mean(0)).square().sum(1)  # (N,)
        variance = spread.sum()

        with torch.no_grad():
            all_scores = self.scores(x, out=scores)
        skip = x @ self.W_skip.t() if config.skip_connection else None
        centred = self._centred(x)

        def code(k: int, how: Selection, trains_encoder: bool, hint: float | None = None) -> SparseCode:
            pattern = select(all_scores, k, how, tokens=tokens, hint=hint)
            inputs, weight, bias = centred, self.encoder.weight, self.encoder.bias
            if not trains_encoder:
                inputs, weight, bias = inputs.detach(), weight.detach(), bias.detach()
            return SparseCode(selected_scores(all_scores, pattern, inputs, weight, bias).relu(), pattern)

        def output(code: SparseCode) -> torch.Tensor:
            out = self.decode(code)
            return out if skip is None else out + skip

        hint = None if self.threshold is None else 0.9 * self.threshold
        chosen = code(config.k, config.activation, True, hint)
        out = output(chosen)
        error = out - target
        squared = error.square().sum(1)  # (N,)
        fvu = squared.sum() / variance
        auxk_loss = multi_topk_fvu = fvu.new_zeros(())
        if dead is not None and bool(dead.any()):
            auxk_loss = self._aux_loss(all_scores, centred, error, variance, dead, tokens, rules)
        if config.multi_topk:
            k = min(4 * config.k, config.num_latents)
            wide = code(k, _plain(config.activation), rules.extra_trains_encoder)
            wide_out = output(wide)
            multi_topk_fvu = (wide_out - target).square().sum() / variance
            if rules.returns_last:
                chosen, out = wide, wide_out
        with torch.no_grad():
            l0 = (chosen.acts > 0).sum() / len(x)
            positive = (all_scores > 0).sum() / len(x) if paper_compat else l0.new_tensor(float("nan"))
            explained = 1 - squared / spread
        return SAELoss(
            loss=fvu + auxk_alpha * auxk_loss + multi_topk_fvu / 8,
            fvu=fvu,
            auxk_loss=auxk_loss,
            multi_topk_fvu=multi_topk_fvu,
            l2_loss=squared.sum() / error.numel(),
            l0=l0,
            positive=positive,
            explained_variance=explained,
            sae_out=out if scale is None else out * scale.std + scale.mean,
            code=chosen,
        )

    def _aux_loss(
        self,
        scores: torch.Tensor,
        centred: torch.Tensor,
        error: torch.Tensor,
        variance: torch.Tensor,
        dead: torch.Tensor,
        tokens: int,
        rules: LossRules,
    ) -> torch.Tensor:
        """How well the dead features alone explain the error, so that gradients reach them."""
        numbers = dead.nonzero().flatten()  # only their rows are multiplied
        half = self.config.d_in // 2  # heuristic of Gao et al., appendix B.1
        k = min(half, len(numbers))
        few = scores[:, numbers]
        pattern = select(few, k, _plain(self.config.activation), tokens=tokens)
        weight, bias = self.encoder.weight[numbers], self.encoder.bias[numbers]
        if not rules.extra_trains_encoder:
            weight, bias, centred = weight.detach(), bias.detach(), centred.detach()
        acts = selected_scores(few, pattern, centred, weight, bias).relu()
        decoded = decode(SparseCode(acts, pattern), self.W_dec[numbers])
        if rules.aux_bias:
            decoded = decoded + self.b_dec
        if rules.aux_detached:
            error = error.detach()
        wanted = error if rules.aux_reversed else -error
        return min(len(numbers) / half, 1.0) * (decoded - wanted).square().sum() / variance

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Rows of the decoder to norm 1."""
        norm = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(norm + torch.finfo(self.W_dec.dtype).eps)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take from each decoder row's gradient what would only change its norm."""
        grad = self.W_dec.grad
        assert grad is not None
        grad.sub_((grad * self.W_dec).sum(1, keepdim=True) * self.W_dec)

    # Other units, identity

    @torch.no_grad()
    def rescaled(self, mean: torch.Tensor, scale: float) -> SparseAutoencoder:
        """The same map on x where this one takes (x - mean) / scale: the statistics go into the weights.

        With `input_unit_norm`, rows are standardised before the weights and brought back after them: a scale changes
        nothing, and another mean than 0 cannot be folded in.
        """
        new = autoencoder_of(self.config).to(self.W_dec)
        new.load_state_dict(self.state_dict())
        new.threshold = self.threshold
        if self.config.input_unit_norm:
            assert not mean.any()
            return new
        new.encoder.weight.div_(scale)
        new.W_dec.mul_(scale)
        new.b_dec.mul_(scale).add_(mean)
        return new

    def fingerprint(self) -> str:
        """Hash of some of the weights, by which a selection of features knows its SAE; the same in bfloat16."""
        return f"{_SAMPLE}{sampled_hash(self)}"

    def has_fingerprint(self, known: str) -> bool:
        """Whether a fingerprint is of these weights. Earlier versions hashed all of them, which took seconds."""
        if known.startswith(_SAMPLE):
            return known == self.fingerprint()
        return known == weights_hash(self, dtype=torch.float32, length=64)


class TimeModulation(nn.Module):
    """x (1 + scale(t)) + shift(t): scale and shift are a linear layer on an MLP with two SiLUs on the sinusoidal
    embedding of t / 1000. A new one leaves x as it is."""

    def __init__(self, time_embed_dim: int, d_in: int) -> None:
        super().__init__()
        width = self.width = time_embed_dim
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mod_linear = nn.Linear(width, 2 * d_in)
        nn.init.zeros_(self.mod_linear.weight)
        nn.init.zeros_(self.mod_linear.bias)

    def forward(self, x: torch.Tensor, timestep: float | None) -> torch.Tensor:
        """Modulated rows (N, d).

        Args:
            timestep: in [0, 1000].

        Raises:
            ValueError: no timestep.
        """
        if timestep is None:
            raise ValueError("this autoencoder is conditioned on the timestep, got None; give one in [0, 1000]")
        # Filled on the device: a tensor made of a number would be copied there and waited for.
        time = get_timestep_embedding(torch.full((1,), timestep / 1000, device=x.device), self.width).to(x.dtype)
        scale, shift = self.mod_linear(self.time_mlp(time)).chunk(2, dim=-1)
        return x * (1 + scale) + shift


class TimeConditionedAutoencoder(SparseAutoencoder):
    """A sparse autoencoder whose input is modulated by the timestep (`TimeModulation`). With `SAEConfig.transcode` it
    is DifFRACT's transcoder (arXiv 2606.15796, section 3.1). Published weights are used; training is not implemented.
    """

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        """See `SparseAutoencoder`.

        Raises:
            ValueError: no `time_embed_dim`.
        """
        if config.time_embed_dim is None:
            raise ValueError("a TimeConditionedAutoencoder needs time_embed_dim, got None; use SparseAutoencoder")
        super().__init__(config, generator=generator)
        self.modulation = TimeModulation(config.time_embed_dim, config.d_in)

    def loss(self, *args: Any, **kwargs: Any) -> SAELoss:
        """Not implemented.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "training a TimeConditionedAutoencoder is not implemented; train a SparseAutoencoder (time_embed_dim=None)"
        )


def autoencoder_of(config: SAEConfig) -> SparseAutoencoder:
    """A new autoencoder of the class that a configuration asks for."""
    return SparseAutoencoder(config) if config.time_embed_dim is None else TimeConditionedAutoencoder(config)


class DeviceCopies:
    """A sparse autoencoder on the device where its activations are. The original is never moved: a copy is made when
    the first activations come from elsewhere, and is kept as long as this object."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._copy: SparseAutoencoder | None = None

    def on(self, device: torch.device) -> SparseAutoencoder:
        """The original where it lies on the device, otherwise the copy, in the original's precision."""
        original = self.sae.W_dec
        if original.device == device:
            return self.sae
        if self._copy is None or (self._copy.W_dec.device, self._copy.W_dec.dtype) != (device, original.dtype):
            moved = {id(p): nn.Parameter(p.detach().to(device), requires_grad=False) for p in self.sae.parameters()}
            self._copy = copy.deepcopy(self.sae, moved)
        return self._copy


def _plain(activation: Selection) -> Selection:
    """Selection of the extra passes: groups make no sense among a part of the features or with another k."""
    return "topk" if activation == "groupmax" else activation


@torch.no_grad()
def geometric_median(points: torch.Tensor, max_iter: int = 100, tol: float = 1e-5) -> torch.Tensor:
    """Point (d,) with the smallest sum of distances to (N, d) (Weiszfeld), where a decoder's bias starts."""
    guess = points.mean(0)
    for _ in range(max_iter):
        before = guess
        # A point that equals the guess would have infinite weight; the reference gets NaN there.
        weights = 1 / (points - guess).norm(dim=1).clamp(min=torch.finfo(points.dtype).eps)
        guess = (weights[:, None] * points).sum(0) / weights.sum()
        if (guess - before).norm() < tol:
            break
    return guess


def auto_lr(num_latents: int) -> float:
    """Learning rate by size: 2e-4 at 2^14 latents, falling with the square root (sparsify, SAeUron)."""
    return 2e-4 / (num_latents / 2**14) ** 0.5


def load_sae(path_or_repo: str | Path, subfolder: str | None = None) -> SparseAutoencoder:
    """See `SparseAutoencoder.from_pretrained`."""
    return SparseAutoencoder.from_pretrained(path_or_repo, subfolder)


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> None:
    """See `SparseAutoencoder.save_pretrained`."""
    sae.save_pretrained(folder)


def __getattr__(name: str) -> Any:
    """Names of version 0.1; they go with version 0.3."""
    return renamed(__name__, name, {"convert_sdxl_unbox": "sae.convert.convert_sdxl_unbox"})
