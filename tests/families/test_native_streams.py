"""Conditions of Qwen-Image 2.1 and Ideogram 4 are what their models take as arguments of their own: reference images
before the image, and image tokens at time 1."""

import pytest
import tiny_ernie_image
import tiny_ideogram4
import tiny_qwen_image21
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor
from tiny_control import image, lora_file
from tiny_families import differs, loaded, make, near, passes

from imgdit import Condition, OmniControl
from imgdit.family import find_family
from imgdit.lora.files import activate

QWEN, IDEOGRAM = tiny_qwen_image21.CASES["Qwen-Image 2.1"], tiny_ideogram4.CASES["Ideogram 4"]
ERNIE = tiny_ernie_image.CASES["ERNIE-Image"]


def everywhere(case, tmp_path):
    """`OmniControl` with an adapter on the text's layers too."""
    control = OmniControl(case.pipeline())
    control.load(lora_file(tmp_path / "canny.safetensors", control.transformer, case.style, std=0.2))
    return control


def stock(control, given):
    """The plain model with the adapter active."""
    activate(control.transformer, ["canny"])
    out = control.transformer(**given)[0][:, -16:]
    activate(control.transformer, [])
    return out


def with_references(given, tokens):
    """The stock call with further reference images of 4x4 tokens before the image."""
    own, count = given["hidden_states"].shape[1] - 16, len(tokens)
    places, mask, text = 4 * count, given["img_mask"], given["encoder_hidden_states"]
    return given | {
        "hidden_states": torch.cat([given["hidden_states"][:, :own], *tokens, given["hidden_states"][:, own:]], dim=1),
        "img_shapes": [[*given["img_shapes"][0][:-1], *[(1, 4, 4)] * (count + 1)]],
        "img_mask": F.pad(mask, (0, places), value=True),
        "encoder_hidden_states": F.pad(text, (0, 0, 0, places)),
        "encoder_hidden_states_mask": None,
        "kv_cache": None,
        "kv_cache_mode": None,
    }


@torch.no_grad()
@pytest.mark.parametrize("own", [{}, tiny_qwen_image21.references()], ids=["alone", "beside references"])
def test_a_condition_of_qwen_image_is_a_reference_before_the_image(own, tmp_path):
    """In calls that write the pipeline's keys and values and in those that read them; index i is the i-th place."""
    control = everywhere(QWEN, tmp_path)
    settings = {"acts_on": "all", "position": (0, 0)}
    for count in (1, 2):
        conditions = [Condition(image(i), "canny", index=1.0 + i, **settings) for i in range(count)]
        found, riding = passes(QWEN, control, conditions, call={"steps": 2, "true_cfg_scale": 1.0, **own})
        assert [given["kv_cache_mode"] for given, _ in found] == ["extract", "cached"]
        for given, out in found:
            near(out, stock(control, with_references(given, [item.tokens for item in riding])))
    turned = passes(QWEN, control, conditions[::-1], call={"steps": 1, "true_cfg_scale": 1.0, **own})[0][0][1]
    differs(turned, found[0][1], 1e-4)  # the first sees less than the second


@torch.no_grad()
def test_a_condition_of_ideogram_is_image_tokens_at_time_1(tmp_path):
    control = everywhere(IDEOGRAM, tmp_path)
    conditions = [Condition(image(i), "canny", acts_on="all", index=float(i)) for i in range(2)]
    found, riding = passes(IDEOGRAM, control, conditions, call={"steps": 1, "batch": 2})
    given, out = found[0]
    tokens = [item.tokens.expand(2, -1, -1) for item in riding]
    ids = [(item.frame.ids() + 65536).long().expand(2, -1, -1) for item in riding]
    own = given["hidden_states"].shape[1]
    times = torch.cat([given["timestep"][:, None].expand(-1, own), torch.ones(2, 32)], dim=1)
    extended = given | {
        "hidden_states": torch.cat([given["hidden_states"], *tokens], dim=1),
        "position_ids": torch.cat([given["position_ids"], *ids], dim=1),
        "segment_ids": F.pad(given["segment_ids"], (0, 32), value=1),
        "indicator": F.pad(given["indicator"], (0, 32), value=2),
        "encoder_hidden_states": F.pad(given["encoder_hidden_states"], (0, 0, 0, 32)),
        "timestep": times,
    }
    activate(control.transformer, ["canny"])
    near(out, control.transformer(**extended)[0][:, own - 16 : own])
    activate(control.transformer, [])
    with control.use(conditions):  # a call with a time for each token
        each = given | {"timestep": times[:, :own]}
        near(control.transformer(**each)[0][:, -16:], out)


def test_the_unconditional_transformer_has_no_conditions(tmp_path):
    """Guidance strengthens the condition with the prompt."""
    pipe = IDEOGRAM.pipeline()
    control, results = loaded(IDEOGRAM, pipe, tmp_path), []
    handle = pipe.unconditional_transformer.register_forward_hook(lambda *call: results.append(call[-1][0]))
    make(IDEOGRAM, pipe, steps=1)
    with control.use(Condition(image(), "canny")):
        make(IDEOGRAM, pipe, steps=1)
    handle.remove()
    assert torch.equal(*results)


def test_the_pipelines_own_cache_changes_nothing(tmp_path):
    control = loaded(QWEN, QWEN.pipeline(), tmp_path)
    conditions = [Condition(image(), "canny", start=0.3, strength=0.5), Condition(image(1), "depth", end=0.6)]
    for mode in ("joint", "independent"):
        with control.use(conditions, mode=mode):
            near(make(QWEN, control.pipe), make(QWEN, control.pipe, use_kv_cache=False))


@torch.no_grad()
def test_what_is_refused(tmp_path):
    control = everywhere(QWEN, tmp_path)
    late = Condition(image(), "canny", acts_on="all", start=0.5)
    with pytest.raises(ValueError, match="kept keys and values of the text without it; pass use_kv_cache=False"):
        with control.use(late):
            make(QWEN, control.pipe)
    with control.use(late):
        make(QWEN, control.pipe, use_kv_cache=False)
    with (
        pytest.raises(ValueError, match="keeps keys and values of its pipeline"),
        control.references(0.5),
    ):
        pass
    for case in (QWEN, IDEOGRAM, ERNIE):
        name = type(case.pipeline().transformer).__name__
        with pytest.raises(ValueError, match=f"complement=True cannot complete an image with a {name}"):
            with loaded(case, case.pipeline(), tmp_path).use(
                Condition(image(), "canny", complement=True, mask=torch.eye(4).bool())
            ):
                pass
    control.transformer.set_attn_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(ValueError, match=r"Call transformer.set_attn_processor\(QwenImage21AttnProcessor\(\)\) first"):
        with control.use(Condition(image(), "canny")):
            pass


def test_a_text_of_another_length_has_other_keys(tmp_path):
    """ERNIE-Image's conditions begin behind the text, and are turned otherwise with it."""
    control = loaded(ERNIE, ERNIE.pipeline(), tmp_path)
    calls = [{"steps": 2}, {"steps": 2, "prompt_embeds": [torch.ones(3, 24)]}]
    conditions = [Condition(image(), "canny")]
    with control.use(conditions, mode="independent", cache=False):
        computed = [make(ERNIE, control.pipe, **call) for call in calls]
    with control.use(conditions, mode="independent"):
        for number in (0, 1, 0):
            near(make(ERNIE, control.pipe, **calls[number]), computed[number])


def test_conditions_have_the_normalisation_that_pipelines_undo():
    pixels, found = image()[None] * 2 - 1, {}
    for case in (QWEN, IDEOGRAM, ERNIE):
        pipe = case.pipeline()
        tokens = find_family(pipe.transformer).tokens.encode(pipe.transformer, pipe.vae, pixels, None)
        found[case.pipeline.__name__] = pipe, pipe.vae, tokens
    pipe, vae, tokens = found["qwen_image21"]
    opaque = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)[:, :, None]
    near(tokens, pipe._pack_latents(pipe._encode_vae_image(opaque, None), 1, 16, 4, 4), 1e-5)
    pipe, vae, tokens = found["ideogram4"]
    cells = tokens * torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps) + vae.bn.running_mean
    latents = cells.view(1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 8, 8)
    near(latents, vae.encode(pixels).latent_dist.mode(), 1e-5)
    pipe, vae, tokens = found["ernie_image"]
    planes = (tokens * torch.sqrt(vae.bn.running_var + 1e-5) + vae.bn.running_mean).transpose(1, 2).view(1, 16, 4, 4)
    near(pipe._unpatchify_latents(planes), vae.encode(pixels).latent_dist.mode(), 1e-5)
