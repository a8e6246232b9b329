"""Hooks on the parts of a transformer while conditions are in use: every part that is called without conditions is
called with them, a hook that changes nothing is the identity, one that changes something has an effect, removed all is
bitwise as before. What conditions would leave out is refused before sampling."""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from tiny import tiny_pipeline
from tiny_control import SD3_TARGETS, flux, image, lora_file, make, quiet, sd3

from imgdit import Condition, OmniControl, compat
from imgdit.benchmarks.speed.conditions import TARGETS
from imgdit.sae.hooks import hooked

ATTENTIONS = r"|.*attn\.(to_out\.0|to_k|to_v|add_v_proj|to_add_out)|.*ff\.net\.0\.proj|.*proj_mlp|norm_out\.linear"
KINDS = {
    "flux": (flux, TARGETS + ATTENTIONS),
    "sd3": (sd3, SD3_TARGETS + ATTENTIONS),
    "ours": (tiny_pipeline, TARGETS + ATTENTIONS),
}


@pytest.fixture(params=list(KINDS))
def calls(request, tmp_path):
    """The transformer, a call without conditions, and one with them."""
    build, targets = KINDS[request.param]
    pipe = build()
    file = lora_file(tmp_path / "canny.safetensors", pipe.transformer, targets)
    condition = Condition(image(), "canny")
    if request.param == "ours":
        pipe.load_control(file, adapter_name="canny")
        call = {"prompt": "a red cube", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}

        def run(conditions=()):
            return pipe(**call, conditions=conditions, generator=torch.Generator().manual_seed(0)).images

        return pipe, run, lambda: run([condition])
    control = OmniControl(pipe)
    control.load(file, adapter_name="canny")

    def controlled():
        with control.use([condition]):
            return make(pipe)

    return pipe, lambda: make(pipe), controlled


def names_called(model, call):
    """Names of the modules that a call goes through."""
    seen, handles = set(), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda module, args, output, name=name: seen.add(name)))
    try:
        out = call()
    finally:
        for handle in handles:
            handle.remove()
    return seen, out


def test_every_module_is_called_under_conditions_too(calls):
    pipe, plain, controlled = calls
    expected = controlled()
    without, _ = names_called(pipe.transformer, plain)
    beside, out = names_called(pipe.transformer, controlled)
    lists = {name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.ModuleList)}
    adapters = {name for name, _ in pipe.transformer.named_modules() if ".lora_" in name}
    everything = {name for name, _ in pipe.transformer.named_modules()} - lists
    assert everything - adapters <= without and without - adapters <= beside
    assert "transformer_blocks.0.attn.to_out.0.lora_B.canny" in beside
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(controlled(), expected)
    assert not any("forward" in m.__dict__ for m in pipe.transformer.modules() if not hasattr(m, "_diffusers_hook"))


class Plus(ModelHook):
    """Adds to the first tensor that a module returns."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def post_forward(self, module, output):
        if isinstance(output, torch.Tensor):
            return output + self.value
        return (output[0] + self.value, *output[1:])


PARTS = (
    "attn",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_q.base_layer",
    "attn.to_add_out",
    "ff",
    "ff.net.0",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context",
    "norm1",
    "norm1.silu",
    "norm1_context",
)


@pytest.mark.parametrize("kind", ["torch", "diffusers"])
def test_identity_effect_and_removal_at_every_part(kind, calls):
    pipe, _, controlled = calls
    expected = controlled()
    places = [f"transformer_blocks.0.{part}" for part in PARTS] + ["norm_out"]
    if hasattr(pipe.transformer, "single_transformer_blocks"):
        places += [f"single_transformer_blocks.0.{part}" for part in ("attn", "norm", "proj_mlp", "proj_out")]
    for place in places:
        module = pipe.transformer.get_submodule(place)
        for value, changes in ((0.0, False), (0.5, True)):
            if kind == "torch":
                hook = Plus(value)
                handle = module.register_forward_hook(lambda m, args, out, hook=hook: hook.post_forward(m, out))
                got = controlled()
                handle.remove()
            else:
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Plus(value), "plus")
                got = controlled()
                compat.remove_hook(module, "plus")
            assert ((got - expected).abs().max() > 1e-5) == changes, place
        assert torch.equal(controlled(), expected), place


@pytest.mark.parametrize("place", ["attn", "ff", "attn.to_out.0"])
def test_steering_reaches_the_image_tokens_alone(place, calls):
    """What unlearning and steering use: a function of the tokens of the image being generated."""
    pipe, _, controlled = calls
    expected, shapes = controlled(), set()

    def read(tokens):
        shapes.add(tokens.values.shape[1])

    with hooked(pipe, {f"transformer.transformer_blocks.0.{place}": read}):
        assert torch.equal(controlled(), expected)
    assert shapes == {16}
    with hooked(pipe, {f"transformer.transformer_blocks.0.{place}": lambda tokens: tokens.values * 0.5}):
        assert (controlled() - expected).abs().max() > 1e-5
    assert torch.equal(controlled(), expected)


def test_hooks_of_all_modules_see_ours_as_they_see_diffusers(calls):
    controlled, kinds = calls[2], []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: kinds.append(type(m).__name__))
    try:
        controlled()
    finally:
        handle.remove()
    assert {"FeedForward", "GELU", "AdaLayerNormZero", "AdaLayerNormContinuous", "Linear"} <= set(kinds)
    assert any("Attention" in kind for kind in kinds)


def test_what_a_hook_kept_is_not_changed_afterwards(calls):
    """Adapters are added to a base layer's output in place."""
    pipe, _, controlled = calls
    base = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer
    kept = []
    handle = base.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    controlled()
    handle.remove()
    assert kept and all(torch.equal(out, copied) for out, copied in kept)


def test_backward_hooks_get_gradients(tmp_path):
    pipe = tiny_pipeline()
    model = pipe.transformer
    pipe.load_control(lora_file(tmp_path / "canny.safetensors", model, KINDS["ours"][1]), adapter_name="canny")
    grads = []
    for place in ("ff", "attn.to_q", "attn.to_q.base_layer"):
        module = model.transformer_blocks[0].get_submodule(place)
        module.register_full_backward_hook(lambda m, given, out: grads.append(out[0].abs().sum()))
    from imgdit.frames import Frame
    from imgdit.layout import FrameLayout

    layout = FrameLayout.build([Frame((4, 4)), Frame((4, 4), adapter="canny", sigma=0.0)], 5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 32, model.token_channels, generator=generator, requires_grad=True)
    text = torch.randn(1, 5, model.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, model.config.pooled_projection_dim, generator=generator)
    model(tokens, text, pooled, torch.tensor([0.5]), layout=layout).sample.sum().backward()
    assert len(grads) == 3 and all(grad > 0 for grad in grads)
    assert torch.isfinite(tokens.grad).all() and tokens.grad.abs().sum() > 0


def test_a_model_whose_hooks_are_gone_is_copied(tmp_path):
    pipe = tiny_pipeline()
    pipe.load_control(lora_file(tmp_path / "canny.safetensors", pipe.transformer), adapter_name="canny")
    call = {"prompt": "a red cube", "height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}

    def run():
        conditions = [Condition(image(), "canny")]
        return pipe(**call, conditions=conditions, generator=torch.Generator().manual_seed(0)).images

    names_called(pipe.transformer, run)
    expected = run()
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(run(), expected)


def test_a_forward_that_was_replaced_is_refused(tmp_path):
    pipe = flux()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer), adapter_name="canny")
    ff = pipe.transformer.transformer_blocks[0].ff
    plain = ff.forward
    ff.forward = lambda x: plain(x) * 0.5
    with (
        control.use([Condition(image(), "canny")]),
        pytest.raises(ValueError, match="forward of a FeedForward was replaced"),
    ):
        make(pipe)
    del ff.forward
    make(pipe)


# Attention processors


class Silent:
    """A processor of one's own: whatever the attention finds is left out."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, *args, **kwargs):
        out = self.processor(*args, **kwargs)
        return tuple(x * 0 for x in out) if isinstance(out, tuple) else out * 0


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_processors_that_would_be_left_out_are_refused(kind, when, tmp_path):
    build, targets = KINDS[kind]
    pipe = build()
    control = OmniControl(pipe)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, targets), adapter_name="canny")
    attn = pipe.transformer.transformer_blocks[1].attn
    own = attn.processor
    with control.use([Condition(image(), "canny")]):
        expected = make(pipe)
    message = r"transformer_blocks.1.attn.processor is a Silent.*set_attn_processor\((Flux|Joint)AttnProcessor"
    if when == "before":
        attn.set_processor(Silent(own))
        with pytest.raises(ValueError, match=message), control.use([Condition(image(), "canny")]):
            pytest.fail("use() began")
    else:
        with control.use([Condition(image(), "canny")]):
            attn.set_processor(Silent(own))
            with pytest.raises(ValueError, match=message):
                make(pipe)
    attn.set_processor(own)
    with control.use([Condition(image(), "canny")]):
        assert torch.equal(make(pipe), expected)


def test_our_transformer_calls_a_processor_of_ones_own(calls):
    pipe, _, controlled = calls
    if type(pipe.transformer).__name__ != "MMDiT":
        pytest.skip("diffusers' models are under test above")
    expected, attn = controlled(), pipe.transformer.transformer_blocks[0].attn
    own = attn.processor
    attn.set_processor(Silent(own))
    assert (controlled() - expected).abs().max() > 1e-5
    attn.set_processor(own)
    assert torch.equal(controlled(), expected)


def test_perturbed_attention_guidance_is_refused_before_the_first_step(tmp_path):
    pipe = sd3()
    parts = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    guided = quiet(diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"]))
    control = OmniControl(guided)
    control.load(lora_file(tmp_path / "canny.safetensors", pipe.transformer, SD3_TARGETS), adapter_name="canny")
    steps = []

    def note(pipe, step, timestep, kwargs):
        steps.append(step)
        return kwargs

    with control.use([Condition(image(), "canny")]):
        make(guided, guidance_scale=4.0, pag_scale=0.0)
        with pytest.raises(ValueError, match=r"is a PAGCFGJointAttnProcessor2_0.*pag_scale=0"):
            make(guided, guidance_scale=4.0, pag_scale=3.0, callback_on_step_end=note)
    assert not steps
