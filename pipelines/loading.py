"""From a model's name and `LoadOptions` to a pipeline: the one way of all commands and of the demo."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers import PipelineQuantizationConfig

import imgdit
from imgdit import compat
from imgdit.hub import HUB_ID, find_pipeline
from imgdit.lora.files import read_info
from imgdit.models.quantized import load_options, quantize_rows
from imgdit.pipelines.few_steps import TURBO
from imgdit.pipelines.load_options import AUTO, LoadOptions
from imgdit.pipelines.omni_control import FluxOmniControlPipeline, StableDiffusion3OmniControlPipeline
from imgdit.pipelines.text_to_image import ImgDiTPipeline

WITH_CONDITIONS = {
    "FluxPipeline": FluxOmniControlPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3OmniControlPipeline,
}
"""diffusers' pipelines that take conditions as ours, by the name in `model_index.json`."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = {"nf4": "bnb_nf4"}
"""Names of `imgdit.models.quantized` for those that are shorter on the command line."""


def load_pipeline(source: str | Path, options: LoadOptions = AUTO) -> Any:
    """Any pipeline that imgdit or diffusers knows, ready to be called; FLUX.1 and SD3 pipelines with `conditions=`.

    Args:
        source: folder or Hub repository. Pickled weights are refused.

    Raises:
        ValueError: there is no such model, or the device cannot do what the options say.
        ImportError: a package that quantises is not installed.
    """
    device = chosen_device(options)
    dtype = chosen_dtype(options)
    quantized = _quantization(options, device, dtype)
    found = find_pipeline(source)
    name = str(compat.DiffusionPipeline.load_config(found).get("_class_name"))
    loader: Any = WITH_CONDITIONS.get(name)
    if loader is None:
        loader = compat.DiffusionPipeline if name in imgdit.__all__ else diffusers.DiffusionPipeline
    # Without a dtype diffusers makes float32 of its models, and transformers keeps what a text encoder is stored in.
    pipe = loader.from_pretrained(found, dtype=dtype, use_safetensors=True, **quantized)
    if isinstance(pipe, ImgDiTPipeline):
        pipe.names_unknown_words = pipe.prompt_words is None
    if options.quantize == "int8":
        quantize_rows(denoiser(pipe))
    add_loras(pipe, options)
    place(pipe, options, device)
    if options.compile:
        compile_blocks(pipe)
    return pipe


def add_loras(pipe: Any, options: LoadOptions) -> None:
    """Load the LoRAs of the options into a pipeline, each at its weight.

    Raises:
        ValueError: a pipeline that takes none, a file that is not there or does not fit, or a few-step LoRA.
    """
    if not options.loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA; leave out --lora")
    names = []
    for number, (source, _) in enumerate(options.loras, start=1):
        path = Path(source).expanduser()
        if not path.exists() and not re.fullmatch(HUB_ID, source):
            raise ValueError(f"there is no LoRA file {source!r} here, and Hub ids look like owner/name")
        if path.suffix == ".safetensors" and path.is_file() and read_info(path).num_inference_steps is not None:
            raise ValueError(
                f"{source} is a few-step LoRA, which needs its own steps and scheduler: copy it into the model's "
                f"folder as {TURBO} and use --turbo, or load it with imgdit.pipelines.few_steps.load_few_steps"
            )
        names.append(f"lora_{number}")
        folder, file = (path.parent, path.name) if path.is_file() else (source, None)
        options_of_file = {} if file is None else {"weight_name": file}
        pipe.load_lora_weights(folder, adapter_name=names[-1], **options_of_file)
    pipe.set_adapters(names, [weight for _, weight in options.loras])


def compile_blocks(pipe: Any) -> None:
    """Compile the blocks of the denoiser that repeat, which takes less long than the whole.

    Raises:
        ValueError: a denoiser that names no such blocks.
    """
    model: Any = denoiser(pipe)
    if not getattr(model, "_repeated_blocks", None):
        raise ValueError(f"{type(model).__name__} names no blocks that could be compiled; leave out --compile")
    model.compile_repeated_blocks(fullgraph=False)


def over_components(owner: Any, pipe: Any, options: LoadOptions) -> Any:
    """Another pipeline over the components of a loaded one, placed as that one is."""
    other = owner(**pipe.components)
    if isinstance(pipe, ImgDiTPipeline):
        other.names_unknown_words, other.prompt_words = pipe.names_unknown_words, pipe.prompt_words
    if options.offload == "model":  # the pipeline itself frees the device after a run
        other.enable_model_cpu_offload(device=chosen_device(options))
    return other


def as_it_was(options: LoadOptions, made_with: Mapping[str, Any]) -> LoadOptions:
    """Options of loading, with the precision, the bits and the LoRAs of an image where nobody asks for others.

    Args:
        made_with: `Origin.made_with` of the image.
    """
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    was: dict[str, Any] = {"dtype": names.get(made_with.get("dtype", "")), "quantize": made_with.get("quantize")}
    was |= {"compile": made_with.get("compile"), "lora": made_with.get("lora")}
    kept = {name: value for name, value in was.items() if value and getattr(options, name) == getattr(AUTO, name)}
    return replace(options, **kept)


def denoiser(pipe: Any) -> torch.nn.Module:
    """The transformer, the U-Net or the language model."""
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or pipe.model


def chosen_device(options: LoadOptions) -> torch.device:
    """Where a model computes.

    Raises:
        ValueError: no device of that name, or none here; or there is nothing that could be offloaded.
    """
    if options.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu, cuda, cuda:1 or mps, got {options.device!r}") from error
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= there.get(device.type, 0):
            here = [
                name if count == 1 else f"{name}:0 to {name}:{count - 1}" for name, count in there.items() if count
            ]
            raise ValueError(f"this machine has no device {options.device!r}; it has {', '.join(here)}")
    if options.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"offload {options.offload!r} keeps a model out of an accelerator's memory, and this one computes on the "
            "CPU; leave it out"
        )
    return device


def chosen_dtype(options: LoadOptions) -> torch.dtype:
    """What all parts of a model are loaded in.

    Raises:
        ValueError: see `chosen_device`.
    """
    if options.dtype == "auto":
        return torch.bfloat16 if chosen_device(options).type == "cuda" else torch.float32
    return DTYPES[options.dtype]


def _quantization(options: LoadOptions, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the denoiser while it is loaded."""
    kind = KINDS.get(options.quantize, options.quantize)
    if kind.startswith("bnb_") and device.type != "cuda":
        raise ValueError(f"quantize {options.quantize!r} works on CUDA only, not on {device}; take int8")
    found = load_options(kind, dtype, f"--quantize {options.quantize}").get("quantization_config")
    if found is None:
        return {}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": found, "unet": found})}


def place(pipe: Any, options: LoadOptions, device: torch.device) -> None:
    """Put a pipeline on its device, or where it waits for it."""
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif options.offload == "group":
        _offload_groups(pipe, device)
    elif pipe.device != device:  # diffusers tells of half precision on a CPU at every `to`
        pipe.to(device)


def _offload_groups(pipe: Any, device: torch.device) -> None:
    """Keep single layers off the device. Those of the denoiser are fetched ahead; a T5 encoder has one that is never
    called, which fetching ahead warns of, and runs once."""
    for part in pipe.components.values():
        if not isinstance(part, torch.nn.Module):
            continue
        ahead = part is denoiser(pipe) and device.type == "cuda"
        options: Any = {"onload_device": device, "offload_type": "leaf_level", "use_stream": ahead}
        enable: Any = getattr(part, "enable_group_offload", None)
        if enable is not None:
            enable(**options)
        else:
            apply_group_offloading(part, **options)
