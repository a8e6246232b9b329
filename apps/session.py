"""One loaded model, and every way to generate images with it: text, conditions, frames, unlearning, steering."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image

import imgdit
from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.omni_control import OmniControl
from imgdit.apps.jobs.request import Control, Request, RequestFrame, fitted
from imgdit.apps.jobs.shelf import Shelf
from imgdit.apps.jobs.sizes import check_sides, duration, unsuited
from imgdit.cameras import FOCAL_LENGTH, orbit_cameras, scale_positions
from imgdit.defaults import GUIDANCE
from imgdit.family import find_family
from imgdit.images import fit, to_rgb
from imgdit.images.fitting import filter_of
from imgdit.lora.files import legal_name
from imgdit.models.nextdit import NextDiT
from imgdit.naming import old_names
from imgdit.pipelines.few_steps import FewSteps, few_steps, load_few_steps
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.loading import chosen_device, chosen_dtype, denoiser, load_pipeline, over_components
from imgdit.pipelines.one_diffusion import OneDiffusionPipeline
from imgdit.pipelines.text_to_image import ImgDiTPipeline
from imgdit.sae.fingerprints import model_fingerprint
from imgdit.sae.hooks import site
from imgdit.sae.unlearning import ConceptUnlearner, steer
from imgdit.scenes.geometry import intrinsics
from imgdit.scenes.training_frames import scene_poses
from imgdit.scenes.world import Camera
from imgdit.tasks import TASKS, ImageFrame, infer_task

Watch = Callable[[int, int, Callable[[], Image.Image] | None], bool]
"""Called after each step with its number from 1, their count and what draws the image so far, if anything does;
`False` stops."""


class Stopped(Exception):
    """The watcher of a request stopped it."""


@old_names(pictures="images")
class Generated(NamedTuple):
    """What a request led to."""

    images: list[Image.Image]
    """One, or one for each of the request's `outputs`."""
    request: Request
    """With its defaults filled in and its images as they were used: generated again, it gives the same bits."""


class Session:
    """A loaded pipeline.

    Args:
        shelf: names the pipeline and what lies beside it.
        loading: precision, device, offloading and bits.
    """

    def __init__(self, shelf: Shelf, loading: LoadOptions = AUTO):
        self.shelf, self.loading = shelf, loading
        self.pipe = load_pipeline(shelf.places["model"] or "", loading)
        if isinstance(self.pipe, OneDiffusionPipeline) and not isinstance(self.pipe.transformer, NextDiT):
            self.frames_pipe, self.pipe = self.pipe, over_components(ImgDiTPipeline, self.pipe, loading)
        shelf.tasks = self._tasks()
        self._bars: dict[str, Any] = {}
        self._loaded: dict[str, str] = {}
        """Adapters that the pipeline has: its name for a file's."""

    @cached_property
    def frames_pipe(self) -> OneDiffusionPipeline:
        """The pipeline for frames, over the same components.

        Raises:
            ValueError: the model takes none.
        """
        if isinstance(self.pipe, OneDiffusionPipeline):
            return self.pipe
        if not isinstance(self.pipe, ImgDiTPipeline):
            raise ValueError(
                f"{type(self.pipe).__name__} generates images from text and conditions; for any-to-any take the "
                "embedded model or a OneDiffusion folder"
            )
        pipe = over_components(OneDiffusionPipeline, self.pipe, self.loading)
        pipe.set_progress_bar_config(**self._bars)
        return pipe

    def quiet(self, disable: bool | None = True) -> None:
        """Switch the sampler's bars off; `None`: where nobody looks on."""
        self._bars = {"desc": "sampling", "disable": disable}
        self.pipe.set_progress_bar_config(**self._bars)
        if "frames_pipe" in vars(self):
            self.frames_pipe.set_progress_bar_config(**self._bars)

    # What is there

    def _tasks(self) -> list[str]:
        """Tasks of frames that the model can be asked for."""
        if not isinstance(self.pipe, ImgDiTPipeline):
            return []
        taught = self.pipe.tokenizer.get_vocab()
        reads_any_token = isinstance(self.pipe.transformer, NextDiT)
        return [name for name, task in TASKS.items() if reads_any_token or task.token in taught]

    @cached_property
    def unlearner(self) -> ConceptUnlearner:
        """The sparse autoencoders and their concepts.

        Raises:
            ValueError: there are none.
        """
        self.shelf.need_sae()
        return ConceptUnlearner.from_pretrained(self.shelf.sae_folder)

    @cached_property
    def turbo(self) -> FewSteps:
        """The few-step LoRA of the pipeline's folder, loaded.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        return load_few_steps(self.pipe, self.shelf.home)

    @property
    def seen_at(self) -> str:
        """Hookpoint whose features are looked at and steered: the first of the image; without one, of the text."""
        places = list(self.unlearner.saes)
        return next((place for place in places if not site(self.pipe, place).text), places[0])

    @property
    def default_size(self) -> int | None:
        """Pixels per side of an image nobody gave a size for; `None` where it depends on the image given."""
        if isinstance(self.pipe, OneDiffusionPipeline):
            return None
        if isinstance(self.pipe, ImgDiTPipeline):
            return self.pipe.default_size
        cells = getattr(self.pipe, "default_sample_size", None)
        return None if cells is None else cells * self.pipe.vae_scale_factor

    @property
    def begins_at_images(self) -> bool:
        """Whether a run may begin at an image under noise."""
        return "strength" in signature(type(self.pipe).__call__).parameters

    @property
    def cell(self) -> int:
        """Pixels that the sides of an image are multiples of: those of a token."""
        pipe = self.pipe
        packed = pipe.image_processor.config.vae_scale_factor  # FLUX packs 2 x 2 latent cells outside of its model
        return max(packed, pipe.vae_scale_factor * getattr(pipe, "patch_size", 1))

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What the last bits of an image depend on besides the request."""
        model = denoiser(self.pipe)
        sketch = json.dumps(model_fingerprint(model), sort_keys=True)
        bits: dict[str, Any] = {} if self.loading.quantize == "none" else {"quantize": self.loading.quantize}
        if self.loading.compile:
            bits["compile"] = True
        if self.loading.lora:
            bits["lora"] = list(self.loading.lora)
        return {
            "imgdit": imgdit.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "device": str(chosen_device(self.loading)),
            "dtype": str(chosen_dtype(self.loading)).removeprefix("torch."),
            **bits,
            **self._captions_read,
            "threads": torch.get_num_threads(),
            "weights": hashlib.sha256(sketch.encode()).hexdigest()[:16],
        }

    @property
    def _captions_read(self) -> dict[str, str]:
        """By which facts prompts are read, if by any."""
        words = getattr(self.pipe, "prompt_words", None)
        if words is None:
            return {}
        facts = json.dumps(dataclasses.asdict(words), sort_keys=True)
        return {"prompts": hashlib.sha256(facts.encode()).hexdigest()[:16]}

    def read_prompts_as(self, made_with: Mapping[str, Any]) -> None:
        """Read prompts as for an image that was generated before: by no facts, if none were noted with it.

        Args:
            made_with: `Origin.made_with` of the image.
        """
        if "prompts" not in made_with:
            pipes: list[Any] = [self.pipe, vars(self).get("frames_pipe")]
            for pipe in pipes:
                if getattr(pipe, "prompt_words", None) is not None:
                    pipe.prompt_words = None
            vars(self).pop("made_with", None)

    # Before generating

    def remarks(self, request: Request) -> list[str]:
        """What a person should know before this is made: words without a meaning, and a size that was never taught
        with the time that it will take.

        A size above the model's own is timed by two steps at its own: call it with the device in hand.

        Raises:
            ValueError: the sides are no multiples of `cell`.
        """
        return [remark for remark in (self.shelf.about_words([request.prompt]), self.about_size(request)) if remark]

    def about_size(self, request: Request, timed: bool = True) -> str | None:
        """A prompt on a size that was never taught, see `remarks`; `None`: nothing speaks against it.

        Args:
            request: what is asked for.
            timed: say how long it will take as well.
        """
        check_sides(request.width, request.height, self.cell)
        own = self.default_size
        size = (request.width or own, request.height or own)
        if size[0] is None or size[1] is None or (request.width is None and request.height is None):
            return None
        remark = unsuited((size[0], size[1]), self.shelf.taught.sizes, own, self.cell)
        if remark is None or not timed or own is None or size[0] * size[1] <= own**2:
            return remark
        # Attention grows faster than the area, hence "at least".
        seconds = request.steps * self._step_seconds * size[0] * size[1] / own**2
        return f"{remark}. It takes at least {duration(seconds)}"

    @cached_property
    def _step_seconds(self) -> float:
        """Of an image of the model's own size with guidance: the second of two steps."""
        times: list[float] = []

        def watch(step: int, steps: int, draw: Any) -> bool:
            times.append(time.perf_counter())
            return True

        self.generate(Request(steps=2, height=self.default_size, width=self.default_size), watch)
        return times[1] - times[0]

    # Generating

    def settled(self, request: Request) -> Request:
        """The request with its defaults filled in and its images at the size they are used at."""
        check_sides(request.width, request.height, self.cell)
        height, width = request.height or self.default_size, request.width or self.default_size
        guidance = request.guidance
        if request.turbo:
            self.shelf.check_turbo(request)
        if guidance is None:
            guidance = 1.0 if request.turbo or _shown_by_images(request.frames) else GUIDANCE
        controls = tuple(self._fitted(control, height, width) for control in request.controls)
        frames = tuple(
            frame if frame.image is None else replace(frame, image=fitted(frame.image, frame.kind, height, width))
            for frame in request.frames
        )
        mode = request.mode
        if mode is None and request.concepts:
            default = self.unlearner.default_mode(self.pipe, request.concepts)
            mode = default if request.multiplier is None else "scale"
        settled = replace(request, height=height, width=width, guidance=guidance, mode=mode or "scale")
        image = None if request.image is None else fitted(request.image, "image", height, width)
        return replace(settled, controls=controls, frames=frames, image=image)

    @torch.no_grad()
    def generate(self, request: Request, watch: Watch | None = None) -> Generated:
        """Generate what is asked for.

        Raises:
            ValueError: something that the model cannot do.
            Stopped: `watch` said so.
        """
        request = self.settled(request)
        frames = request.frames
        if request.controls and self.shelf.as_frames(request.controls):
            frames = (RequestFrame(), RequestFrame(request.controls[0].kind, request.controls[0].image))
        pipe: Any = self.frames_pipe if frames else self.pipe
        call = self._call(request, frames)
        first = next((i for i, frame in enumerate(frames) if frame.image is None and frame.kind != "rays"), 0)
        watcher = None if watch is None else _Watcher(watch, first)
        with self._edited(pipe, request):
            output = pipe(**call, **({} if watcher is None else {"callback_on_step_end": watcher}))
        if watcher is not None and watcher.stopped:
            raise Stopped
        images = _images(output, frames)
        return Generated(images, replace(request, height=images[0].height, width=images[0].width))

    def _call(self, request: Request, frames: tuple[RequestFrame, ...]) -> dict[str, Any]:
        """Arguments of the pipeline."""
        call: dict[str, Any] = {
            "prompt": request.prompt,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "height": request.height,
            "width": request.width,
            "generator": torch.Generator().manual_seed(request.seed),
        }
        if request.negative_prompt:
            call["negative_prompt"] = request.negative_prompt
        if request.image is not None:
            if frames:
                raise ValueError(
                    "a control that is read as a frame goes with no image to begin at; leave one of them out"
                )
            if not self.begins_at_images:
                name = type(self.pipe).__name__
                raise ValueError(f"{name} begins at noise alone; for an image to begin at take the embedded model")
            call |= {"image": request.image, "strength": request.strength}
        if frames:
            task = request.task or (request.controls[0].kind if request.controls else None)
            return call | self._frames(frames, task)
        if request.controls and self._rides is None:
            call["conditions"] = [self._condition(control) for control in request.controls]
        return call

    @contextmanager
    def _edited(self, pipe: Any, request: Request) -> Iterator[None]:
        """The few-step LoRA in use, concepts unlearned and features steered while the context is open."""
        with ExitStack() as hooks:
            if request.turbo:
                hooks.enter_context(few_steps(pipe, self.turbo))
            if request.controls and pipe is self.pipe and self._rides is not None:
                conditions = [self._condition(control) for control in request.controls]
                hooks.enter_context(self._rides.use(conditions))
            if request.concepts:
                mode: Any = request.mode
                hooks.enter_context(
                    self.unlearner.attach(pipe, list(request.concepts), mode=mode, multiplier=request.multiplier)
                )
            if request.features:
                hooks.enter_context(steer(pipe, self.unlearner.saes[self.seen_at], dict(request.features)))
            yield

    def _fitted(self, control: Control, height: int | None, width: int | None) -> Control:
        """A control with its image in RGB and at the size it is read at, see `Condition.position`."""
        name = self.shelf.adapter_for(control.kind)
        if name is None or height is None or width is None or self._control_loader is None:
            return replace(control, image=fitted(control.image, control.kind, height, width))
        image = to_rgb(control.image)
        condition = self._described(replace(control, image=image), name)
        if not isinstance(condition.position, str):  # placed by numbers, it has to have a whole number of tokens
            condition = replace(condition, position="subject")
        side = self.pipe.vae_scale_factor * getattr(self.pipe, "patch_size", 2)
        rows, columns = condition.read_size((image.height, image.width), side, (height // side, width // side))
        return replace(control, image=fit(image, (columns, rows), filter_of(control.kind)))

    @cached_property
    def _rides(self) -> OmniControl | None:
        """What lets conditions ride through a pipeline of diffusers; `None`: the pipeline's call takes them, or its
        transformer takes none."""
        if hasattr(self.pipe, "load_control"):
            return None
        family = find_family(compat.unwrapped(denoiser(self.pipe)))
        return None if family is None or family.conditions is None else OmniControl(self.pipe)

    @property
    def _control_loader(self) -> Callable[..., Any] | None:
        """Loads a condition adapter; `None`: this pipeline takes none."""
        if self._rides is not None:
            return self._rides.load
        return getattr(self.pipe, "load_control", None)

    def _condition(self, control: Control) -> Condition:
        loader = self._control_loader
        if loader is None:
            raise ValueError(
                f"{type(self.pipe).__name__} takes no conditions; `imgdit models` lists the families that do"
            )
        name = self.shelf.adapter_for(control.kind)
        assert name is not None
        if name not in self._loaded:
            adapter = legal_name(name, self._loaded.values())
            self._loaded[name] = loader(self.shelf.adapters[name], adapter_name=adapter).adapter
        return replace(self._described(control, name), adapter=self._loaded[name])

    def _described(self, control: Control, adapter: str) -> Condition:
        """A control as the condition of its adapter, whose header tells where it stands."""
        info = self.shelf.found[adapter].info
        position: Any = info.position or "aligned"
        return Condition(
            control.image,
            adapter,
            position=position,
            scale=info.scale or 1.0,
            strength=control.strength,
            start=control.start,
            end=control.end,
        )

    def _frames(self, frames: tuple[RequestFrame, ...], task: str | None) -> dict[str, Any]:
        """Arguments of the any-to-any pipeline."""
        cameras = [frame.camera for frame in frames if frame.camera is not None]
        focal, matrices = self._cameras(cameras) if cameras else (FOCAL_LENGTH, torch.empty(0))
        rows = iter(matrices)
        asked = []
        for frame in frames:
            kind = TASKS[frame.kind].condition if frame.kind in TASKS else frame.kind
            content = next(rows) if frame.camera is not None else frame.image
            asked.append(ImageFrame.generate(kind) if content is None else ImageFrame.clean(content, kind))
        pair = next((f.kind for f in frames if f.kind in TASKS and TASKS[f.kind].condition == "image"), None)
        return {"frames": asked, "task": task or pair or infer_task(asked), "focal_length": focal}

    def _cameras(self, cameras: list[tuple[float, float]]) -> tuple[float, torch.Tensor]:
        """Focal length in image widths and camera-to-world matrices (V, 4, 4), as the model was taught them."""
        if isinstance(self.pipe.transformer, NextDiT):
            azimuths, elevations = zip(*cameras)
            return FOCAL_LENGTH, scale_positions(orbit_cameras(azimuths, elevations))
        poses = scene_poses([Camera(azimuth=azimuth, elevation=elevation) for azimuth, elevation in cameras])
        return float(intrinsics(1)[0, 0]), poses


def _images(output: Any, frames: tuple[RequestFrame, ...]) -> list[Image.Image]:
    """Images of the frames that were generated, in their order."""
    if not frames:
        return list(output.images)
    kinds = [
        "image" if frame.kind == "image" else TASKS[frame.kind].condition
        for frame in frames
        if frame.image is None and frame.kind != "rays"
    ]
    queues = {"image": iter(output.images)} | {kind: iter(maps) for kind, maps in (output.maps or {}).items()}
    return [next(queues[kind]) for kind in kinds]


def _shown_by_images(frames: Sequence[RequestFrame]) -> bool:
    """Whether a given image shows what is asked for, its maps or its other views, and guidance would only harm."""
    images = [frame.image is not None for frame in frames if frame.kind == "image"]
    views = any(frame.kind == "rays" for frame in frames)
    return bool(frames) and (all(images) or (views and any(images)))


class _Watcher:
    """A pipeline's callback that tells a `Watch` and stops when it says so.

    Args:
        watch: is told.
        frame: number of the frame that is drawn.
    """

    def __init__(self, watch: Watch, frame: int):
        self.watch, self.frame, self.stopped = watch, frame, False
        self.before: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        draw = None
        if isinstance(pipe, ImgDiTPipeline):
            latents = latents[:, self.frame] if latents.ndim == 5 else latents  # (B, C, h, w)
            before = self.before

            def draw() -> Image.Image:
                return _clean(pipe, step, latents, before)

        if not self.watch(step + 1, pipe.num_timesteps, draw):
            self.stopped = pipe._interrupt = True
        self.before = latents
        return {}


@torch.no_grad()
def _clean(pipe: ImgDiTPipeline, step: int, latents: torch.Tensor, before: torch.Tensor | None) -> Image.Image:
    """The image that a step aimed at: from where it came, on to noise level 0."""
    if before is not None:
        sigmas = pipe.scheduler.sigmas[pipe.scheduler.begin_index or 0 :]  # of the steps of this run
        gone, left = float(sigmas[step] - sigmas[step + 1]), float(sigmas[step + 1])
        latents = latents - left / gone * (before - latents)
    return pipe.decode_latents(latents)[0]
