"""Flow matching over frames: one schedule, of which only the frames being generated take part.

B batch, N tokens, F frames, n tokens of the frames being generated. sigma is the noise level in [0, 1], timestep is
1000 * sigma; a noisy frame is `x = (1 - sigma) * data + sigma * noise`, its velocity `noise - data` (rectified flow,
arXiv 2209.03003; in the form of SD3, arXiv 2403.03206, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from imgdit.layout import FrameLayout, put_rows, take_rows


def linear_sigmas(num_inference_steps: int) -> list[float]:
    """Evenly spaced noise levels 1 … 1/n, before any shift; the step to 0 follows.

    diffusers' own default ends at 0.001 and, with a shift, shifts that end twice: always give sigmas.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()


def calculate_shift(config: Mapping[str, Any], num_tokens: float) -> float | None:
    """Shift parameter mu for `set_timesteps`, linear in the generated tokens; `None` without dynamic shifting.

    FLUX's rule: `base_shift` at `base_image_seq_len` tokens, `max_shift` at `max_image_seq_len`; FLUX's numbers where
    a scheduler's configuration has none.

    Args:
        config: of any scheduler.
        num_tokens: those that are generated.
    """
    if not config.get("use_dynamic_shifting", False):
        return None
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (num_tokens - base_tokens)


def mix(data: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Noisy tokens (B, N, C) of frames at their own noise levels.

    Args:
        data, noise: (B, N, C).
        sigmas: (B, F) noise level of each frame.
        lengths: tokens of each frame.
    """
    if sigmas.shape != (data.shape[0], len(lengths)) or sum(lengths) != data.shape[1]:
        raise ValueError(
            f"for data of shape {tuple(data.shape)} sigmas must be ({data.shape[0]}, {len(lengths)}) and lengths add "
            f"up to {data.shape[1]}; got sigmas of shape {tuple(sigmas.shape)} and frames of {tuple(lengths)} tokens"
        )
    per_token = _per_token(sigmas, lengths)[..., None].to(data)
    return (1.0 - per_token) * data + per_token * noise


def _per_token(levels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Levels (B, F) of frames as levels (B, N) of their tokens."""
    parts = (levels[:, n : n + 1].expand(-1, length) for n, length in enumerate(lengths))
    return torch.cat(list(parts), dim=1)


def velocity(data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model learns to predict: the derivative of `mix` by sigma."""
    return noise - data


class MultiFrameFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` that moves only generated frames, and draws training noise per frame.

    With one frame, or without a layout, it is bitwise its parent, whose configuration it shares: each loads the
    other's folders.
    """

    def mu(self, num_tokens: float) -> float | None:
        """`calculate_shift` of this configuration. Frames that are only given do not count (OneDiffusion,
        OminiControl)."""
        return calculate_shift(self.config, num_tokens)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        layout: FrameLayout | None = None,
        frame_timesteps: torch.Tensor | None = None,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One Euler step; see the parent for what is not listed.

        Args:
            model_output: velocity, (B, n, C) with a layout.
            sample: (B, N, C) with a layout: all its frames, of which the clean ones come back bitwise as they are.
            generator: one, or one for each sample, of the noise that `stochastic_sampling` draws.
            per_token_timesteps: without a layout, (B, N) of samples (B, N, C), or (B, h, w) of latent grids
                (B, C, h, w), in [0, 1000]: each token or cell moves to the next lower level of the schedule. As in
                the parent, `model_output` is then the negative velocity, data - noise.
            layout: the frames; `None`: everything moves, any shape.
            frame_timesteps: (B, F) in [0, 1000], where the frames stand at their own noise levels: each moves to the
                next lower level of the schedule, one at 0 stays.
        """
        options: tuple = (s_churn, s_tmin, s_tmax, s_noise, generator)
        if layout is None:
            if frame_timesteps is not None:
                raise ValueError("frame_timesteps needs the layout that says which tokens belong to which frame")
            if per_token_timesteps is not None:
                return self._step_cells(model_output, timestep, sample, options, per_token_timesteps, return_dict)
            return super().step(model_output, timestep, sample, *options, None, return_dict)
        if per_token_timesteps is not None:
            raise ValueError("give noise levels per frame (frame_timesteps) or per token, not both")
        generated = take_rows(sample, layout.predicted)
        if model_output.shape != generated.shape:
            raise ValueError(
                f"model_output must be {tuple(generated.shape)}, the tokens of the frames being generated; "
                f"got {tuple(model_output.shape)}"
            )
        if frame_timesteps is None:
            (moved,) = super().step(model_output, timestep, generated, *options, None, return_dict=False)
        else:
            moved = self._step_frames(model_output, timestep, generated, options, layout, frame_timesteps)
        prev_sample = put_rows(sample, layout.predicted, moved)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _step_cells(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        options: tuple,
        timesteps: torch.Tensor,
        return_dict: bool,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """The parent's branch for levels of single tokens, which knows (B, N, C) only, for grids as well."""
        if sample.ndim == 3 and timesteps.shape == sample.shape[:2]:
            return super().step(model_output, timestep, sample, *options, timesteps, return_dict)
        if sample.ndim < 4 or timesteps.shape != (len(sample), *sample.shape[2:]):
            raise ValueError(
                "per_token_timesteps must be (B, N) for samples (B, N, C), or (B, h, w) for latent grids "
                f"(B, C, h, w); got {tuple(timesteps.shape)} for samples of shape {tuple(sample.shape)}"
            )
        output, tokens = (x.flatten(2).transpose(1, 2) for x in (model_output, sample))  # (B, N, C)
        (moved,) = super().step(output, timestep, tokens, *options, timesteps.flatten(1), return_dict=False)
        prev_sample = moved.transpose(1, 2).unflatten(2, sample.shape[2:])
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _step_frames(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        generated: torch.Tensor,
        options: tuple,
        layout: FrameLayout,
        frame_timesteps: torch.Tensor,
    ) -> torch.Tensor:
        per_frame = take_rows(layout.expand(frame_timesteps), layout.predicted_frames)
        per_token = _per_token(per_frame, layout.predicted_lengths)
        # The parent's branch for per-token levels has dt = current - next, the opposite sign of its ordinary step.
        sign = 1 if self.config.stochastic_sampling else -1
        (moved,) = super().step(sign * model_output, timestep, generated, *options, per_token, return_dict=False)
        return moved.to(model_output.dtype)

    def sample_sigmas(
        self,
        batch_size: int,
        num_frames: int = 1,
        *,
        distribution: Literal["logit_normal", "uniform"] = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        shared: bool = False,
        clean: float = 0.0,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Noise levels for training, (B, F) in [0, 1], shifted as this scheduler shifts its steps.

        Args:
            distribution: "logit_normal" (SD3, arXiv 2403.03206, equation 19) or "uniform".
            mean, std: of the normal behind the logit-normal.
            shared: one level for all frames of a sample instead of one each.
            clean: fraction of frames that get level 0, as if they conditioned. One frame of a sample always keeps its
                noise.
            num_tokens: generated tokens, for dynamic shifting (SD3, equation 23).
            generator: source of every draw.
        """
        if distribution not in ("logit_normal", "uniform"):
            raise ValueError(f"distribution must be 'logit_normal' or 'uniform', got {distribution!r}")
        if not 0.0 <= clean <= 1.0:
            raise ValueError(f"clean is a fraction of frames in [0, 1], got {clean}")
        device = torch.device(device or "cpu")
        shape = (batch_size, 1 if shared else num_frames)
        normal = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if distribution == "logit_normal":
            sigmas = torch.sigmoid(mean + std * normal)
        else:
            sigmas = torch.special.ndtr(normal)  # uniform; one kind of draw keeps CPU generators usable with CUDA
        sigmas = self.shifted(sigmas, num_tokens).expand(batch_size, num_frames)
        if clean > 0.0 and num_frames > 1:
            scores = torch.special.ndtr(
                randn_tensor((batch_size, num_frames), generator=generator, device=device, dtype=torch.float32)
            )
            is_clean = scores < clean
            is_clean.scatter_(1, scores.argmax(dim=1, keepdim=True), False)
            sigmas = sigmas.masked_fill(is_clean, 0.0)
        return sigmas.clone()

    def shifted(self, sigmas: torch.Tensor, num_tokens: int | None) -> torch.Tensor:
        """Noise levels shifted as this scheduler shifts its steps.

        Args:
            sigmas: in [0, 1].
            num_tokens: generated tokens, for dynamic shifting.

        Raises:
            ValueError: dynamic shifting without `num_tokens`.
        """
        if not self.config.use_dynamic_shifting:
            return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        if num_tokens is None:
            raise ValueError("this scheduler shifts by the number of generated tokens; pass num_tokens")
        return self.time_shift(self.mu(num_tokens), 1.0, sigmas)
