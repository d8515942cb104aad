"""Attention of packed sequences, under autocast, and its operators' shapes and strides."""

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor

import tridrop
from tridrop import scaled_dot_product_attention as sdpa

BACKENDS = [PLAIN, "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def inputs(batch, heads, queries, keys, key_heads):
    return (
        draw(batch, heads, queries, 16, seed=1),
        draw(batch, key_heads, keys, 16, seed=2),
        draw(batch, key_heads, keys, 16, seed=3),
    )


def run(function, *tensors: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def packed_inputs():
    starts = torch.tensor([0, 12, 12, 40, 58], dtype=torch.int32, device=DEVICE)
    key_starts = torch.tensor([0, 30, 33, 60, 70], dtype=torch.int32, device=DEVICE)
    return inputs(1, 4, 60, 75, 2), starts, key_starts


@pytest.mark.parametrize("case", ["plain", "causal", "window", "bias"])
def test_packed_sequences_equal_calls_of_their_own(backend, case):
    tensors, starts, key_starts = packed_inputs()
    options = {"causal": {"is_causal": True}, "window": {"window": (5, 2)}}.get(case, {})
    if case == "bias":
        tensors = (*tensors, draw(4, 1, 28, 30, seed=9))
        options = {"max_seqlen_q": 28, "max_seqlen_k": 30}

    def packed(query, key, value, bias=None):
        return sdpa(
            query, key, value, bias, 0.3, enable_gqa=True, cu_seqlens_q=starts,
            cu_seqlens_k=key_starts, seed=3, **options,
        )  # fmt: skip

    def apart(query, key, value, bias=None):
        pieces = []
        own = {} if case == "bias" else options
        for i in range(4):
            at = slice(int(starts[i]), int(starts[i + 1]))
            keys = slice(int(key_starts[i]), int(key_starts[i + 1]))
            n, m = at.stop - at.start, keys.stop - keys.start
            mask = None if bias is None else bias[i : i + 1, :, :n, :m]
            # a sequence is a batch entry of the mask
            where = tridrop.Shard((4, 4, n, m), (i, 0, 0, 0))
            one = (query[:, :, at], key[:, :, keys], value[:, :, keys], mask, 0.3)
            pieces.append(sdpa(*one, enable_gqa=True, shard=where, seed=3, **own))
        return torch.cat([*pieces, torch.zeros_like(query[:, :, 58:])], 2)

    grad = draw(1, 4, 60, 16, seed=5)
    for a, b in zip(run(packed, *tensors, grad=grad), run(apart, *tensors, grad=grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_packed_tensors_may_have_three_dimensions(backend):
    tensors, starts, key_starts = packed_inputs()
    options = {"enable_gqa": True, "dropout_p": 0.3, "seed": 3}
    options |= {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts, "return_lse": True}
    four = sdpa(*tensors, **options)
    three = sdpa(*(t[0] for t in tensors), **options)
    assert torch.equal(three[0], four[0][0])
    assert torch.equal(three[1], four[1][0])


def test_padding_inside_packed_sequences(backend):
    """A key that takes no part is as if it were not there."""
    tensors, starts, key_starts = packed_inputs()
    there = torch.ones(4, 30, dtype=torch.bool, device=DEVICE)
    there[0, 25:] = False
    options = {"enable_gqa": True, "dropout_p": 0.3, "seed": 3, "max_seqlen_k": 30}
    options |= {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts}
    found = sdpa(*tensors, key_mask=there, **options)
    query, key, value = tensors
    alone = sdpa(
        query[:, :, :12], key[:, :, :25], value[:, :, :25], dropout_p=0.3, enable_gqa=True, seed=3
    )
    torch.testing.assert_close(found[:, :, :12], alone)
    assert torch.equal(found[:, :, 12:], sdpa(*tensors, **options)[:, :, 12:])


def test_shapes_are_known_without_data():
    query, key, value = (t.to("meta") for t in inputs(2, 4, 6, 9, 2))
    out, lse = sdpa(query, key, value, dropout_p=0.3, enable_gqa=True, seed=3, return_lse=True)
    assert out.device.type == lse.device.type == "meta"
    assert (out.shape, lse.shape) == ((2, 4, 6, 16), (2, 4, 6))


def test_bounds_below_a_length_are_refused():
    tensors, starts, key_starts = packed_inputs()
    tensors = [t.cpu() for t in tensors]
    options = {"cu_seqlens_q": starts.cpu(), "cu_seqlens_k": key_starts.cpu(), "enable_gqa": True}
    with pytest.raises(ValueError, match="a sequence has 28 tokens"):
        sdpa(*tensors, **options, max_seqlen_q=27)
    with pytest.raises(ValueError, match="max_seqlen_k = -1"):
        sdpa(*tensors, **options, max_seqlen_k=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_torchs_function(dtype):
    query, key, value = inputs(1, 2, 9, 17, 2)
    mixed = (query, key.to(dtype), value)
    with torch.autocast(DEVICE, dtype), tridrop.backend("reference"):
        found = sdpa(*mixed, is_causal=True)
        expected = F.scaled_dot_product_attention(*mixed, is_causal=True)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["contiguous", "heads last"])
def test_operators_tell_torch_the_shapes_and_strides_they_return(backend, layout):
    tensors = inputs(2, 4, 6, 9, 2)
    if layout == "heads last":
        tensors = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
    mask, sinks = draw(2, 1, 6, 9, seed=4), draw(4, seed=5)
    key_mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    options = tridrop.spec.attention.AttentionOptions(p=0.3, scale=0.25, lower=-3, softcap=2.0)
    packed = tridrop.ops.pack_attention(options, backend)
    seed = torch.tensor([3, 0], device=DEVICE)
    arguments = (*tensors, mask, key_mask, sinks, None, None, seed, None, *packed)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tridrop.attention_forward, arguments, test_utils=tests)
    out, lse = torch.ops.tridrop.attention_forward(*arguments)
    needs = [True] * 5
    arguments = (out, torch.ones_like(lse), out, lse, *arguments, needs, False)
    torch.library.opcheck(torch.ops.tridrop.attention_backward, arguments, test_utils=tests)
