"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from tiny import rope_config, tiny_mmdit

from imgdit import Frame, FrameLayout
from imgdit.attention.grouped import grouped_attention
from imgdit.attention.packed import PackedRows, packed_attention, packed_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def scenes():
    a = FrameLayout.build([Frame((5, 7)), Frame((4, 4), 0.0, sees="self")], 11)
    b = FrameLayout.build([Frame((9, 3))], 6)
    return FrameLayout.pack([a, b, a])


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("varlen", torch.float16), ("varlen", torch.bfloat16), ("xformers", torch.bfloat16), ("xformers", torch.float32)],
)
def test_packed_call_equals_groups(kernel, dtype):
    if kernel == "xformers":
        pytest.importorskip("xformers")
    layout = scenes()
    length = layout.text_length + layout.image_length
    query, key, value = (torch.randn(1, length, 4, 64, device="cuda", dtype=dtype) for _ in range(3))
    assert packed_backend(query, "native" if kernel == "varlen" else kernel) == kernel
    packed = PackedRows.build(layout.groups, length, "cuda")
    got = packed_attention(query, key, value, packed, kernel=kernel)
    expected = grouped_attention(query, key, value, layout.groups)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["native", "xformers", "_native_efficient", "_native_cudnn", "_native_flash"])
def test_backends_agree_on_a_packed_model(backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    model = tiny_mmdit(rope_config(attention_head_dim=64, axes_dims_rope=(16, 24, 24))).to("cuda", torch.bfloat16)
    layout = scenes()
    kwargs = {
        "hidden_states": torch.randn(1, layout.image_length, 16),
        "encoder_hidden_states": torch.randn(1, layout.text_length, 32),
        "pooled_projections": torch.randn(3, 32),
    }
    kwargs = {key: value.to("cuda", torch.bfloat16) for key, value in kwargs.items()}
    kwargs |= {"timestep": torch.rand(3, device="cuda"), "layout": layout}
    with torch.no_grad():
        expected = model(**kwargs).sample
        model.set_attention_backend(backend)
        got = model(**kwargs).sample
        model.set_attention_backend("native")  # the backend is the process's, too
    assert (got - expected).norm() / expected.norm() < 0.03
