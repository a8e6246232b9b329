"""Changing chosen features of activations.

    out = x + sum over features f of [a_f > threshold_f] a_f (factor_f - 1) W_dec[f]

is what encode, edit, decode gives when the reconstruction error is kept, but only the chosen features are computed.
N rows, L latents, m chosen features, d width.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from imgdit.sae.model import DeviceCopies, RowScale, SparseAutoencoder

_CHUNK = 2**25
"""Entries of the largest (rows, L) block that is encoded at once: 128 MiB in float32."""
_MARGIN = 1e-3
"""Relative distance to a threshold within which the small product's rounding could decide otherwise than the whole
one's; such rows are encoded in full."""


class Edit(NamedTuple):
    """Chosen features and what becomes of them."""

    features: torch.Tensor
    """(m,) latents, each once."""
    factors: torch.Tensor
    """(m,) or (N, m): what their activation is multiplied by."""
    thresholds: torch.Tensor
    """(m,): only activations above are changed."""


class ChosenFeatures:
    """The part of an SAE's weights that an edit needs, ready to be multiplied.

    Args:
        sae: it may lie on another device.
        features: (m,) latents, each once, on any device.
        thresholds: (m,) on the device of the activations: only activations above count.
        whole: copies of the SAE that others use too; its own by default.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        features: torch.Tensor,
        thresholds: torch.Tensor,
        whole: DeviceCopies | None = None,
    ) -> None:
        device, rows = thresholds.device, features.to(sae.W_dec.device)
        self.sae, self.features, self.whole = sae, features.to(device), whole or DeviceCopies(sae)
        self.weight = sae.encoder.weight[rows].to(device)  # (m, d)
        shift = self.weight @ sae.b_dec.to(device) if sae.config.subtracts_b_dec else 0
        self.bias = sae.encoder.bias[rows].to(device) - shift
        self.decoder = sae.W_dec[rows].to(device)  # (m, d)
        self.modulation = None if sae.modulation is None else copy.deepcopy(sae.modulation).to(device)
        # Activations are never negative, so a threshold of 0 is that of the ReLU.
        self.thresholds = thresholds.clamp(min=0.0)
        if isinstance(sae.cutoff, torch.Tensor):
            self.thresholds = torch.maximum(self.thresholds, sae.cutoff[rows].to(self.thresholds))
        elif sae.cutoff is not None:
            self.thresholds = self.thresholds.clamp(min=sae.cutoff)

    def normalize(self, x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, RowScale | None]:
        """See `SparseAutoencoder.normalize`."""
        return self.sae.normalize(x) if self.modulation is None else (self.modulation(x, timestep), None)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations (N, m) of normalised rows (N, d)."""
        return F.linear(x, self.weight, self.bias)  # on a CPU four times as fast as addmm for few features

    def activations(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Activations (N, m) that are active and above their thresholds, 0 elsewhere.

        Args:
            x: (N, d) normalised rows.
            scores: `self.scores(x)`.
        """
        if self.sae.cutoff is not None:
            return torch.where(scores > self.thresholds, scores, 0.0)
        margin = _MARGIN * (1 + self.thresholds)
        rows = (scores > self.thresholds - margin).any(1).nonzero().flatten()
        acts = torch.zeros_like(scores)
        for part in rows.split(max(_CHUNK // self.sae.config.num_latents, 1)):
            acts[part] = self._exact(x[part])
        return acts

    def _exact(self, x: torch.Tensor) -> torch.Tensor:
        """The same by encoding in full: whether a feature is among the k largest is decided within one product, and
        among equal ones as the encoder decides."""
        sae = self.whole.on(x.device)
        scores = sae.scores(x)
        pattern = sae.active(scores)
        active = torch.zeros_like(scores, dtype=torch.bool)
        active.view(-1).index_fill_(0, pattern.rows * pattern.num_latents + pattern.indices, True)
        mine = scores[:, self.features]
        return torch.where(active[:, self.features] & (mine > self.thresholds), mine, 0.0)

    def added(
        self, x: torch.Tensor, acts: torch.Tensor, factors: torch.Tensor, scale: RowScale | None
    ) -> torch.Tensor:
        """Activations x (N, d), in their units and dtype, with the change that the factors make."""
        weights = acts * (factors - 1)
        if scale is not None:
            weights = weights * scale.std
        # Half precision is rounded once, at the end.
        exact = torch.promote_types(x.dtype, self.decoder.dtype)
        return torch.addmm(x.to(exact), weights.to(exact), self.decoder.to(exact)).to(x.dtype)


def edit_by_decoding(
    sae: SparseAutoencoder,
    x: torch.Tensor,
    change: Edit,
    *,
    error: Literal["kept", "reversed", "dropped"] = "kept",
    timestep: float | None = None,
) -> torch.Tensor:
    """Encode, edit and decode all features: what SAeUron does, and 4 times a block's cost.

    Args:
        x: (N, d).
        error: "kept": x - reconstruction is added, as it should be, equal to `ChosenFeatures.added`; "reversed": its
            negative is, as in all of SAeUron's published runs, which gives 2 * reconstruction - x where nothing is
            edited; "dropped".
        timestep: see `SparseAutoencoder.normalize`.
    """
    # The published hook ignores input_unit_norm.
    values = x.to(sae.W_dec.dtype)
    rows: torch.Tensor = values
    scale: RowScale | None = None
    if error == "kept":
        rows, scale = sae.normalize(values, timestep)
    code = sae.encode(rows)
    factors = code.acts.new_ones(len(x), sae.config.num_latents)
    factors[:, change.features] = change.factors.to(factors)
    thresholds = torch.full_like(factors[0], torch.inf)
    thresholds[change.features] = change.thresholds.to(thresholds)
    factor = torch.where(
        code.acts > thresholds[code.pattern.indices], code.pattern.gather(factors), torch.ones_like(code.acts)
    )
    recon = sae.decode(code)
    edited = sae.decode(code._replace(acts=code.acts * factor))
    if scale is not None:
        recon, edited = recon * scale.std + scale.mean, edited * scale.std + scale.mean
    if error == "kept":
        edited = edited + (values - recon)
    elif error == "reversed":
        edited = edited + (recon - values)
    return edited.to(x.dtype)
