"""Run by torchrun on two CPU ranks: context, tensor and fully sharded parallelism against one process."""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny import rope_config, sincos_config, tiny_mmdit
from tiny_control import flux, make, text
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from imgdit import Frame, MMDiT


def inputs(model):
    generator = torch.Generator().manual_seed(0)
    rope = model.config.pos_embed_type == "rope"
    return {
        "hidden_states": torch.randn(1, *((8, 16) if rope else (4, 4, 8)), generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        **({"img_ids": Frame((2, 4)).ids(), "txt_ids": torch.zeros(4, 3)} if rope else {}),
    }


def close(got, expected, what):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{what}: {m}")
    if dist.get_rank() == 0:
        print(f"{what}: max difference {(got - expected).abs().max():.1e}", flush=True)


def context_parallel():
    """The sequence split over ranks (Ulysses); gradients add up over ranks."""
    model, reference = tiny_mmdit(), tiny_mmdit()
    expected = reference(**inputs(reference)).sample
    expected.square().sum().backward()
    # diffusers asks for the accelerators even on a machine without one.
    torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    (got,) = model(**inputs(model), return_dict=False)  # diffusers' gathering hook takes no output class
    close(got.detach(), expected.detach(), "context parallel forward")
    got.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        dist.all_reduce(a.grad)
        scale = max(b.grad.abs().max().item(), 1e-3)
        assert (a.grad - b.grad).abs().max() <= 1e-4 * scale, name
    if dist.get_rank() == 0:
        print("context parallel gradients: equal", flush=True)


def one_image():
    """An image of FLUX's pipeline on our model, the sequence of each step split over both ranks. (Ring attention
    needs a kernel that returns its logits' sums, which CPUs have not.)"""
    pipe = flux()
    plain = pipe.transformer
    arguments = {name: value[:, :4] if name == "prompt_embeds" else value for name, value in text(pipe).items()}
    pipe.transformer = MMDiT.from_diffusers(plain)
    expected = make(pipe, **arguments)
    pipe.transformer = MMDiT.from_diffusers(plain)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    close(make(pipe, **arguments), expected, "one image")


def tensor_parallel():
    """`_tp_plan` with torch's own styles; diffusers' driver refuses CPUs. The packed projection stays whole."""
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    for config in (rope_config(num_single_layers=0), sincos_config(dual_attention_layers=(0,))):
        model = tiny_mmdit(config)
        kwargs = inputs(model)
        with torch.no_grad():
            expected = model(**kwargs).sample
            plan = {name: styles[style]() for name, style in model._tp_plan.items() if style in styles}
            parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
            assert isinstance(model.transformer_blocks[0].attn.to_q.weight, DTensor)
            close(model(**kwargs).sample, expected, f"tensor parallel forward, {config.get('pos_embed_type', 'rope')}")


def fully_sharded():
    """FSDP2 per block and at the root."""
    model, reference = tiny_mmdit(), tiny_mmdit()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    got, expected = model(**inputs(model)).sample, reference(**inputs(reference)).sample
    close(got.detach(), expected.detach(), "fully sharded forward")
    got.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert [r.name for r in model.mup_table()] == [r.name for r in reference.mup_table()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    context_parallel()
    one_image()
    tensor_parallel()
    fully_sharded()
    dist.destroy_process_group()
