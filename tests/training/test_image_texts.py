"""Training of texts about images: what is masked, what is frozen, and both kinds of passes."""

import dataclasses

import pytest
import torch

from imgdit import Frame, FrameLayout, MMDiT
from imgdit.io.order import Batches
from imgdit.models.text_head import add_text_head, load_text_head, save_text_head
from imgdit.pipelines.image_text_reading import ImageTextReader
from imgdit.schedulers.flow_match import MultiFrameFlowMatchScheduler
from imgdit.training import train
from imgdit.training.batches import Batch, Text
from imgdit.training.build import add_adapter, build_model
from imgdit.training.image_texts import image_text_logits
from imgdit.training.masked_text_loss import antithetic_times
from imgdit.training.objectives.joint import joint
from imgdit.training.objectives.masked_text import masked_text
from imgdit.training.recipe import AdapterConfig, parse_recipe
from imgdit.training.sources import InTurn, only_batch
from imgdit.training.text_rows import ImageTexts, TextRow, text_rows

MASK, EOS = 19, 1
CONFIG = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4), "qk_norm": "rms_norm",
}  # fmt: skip


def model():
    torch.manual_seed(0)
    plain = MMDiT(**CONFIG)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    add_text_head(plain, 20, rope_axis=2, embeds=True, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(plain.text_proj_out.weight, std=0.2)  # it begins with zeros, which pass no gradient on
    return plain


def texts(seed=0, images=2):
    generator = torch.Generator().manual_seed(seed)
    rows = [TextRow([], [5, 6, 7]), TextRow([8, 9], [10]), TextRow([8, 3], [4])] * images
    tokens = torch.randn(images, 4, 8, generator=generator)
    return ImageTexts(tokens, (2, 2), text_rows(rows, 6, EOS), torch.randn(1, 6, generator=generator))


def frames(seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = Text(torch.randn(2, 3, 12, generator=generator), torch.randn(2, 6, generator=generator))
    layout = FrameLayout.build([Frame((2, 2))], 3)
    return Batch(torch.randn(2, 4, 8, generator=generator), layout, text, text.rows(slice(0, 1)))


def seen_ids(model):
    found = []
    model.text_embedder.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    return found


@pytest.mark.parametrize("complement", [False, True])
def test_questions_are_never_masked_and_ends_are(complement):
    net, batch = model(), texts()
    found = seen_ids(net)
    output = masked_text(net, None, batch, torch.Generator().manual_seed(1), complement=complement, mask_token_id=MASK)
    (ids,) = found
    masked = ids == MASK
    copies = 2 if complement else 1
    assert not (masked & batch.texts.prompt.repeat(copies, 1)).any()
    assert masked[:, -1].any(), "end tokens that pad a row are targets"
    if complement:
        first, second = masked.chunk(2)
        assert torch.equal(first ^ second, batch.texts.counted)
    output.loss.backward()
    assert net.text_proj_out.weight.grad.abs().sum() > 0 and net.text_embedder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("antithetic", [False, True])
def test_answers_can_be_masked_whole_and_captions_are_not(antithetic):
    net, batch = model(), texts(images=8)
    found = seen_ids(net)
    options = {"mask_token_id": MASK, "antithetic": antithetic, "least_answer_rate": 1.0}
    masked_text(net, None, batch, torch.Generator().manual_seed(1), **options)
    (ids,) = found
    asked, masked = batch.texts.prompt.any(1), ids == MASK
    assert torch.equal(masked[asked], batch.texts.counted[asked])
    assert not torch.equal(masked[~asked], batch.texts.counted[~asked])


def test_one_token_is_masked_of_answers_the_first_and_of_captions_any():
    net, batch = model(), texts(images=8)
    found = seen_ids(net)
    options = {"mask_token_id": MASK, "weight": "rate_and_length"}
    output = masked_text(net, None, batch, torch.Generator().manual_seed(1), one_token_rate=1.0, **options)
    (ids,) = found
    asked, masked, counted = batch.texts.prompt.any(1), ids == MASK, batch.texts.counted
    assert (masked.sum(1) == 1).all() and not (masked & ~counted).any()
    assert torch.equal(masked[asked].int().argmax(1), counted[asked].int().argmax(1))
    ends = batch.texts.ids == batch.texts.ids[:, -1:]
    assert not (masked & ends & ends.roll(1, 1))[:, 1:].any(), "padding is not masked"
    assert len(set(masked[~asked].int().argmax(1).tolist())) > 1
    output.loss.backward()
    with pytest.raises(ValueError, match="no complement"):
        masked_text(net, None, batch, None, one_token_rate=0.5, complement=True, **options)
    some = seen_ids(net)
    masked_text(net, None, batch, torch.Generator().manual_seed(1), one_token_rate=0.5, **options)
    several = (some[-1] == MASK).sum(1)
    assert (several == 1).any() and (several > 1).any()


def test_a_text_is_about_its_own_image():
    net, batch = model(), texts()
    other = dataclasses.replace(batch, tokens=torch.cat([batch.tokens[:1], batch.tokens[1:] + 1]))
    of_first = dataclasses.replace(batch.texts, counted=batch.texts.counted & (torch.arange(6) < 3)[:, None])

    def loss(batch):
        return masked_text(net, None, batch, torch.Generator().manual_seed(1), weight="none", mask_token_id=MASK).loss

    assert loss(dataclasses.replace(batch, texts=of_first)) == loss(dataclasses.replace(other, texts=of_first))
    assert loss(batch) != loss(other)


def test_without_images_texts_depend_on_themselves_alone():
    net, batch = model(), texts()
    other = dataclasses.replace(batch, tokens=batch.tokens + 1)

    def loss(batch, dropout):
        generator = torch.Generator().manual_seed(1)
        return masked_text(net, None, batch, generator, image_dropout=dropout, mask_token_id=MASK).loss

    assert loss(batch, 1.0) == loss(other, 1.0) and loss(batch, 0.0) != loss(other, 0.0)
    read = ImageTextReader(net, net.text_embedder, None, batch.pooled, torch.ones(6, 6, dtype=torch.bool), MASK)
    ids = torch.full((6, 6), MASK)
    found = image_text_logits(net, batch, ids, torch.ones(6), with_images=False)
    torch.testing.assert_close(found, read(ids).logits)


def test_an_adapter_learns_alone_and_images_stay_what_they_are():
    net = model().requires_grad_(False)  # torch has another kernel for norms whose weights are trained
    image = frames()
    inputs = (image.tokens, image.text.embeddings, image.text.pooled, torch.full((2,), 0.5))
    with torch.no_grad():
        before = net(*inputs, layout=image.layout).sample
    targets = (r"context_embedder", r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)")
    add_adapter(net, AdapterConfig(2, targets=targets, modules=("text_embedder", "text_proj_out")), seed=0)
    output = masked_text(net, None, texts(), torch.Generator().manual_seed(1), mask_token_id=MASK, adapter="trained")
    output.loss.backward()
    learned = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert learned and all("lora" in name or name.startswith("text_") for name in learned)
    net.disable_adapters()
    with torch.no_grad():
        assert torch.equal(net(*inputs, layout=image.layout).sample, before)
    with pytest.raises(ValueError, match="'no_head', which is no module"):
        add_adapter(model(), AdapterConfig(2, targets=targets, modules=("no_head",)), seed=0)


def test_a_frozen_image_gives_the_same_loss():
    """Whether keys and values of the image are computed with or without gradients, the loss is the same."""
    net = model()
    options = {"mask_token_id": MASK, "antithetic": True}
    whole = masked_text(net, None, texts(), torch.Generator().manual_seed(1), **options)
    assert net.x_embedder.weight.grad is None
    whole.loss.backward()
    assert net.x_embedder.weight.grad.abs().sum() > 0
    net.zero_grad(set_to_none=True)
    frozen = masked_text(net, None, texts(), torch.Generator().manual_seed(1), adapter="none", **options)
    assert torch.equal(frozen.loss, whole.loss)
    frozen.loss.backward()
    assert not net.x_embedder.weight.grad.any()


def test_a_head_is_saved_and_loaded(tmp_path):
    trained = model()
    save_text_head(trained, tmp_path / "head.safetensors")
    plain = MMDiT(**CONFIG)
    load_text_head(plain, tmp_path / "head.safetensors")
    assert plain.config.text_rope_axis == 2 and plain.config.text_embeds and plain.config.text_vocab_size == 20
    torch.testing.assert_close(plain.text_embedder.weight, trained.text_embedder.weight, atol=1e-3, rtol=1e-3)
    wide = MMDiT(**{**CONFIG, "num_attention_heads": 4})
    with pytest.raises(ValueError, match="no text head of a model of width 32"):
        load_text_head(wide, tmp_path / "head.safetensors")


def test_levels_are_spread_evenly():
    times = antithetic_times(5, torch.Generator().manual_seed(0))
    assert (times * 5).floor().tolist() == [0, 1, 2, 3, 4] and times.diff().tolist() == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("together", [False, True])
def test_passes_in_turn_and_together(together):
    net, scheduler = model(), MultiFrameFlowMatchScheduler()
    options = {"mask_token_id": MASK, "together": together}
    image = joint(net, scheduler, frames(), torch.Generator().manual_seed(0), **options)
    image.loss.backward()
    assert net.proj_out.weight.grad.abs().sum() > 0 and net.text_proj_out.weight.grad is None
    net.zero_grad(set_to_none=True)
    whole = joint(net, scheduler, texts(), torch.Generator().manual_seed(0), text_weight=1.0, **options)
    part = joint(net, scheduler, texts(), torch.Generator().manual_seed(0), text_weight=0.25, **options)
    part.loss.backward()
    assert net.text_proj_out.weight.grad.abs().sum() > 0
    if together:
        assert net.proj_out.weight.grad.abs().sum() > 0
        torch.testing.assert_close(whole.loss, whole.metrics["image"] + whole.metrics["text"])
        torch.testing.assert_close(part.loss, whole.metrics["image"] + 0.25 * whole.metrics["text"])
    else:
        assert net.proj_out.weight.grad is None
        torch.testing.assert_close(part.loss, 0.25 * whole.loss)


class Numbered:
    def __init__(self, make):
        self.make = make

    def __getitem__(self, index):
        return self.make(index)


def test_a_joint_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """With μP's parameter groups, and passes of both kinds."""

    def run(folder, **options):
        recipe = parse_recipe(
            {
                "run": {"folder": str(tmp_path / folder), "steps": 4, "batch_size": 1, "log_every": 1},
                "model": {"arguments": {**CONFIG, "axes_dims_rope": [2, 2, 4], "text_vocab_size": 20,
                                        "text_rope_axis": 2, "text_embeds": True, "mup_base_width": 8}},
                "objective": {"name": "joint", "arguments": {"mask_token_id": MASK}},
            },
            "a test",
        )  # fmt: skip
        net = build_model(recipe)
        batches = Batches(InTurn(Numbered(frames), Numbered(texts)), only_batch, seed=0, whole=True)
        result = train(recipe, model=net, batches=batches, **options)
        return net, result

    straight, result = run("straight")
    assert result.step == 4
    run("broken", stop_at=2)
    resumed, _ = run("broken", resume=True)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_models_without_a_head_and_missing_mask_tokens_are_refused():
    plain = MMDiT(**CONFIG)
    with pytest.raises(ValueError, match="no embeddings of text that is generated"):
        masked_text(plain, None, texts(), None, mask_token_id=MASK)
    with pytest.raises(ValueError, match="names no mask token"):
        masked_text(model(), None, texts(), None)
    with pytest.raises(ValueError, match="names no mask token"):
        joint(model(), MultiFrameFlowMatchScheduler(), texts(), None, together=True)
    with pytest.raises(ValueError, match="has a text head of 20 tokens already"):
        add_text_head(model(), 20)
    with pytest.raises(ValueError, match="ends the text stream"):
        add_text_head(MMDiT(**{**CONFIG, "num_single_layers": 0}), 20)
