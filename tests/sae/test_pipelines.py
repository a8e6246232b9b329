"""Unlearning and steering in every kind of pipeline: the identity, a change, and nothing left behind."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
)
from parity.ominicontrol_cases import CASES as OMNI
from parity.ominicontrol_cases import lora
from parity.ominicontrol_cases import pipeline as omni_pipeline
from tiny import randomize, rope_config, sincos_config, tiny_pipeline, tiny_vae
from tiny_sae import (
    WIDTH,
    all_features,
    dit,
    embeds,
    flux,
    flux2,
    flux_guided,
    hunyuan,
    ours,
    pixart,
    quiet,
    run,
    sana,
    sd3,
    selection,
    small_unet,
    tiny_sae,
    unet,
    unlearner_of,
)

from imgdit import Condition, OmniControl
from imgdit.sae.config import SAEConfig
from imgdit.sae.edits import Edit, edit_by_decoding
from imgdit.sae.hooks import find_hookpoints, hooked, site
from imgdit.sae.model import SparseAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner, Intervention, steer

# pipeline, hookpoint, its grid (`None`: it reads the text), and which half of the batch is guided (first, second, or
# all of it)
PLACES = {
    "ours": (ours, "transformer.transformer_blocks.1", (4, 6), "second"),
    "ours, single block": (ours, "transformer.single_transformer_blocks.0", (4, 6), "second"),
    "ours, attention": (ours, "transformer.transformer_blocks.0.attn", (4, 6), "second"),
    "ours, single attention": (ours, "transformer.single_transformer_blocks.1.attn", (4, 6), "second"),
    "ours, sin-cos": (lambda: ours(sincos_config()), "transformer.transformer_blocks.0.ff", (4, 6), "second"),
    "unet": (unet, "unet.up_blocks.0.attentions.1", (4, 6), "second"),
    "unet, tokens": (unet, "unet.up_blocks.0.attentions.0.transformer_blocks.0", (4, 6), "second"),
    "pixart": (pixart, "transformer.transformer_blocks.1", (4, 6), "second"),
    "dit": (dit, "transformer.transformer_blocks.0", (4, 4), "first"),
    "sd3": (sd3, "transformer.transformer_blocks.1", (4, 6), "second"),
    "sd3, last": (sd3, "transformer.transformer_blocks.2", (4, 6), "second"),
    "sd3, attention": (sd3, "transformer.transformer_blocks.0.attn", (4, 6), "second"),
    "sd3, second attention": (sd3, "transformer.transformer_blocks.0.attn2", (4, 6), "second"),
    "flux": (flux, "transformer.transformer_blocks.0", (4, 6), "all"),
    "flux, single block": (flux, "transformer.single_transformer_blocks.0", (4, 6), "all"),
    "flux, attention": (flux, "transformer.transformer_blocks.1.attn", (4, 6), "all"),
    "flux, single attention": (flux, "transformer.single_transformer_blocks.1.attn", (4, 6), "all"),
    "flux, guided": (flux_guided, "transformer.transformer_blocks.1", (4, 6), "all"),
    "flux.2": (flux2, "transformer.transformer_blocks.1", (4, 6), "all"),
    "flux.2, single block": (flux2, "transformer.single_transformer_blocks.0", (4, 6), "all"),
    "sana": (sana, "transformer.transformer_blocks.1", (4, 6), "second"),
    "sana, feed-forward": (sana, "transformer.transformer_blocks.0.ff", (4, 6), "second"),
    "hunyuan": (hunyuan, "transformer.blocks.1", (4, 6), "second"),
    "ours, text": (ours, "transformer.context_embedder", None, "second"),
    "ours, text of a block": (ours, "transformer.transformer_blocks.0.ff_context", None, "second"),
    "pixart, text": (pixart, "transformer.caption_projection", None, "second"),
    "sd3, text": (sd3, "transformer.context_embedder", None, "second"),
    "flux, text": (flux, "transformer.context_embedder", None, "all"),
}
everywhere = pytest.mark.parametrize("place", PLACES)


@everywhere
def test_identity_change_removal(place):
    make, hookpoint, _, _ = PLACES[place]
    pipe, inputs = make()
    plain = run(pipe, inputs)
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    assert plain.isfinite().all()
    with unlearner.attach(pipe, []):
        assert torch.equal(run(pipe, inputs), plain)
    with unlearner.attach(pipe, ["everything"], multiplier=-1 / 3):  # factor 1
        assert torch.equal(run(pipe, inputs), plain)
    with steer(pipe, tiny_sae(hookpoint), {3: 1.0}):
        assert torch.equal(run(pipe, inputs), plain)
    for mode in ("scale", "remove", "replace"):
        with unlearner.attach(pipe, ["everything"], mode=mode):
            assert not torch.equal(run(pipe, inputs), plain)
    assert torch.equal(run(pipe, inputs), plain)


@everywhere
def test_what_is_read(place):
    """The image's tokens with their grid, or the text's; the guided half; the hook sees exactly what the model
    goes on with."""
    make, hookpoint, grid, half = PLACES[place]
    pipe, inputs = make()
    seen = []
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens)}):
        plain = run(pipe, inputs)
    assert {tokens.grids for tokens in seen} == {() if grid is None else (grid,)}
    for tokens in seen:
        count = tokens.call.text_length if grid is None else grid[0] * grid[1]
        assert count > 0 and tokens.values.shape[1:] == (count, WIDTH)
        batch = tokens.call.batch
        expected = {"all": slice(0, batch), "first": slice(0, batch // 2), "second": slice(batch // 2, batch)}[half]
        assert (tokens.call.conditional or tokens.call.unconditional) == expected
        assert 0 <= tokens.call.timestep <= 1000
    if "guided" in place:
        assert [tokens.call.conditional is None for tokens in seen] == [False, True] * 3
    times = [tokens.call.timestep for tokens in seen if tokens.call.conditional]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3
    with hooked(pipe, {hookpoint: lambda tokens: tokens.values.clone()}):
        assert torch.equal(run(pipe, inputs), plain)


@everywhere
def test_delta_is_encode_edit_decode(place):
    make, hookpoint, _, _ = PLACES[place]
    pipe, inputs = make()
    sae = tiny_sae(hookpoint)
    selected = selection("some", list(range(1, 64, 3)), [-2.0, 0.5, 3.0] * 7, threshold=0.05)
    change = Edit(selected.features, selected.means[0], selected.thresholds[0])

    intervention = Intervention(sae, [[selected]], "scale", 1.0, (0.0, 1000.0), "both", False)
    calls = []

    def compared(tokens):
        rows = tokens.values.reshape(-1, WIDTH)
        expected = edit_by_decoding(sae, rows, change).view(tokens.values.shape)
        got = intervention(tokens)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        calls.append((got - tokens.values).abs().max() > 0)
        return got

    with hooked(pipe, {hookpoint: compared}):
        run(pipe, inputs)
    assert any(calls)


def pix2pix():
    model = small_unet(in_channels=8, out_channels=4)
    pipe = StableDiffusionInstructPix2PixPipeline(
        tiny_vae(), None, None, model, DDIMScheduler(), None, None, None, False
    )
    return pipe, {**embeds("prompt_embeds", "negative_prompt_embeds"), "image": torch.rand(2, 3, 16, 16)}


def seen_parts(pipe, inputs, hookpoint):
    """Rows for the prompt, rows for the negative prompt, and images, of the first call."""
    seen = []
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.call)}):
        run(pipe, inputs, steps=1)
    return seen[0].conditional, seen[0].unconditional, seen[0].images


def test_guidance_in_three_parts():
    """InstructPix2Pix: prompt and image, image alone, neither."""
    pipe, inputs = pix2pix()
    hookpoint = "unet.up_blocks.0.attentions.0"
    assert seen_parts(pipe, inputs, hookpoint) == (slice(0, 2), slice(2, 6), 2)
    assert seen_parts(pipe, {**inputs, "guidance_scale": 1.0}, hookpoint) == (slice(0, 2), None, 2)
    one, other = selection("one", [3, 5], [-3.0, -3.0]), selection("other", [5, 9], [4.0, 4.0])
    unlearner = unlearner_of(pipe, hookpoint, [one, other])
    results = {}
    for names in ("one", "other"):
        with unlearner.attach(pipe, [names]):
            results[names] = run(pipe, inputs)
    with unlearner.attach(pipe, [["one"], ["other"]]):
        mixed = run(pipe, inputs)
    torch.testing.assert_close(mixed[0], results["one"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], results["other"][1], atol=1e-5, rtol=1e-4)


def test_perturbed_attention_is_a_part_of_its_own():
    plain, inputs = unet()
    pipe = StableDiffusionPAGPipeline(
        None, None, None, plain.unet, plain.scheduler, None, None, None, False, pag_applied_layers="mid"
    )
    hookpoint, inputs = "unet.mid_block.attentions.0", {**inputs, "pag_scale": 3.0}
    assert seen_parts(pipe, inputs, hookpoint) == (slice(2, 4), slice(0, 2), 2)
    assert seen_parts(pipe, {**inputs, "guidance_scale": 1.0}, hookpoint) == (slice(0, 2), None, 2)


@pytest.mark.parametrize("make", [pixart, dit])
def test_two_images_of_one_noise_without_guidance(make):
    """Pipelines that keep whether they guide to themselves: equal latents are no two halves."""
    pipe, inputs = make()
    guided = (slice(0, 2), slice(2, 4), 2) if make is dit else (slice(2, 4), slice(0, 2), 2)
    assert seen_parts(pipe, inputs, "transformer.transformer_blocks.1") == guided
    inputs = {**inputs, "guidance_scale": 1.0}
    if make is pixart:
        inputs["latents"] = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    else:  # takes no latents: two generators of one seed
        inputs["generator"] = [torch.Generator().manual_seed(3) for _ in range(2)]
    seen = []
    with hooked(pipe, {"transformer.transformer_blocks.1": lambda tokens: seen.append(tokens.call)}):
        quiet(pipe)(**{"output_type": "latent", **inputs}, num_inference_steps=1)
    assert (seen[0].conditional, seen[0].unconditional, seen[0].images) == (slice(0, 2), None, 2)


@pytest.mark.parametrize("halves", ["conditional", "unconditional"])
def test_one_half(halves):
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    seen, unlearner = [], unlearner_of(pipe, hookpoint, [all_features()])
    with unlearner.attach(pipe, ["everything"], halves=halves):
        with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.values.clone())}):
            run(pipe, inputs, steps=1)
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.values.clone())}):
        run(pipe, inputs, steps=1)
    changed = (seen[0] != seen[1]).flatten(1).any(1).tolist()
    assert changed == ([False, False, True, True] if halves == "conditional" else [True, True, False, False])


def test_each_request_its_concepts():
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    one, other = selection("one", [3, 5], [-3.0, -3.0]), selection("other", [5, 9], [4.0, 4.0])
    unlearner = unlearner_of(pipe, hookpoint, [one, other])
    results = {}
    for names in (["one"], ["other"], []):
        with unlearner.attach(pipe, names):
            results[str(names)] = run(pipe, inputs)
    with unlearner.attach(pipe, [["one"], ["other"]]):
        mixed = run(pipe, inputs)
    torch.testing.assert_close(mixed[0], results["['one']"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], results["['other']"][1], atol=1e-5, rtol=1e-4)
    with unlearner.attach(pipe, [[], ["one"]]):
        assert torch.equal(run(pipe, inputs)[0], results["[]"][0])
    with pytest.raises(ValueError, match="3 requests, the batch has 2"), unlearner.attach(pipe, [["one"], [], []]):
        run(pipe, inputs)


def test_order_of_concepts():
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    one, other = selection("one", list(range(32)), [-3.0] * 32), selection("other", list(range(32, 64)), [4.0] * 32)
    shared = selection("shared", list(range(16, 48)), [2.0] * 32)
    unlearner = unlearner_of(pipe, hookpoint, [one, other, shared])

    def result(names):
        with unlearner.attach(pipe, names):
            return run(pipe, inputs)

    torch.testing.assert_close(result(["one", "other"]), result(["other", "one"]), atol=1e-5, rtol=1e-4)
    assert not torch.equal(result(["one", "shared"]), result(["shared", "one"]))  # the later one decides


@pytest.mark.parametrize("make", [ours, unet, sd3])
def test_batch_size_does_not_matter(make):
    pipe, inputs = make()
    hookpoint = "unet.up_blocks.0.attentions.0" if make is unet else "transformer.transformer_blocks.1"
    unlearner = unlearner_of(pipe, hookpoint, [all_features(factor=-0.5)])

    def sample(picked):
        rows = {name: v[picked] if isinstance(v, (list, torch.Tensor)) else v for name, v in inputs.items()}
        generators = [torch.Generator().manual_seed(i) for i in range(2)][picked]
        with unlearner.attach(pipe, ["everything"]):
            options = {"num_inference_steps": 3, "output_type": "latent", "generator": generators}
            return quiet(pipe)(**rows, **options).images

    both = sample(slice(0, 2))
    torch.testing.assert_close(both, torch.cat([sample(slice(i, i + 1)) for i in range(2)]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "scheduler"),
    [
        (unet, HeunDiscreteScheduler()),
        (unet, DPMSolverMultistepScheduler()),
        (sd3, FlowMatchHeunDiscreteScheduler()),
    ],
)
def test_strength_follows_the_timestep(make, scheduler):
    """Samplers that call twice per step, another number of steps, a second call: only the timestep decides."""
    pipe, inputs = make()
    pipe.scheduler = scheduler
    hookpoint = "unet.up_blocks.0.attentions.0" if make is unet else "transformer.transformer_blocks.1"
    rising = selection("rising", [3], [1.0], timesteps=(1000.0, 0.0))
    rising = dataclasses.replace(rising, means=torch.tensor([[0.0], [1000.0]]))
    unlearner = unlearner_of(pipe, hookpoint, [rising])
    used = []
    with unlearner.attach(pipe, ["rising"], multiplier=1.0):
        hook = getattr(pipe, hookpoint.split(".")[0]).get_submodule(hookpoint.split(".", 1)[1])._diffusers_hook
        intervention = next(iter(hook.hooks.values())).function
        first = run(pipe, inputs, steps=5)
        used = dict(intervention.plans)
        assert torch.equal(run(pipe, inputs, steps=5), first)
        run(pipe, inputs, steps=7)
    for timestep, plan in used.items():
        assert float(plan.factors[0]) == pytest.approx(1000.0 - timestep, rel=1e-4, abs=1e-3)


def test_range_of_timesteps():
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    unlearner, plain = unlearner_of(pipe, hookpoint, [all_features()]), run(pipe, inputs)
    with unlearner.attach(pipe, ["everything"], timesteps=(0.0, 1.0)):
        assert torch.equal(run(pipe, inputs), plain)
    with unlearner.attach(pipe, ["everything"], timesteps=(900.0, 1000.0)):
        assert not torch.equal(run(pipe, inputs), plain)


@pytest.mark.parametrize("first", ["cache", "unlearner"])
def test_step_cache(first):
    """Whichever is on first, a change is applied once, also to what a cached step takes from an earlier one."""
    hookpoint = "transformer.transformer_blocks.1"
    pipe, inputs = flux()
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    config = FirstBlockCacheConfig(threshold=10.0)
    pipe.transformer.enable_cache(config)
    cached = run(pipe, inputs, steps=4)
    pipe.transformer.disable_cache()

    if first == "cache":
        pipe.transformer.enable_cache(config)
        with unlearner.attach(pipe, ["everything"]):
            got = run(pipe, inputs, steps=4)
        assert pipe.transformer.is_cache_enabled
        torch.testing.assert_close(run(pipe, inputs, steps=4), cached)
    else:
        with unlearner.attach(pipe, ["everything"]):
            pipe.transformer.enable_cache(config)
            got = run(pipe, inputs, steps=4)
        torch.testing.assert_close(run(pipe, inputs, steps=4), cached)
    other, inputs = flux()
    with unlearner_of(other, hookpoint, [all_features()]).attach(other, ["everything"]):
        other.transformer.enable_cache(config)
        torch.testing.assert_close(run(other, inputs, steps=4), got)


@pytest.mark.parametrize("block", ["transformer_blocks.1", "single_transformer_blocks.0"])
@pytest.mark.parametrize("first", ["conditions", "unlearner"])
def test_beside_conditions(block, first):
    """Condition tokens ride behind the image's; they are neither read nor changed."""
    case = next(case for case in OMNI.values() if case.get("active_adapters"))
    pipe, hookpoint = omni_pipeline(case), f"transformer.{block}"
    adapter = case["active_adapters"][0]
    model = pipe.transformer
    width, config = model.inner_dim, model.config
    inputs = {"prompt_embeds": torch.randn(1, 5, config.joint_attention_dim), "height": 32, "width": 48}
    inputs["pooled_prompt_embeds"] = torch.randn(1, config.pooled_projection_dim)
    sae = SparseAutoencoder(SAEConfig(width, 64, k=4, hookpoint=hookpoint)).requires_grad_(False)

    def prepared():
        control = OmniControl(pipe)
        control.load(lora(case, adapter), adapter_name=adapter)
        return control

    conditions = [Condition(torch.rand(3, 32, 48), adapter=adapter)]
    control = prepared()
    with control.use(conditions):
        alone = run(pipe, inputs)
    control.remove()
    results, seen = {}, []
    for factor in (1.0, -3.0):
        steering = steer(pipe, sae, dict.fromkeys(range(64), factor))
        with ExitStack() as stack:
            if first == "unlearner":
                stack.enter_context(steering)
            control = prepared()
            with ExitStack() as inner:
                if first == "conditions":
                    inner.enter_context(steering)
                inner.enter_context(control.use(conditions))
                inner.enter_context(hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens)}))
                results[factor] = run(pipe, inputs)
        with control.use(conditions):
            assert torch.equal(run(pipe, inputs), alone)
        control.remove()
    assert torch.equal(results[1.0], alone)
    assert not torch.equal(results[-3.0], alone)
    assert {tokens.values.shape[1] for tokens in seen} == {seen[0].grids[0][0] * seen[0].grids[0][1]}


def read(pipe, inputs, hookpoint, source):
    seen = []
    with hooked(pipe, {hookpoint: lambda tokens: seen.append(tokens.values)}, source={hookpoint: source}):
        run(pipe, inputs, steps=1)
    return seen[0]


def test_updates():
    """An SAE of a block's update changes output - input, whatever the input is."""
    for make, hookpoint in (
        (unet, "unet.up_blocks.0.attentions.0"),
        (flux, "transformer.single_transformer_blocks.0"),
        (ours, "transformer.transformer_blocks.1"),
    ):
        pipe, inputs = make()
        sae = tiny_sae(hookpoint, source="update")
        plain = run(pipe, inputs)
        output, update = read(pipe, inputs, hookpoint, "output"), read(pipe, inputs, hookpoint, "update")
        assert update.shape == output.shape
        assert (update - output).abs().max() > 1e-3
        with steer(pipe, sae, {3: 1.0}):
            assert torch.equal(run(pipe, inputs), plain)
        with steer(pipe, sae, dict.fromkeys(range(64), -2.0)):
            assert not torch.equal(run(pipe, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe, inputs = ours()
    unlearner = unlearner_of(pipe, "transformer.transformer_blocks.1", [all_features()])
    pipe.transformer.to(dtype)
    with unlearner.attach(pipe, ["everything"]):  # selected in float32, and still known to be the same model
        assert run(pipe, inputs).isfinite().all()


def test_hookpoints():
    pipe, _ = flux()
    assert find_hookpoints(pipe, ["transformer.transformer_blocks.*"]) == [
        "transformer.transformer_blocks.0",
        "transformer.transformer_blocks.1",
    ]
    assert len(find_hookpoints(pipe, ["transformer.*_blocks.*.attn"])) == 4
    with pytest.raises(ValueError, match=r"nearest is 'transformer.transformer_blocks.1'"):
        find_hookpoints(pipe, ["transformer.transformer_block.1"])
    assert site(pipe, "transformer.transformer_blocks.0.ff_context").text
    assert not site(pipe, "transformer.transformer_blocks.0.ff").text


HEADS = {
    "ours": (ours, "transformer.transformer_blocks.0.attn.norm_q"),
    "ours, text": (ours, "transformer.transformer_blocks.0.attn.norm_added_q"),
    "ours, single": (ours, "transformer.single_transformer_blocks.0.attn.norm_k"),
    "flux": (flux, "transformer.transformer_blocks.0.attn.norm_k"),
    "sd3": (sd3, "transformer.transformer_blocks.1.attn.norm_q"),
}


# Bad input


@pytest.mark.parametrize("place", HEADS)
def test_heads_are_no_planes(place):
    make, hookpoint = HEADS[place]
    pipe, inputs = make()
    plain = run(pipe, inputs)
    with pytest.raises(ValueError, match=r"heads .* are not read, hook the attention itself"):
        with hooked(pipe, {hookpoint: lambda tokens: tokens.values}):
            run(pipe, inputs)
    assert torch.equal(run(pipe, inputs), plain)


@pytest.mark.parametrize("hookpoint", ["transformer.time_text_embed", "transformer.time_text_embed.timestep_embedder"])
def test_a_module_without_tokens(hookpoint):
    """MMDiT's time embedding gives vectors of frames and texts."""
    pipe, inputs = ours()
    steering = steer(pipe, tiny_sae(hookpoint), dict.fromkeys(range(64), -2.0))
    with pytest.raises(ValueError, match=r"returns (tuple and is not known to say|.*no tokens)"), steering:
        run(pipe, inputs)
    assert hooks_of(pipe) == []


def unknown_models():
    flow = FlowMatchEulerDiscreteScheduler()
    lumina = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(16, 16, 16), cap_feat_dim=32,
    )  # fmt: skip
    aura = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    return {
        "lumina": (Lumina2Pipeline(lumina, flow, None, None, None), "transformer.layers.0"),
        "aura-flow": (AuraFlowPipeline(None, None, None, aura, flow), "transformer.joint_transformer_blocks.0"),
    }


@pytest.mark.parametrize("name", ["lumina", "aura-flow"])
def test_unknown_models_are_refused_before_sampling(name):
    pipe, hookpoint = unknown_models()[name]
    with pytest.raises(ValueError, match="it is none of the models whose activations can be read"):
        with hooked(pipe, {hookpoint: lambda tokens: None}):
            raise AssertionError("not reached")
    assert hooks_of(pipe) == []


def hooks_of(pipe):
    return [
        name for m in pipe.transformer.modules() for name in getattr(m, "_diffusers_hook", m).__dict__.get("hooks", {})
    ]


def test_a_concept_has_its_own_strength(tmp_path):
    pipe, inputs = ours()
    hookpoint = "transformer.transformer_blocks.1"
    tuned = dataclasses.replace(all_features(), multiplier=-0.25)
    unlearner_of(pipe, hookpoint, [tuned]).save_pretrained(tmp_path)
    unlearner = ConceptUnlearner.from_pretrained(tmp_path)
    results = []
    for options in ({}, {"multiplier": -0.25}, {"multiplier": -1.0}):
        with unlearner.attach(pipe, ["everything"], **options):
            results.append(run(pipe, inputs))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    file = tmp_path / hookpoint / "concepts.json"
    file.write_text(file.read_text().replace("-0.25", '"strong"'))
    with pytest.raises(ValueError, match="everything: multiplier must be a number, got 'strong'"):
        ConceptUnlearner.from_pretrained(tmp_path)


def test_the_text_comes_first():
    """Where a concept is known to an SAE of the text, the image's are left alone, unless they are asked for."""
    pipe, inputs = ours()
    text, image = "transformer.context_embedder", "transformer.transformer_blocks.1"
    one, other = all_features("one"), all_features("other")
    both = unlearner_of(pipe, text, [one])
    beside = unlearner_of(pipe, image, [one, other])
    both.saes |= beside.saes
    both.books |= beside.books

    def result(unlearner, *arguments, **options):
        with unlearner.attach(pipe, *arguments, **options):
            return run(pipe, inputs)

    only_text = result(unlearner_of(pipe, text, [one]), ["one"])
    assert torch.equal(result(both, ["one"]), only_text)
    assert torch.equal(result(both, ["one"], hookpoints=[image]), result(beside, ["one"]))
    # The text does not know the other one.
    everywhere_ = result(both, ["one"], hookpoints=[text, image])
    assert torch.equal(result(both, ["one", "other"], hookpoints=[image]), result(beside, ["one", "other"]))
    assert not torch.equal(everywhere_, only_text)
    assert not torch.equal(result(both, ["one", "other"]), only_text)


def test_refusals_before_sampling():
    hookpoint = "transformer.transformer_blocks.1"
    pipe, _ = ours()
    unlearner = unlearner_of(pipe, hookpoint, [all_features()])
    for message, arguments, options in (
        ("unknown concept 'neo'; known are everything", (pipe, ["neo"]), {}),
        (r"write \['everything'\]", (pipe, "everything"), {}),
        ("mode must be one of", (pipe, ["everything"]), {"mode": "delete"}),
        ("halves must be one of", (pipe, ["everything"]), {"halves": "all"}),
        ("no concept was selected at 'elsewhere'", (pipe, ["everything"]), {"hookpoints": ["elsewhere"]}),
        ("no module is called", (unet()[0], ["everything"]), {}),
        ("selected in another model", (ours({**rope_config(), "num_layers": 3})[0], ["everything"]), {}),
    ):
        with pytest.raises(ValueError, match=message), unlearner.attach(*arguments, **options):
            raise AssertionError("not reached")
    other = tiny_pipeline()
    randomize(other.transformer, seed=9, std=0.5)
    with pytest.raises(ValueError, match="selected in another model"), unlearner.attach(other, ["everything"]):
        raise AssertionError("not reached")
    wide = SparseAutoencoder(SAEConfig(48, 64, k=4, hookpoint=hookpoint))
    with pytest.raises(ValueError, match="width 48"), steer(pipe, wide, {0: 2.0}):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="features 0 to 63, got 64"), steer(pipe, tiny_sae(), {64: 2.0}):
        raise AssertionError("not reached")
    assert hooks_of(pipe) == []


def test_another_sae(tmp_path):
    hookpoint = "transformer.transformer_blocks.1"
    pipe, _ = ours()
    unlearner_of(pipe, hookpoint, [all_features()]).save_pretrained(tmp_path)
    SparseAutoencoder(tiny_sae(hookpoint).config).save_pretrained(tmp_path / hookpoint)
    with pytest.raises(ValueError, match="selected with another SAE"):
        ConceptUnlearner.from_pretrained(tmp_path)


def test_hooks_are_removed_when_sampling_raises():
    pipe, inputs = ours()
    unlearner = unlearner_of(pipe, "transformer.transformer_blocks.1", [all_features()])

    def stop(*_):
        raise RuntimeError("stopped")

    plain = run(pipe, inputs)
    with pytest.raises(RuntimeError, match="stopped"), unlearner.attach(pipe, ["everything"]):
        run(pipe, {**inputs, "callback_on_step_end": stop})
    assert hooks_of(pipe) == []
    assert torch.equal(run(pipe, inputs), plain)


def test_nan_activations():
    pipe, inputs = ours()
    unlearner = unlearner_of(pipe, "transformer.transformer_blocks.1", [all_features()])
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].ff.net[2].bias[0] = float("nan")
    for mode in ("scale", "replace"):
        with pytest.raises(ValueError, match="NaN or infinite"), unlearner.attach(pipe, ["everything"], mode=mode):
            run(pipe, inputs)
    assert hooks_of(pipe) == []


def test_learn_save_load(tmp_path):
    pipe, _ = ours()
    hookpoint = "transformer.transformer_blocks.1"
    unlearner = ConceptUnlearner({hookpoint: tiny_sae(hookpoint)})
    prompts = {"cube": ["a red cube", "the blue cube"], "sphere": ["a red sphere", "the blue sphere"]}
    options = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0}
    unlearner.learn(pipe, prompts, top_n=2, **options)
    unlearner.save_pretrained(tmp_path)
    again = ConceptUnlearner.from_pretrained(tmp_path)
    assert again.concepts == ["cube", "sphere"]
    chosen = again.books[hookpoint].selections["cube"]
    assert chosen.selected.sum(1).tolist() == [2, 2, 2]
    assert chosen.origin["prompts"] == prompts["cube"] and chosen.origin["call"]["num_inference_steps"] == 3
    assert sum(f.stat().st_size for f in tmp_path.rglob("concepts.*")) < 20_000
    for one in (again, unlearner):
        with one.attach(pipe, ["cube"], multiplier=-5.0):
            image = pipe("a red cube", **options, output_type="latent", generator=torch.Generator().manual_seed(0))
        if one is again:
            first = image.images
    assert torch.equal(first, image.images)
