"""What is installed, and what of it works on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

CORE = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
LARGE = 40.0
"""GiB of a GPU that hold FLUX.1 in bf16 with its text encoders."""
DISK = 40.0
"""GiB that should be free before a model is downloaded."""
EXTRAS = {
    "demo": "gradio",
    "xformers": "xformers",
    "vision": "opencv-python-headless",
    "data": "webdataset",
    "ray": "ray",
    "quantized": "torchao",
    "tensorboard": "tensorboard",
    "plots": "matplotlib",
}
"""Extras of the package by the distribution that stands for each."""


def checkup() -> dict[str, Any]:
    """Findings as JSON's types; `problems` lists, in messages, what keeps the embedded model from running."""
    import torch

    import imgdit
    from imgdit.checkpoints import SCENES

    problems = [f"{name} is not installed" for name in CORE if _version(name) is None]
    parts = [SCENES / "model_index.json", *(SCENES / part for part in ("transformer", "vae", "text_encoder"))]
    if not all(part.exists() for part in parts):
        problems.append(f"the embedded model is missing from {SCENES}; `make weights` trains it")
    devices = _devices(torch)
    return {
        "imgdit": imgdit.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "core": {name: _version(name) for name in CORE},
        "extras": {extra: _version(name) for extra, name in EXTRAS.items()},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "attention": {device: _backends(device) for device in devices},
        "embedded": {
            "folder": str(SCENES),
            "adapters": sorted(file.stem for file in (SCENES / "adapters").glob("*.safetensors")),
            "autoencoders": sorted(file.parent.name for file in (SCENES / "sae").glob("**/cfg.json")),
        },
        "problems": problems,
    }


def report(found: dict[str, Any]) -> list[str]:
    """The findings as lines."""
    lines = [f"imgdit {found['imgdit']}, Python {found['python']}, {found['system']}"]
    lines += [f"  {name} {version or 'missing'}" for name, version in found["core"].items()]
    for extra, version in found["extras"].items():
        hint = version or f"not installed: pip install 'imgdit[{extra}]'"
        lines.append(f"  extra {extra}: {hint}")
    lines.append(
        f"memory {found['memory_gib']} GiB, free disk {found['disk_free_gib']} GiB, {found['threads']} threads"
    )
    for device, name in found["devices"].items():
        lines.append(f"{device}: {name}")
        lines.append(f"  attention backends that work: {', '.join(found['attention'][device])}")
    embedded = found["embedded"]
    lines.append(f"embedded model: {embedded['folder']}")
    lines.append(f"  condition adapters: {', '.join(embedded['adapters']) or 'none'}")
    lines.append(f"  sparse autoencoders: {', '.join(embedded['autoencoders']) or 'none'}")
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]] or ["everything that is needed works"]
    return lines + [f"advice: {one}" for one in advice(found)]


def advice(found: dict[str, Any]) -> list[str]:
    """What to do next on this machine, as messages: one for what is missing, one for its devices."""
    said = [f"pip install {problem.split()[0]}" for problem in found["problems"] if problem.endswith("not installed")]
    if found["problems"] and not said:
        said.append("run `make weights`, or install the package again")
    gpus = [name for name in found["devices"] if name.startswith("cuda")]
    memory = max((float(found["devices"][name].split(", ")[-1].split()[0]) for name in gpus), default=0.0)
    if not gpus and "mps" in found["devices"]:
        said.append("the Apple GPU is used by --device mps")
    elif not gpus:
        said.append("there is no GPU: the embedded model takes seconds for an image, FLUX and SD3 many minutes")
    elif memory < LARGE:
        said.append(f"a GPU of {memory:.0f} GiB: take --offload model or --quantize int8 for FLUX.1 and larger models")
    if gpus and found["extras"].get("quantized") is None:
        said.append("for --quantize nf4 and torchao_int8: pip install 'imgdit[quantized]'")
    if found["disk_free_gib"] < DISK:
        said.append(
            f"{found['disk_free_gib']} GiB of disk are free; FLUX.1 alone needs 34: set HF_HOME to another disk"
        )
    said.append("`imgdit models FOLDER` computes the memory of a model, `imgdit generate` draws six examples")
    return said


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(torch: Any) -> dict[str, str]:
    """Name of each device by how torch calls it."""
    found = {"cpu": platform.processor() or platform.machine()}
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _memory() -> float:
    import psutil  # a dependency of accelerate

    return round(psutil.virtual_memory().available / 2**30, 1)


def _backends(device: str) -> list[str]:
    """Attention backends that compute something on a device. Those that fetch kernels from the Hub are left out."""
    import logging
    import warnings

    import torch

    from imgdit import compat

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    query, key, value = torch.randn(3, 1, 16, 2, 64, device=device, dtype=dtype)  # (B, S, H, D) each
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    working = []
    for backend in compat.AttentionBackendName:
        if "hub" in backend.value:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                out = compat.dispatch_attention(query, key, value, None, backend, None)
        except (
            Exception
        ):  # a missing package, an unsupported device, a kernel's refusal: all mean that it does not work
            continue
        if out.shape == query.shape and bool(torch.isfinite(out).all()):
            working.append(backend.value)
    return working
