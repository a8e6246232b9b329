"""When conditions act: steps counted by the scheduler in use, in every pipeline and in several threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny import tiny_pipeline
from tiny_control import SD3_TARGETS, flux, image, lora_file, make, quiet, sd3

from imgdit import Condition, FluxOmniControlPipeline, OmniControl
from imgdit.frames import Frame
from imgdit.lora.files import AdapterInfo

KINDS = {
    "flux": (flux, {}, "FluxImg2ImgPipeline"),
    "sd3": (sd3, {"targets": SD3_TARGETS}, "StableDiffusion3Img2ImgPipeline"),
}
IMAGE = {"image": image(2)[None]}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def controlled(kind, folder, info=None):
    build, targets, _ = KINDS[kind]
    pipe = build()
    control = OmniControl(pipe)
    control.load(lora_file(folder / "canny.safetensors", pipe.transformer, info=info, **targets), adapter_name="canny")
    return control


def acting(control, pipe, conditions=(), **call):
    """In which steps of a call conditions act, told by the width of the image stream in a block."""
    widths, counted = [], []

    def note(module, args, kwargs):
        widths.append(kwargs["hidden_states"].shape[1])

    def step(pipe, number, timestep, tensors):
        counted.append(set(widths))
        widths.clear()
        return tensors

    handle = control.transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with control.use(conditions):
            make(pipe, callback_on_step_end=step, **call)
    finally:
        handle.remove()
    assert all(len(widths) == 1 for widths in counted)
    return [widths.pop() > 16 for widths in counted]


CALLS = [
    # condition's range, num_inference_steps, img2img strength, steps in which it acts
    ({"start": 0.5}, 10, None, [False] * 5 + [True] * 5),
    ({"end": 0.5}, 10, None, [True] * 5 + [False] * 5),
    ({"start": 0.5}, 10, 1.0, [False] * 5 + [True] * 5),
    ({"start": 0.5}, 10, 0.6, [False] * 3 + [True] * 3),
    ({"end": 0.5}, 10, 0.6, [True] * 3 + [False] * 3),
    ({"start": 0.25, "end": 0.75}, 10, 0.4, [False, True, True, False]),
]


def test_start_and_end_in_pipelines_of_from_pipe(kind, tmp_path):
    control = controlled(kind, tmp_path)
    other = quiet(getattr(diffusers, KINDS[kind][2]).from_pipe(control.pipe))
    for changes, steps, strength, expected in CALLS:  # the first pipeline has not run before the second does
        pipe, call = (control.pipe, {}) if strength is None else (other, {**IMAGE, "strength": strength})
        condition = Condition(image(), "canny", **changes)
        assert acting(control, pipe, [condition], num_inference_steps=steps, **call) == expected, (changes, strength)
    fresh = controlled(kind, tmp_path)
    other = quiet(getattr(diffusers, KINDS[kind][2]).from_pipe(fresh.pipe))
    got = acting(fresh, other, [Condition(image(), "canny", end=0.5)], num_inference_steps=4, strength=0.5, **IMAGE)
    assert got == [True, False]


@pytest.mark.parametrize(("cls", "calls"), [(FlowMatchEulerDiscreteScheduler, 4), (FlowMatchHeunDiscreteScheduler, 7)])
def test_start_and_end_count_the_calls_of_the_transformer(cls, calls, tmp_path):
    """A second-order scheduler calls twice in a step; diffusers' ControlNets count the calls too."""
    control = controlled("sd3", tmp_path)
    control.pipe.scheduler = cls.from_config(control.pipe.scheduler.config)
    got = acting(control, control.pipe, [Condition(image(), "canny", end=0.5)], num_inference_steps=4)
    assert got == [(i + 1) / calls <= 0.5 for i in range(calls)]


def test_half_precision_timesteps_are_recognised(tmp_path):
    control = controlled("flux", tmp_path)
    control.pipe.to(torch.bfloat16)
    condition = Condition(image(), "canny", start=0.5)
    embeds = {
        name: torch.randn(shape, dtype=torch.bfloat16)
        for name, shape in (("prompt_embeds", (1, 5, 32)), ("pooled_prompt_embeds", (1, 32)))
    }
    got = acting(control, control.pipe, [condition], num_inference_steps=28, **embeds)
    assert got == [False] * 14 + [True] * 14


def test_the_scheduler_of_the_pipeline_that_runs_counts(kind, tmp_path):
    control = controlled(kind, tmp_path)
    other = quiet(getattr(diffusers, KINDS[kind][2]).from_pipe(control.pipe))
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    late = Condition(image(), "canny", start=0.5)
    for _ in range(2):  # before the first pipeline ran, and after
        got = acting(control, other, [late], num_inference_steps=10, strength=0.6, **IMAGE)
        assert got == [False] * 3 + [True] * 3
        make(control.pipe)


def test_a_timestep_that_is_not_the_schedulers_is_refused(kind, tmp_path):
    """A loop of one's own, which steps another scheduler than the pipeline's."""
    control = controlled(kind, tmp_path)
    scheduler = control.pipe.scheduler
    inputs = {
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "hidden_states": torch.randn(1, 16, 16) if kind == "flux" else torch.randn(1, 4, 8, 8),
    }
    if kind == "flux":
        inputs |= {"img_ids": Frame((4, 4)).ids(), "txt_ids": torch.zeros(5, 3)}

    def run(timestep):
        return control.transformer(**inputs, timestep=torch.tensor([timestep / (1000 if kind == "flux" else 1)]))

    with torch.no_grad(), control.use([Condition(image(), "canny", start=0.5)]):
        with pytest.raises(ValueError, match="which is not at the timestep 1000 of this call; step that scheduler"):
            run(1000.0)  # nobody has set its timesteps
        scheduler.set_timesteps(4)
        run(float(scheduler.timesteps[0]))
        with pytest.raises(ValueError, match="not at the timestep"):
            run(float(scheduler.timesteps[0]) - 7.0)


# Several threads


def clones(pipe, count):
    """Pipelines with schedulers of their own on one transformer."""
    made = []
    for _ in range(count):
        parts = dict(pipe.components)
        parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
        made.append(quiet(type(pipe)(**parts)))
    return made


def in_threads(jobs):
    """Results of functions that all run at once."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_pipelines_in_threads_under_one_use_are_exact(mode, kind, tmp_path):
    control = controlled(kind, tmp_path, AdapterInfo(mode=mode))
    conditions = [Condition(image(), "canny"), Condition(image(1), "canny", position="subject", strength=0.5)]
    sizes = ((16, 16), (16, 24), (24, 16), (16, 16))
    calls = [
        {"seed": n, "num_inference_steps": 3 + n, "height": height, "width": width}
        for n, (height, width) in enumerate(sizes)
    ]
    expected = []
    for pipe, call in zip(clones(control.pipe, 4), calls):
        with control.use(conditions):
            expected.append(make(pipe, **call))
    pipes = clones(control.pipe, 4)
    with control.use(conditions):
        for _ in range(2):
            got = in_threads([lambda pipe=pipe, call=call: make(pipe, **call) for pipe, call in zip(pipes, calls)])
            for one, right in zip(got, expected):
                assert torch.equal(one, right)


def test_start_and_end_in_threads_are_exact(kind, tmp_path):
    """Each thread counts by the scheduler of its own pipeline, of another number of steps."""
    control = controlled(kind, tmp_path)
    conditions = [Condition(image(), "canny", end=0.5), Condition(image(1), "canny", start=0.5)]
    calls = [{"seed": n, "num_inference_steps": steps} for n, steps in enumerate((4, 8, 2, 5))]
    with control.use(conditions):
        expected = [make(pipe, **call) for pipe, call in zip(clones(control.pipe, 4), calls)]
        pipes = clones(control.pipe, 4)
        got = in_threads([lambda pipe=pipe, call=call: make(pipe, **call) for pipe, call in zip(pipes, calls)])
    for one, right in zip(got, expected):
        assert torch.equal(one, right)


def test_hooked_modules_in_threads_are_exact(tmp_path):
    """Each call of a hooked module computes its own thread's rows."""
    control = controlled("flux", tmp_path)
    calls = [{"seed": n, "num_inference_steps": 3 + n} for n in range(3)]
    with control.use([Condition(image(), "canny")]):
        expected = [make(pipe, **call) for pipe, call in zip(clones(control.pipe, 3), calls)]
        seen = []
        modules = [module for _, module in control.transformer.named_modules()]
        handles = [module.register_forward_hook(lambda module, args, out: seen.append(module)) for module in modules]
        pipes = clones(control.pipe, 3)
        got = in_threads([lambda pipe=pipe, call=call: make(pipe, **call) for pipe, call in zip(pipes, calls)])
        for handle in handles:
            handle.remove()
        assert seen
        for one, right in zip(got, expected):
            assert torch.equal(one, right)
    assert not any("forward" in m.__dict__ for m in modules if not hasattr(m, "_diffusers_hook"))


def test_our_pipelines_in_threads_are_exact(tmp_path):
    pipe = tiny_pipeline()
    pipe.load_control(lora_file(tmp_path / "own.safetensors", pipe.transformer), adapter_name="own")
    call = {"prompt": "a red cube", "height": 16, "width": 16, "output_type": "latent"}
    runs = [
        {"conditions": [Condition(image(n), "own", start=0.25 * n)], "num_inference_steps": 3 + n} for n in range(3)
    ]

    def run(pipe, seed, options):
        return pipe(**call, **options, generator=torch.Generator().manual_seed(seed)).images

    expected = [run(one, n, options) for n, (one, options) in enumerate(zip(clones(pipe, 3), runs))]
    jobs = [lambda a=(one, n, o): run(*a) for n, (one, o) in enumerate(zip(clones(pipe, 3), runs))]
    for one, right in zip(in_threads(jobs), expected):
        assert torch.equal(one, right)


def test_a_second_use_in_another_thread_is_refused(tmp_path):
    control = controlled("flux", tmp_path)
    other = quiet(FluxOmniControlPipeline.from_pipe(control.pipe))
    with control.use([Condition(image(), "canny")]):
        expected = make(control.pipe)
        with ThreadPoolExecutor(1) as pool:
            failed = pool.submit(make, other, conditions=[Condition(image(), "canny")])
        with pytest.raises(ValueError, match="in use already on this transformer"):
            failed.result()
        assert torch.equal(make(control.pipe), expected)
