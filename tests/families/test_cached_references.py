"""`references(cached="approximate")`: keys and values of references from an earlier step, and the error of that."""

from unittest import mock

import pytest
import tiny_flux2
import tiny_flux_kin
import tiny_qwen_image
import torch
from diffusers import FluxKontextPipeline, LongCatImageEditPipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from tiny_control import TARGETS, flux, image, quiet
from tiny_families import FamilyCase, differs, loaded, make, near, random
from tiny_flux2 import reference
from tiny_flux3 import flux3

from imgdit import Condition, OmniControl, References
from imgdit.adapters.run import Progress


def kontext():
    return quiet(FluxKontextPipeline.from_pipe(flux()))


class Processor:
    """Of a text encoder that is not there."""

    image_processor = None


class LongCatEdit(LongCatImageEditPipeline):
    """Reads its reference image at 32 pixels and not at 1024, and has prompts of 6 tokens, of 4 for an empty one."""

    def __call__(self, *args, height, width, **options):
        with mock.patch.object(pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: (32, 32)):
            return super().__call__(*args, **options)

    def _encode_prompt(self, prompt, image):
        length = 6 if prompt[0] else 4
        return random(len(prompt), length, 24, seed=length)


def longcat_edit():
    own = tiny_flux_kin.longcat_image()
    return quiet(LongCatEdit(own.scheduler, own.vae, None, None, Processor(), own.transformer))


SHARED = {"dense": None, "style": "", "hookpoints": ()}
CASES = {name: case for name, case in (tiny_flux2.CASES | tiny_qwen_image.CASES).items() if case.references}
CASES["FLUX.1 Kontext"] = FamilyCase(
    pipeline=kontext,
    prompts=lambda batch: {
        "prompt_embeds": random(batch, 5, 32), "pooled_prompt_embeds": random(batch, 32, seed=4), "max_area": 16**2,
        "_auto_resize": False,
    },
    targets=TARGETS,
    references=lambda: {"image": reference()},
    **SHARED,
)  # fmt: skip
CASES["LongCat-Image-Edit"] = FamilyCase(
    pipeline=longcat_edit,
    prompts=lambda batch: {"prompt": "a", "negative_prompt": "", "guidance_scale": 2.0},
    targets=tiny_flux_kin.TARGETS,
    references=lambda: {"image": reference()},
    calls=2,
    **SHARED,
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def control(case, tmp_path):
    return loaded(case, case.pipeline(), tmp_path)


@torch.no_grad()
def calls(case, control):
    """Arguments of the transformer for the prompt in two steps of a call with references, and its results."""
    found = []
    handle = control.transformer.register_forward_hook(
        lambda module, args, kwargs, output: found.append((kwargs, output[0])), with_kwargs=True
    )
    make(case, control.pipe, steps=2, **case.references())
    handle.remove()
    return found[0], found[case.calls]


@torch.no_grad()
def test_keys_of_the_first_step_are_read_and_the_error_is_told(case, control, caplog):
    (first, plain), (second, expected) = calls(case, control)
    lengths = []
    control.transformer.transformer_blocks[0].attn.to_k.register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )

    def at(step, arguments):
        control.progress = lambda *_: Progress(step, 4)
        return control.transformer(**arguments)[0]

    image = first["hidden_states"].shape[1] - sum(
        frame.length for frame in control._conditions.references(control.transformer, first)
    )
    with control.references(cached="approximate"):
        near(at(0, first)[:, :image], plain[:, :image])
        near(at(1, first)[:, :image], plain[:, :image])  # the same input: what is kept is what would be computed
        assert control.reference_error < 1e-5
        assert lengths[0] > lengths[1] == image
    with control.references(cached="approximate"):
        at(0, first)
        changed = at(1, second)[:, :image]
        expected = expected[:, :image]
        differs(changed, expected, 1e-4)
        lengths.clear()
        at(2, second)
        assert lengths == [image]  # the error is measured once
    error = float((changed - expected).norm() / expected.norm())
    assert control.reference_error == pytest.approx(error, rel=1e-3)
    assert "reading the references of step 1 changes the model's result of step 2" in caplog.text


def test_each_call_of_the_pipeline_has_its_own(case, control):
    call = case.references() | {"steps": 3}
    plain = make(case, control.pipe, **call)
    turned = reference().rotate(90)
    other = call | {"image": [turned] if isinstance(call["image"], list) else turned}
    with control.references(cached="approximate"):
        cached = make(case, control.pipe, **call)
        second = make(case, control.pipe, **other)
    differs(cached, plain, 1e-5)
    with control.references(cached="approximate"):
        near(make(case, control.pipe, **other), second)
        near(make(case, control.pipe, **call), cached)
    assert torch.equal(make(case, control.pipe, **call), plain)


def test_what_cannot_be_cached_is_refused(case, control):
    for kind, settings, message in (
        (control, {"cached": True}, 'every block of the references does; leave cached out, or use cached="approx'),
        (control, {"cached": "yes"}, "cached"),
        (OmniControl(flux3()), {"cached": "approximate"}, 'Flux3Transformer2DModel has no cached="approximate"'),
    ):
        with pytest.raises(ValueError, match=message), kind.references(**settings):
            pass
    beside = {"references": References(cached="approximate")}
    with (
        pytest.raises(ValueError, match="runs without conditions"),
        control.use(Condition(image(), "canny"), **beside),
    ):
        pass
