"""A naive reference of conditions: all rows in one sequence, each with its own noise level and its owner's LoRA, and
attention by an explicit bias.

B batch, T text tokens, S rows [text, image, the pipeline's references, conditions], D width, H heads, d features of a
head.
"""

import math

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer


class DenseRows:
    """The rows of one pass.

    Args:
        lengths: rows of the text, then of each of the model's own frames.
        conditions: encoded, in the order in which they ride.
        heads: of queries, keys and values alike.
        key_mask: boolean (B, rows of the model's own), False on padding; or floating, whose products of rows and
            columns are added.
    """

    def __init__(self, lengths, conditions=(), *, heads, key_mask=None):
        self.lengths = [*lengths, *(item.frame.length for item in conditions)]
        self.owners = [None] * len(lengths) + [item.condition.adapter for item in conditions]
        self.segment = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        self.text = slice(0, lengths[0])
        self.image = slice(lengths[0], lengths[0] + lengths[1])
        """Rows of the image that is generated."""
        self.frames = slice(lengths[0], None)
        """Rows of all but the text."""
        self.conditions, self.heads = conditions, heads
        self.bias = self._bias(len(lengths))
        if key_mask is not None:
            mask = F.pad(key_mask, (0, len(self.segment) - key_mask.shape[1]), value=1)
            if mask.is_floating_point():
                seen = mask[:, :, None] * mask[:, None]
            else:
                seen = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)[:, None]
            self.bias = self.bias + seen[:, None]

    def _bias(self, own):
        """(S, S) log strengths, -inf where a row does not see."""
        bias = torch.zeros(len(self.lengths), len(self.lengths))
        for i, item in enumerate(self.conditions, start=own):
            bias[i] += math.log(item.condition.strength)
            bias[:, i] += math.log(item.condition.strength)
        for i, item in enumerate(self.conditions, start=own):
            bias[i, own:] = -math.inf
            if item.frame.sees == "self":
                bias[i] = -math.inf
            bias[i, i] = 0.0
        return bias[self.segment][:, self.segment]

    def tokens(self, own):
        """(B, rows, C) of the model's own frames, the conditions' behind them."""
        return torch.cat([own, *(item.tokens.expand(len(own), -1, -1) for item in self.conditions)], dim=1)

    def linear(self, module, x, rows=slice(None)):
        """A linear layer on (B, rows, …), each adapter on its conditions' rows."""
        if not isinstance(module, LoraLayer):
            return module(x)
        out = module.base_layer(x)
        for name in dict.fromkeys(owner for owner in self.owners if owner in module.lora_A):
            mine = torch.tensor([self.owners[i] == name for i in self.segment[rows].tolist()])[None, :, None]
            out = out + mine * module.scaling[name] * (x @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T)
        return out

    def each(self, vectors):
        """(B, S, …) from the vectors (B, …) of the segments."""
        return torch.stack(vectors, dim=1)[:, self.segment]

    def ids(self, axes=3):
        """Positions (n, axes) of each condition's tokens."""
        return [F.pad(item.frame.ids(), (0, axes - 3)) for item in self.conditions]

    def split(self, x, norm=None):
        """(B, rows, D) to (B, rows, H, d), with the norm of a head."""
        x = x.unflatten(-1, (self.heads, -1))
        return x if norm is None else norm(x)

    def attend(self, query, key, value, angle, *, halves=False):
        """(B, S, D) from (B, S, H, d) and the angles (S, d/2) or (B, S, d/2) that neighbouring features turn by.

        Args:
            halves: features i and i + d/2 are a pair, and the angles (S, d) or (B, S, d) are those of each feature.
        """
        angle = angle.unsqueeze(-2)

        def turn(x):
            if halves:
                a, b = x.chunk(2, dim=-1)
                return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

        logits = torch.einsum("bihd,bjhd->bhij", turn(query), turn(key)) / query.shape[-1] ** 0.5
        return torch.einsum("bhij,bjhd->bihd", (logits + self.bias).softmax(-1), value).flatten(2)


def angles(ids, axes_dims, theta):
    """(S, d/2) from positions (S, axes)."""
    frequencies = [theta ** -(torch.arange(0, dim, 2).double() / dim) for dim in axes_dims]
    parts = [ids[:, axis, None].double() * one for axis, one in enumerate(frequencies)]
    return torch.cat(parts, dim=-1).float()


def modulated(x, shift, scale):
    """LayerNorm without gains, shifted and scaled."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
