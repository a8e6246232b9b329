"""What sparse autoencoders cost: a training step against dense arithmetic, and a hook against the block it sits on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from imgdit.benchmarks.speed.timing import Comparison, compare
from imgdit.frames import Frame
from imgdit.kernels import prefer_onednn
from imgdit.layout import FrameLayout
from imgdit.models.blocks import BlockPlan, MMDiTBlock
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.concepts import ConceptSelection
from imgdit.sae.config import SAEConfig
from imgdit.sae.edits import Edit, edit_by_decoding
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.streams import Tokens
from imgdit.sae.training import ADAM_EPS, SAETrainConfig, SAETraining
from imgdit.sae.unlearning import Intervention

# The sizes of the comparison: a small model's width, 16 features per channel.
WIDTH, LATENTS, ACTIVE, BATCH = 256, 4096, 32, 4096
TEXT, TOKENS, CHOSEN = 32, 256, 3


def dense_step(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """A training step as SAeUron computes it: the code as a dense (N, L), gradients by dense products, and the numbers
    it logs."""
    sae.normalize_decoder()
    scores = torch.relu(sae.scores(x))
    top = scores.topk(sae.config.k, dim=1, sorted=False)
    code = torch.zeros_like(scores).scatter(1, top.indices, top.values)
    out = code @ sae.W_dec + sae.b_dec
    error, spread = out - x, x - x.mean(0)
    fvu = error.square().sum() / spread.square().sum()
    with torch.no_grad():
        (scores > 0).float().sum(1).mean()  # l0_loss
        error.square().mean(), 1 - error.square().sum(1) / spread.square().sum(1)  # l2_loss, explained_variance
    fvu.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    sae.project_decoder_gradient()
    optimizer.step()
    optimizer.zero_grad()
    return fvu.detach()


def training_comparison(*, rounds: int = 5, device: torch.device | str = "cpu") -> Comparison:
    """Our training step against the same with dense decode and dense gradients, from the same weights and data."""
    generator = torch.Generator().manual_seed(0)
    code = torch.rand(BATCH, WIDTH, generator=generator) * (torch.rand(BATCH, WIDTH, generator=generator) < 0.1)
    x = (code @ torch.randn(WIDTH, WIDTH, generator=generator)).to(device)
    config = SAEConfig(WIDTH, LATENTS, k=ACTIVE)
    saes = [SparseAutoencoder(config, generator=torch.Generator().manual_seed(1)).to(device) for _ in range(2)]
    for sae in saes:
        with torch.no_grad():
            sae.b_dec.copy_(x.mean(0))
    optimizer = torch.optim.Adam(saes[1].parameters(), lr=4e-4, eps=ADAM_EPS, fused=True)
    options = SAETrainConfig(lr=4e-4, schedule="constant", auxk_alpha=0.0, standardize=False)
    training = SAETraining(saes[0], options, steps=1000)

    @torch.enable_grad()
    def ours() -> torch.Tensor:
        return torch.tensor(training.step(x)["fvu"])

    @torch.enable_grad()
    def other() -> torch.Tensor:
        return dense_step(saes[1], optimizer, x).cpu()

    return compare(
        f"training step, {BATCH} vectors of {WIDTH}, {LATENTS} latents, k {ACTIVE}",
        "dense decode and gradients",
        ours,
        other,
        rounds=rounds,
        device=device,
    )


def hook_comparisons(*, rounds: int = 15, device: torch.device | str = "cpu") -> Iterator[Comparison]:
    """What a hook adds to a double-stream block, over the block's own time.

    Two guidance halves of 256 tokens, three chosen features. The exact delta encodes in full those tokens that may
    show the concept: the thresholds are set so that 10 % or 2 % do. With a learned threshold none is.
    """
    torch.manual_seed(0)
    block = MMDiTBlock(WIDTH, WIDTH // 64, 4.0, qk_norm=True, dual_attention=False, context_pre_only=False).to(device)
    prefer_onednn(block)
    image = torch.randn(2, TOKENS, WIDTH, device=device)
    text, vector = torch.randn(2, TEXT, WIDTH, device=device), torch.randn(2, 1, WIDTH, device=device)
    layout = FrameLayout.build([Frame((16, 16))], TEXT)
    plan = BlockPlan(layout.text_lengths, layout.lengths, layout.groups, layout.image_groups)
    half = (slice(0, 1), slice(1, 2))
    call = DenoiserCall(500.0, 2, half[1], half[0], (slice(0, TOKENS),), ((16, 16),), TEXT)
    tokens = Tokens(image, call.grids, call)

    def run_block() -> torch.Tensor:
        return block(image, text, vector, vector, None, plan)[0]

    for name, fraction, threshold in (
        ("exact delta, 10 % of the tokens show the concept", 0.10, False),
        ("exact delta, 2 % of the tokens show the concept", 0.02, False),
        ("learned threshold", 0.10, True),
    ):
        sae = SparseAutoencoder(SAEConfig(WIDTH, LATENTS, k=ACTIVE)).to(device).requires_grad_(False)
        rows = image.reshape(-1, WIDTH)
        scores = sae.scores(rows)
        if threshold:
            sae.threshold = float(scores.flatten().topk(ACTIVE * len(rows)).values[-1])
        intervention = Intervention(sae, [[_selection(scores, fraction)]], "scale", -1.0, (0.0, 1000.0), "both", False)

        def hooked(intervention: Intervention = intervention) -> torch.Tensor:
            changed = intervention(tokens)
            intervention.sums = None
            assert changed is not None
            return changed

        yield _over_block(name, hooked, run_block, rounds, device)
        if name.startswith("exact delta, 10"):
            chosen = intervention.plans[call.timestep]
            assert chosen is not None
            change = Edit(chosen.chosen.features, chosen.factors, chosen.chosen.thresholds)

            def published(sae: SparseAutoencoder = sae, change: Edit = change) -> torch.Tensor:
                return edit_by_decoding(sae, image.reshape(-1, WIDTH), change).view(image.shape)

            yield _over_block("encode, edit, decode (as published)", published, run_block, rounds, device)


def _over_block(
    name: str, hook: Callable[[], torch.Tensor], block: Callable[[], torch.Tensor], rounds: int, device: Any
) -> Comparison:
    row = compare(name, f"MMDiT block, d {WIDTH}, 2 x {TOKENS} tokens", hook, block, rounds=rounds, device=device)
    return row._replace(difference=float("nan"))  # a hook and a block compute different things


def _selection(scores: torch.Tensor, fraction: float) -> ConceptSelection:
    """Three features, with thresholds that a fraction of the tokens passes with any of them."""
    features = torch.arange(CHOSEN)
    strongest = scores[:, :CHOSEN].amax(1)
    threshold = float(strongest.quantile(1 - fraction).clamp(min=0.0))
    return ConceptSelection(
        name="concept",
        timesteps=(500.0,),
        features=features,
        selected=torch.ones(1, CHOSEN, dtype=torch.bool),
        means=torch.ones(1, CHOSEN),
        thresholds=torch.full((1, CHOSEN), threshold),
        replacement=torch.zeros(1, WIDTH),
    )
