import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC
from peft import LoraConfig
from tiny import randomize, rope_config, tiny_mmdit, tiny_vae
from training.toy import LAYOUT, batch

from imgdit import Frame, FrameLayout, MultiFrameFlowMatchScheduler
from imgdit.training.batches import Images, Text
from imgdit.training.objectives.autoencoder import autoencoder
from imgdit.training.objectives.condition_lora import condition_lora
from imgdit.training.objectives.flow_matching import flow_matching

SCHEDULER = MultiFrameFlowMatchScheduler()
GIVEN = FrameLayout.build([Frame((2, 2)), Frame((2, 2), sigma=0.0, index=1.0)], 4)
CONDITION = FrameLayout.build([Frame((2, 2)), Frame((2, 2), sigma=0.0, adapter="canny", sees="joint")], 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Oracle(torch.nn.Module):
    """Knows the clean data, so it predicts the velocity of any frame that has noise exactly; keeps what it saw."""

    def __init__(self, batch, error=0.0):
        super().__init__()
        self.batch, self.error = batch, error
        self.config = SimpleNamespace(timestep_scale=1000.0, guidance_embeds=False)

    def forward(self, tokens, text, pooled, sigmas, *, guidance, encoder_attention_mask, layout):
        self.seen = SimpleNamespace(
            tokens=tokens, text=text, pooled=pooled, sigmas=sigmas, mask=encoder_attention_mask
        )
        per_token = sigmas.repeat_interleave(torch.tensor(layout.lengths), dim=1)[..., None]
        velocity = (tokens - self.batch.tokens) / per_token  # x = data + sigma (noise - data)
        velocity = torch.cat([velocity[:, rows] for rows in layout.predicted], dim=1)
        error = torch.as_tensor(self.error, dtype=velocity.dtype)
        return SimpleNamespace(sample=velocity + error)


@pytest.mark.parametrize("layout", [LAYOUT, GIVEN])
@pytest.mark.parametrize("clean", [0.0, 0.5])
def test_a_perfect_prediction_has_no_loss(layout, clean):
    data = batch(16, layout)
    output = flow_matching(Oracle(data), SCHEDULER, data, seeded(), clean=clean)
    assert output.loss < 1e-8


def test_the_loss_is_the_squared_error():
    data = batch(16)
    assert flow_matching(Oracle(data, error=0.5), SCHEDULER, data, seeded()).loss == pytest.approx(0.25, rel=1e-4)


def test_frames_that_do_not_count_contribute_nothing():
    data = batch(8)
    error = torch.zeros(8, 1)
    error[4:] = 3.0  # the second frame
    counts = torch.tensor([[True, False]]).expand(8, 2)
    output = flow_matching(Oracle(data, error), SCHEDULER, dataclasses.replace(data, counts=counts), seeded())
    assert output.loss < 1e-8
    assert flow_matching(Oracle(data, error), SCHEDULER, data, seeded()).loss == pytest.approx(4.5, rel=1e-4)
    nothing = dataclasses.replace(data, counts=torch.zeros(8, 2, dtype=torch.bool))
    assert flow_matching(Oracle(data, error), SCHEDULER, nothing, seeded()).loss == 0


def test_each_sample_weighs_the_same():
    """A sample with one counted frame is not outweighed by one with two."""
    data = batch(2)
    counts = torch.tensor([[True, True], [True, False]])
    error = torch.tensor([1.0, 3.0])[:, None, None]
    output = flow_matching(Oracle(data, error), SCHEDULER, dataclasses.replace(data, counts=counts), seeded())
    assert output.loss == pytest.approx((1 + 9) / 2, rel=1e-4)


def test_noise_levels_per_frame_reach_tokens_and_model():
    data = batch(2)
    sigmas = torch.tensor([[0.2, 0.9], [1.0, 0.5]])
    noise = torch.randn(data.tokens.shape, generator=seeded())
    oracle = Oracle(data)
    flow_matching(oracle, SCHEDULER, dataclasses.replace(data, sigmas=sigmas, noise=noise), seeded())
    assert torch.equal(oracle.seen.sigmas, sigmas)
    for sample in range(2):
        for frame, rows in enumerate(LAYOUT.rows):
            level = sigmas[sample, frame]
            expected = (1 - level) * data.tokens[sample, rows] + level * noise[sample, rows]
            torch.testing.assert_close(oracle.seen.tokens[sample, rows], expected)


def test_given_frames_stay_as_they_are():
    data = batch(8, GIVEN)
    oracle = Oracle(data)
    flow_matching(oracle, SCHEDULER, data, seeded())
    assert not oracle.seen.sigmas[:, 1].any() and oracle.seen.sigmas[:, 0].all()
    assert torch.equal(oracle.seen.tokens[:, 4:], data.tokens[:, 4:])


def test_share_of_clean_frames():
    data = batch(4096)
    oracle = Oracle(data)
    flow_matching(oracle, SCHEDULER, data, seeded(), clean=0.4)
    clean = oracle.seen.sigmas == 0
    # Both frames are drawn clean in 0.16 of the samples, and one of them then keeps its noise.
    assert clean.float().mean().item() == pytest.approx(0.4 - 0.08, abs=0.02)
    assert not clean.all(dim=1).any()


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_share_of_dropped_texts(fraction):
    data = batch(4096)
    empty = Text(torch.full((1, 4, 32), 7.0), torch.full((1, 32), 7.0), torch.tensor([[True, False, False, False]]))
    oracle = Oracle(data)
    flow_matching(oracle, SCHEDULER, dataclasses.replace(data, empty=empty), seeded(), text_dropout=fraction)
    dropped = (oracle.seen.pooled == 7).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(fraction, abs=0.03)
    assert torch.equal((oracle.seen.text == 7).all(dim=2).all(dim=1), dropped)  # both at once
    assert torch.equal(oracle.seen.mask.sum(dim=1), torch.where(dropped, 1, 4))


def test_share_of_dropped_given_frames():
    data = batch(4096, GIVEN)
    oracle = Oracle(data)
    flow_matching(oracle, SCHEDULER, data, seeded(), condition_dropout=0.3)
    dropped = oracle.seen.sigmas[:, 1] == 1
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (oracle.seen.sigmas[~dropped, 1] == 0).all()
    rest = (oracle.seen.tokens - data.tokens)[dropped, 4:]
    assert (rest.abs().amax(dim=(1, 2)) > 1).all()  # noise, nothing of the frame
    correlation = (oracle.seen.tokens[dropped, 4:] * data.tokens[dropped, 4:]).mean()
    assert abs(correlation) < 0.02


def test_evaluation_drops_nothing():
    data = batch(64, GIVEN)
    oracle = Oracle(data).eval()
    flow_matching(oracle, SCHEDULER, data.at(0.3), seeded(), text_dropout=1.0, condition_dropout=1.0, clean=1.0)
    assert torch.equal(oracle.seen.sigmas, torch.tensor([[0.3, 0.0]]).expand(64, 2))
    assert torch.equal(oracle.seen.text, data.text.embeddings)


def test_seed_decides_everything():
    data, model = batch(4), tiny_mmdit().train()
    first, again, other = (flow_matching(model, SCHEDULER, data, seeded(s), clean=0.3).loss for s in (1, 1, 2))
    assert first == again != other


def test_levels_reach_a_model_that_counts_to_1000():
    data = batch(2)
    levels = dataclasses.replace(data, sigmas=torch.tensor([[0.25, 1.0], [0.5, 0.125]]))
    models = [tiny_mmdit(rope_config(timestep_scale=scale)) for scale in (1.0, 1000.0)]
    a, b = (flow_matching(model, SCHEDULER, levels, seeded()).loss for model in models)
    torch.testing.assert_close(a, b)


def test_guidance_reaches_a_distilled_model():
    data, model = batch(2), tiny_mmdit(rope_config(guidance_embeds=True))
    a, b = (flow_matching(model, SCHEDULER, data, seeded(), guidance=g).loss for g in (1.0, 3.5))
    assert a != b


def test_condition_lora_trains_the_adapter_on_condition_rows_only():
    model = tiny_mmdit().train().requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), adapter_name="canny")
    randomize(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad))
    data = batch(3, CONDITION)
    output = condition_lora(model, SCHEDULER, data, seeded(), condition_dropout=0.0)
    output.loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name and "canny" in name for name in trained)
    assert any(grad is not None and grad.any() for grad in trained.values())
    # Where no condition can be seen, its adapter changes nothing: it does not act on the target's rows.
    blind = FrameLayout.build(CONDITION.frames, 4, visible=torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool())
    alone = dataclasses.replace(data, layout=blind)
    with_adapter = condition_lora(model, SCHEDULER, alone, seeded(), condition_dropout=0.0).loss
    model.disable_adapters()
    assert torch.equal(with_adapter, condition_lora(model, SCHEDULER, alone, seeded(), condition_dropout=0.0).loss)


def test_condition_lora_drops_to_the_empty_image():
    data = dataclasses.replace(batch(2048, CONDITION), empty_tokens=torch.full((8, 16), 9.0))
    oracle = Oracle(data)
    output = condition_lora(oracle, SCHEDULER, data, seeded(), condition_dropout=0.25)
    assert output.loss < 1e-6  # the target is never touched
    dropped = (oracle.seen.tokens[:, 4:] == 9).all(dim=2).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not oracle.seen.sigmas[:, 1].any()


@pytest.mark.parametrize(
    ("change", "objective", "options", "message"),
    [
        ({"empty": None}, flow_matching, {}, r"text_dropout=0.1 needs the empty text"),
        ({}, flow_matching, {"text_dropout": 1.5}, r"text_dropout is a fraction in \[0, 1\], got 1.5"),
        ({}, condition_lora, {}, r"needs a layout with a clean frame that an adapter reads"),
        ({"layout": FrameLayout.pack([LAYOUT, LAYOUT])}, flow_matching, {}, r"got a packed one of 2 scenes"),
        ({"tokens": torch.zeros(3, 5, 16)}, flow_matching, {}, r"tokens must be \(batch, 8, channels\).*\(3, 5, 16\)"),
        ({"counts": torch.ones(3, 1).bool()}, flow_matching, {}, r"counts must be \(3, 2\).*got \(3, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(change, objective, options, message):
    data = dataclasses.replace(batch(3), **change)
    with pytest.raises(ValueError, match=message):
        objective(Oracle(data), SCHEDULER, data, seeded(), **options)


def test_autoencoder_terms():
    vae = tiny_vae().train()
    images = Images(torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1)
    output = autoencoder(vae, None, images, seeded(), square_weight=2.0, gradient_weight=0.5, kl_weight=0.1)
    terms = output.metrics
    expected = terms["pixel"] + 2.0 * terms["square"] + 0.5 * terms["edges"] + 0.1 * terms["kl"]
    torch.testing.assert_close(output.loss, expected)
    posterior = vae.encode(images.pixels).latent_dist
    decoded = vae.decode(posterior.sample(generator=seeded())).sample
    torch.testing.assert_close(terms["pixel"], (decoded - images.pixels).abs().mean())
    torch.testing.assert_close(terms["square"], (decoded - images.pixels).square().mean())
    torch.testing.assert_close(terms["kl"], posterior.kl().mean() / posterior.mean[0].numel())
    output.loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_autoencoder_weight_and_perfection():
    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.quant_conv = torch.nn.Conv2d(3, 8, 1), None
            torch.nn.init.zeros_(self.encoder.weight), torch.nn.init.zeros_(self.encoder.bias)

        def forward(self, pixels, sample_posterior, generator):
            self.encoder(pixels)  # mean 0, log-variance 0: a normal distribution
            return SimpleNamespace(sample=pixels)

    images = Images(torch.rand(2, 3, 16, 16))
    assert autoencoder(Perfect(), None, images, None).loss == 0
    vae = tiny_vae()
    plain = autoencoder(vae, None, images, None).metrics["pixel"]
    weighted = autoencoder(vae, None, dataclasses.replace(images, weight=torch.full((2, 1, 16, 16), 2.0)), None)
    torch.testing.assert_close(weighted.metrics["pixel"], 2 * plain)


def test_autoencoder_dc_draws_its_latent():
    """A latent without a distribution of its own counts as N(z, latent_noise²): drawn in training, z in evaluation."""
    torch.manual_seed(0)
    blocks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
        ("block_types", "ResBlock"), ("block_out_channels", (8, 8)), ("layers_per_block", (1, 1)),
        ("qkv_multiscales", ((), ())),
    )}  # fmt: skip
    model = AutoencoderDC(latent_channels=4, attention_head_dim=8, downsample_block_type="conv", **blocks)
    images = Images(torch.rand(2, 3, 16, 16) * 2 - 1)
    model.train()
    a, b = (autoencoder(model, None, images, seeded(), latent_noise=0.5) for _ in range(2))
    other = autoencoder(model, None, images, seeded(1), latent_noise=0.5)
    assert a.loss == b.loss != other.loss
    z = model.encode(images.pixels).latent
    expected = 0.5 * (z.square() + 0.25 - 1 - math.log(0.25)).mean()
    torch.testing.assert_close(a.metrics["kl"], expected.detach())
    assert other.metrics["kl"] == a.metrics["kl"], "noise is drawn behind the latent"
    model.eval()
    plain = autoencoder(model, None, images, seeded(), latent_noise=0.5)
    restored = model(images.pixels).sample
    torch.testing.assert_close(plain.metrics["pixel"], (restored - images.pixels).abs().mean().detach())
