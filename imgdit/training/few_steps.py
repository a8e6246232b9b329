"""What a few-step student learns from: the path of its teacher's guided ODE, and the straight line over a part of it.

B batch, N tokens, C channels. sigma is the noise level in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from imgdit.layout import FrameLayout
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler, linear_sigmas
from imgdit.training.batches import Text
from imgdit.training.objectives.frames import predict_velocity


def path_levels(scheduler: MultiFrameFlowMatchScheduler, steps: int, num_tokens: int) -> list[float]:
    """The noise levels 1 … 0 (steps + 1) that a pipeline with this scheduler goes through in so many steps.

    Args:
        num_tokens: that are generated, for dynamic shifting.
    """
    return [*scheduler.shifted(torch.tensor(linear_sigmas(steps)), num_tokens).tolist(), 0.0]


def guided_velocity(
    model: torch.nn.Module,
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    text: Text,
    empty: Text | None,
    layout: FrameLayout,
    guidance_scale: float,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Velocity (B, N, C) float32 of one frame under classifier-free guidance (arXiv 2207.12598), both predictions in
    one batch.

    Args:
        sigmas: (B, 1).
        empty: the empty text, B = 1 and as long as `text`; `None` with a `guidance_scale` of 1.
        guidance: input of guidance-distilled models.
    """
    if guidance_scale == 1.0:
        return predict_velocity(model, noisy, text, sigmas, layout, guidance).float()
    assert empty is not None
    mask = None
    if text.mask is not None and empty.mask is not None:
        mask = torch.cat([empty.mask.expand(len(noisy), -1), text.mask])
    both = Text(
        torch.cat([empty.embeddings.expand(len(noisy), -1, -1), text.embeddings]),
        torch.cat([empty.pooled.expand(len(noisy), -1), text.pooled]),
        mask,
    )
    found = predict_velocity(model, noisy.repeat(2, 1, 1), both, sigmas.repeat(2, 1), layout, guidance)
    negative, positive = found.float().chunk(2)
    return negative + guidance_scale * (positive - negative)


def ode_path(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], start: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """States (B, K + 1, N, C) of the ODE dx/dsigma = velocity at falling noise levels, the start first.

    Two-step Adams-Bashforth with steps of any size, the first one Euler's: one velocity per level, error of second
    order (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, section III.5).

    Args:
        velocity: of states (B, N, C) at levels (B, 1).
        start: (B, N, C) at the first levels.
        levels: (B, K + 1).
    """
    states, before = [start], None
    for k in range(levels.shape[1] - 1):
        now = velocity(states[-1], levels[:, k : k + 1])
        step = (levels[:, k + 1] - levels[:, k])[:, None, None]
        along = now
        if before is not None:
            ratio = step / (2 * before[1])
            along = (1 + ratio) * now - ratio * before[0]
        states.append(states[-1] + step * along)
        before = (now, step)
    return torch.stack(states, dim=1)


def straight_line(
    before: torch.Tensor, after: torch.Tensor, level: torch.Tensor, next_level: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The data and noise, each (B, N, C), between which the line through two states of a path runs.

    With them `mix` at `level` is the first state, and `velocity` is what leads to the second one in one Euler step: a
    student that learns flow matching on them learns the path's mean velocity from one level to the next.

    Args:
        before, after: (B, N, C) states.
        level, next_level: (B, 1) their noise levels.
    """
    velocity = (before - after) / (level - next_level)[..., None]
    data = before - level[..., None] * velocity
    return data, data + velocity
