from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imgdit import Frame, FrameLayout
from imgdit.attention.cache import KVCache
from imgdit.attention.grouped import grouped_attention
from imgdit.attention.packed import PackedRows, packed_attention, packed_backend

HEADS, DIM = 2, 8


def qkv(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, HEADS, DIM, generator=generator) for _ in range(3))


def dense(query, key, value, mask):
    """Attention with the expanded boolean mask (S, K) or (B, S, K)."""
    mask = mask if mask.ndim == 2 else mask[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)
    return out.transpose(1, 2)


def emulated_varlen(query, key, value, query_starts, key_starts, longest_query, longest_key):
    """What PyTorch's kernel computes on a GPU: each group's rows by themselves, (rows, H, D)."""
    pairs = [list(pairwise(starts)) for starts in (query_starts.tolist(), key_starts.tolist())]
    assert max(b - a for a, b in pairs[0]) == longest_query and max(b - a for a, b in pairs[1]) == longest_key
    assert query_starts.dtype == key_starts.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(*pairs):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(outputs)


def emulated_xformers(query, key, value, attn_bias):
    """xformers' kernel by its own bias, spelled out: what it computes on a GPU."""
    bias = attn_bias.materialize((1, HEADS, query.shape[1], key.shape[1]))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


@pytest.fixture(scope="module", autouse=True)
def varlen():
    """PyTorch's variable-length attention without a GPU."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "varlen_attn", emulated_varlen)
        yield


@st.composite
def layouts(draw, scenes=1, strengths=(1.0,)):
    """A layout with any visibility in which every segment sees at least itself."""
    made = []
    for _ in range(scenes):
        frames = [
            Frame(
                (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                sigma=draw(st.sampled_from([None, 0.0])),
                strength=draw(st.sampled_from(strengths)),
            )
            for _ in range(draw(st.integers(1, 4)))
        ]
        size = 1 + len(frames)
        seen = torch.tensor(draw(st.lists(st.booleans(), min_size=size**2, max_size=size**2))).view(size, size)
        made.append(FrameLayout.build(frames, draw(st.integers(1, 4)), visible=seen | torch.eye(size).bool()))
    return made[0] if scenes == 1 else FrameLayout.pack(made)


def rows_of(layout):
    return layout.text_length + layout.image_length


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 3))
def test_groups_equal_the_dense_mask(layout, batch):
    q, k, v = qkv(batch, rows_of(layout))
    got = grouped_attention(q, k, v, layout.groups)
    torch.testing.assert_close(got, dense(q, k, v, layout.dense_mask()), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(layouts(strengths=(0.3, 1.0, 2.0)), st.integers(1, 3))
def test_strength_equals_a_dense_bias(layout, batch):
    q, k, v = qkv(batch, rows_of(layout))
    got = grouped_attention(q, k, v, layout.groups)
    torch.testing.assert_close(got, dense(q, k, v, layout.dense_bias()), atol=1e-5, rtol=1e-5)


def test_strength_acts_on_cached_keys_and_beside_a_text_mask():
    layout = FrameLayout.build(
        [Frame((2, 2)), Frame((1, 3), sigma=0.0, adapter="a", sees="self", strength=0.4)], text_length=2
    )
    q, k, v = qkv(2, rows_of(layout))
    key_mask = torch.ones(2, rows_of(layout), dtype=torch.bool)
    key_mask[0, 1] = False
    bias = layout.dense_bias() + torch.zeros(2, 1, 1).masked_fill(~key_mask[:, None], float("-inf"))
    expected = dense(q, k, v, bias)
    torch.testing.assert_close(
        grouped_attention(q, k, v, layout.groups, key_mask=key_mask), expected, atol=1e-5, rtol=1e-5
    )
    got = grouped_attention(
        q[:, :6],
        k[:, :6],
        v[:, :6],
        layout.without_frozen().groups,
        key_mask=key_mask[:, :6],
        cached=(k[:, 6:], v[:, 6:]),
    )
    torch.testing.assert_close(got, expected[:, :6], atol=1e-5, rtol=1e-5)


def test_strength_one_is_no_bias():
    frames = [Frame((2, 2)), Frame((1, 3), sigma=0.0, adapter="a", sees="joint")]
    layout = FrameLayout.build(frames, text_length=2)
    assert layout.groups == ((((slice(0, 9),), (slice(0, 9),), (), None, (0,))),)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf"), float("nan")])
def test_strength_must_be_positive(strength):
    with pytest.raises(ValueError, match="strength must be positive"):
        Frame((1, 1), strength=strength)


@settings(max_examples=40, deadline=None)
@given(layouts(scenes=3))
def test_packed_call_equals_the_dense_mask(layout):
    q, k, v = qkv(1, rows_of(layout))
    packed = PackedRows.build(layout.groups, rows_of(layout), "cpu")
    got = packed_attention(q, k, v, packed)
    torch.testing.assert_close(got, dense(q, k, v, layout.dense_mask()), atol=1e-5, rtol=1e-5)


def test_packed_call_of_xformers_equals_the_dense_mask(monkeypatch):
    pytest.importorskip("xformers")
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", emulated_xformers)
    one = FrameLayout.build([Frame((2, 3)), Frame((1, 2), 0.0, "a", "joint")], 4)
    layout = FrameLayout.pack([one, FrameLayout.build([Frame((3, 1))], 2)])
    q, k, v = qkv(1, rows_of(layout))
    packed = PackedRows.build(layout.groups, rows_of(layout), "cpu")
    got = packed_attention(q, k, v, packed, kernel="xformers")
    torch.testing.assert_close(got, dense(q, k, v, layout.dense_mask()), atol=1e-5, rtol=1e-5)


class OnCuda:
    """What `packed_backend` reads of a query on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, shape=(1, 6, 2, 64), dtype=torch.bfloat16):
        self.shape, self.dtype = shape, dtype


@pytest.mark.parametrize(
    ("query", "backend", "expected"),
    [
        (OnCuda(), None, "varlen"),
        (OnCuda(dtype=torch.float16), "native", "varlen"),
        (OnCuda(dtype=torch.float32), "native", None),
        (OnCuda((2, 6, 2, 64)), "native", None),
        (OnCuda((1, 6, 2, 60)), "native", None),
        (OnCuda((1, 6, 2, 264)), "native", None),
        (OnCuda(), "flash", None),
        (OnCuda(), "_native_math", None),
        (OnCuda(), "xformers", "xformers"),
        (OnCuda(dtype=torch.float32), "xformers", "xformers"),
    ],
)
def test_which_kernel_takes_a_packed_batch(monkeypatch, query, backend, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert packed_backend(query, backend) == expected


def test_old_gpus_and_autocast_choose_the_kernel_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert packed_backend(OnCuda(), None) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert packed_backend(OnCuda(dtype=torch.float32), None) == "varlen"


def test_autocast_gives_the_kernel_one_dtype():
    layout = FrameLayout.pack([FrameLayout.build([Frame((2, 2))], 2), FrameLayout.build([Frame((1, 3))], 1)])
    q, k, v = qkv(1, rows_of(layout))
    packed = PackedRows.build(layout.groups, rows_of(layout), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        got = packed_attention(q, k, v.bfloat16(), packed)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), dense(q, k, v, layout.dense_mask()), atol=3e-2, rtol=3e-2)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.booleans())
def test_cached_rows_equal_computed_ones(layout, through_packed):
    q, k, v = qkv(1, rows_of(layout))
    expected = dense(q, k, v, layout.dense_mask())
    cache = KVCache()
    assert cache.layer("block").exchange("attn", k, v, layout.frozen_rows()) is None
    cache.freeze()
    stored = cache.layer("block").exchange("attn", k, v, ())
    read = layout.without_frozen()
    if not read.live:
        return
    frozen = {i for rows in layout.frozen_rows() for i in range(rows.start, rows.stop)}
    kept = [i for i in range(rows_of(layout)) if i not in frozen]
    q, k, v = (x[:, kept] for x in (q, k, v))
    if through_packed:
        packed = PackedRows.build(read.groups, rows_of(read), "cpu")
        got = packed_attention(q, k, v, packed, cached=stored)
    else:
        got = grouped_attention(q, k, v, read.groups, cached=stored)
    torch.testing.assert_close(got, expected[:, kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [None, "native", "_native_math", "flex"])
@pytest.mark.parametrize("grouped", [False, True])
def test_padding_is_masked_on_every_cpu_backend(backend, grouped):
    layout = FrameLayout.build([Frame((2, 3)), Frame((1, 2), 0.0, "a", "joint" if grouped else "all")], 4)
    q, k, v = qkv(2, rows_of(layout))
    mask = torch.ones(2, rows_of(layout), dtype=torch.bool)
    mask[0, 1:4] = mask[1, 3:4] = False
    got = grouped_attention(q, k, v, layout.groups, key_mask=mask, backend=backend)
    expected = dense(q, k, v, layout.dense_mask() & mask[:, None, :])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_padding_on_a_backend_without_masks():
    """Flash-like backends take no mask: samples go one by one, with the real keys only."""
    q, k, v = qkv(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    got = grouped_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), key_mask=mask, backend="_native_flash")
    torch.testing.assert_close(got.float(), dense(q, k, v, mask[:, None, :]), atol=3e-2, rtol=3e-2)


def test_a_padded_batch_without_masks_is_not_compiled():
    q, k, v = (x.bfloat16() for x in qkv(2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]]).bool()
    compiled = torch.compile(grouped_attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="takes no mask, so padded prompts are attended one by one"):
        compiled(q, k, v, key_mask=mask, backend="_native_flash")


def test_sage_kernels_refuse_what_is_a_bias():
    layout = FrameLayout.build([Frame((2, 2)), Frame((1, 3), sigma=0.0, adapter="a", strength=0.4)], text_length=2)
    q, k, v = qkv(1, rows_of(layout))
    with pytest.raises(ValueError, match=r"'sage' computes logits in 8 bits and takes no bias, but the strength"):
        grouped_attention(q, k, v, layout.groups, backend="sage")
    with pytest.raises(ValueError, match=r"'_sage_qk_int8_pv_fp16_cuda' .* adds its text mask to the logits"):
        grouped_attention(q, k, v, key_mask=torch.ones(1, 9), backend="_sage_qk_int8_pv_fp16_cuda")


def test_xformers_without_cuda_says_so():
    q, k, v = qkv(1, 4)
    with pytest.raises(ValueError, match="kernels for CUDA only, got tensors on cpu"):
        grouped_attention(q, k, v, backend="xformers")
    assert packed_backend(q, None) is None


def test_reading_an_unwritten_cache_says_so():
    cache = KVCache()
    cache.freeze()
    with pytest.raises(ValueError, match="holds nothing for block; run one step with all frames and then call freeze"):
        cache.layer("block")


def test_cleared_cache_writes_again():
    cache = KVCache()
    _, k, v = qkv(1, 4)
    cache.layer("block").exchange("attn", k, v, (slice(0, 2),))
    cache.freeze()
    cache.clear()
    assert cache.mode == "write"
    cache.freeze()
    with pytest.raises(ValueError, match="holds nothing"):
        cache.layer("block")
