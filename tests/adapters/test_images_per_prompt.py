"""A condition image per prompt or per sample: each sample meets its own, however the batch is made up."""

import pytest
import torch
from tiny import tiny_pipeline
from tiny_control import SD3_TARGETS, SIZE, flux, image, lora_file, sd3, with_texts

from imgdit import Condition, FluxOmniControlPipeline, OmniControl, StableDiffusion3OmniControlPipeline
from imgdit.adapters.pairing import Pairing, Samples

STEPS = {"height": SIZE, "width": SIZE, "num_inference_steps": 1, "output_type": "latent", "return_dict": False}


WORDS = ("a red cube", "the blue sphere left", "a cone")


def texts(numbers):
    """A prompt for each number."""
    return {"prompt": [WORDS[number] for number in numbers]}


def noise(pipe, count):
    """Packed for FLUX."""
    drawn = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe._pack_latents(drawn, count, 4, 8, 8) if "Flux" in type(pipe).__name__ else drawn


def of_use(make, targets):
    def route(file):
        pipe = with_texts(make())
        control = OmniControl(pipe)
        control.load(file(pipe.transformer, targets), adapter_name="a")

        def call(numbers, condition, latents, samples=None, **options):
            with control.use([condition], samples=samples):
                return pipe(**STEPS, **texts(numbers), latents=latents, **options)[0]

        return pipe, call

    return route


def of_class(make, cls, targets):
    def route(file):
        pipe = cls.from_pipe(with_texts(make()))
        pipe.set_progress_bar_config(disable=True)
        pipe.load_control(file(pipe.transformer, targets), adapter_name="a")

        def call(numbers, condition, latents, **options):
            return pipe(**STEPS, **texts(numbers), latents=latents, conditions=[condition], **options)[0]

        return pipe, call

    return route


def of_ours(file):
    pipe = tiny_pipeline()
    pipe.load_control(file(pipe.transformer, None), adapter_name="a")

    def call(numbers, condition, latents, **options):
        return pipe(**texts(numbers), conditions=[condition], latents=latents, **STEPS, **options)[0]

    return pipe, call


ROUTES = {
    "stock FLUX": of_use(flux, None),
    "stock SD3": of_use(sd3, SD3_TARGETS),
    "FLUX with conditions": of_class(flux, FluxOmniControlPipeline, None),
    "SD3 with conditions": of_class(sd3, StableDiffusion3OmniControlPipeline, SD3_TARGETS),
    "ours": of_ours,
}


@pytest.fixture(params=list(ROUTES))
def route(request, tmp_path):
    def file(transformer, targets):
        return lora_file(tmp_path / "a.safetensors", transformer, **({} if targets is None else {"targets": targets}))

    return ROUTES[request.param](file)


def same(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_an_image_per_prompt_meets_its_prompt(route):
    pipe, call = route
    images, start = torch.stack([image(1), image(2)]), noise(pipe, 4)
    both = call([0, 1], Condition(images, "a"), start, num_images_per_prompt=2)
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        alone = call([i], Condition(images[i], "a"), start[rows], num_images_per_prompt=2)
        same(both[rows], alone)
        other = call([i], Condition(images[1 - i], "a"), start[rows], num_images_per_prompt=2)
        assert (both[rows] - other).abs().amax(tuple(range(1, both.ndim))).min() > 1e-3


def test_an_image_per_sample_meets_its_sample(route):
    pipe, call = route
    images, start = torch.stack([image(i) for i in range(4)]), noise(pipe, 4)
    whole = call([0, 1], Condition(images, "a"), start, num_images_per_prompt=2)
    for i in range(4):
        same(whole[i : i + 1], call([i // 2], Condition(images[i], "a"), start[i : i + 1]))


def test_completion_pastes_each_samples_own_tokens(route):
    pipe, call = route
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1:3, 1:] = False
    images, start = torch.stack([image(1), image(2)]), noise(pipe, 4)
    both = call([0, 1], Condition(images, "a", mask=mask, complement=True), start, num_images_per_prompt=2)
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        one = Condition(images[i], "a", mask=mask, complement=True)
        same(both[rows], call([i], one, start[rows], num_images_per_prompt=2))


def test_another_number_of_images_is_refused(route):
    pipe, call = route
    images = torch.stack([image(i) for i in range(3)])
    for numbers, count in (([0, 1], 1), ([0, 1], 3), ([0], 1)):  # 6 samples of 2 prompts divide by 3, and do not pair
        with pytest.raises(
            ValueError, match=r"holds 3 images for .*; give one for all, one per prompt, or one per sample"
        ):
            call(numbers, Condition(images, "a"), noise(pipe, len(numbers) * count), num_images_per_prompt=count)


def test_the_number_of_samples_may_be_told(tmp_path):
    """The same two noises for two prompts: guidance's copies would look alike."""

    def file(transformer, targets):
        return lora_file(tmp_path / "a.safetensors", transformer, targets=targets)

    pipe, call = ROUTES["stock SD3"](file)
    start = noise(pipe, 2).repeat(2, 1, 1, 1)
    condition = Condition(torch.stack([image(1), image(2)]), "a")
    options = {"num_images_per_prompt": 2, "guidance_scale": 1.0}
    both = call([0, 1], condition, start, samples=4, **options)
    assert torch.equal(call([0, 1], condition, start, **options), both)  # the pipeline says that nothing guides
    for i in range(2):
        same(both[2 * i : 2 * i + 2], call([i], Condition(condition.image[i], "a"), start[:2], **options))
    with pytest.raises(ValueError, match="batch of 4, which is no multiple of the 6 samples"):
        call([0, 1], condition, start, samples=6, **options)


@pytest.mark.parametrize(
    ("rows", "words", "images", "guided", "order"),
    [
        ("ab", "pq", 2, None, (0, 1)),
        ("abcd", "ppqq", 2, None, (0, 0, 1, 1)),
        ("abab", "nnpq", 2, None, (0, 1, 0, 1)),
        ("ababab", "nnpqpq", 2, None, (0, 1, 0, 1, 0, 1)),
        ("abcdabcd", "nnnnppqq", 2, None, (0, 0, 1, 1, 0, 0, 1, 1)),
        ("abcdabcd", "nnnnppqq", 4, True, (0, 1, 2, 3, 0, 1, 2, 3)),
        ("abcabc", "nnnppp", 3, None, (0, 1, 2, 0, 1, 2)),
        ("aa", "np", 2, None, None),
        ("aa", "np", 2, True, None),
        ("aa", "pq", 2, False, (0, 1)),
        ("ab", "pq", 2, True, (0, 1)),
        ("abcd", "pqrs", 2, None, None),
        ("abcd", "pppp", 3, None, None),
        ("abab", "ppqq", 2, None, None),
        ("abab", "ppqq", 2, False, (0, 0, 1, 1)),
        ("abab", "ppqq", 2, True, (0, 1, 0, 1)),
    ],
)
def test_what_a_batch_tells(rows, words, images, guided, order):
    latents, text = (torch.tensor([[ord(letter)] for letter in line]) for line in (rows, words))
    pairing = Pairing(len(rows), None, latents, (text,), guided=guided)
    if order is not None:
        assert pairing.order(images) == order
    else:
        with pytest.raises(ValueError, match=f"a condition holds {images} images"):
            pairing.order(images)


def test_what_a_call_tells():
    assert Samples(4).order(2) == Samples(4, 2).order(2) == (0, 0, 1, 1)
    assert Samples(3, 1).order(3) == (0, 1, 2) and Samples(3, 1).order(1) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"holds 3 images for 2 prompt\(s\) and 6 sample"):
        Samples(6, 2).order(3)


def test_perturbed_attention_repeats_the_batch_three_times():
    assert Pairing(12, Samples(4, 2)).order(2) == (0, 0, 1, 1) * 3
