"""LoRA files by the names of a model's own repository, as trainers write them."""

import torch
from torch.nn import Linear


def comfyui(name):
    return f"diffusion_model.{name}.lora_A.weight", f"diffusion_model.{name}.lora_B.weight", None


def scaled(name):
    stem = f"diffusion_model.{name}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def kohya(name):
    stem = "lora_unet_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def own_tensors(model, layers, key):
    """A file with a LoRA of rank 2 and alpha 1 for every layer, and what it changes of each of diffusers' layers.

    Args:
        layers: by own name, diffusers' names of the parts in the order of their rows.
        key: one of the functions above.
    """
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, Linear)}
    generator, tensors, changes = torch.Generator().manual_seed(0), {}, {}
    for own, parts in layers.items():
        rows = [shapes[part][0] for part in parts]
        down, up, alpha = key(own)
        tensors[down] = torch.randn(2, shapes[parts[0]][1], generator=generator)
        tensors[up] = torch.randn(sum(rows), 2, generator=generator)
        if alpha is not None:
            tensors[alpha] = torch.tensor(1.0)
        change = tensors[up] @ tensors[down] * (1.0 if alpha is None else 0.5)
        changes |= dict(zip(parts, change.split(rows), strict=True))
    return tensors, changes
