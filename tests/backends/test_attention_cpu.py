"""Attention on a CPU: torch's fused kernel where nothing drops, and blocks of scores elsewhere."""

import math

import pytest
import torch
from torch import Tensor

import tridrop
from tridrop import scaled_dot_product_attention as sdpa
from tridrop.backends.cpu import by_head, flash
from tridrop.backends.reference import attention, blocks
from tridrop.commands.check.measure import error, tolerance
from tridrop.nn.attention import ScaledDotProductAttention


@pytest.fixture(autouse=True)
def reference():
    with tridrop.backend("cpu"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernel's passes, in the order in which they ran."""
    names: list[str] = []
    for name in ("_FORWARD", "_BACKWARD"):
        real = getattr(flash, name)

        def counted(*args, real=real, name=name, **kwargs):
            names.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(flash, name, counted)
    return names


@pytest.fixture
def in_blocks(monkeypatch):
    """No call is computed a head at a time, see test_attention_by_head.py."""
    monkeypatch.setattr(by_head, "torchs_team", lambda: None)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch=2, heads=4, queries=19, keys=37, width=16, value_width=None, shared=None, **more):
    sizes = ((heads, queries, width), (shared or heads, keys, width),
             (shared or heads, keys, value_width or width))  # fmt: skip
    return [draw(batch, *size, seed=i, **more) for i, size in enumerate(sizes)]


def results(tensors: list[Tensor], with_lse: bool = False, **options) -> list[Tensor]:
    """out, lse, and the gradients of query, key and value, of out alone or of lse as well."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, lse = sdpa(*leaves, return_lse=True, **options)
    total = (out * draw(*out.shape, seed=7).half().to(out.dtype)).sum()
    if with_lse:
        total = total + torch.where(lse == -math.inf, 0, lse).square().sum().to(total.dtype)
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def composed(monkeypatch, *args, **kwargs) -> list[Tensor]:
    """The same without the kernel."""
    with monkeypatch.context() as patch:
        patch.setattr(flash, "_FORWARD", None)
        return results(*args, **kwargs)


PADDING = torch.arange(37) < torch.tensor([[30], [37]])
LEFT = torch.arange(37) >= torch.tensor([[5], [0]])  # with is_causal, rows without keys
HOLES = draw(2, 1, 19, 37, seed=5) > 0
HOLES[0, 0, 3], HOLES[1, 0, 18] = False, False
BIAS = draw(1, 4, 19, 37, seed=6)

SERVED = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3, "is_causal": True},
    "key_mask": {"key_mask": PADDING},
    "left padding": {"key_mask": LEFT, "is_causal": True},
    "bool": {"attn_mask": HOLES},
    "bool, causal": {"attn_mask": HOLES, "is_causal": True, "key_mask": LEFT},
    "float": {"attn_mask": BIAS},
    "float, causal": {"attn_mask": BIAS.masked_fill(~HOLES[:1], -math.inf), "is_causal": True},
    "float of a query": {"attn_mask": BIAS[:, :, :, :1]},
    "float, other strides": {"attn_mask": draw(37, 19, seed=3).mT},
    "fp16 bias": {"attn_mask": BIAS.half(), "key_mask": PADDING},
    "window": {"window": (4, 2)},
    "window, causal": {"window": (4, None), "is_causal": True, "key_mask": LEFT},
    "negative scale": {"scale": -0.3},
}


def hidden_of(lengths, attn_mask=None, key_mask=None, is_causal=False, window=None) -> Tensor:
    """What is added to scaled scores: -inf where a key takes no part."""
    allowed = torch.ones(lengths, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if window is not None:
        left, right = window
        allowed = allowed.triu(-left).tril(lengths[1] if right is None else right)
    floats = torch.zeros(()) if attn_mask is None else attn_mask
    if floats.dtype == torch.bool:
        allowed, floats = allowed & floats, torch.zeros(())
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    return torch.where(allowed, floats.double(), -math.inf)


def eager(tensors, scale=None, **masks) -> list[Tensor]:
    """The same as ``results`` in plain torch, in the dtype of the tensors."""
    query, key, value = leaves = [t.detach().requires_grad_() for t in tensors]
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + hidden_of(scores.shape[-2:], **masks).to(scores.dtype)
    empty = (scores == -math.inf).all(-1)
    weights = torch.softmax(scores.masked_fill(empty[..., None], 0), -1)
    out = weights.masked_fill(empty[..., None], 0) @ value
    total = (out * draw(*out.shape, seed=7).half().to(out.dtype)).sum()
    found = torch.autograd.grad(total, leaves)
    return [out.detach(), torch.logsumexp(scores.detach(), -1), *found]


def assert_as_accurate_as_eager(tensors, options, found):
    """Within the errors that all ops may have; what is infinite, exactly.

    A gradient that cancels to zero is held to eight fp32 roundings of the terms that cancel.
    """
    wide = [t.double() for t in tensors]
    exact = eager(wide, **options)
    plain = eager(tensors, **options)
    for f, p, t in zip(found, plain, exact, strict=True):
        hidden = t == -math.inf
        assert torch.equal(f == -math.inf, hidden)
        f, p, t = (x.masked_fill(hidden, 0) for x in (f, p, t))
        floor = 0.0 if t.any() else 4 * torch.finfo(torch.float32).eps * float(found[0].abs().max())
        assert error(f, t) <= tolerance(p, t) + floor


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_agrees_with_the_composition(monkeypatch, calls, options, dtype):
    # The kernel scales the infinities of causal order.
    served = options.get("scale", 1) > 0
    for shared in (4, 2):
        tensors = inputs(shared=shared, dtype=dtype)
        found = results(tensors, enable_gqa=True, **options)
        assert calls == (["_FORWARD", "_BACKWARD"] if served else [])
        assert_as_accurate_as_eager(tensors, options, found)
        if dtype == torch.float32:
            plain = composed(monkeypatch, tensors, enable_gqa=True, **options)
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        empty = found[1] == -math.inf
        assert (found[0][empty] == 0).all()
        assert (found[2][empty] == 0).all()
        calls.clear()


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 65, 8), (130, 5, 40), (64, 300, 33), (300, 64, 24)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_sizes_and_layouts(calls, sizes, is_causal):
    queries, keys, width = sizes
    tensors = inputs(queries=queries, keys=keys, width=width)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    other = [t.mT.contiguous().mT for t in tensors]
    expanded = [tensors[0], *(t[:, :1].expand(t.shape) for t in tensors[1:])]
    for given in (tensors, apart, other, expanded):
        found = results(given, is_causal=is_causal)
        assert_as_accurate_as_eager(given, {"is_causal": is_causal}, found)
        for result, t in zip(found[2:], given, strict=True):
            assert result.stride() == torch.empty_like(t).stride()
    assert calls == ["_FORWARD", "_BACKWARD"] * 4


def test_fp64_is_served_and_compared_as_it_is(monkeypatch, calls):
    tensors = inputs(dtype=torch.float64)
    options = {"attn_mask": HOLES, "is_causal": True}
    found = results(tensors, **options)
    assert calls == ["_FORWARD", "_BACKWARD"]
    torch.testing.assert_close(found, composed(monkeypatch, tensors, **options))


OTHERS = {
    "dropout": {"dropout_p": 0.3, "seed": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.zeros(4)},
    "fp64 mask": {"attn_mask": BIAS.double()},
    "causal by a scale of 0": {"is_causal": True, "scale": 0.0},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_what_the_kernel_cannot_is_composed(calls, options):
    results(inputs(), **options)
    assert not calls


def test_other_shapes_are_composed(calls):
    results(inputs(value_width=24))
    results(inputs(queries=0))
    results(inputs(keys=0))
    offsets = torch.tensor([0, 7, 19], dtype=torch.int32)
    results(inputs(1, keys=19), cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    assert not calls


def test_gradients_that_the_kernel_lacks_are_composed(monkeypatch, calls):
    """Of a mask, and of the log-sum-exp; the forward is the kernel's."""
    tensors = inputs()
    found = results(tensors, with_lse=True, key_mask=PADDING)
    assert calls == ["_FORWARD"]
    plain = composed(monkeypatch, tensors, with_lse=True, key_mask=PADDING)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    bias = BIAS.clone().requires_grad_()
    calls.clear()
    torch.autograd.grad(sdpa(*tensors, bias).square().sum(), bias)
    assert calls == ["_FORWARD"]


def test_a_torch_without_the_operator_is_served_by_the_composition(monkeypatch):
    tensors = inputs()
    expected = sdpa(*tensors)
    monkeypatch.setattr(flash, "_FORWARD", None)  # as torch_private.cpu_attention says it
    torch.testing.assert_close(sdpa(*tensors), expected)


def test_nan_in_keys_that_are_left_out_stays_there(monkeypatch):
    query, key, value = inputs()
    key[0, :, 30:] = math.nan
    out = sdpa(query, key, value, key_mask=PADDING)
    assert torch.equal(out, composed(monkeypatch, [query, key, value], key_mask=PADDING)[0])
    assert not out.isnan().any()
    seen = sdpa(query, key, value)
    assert seen[0].isnan().all()
    assert not seen[1].isnan().any()


def test_a_log_sum_exp_of_0_is_no_empty_row():
    query, key, value = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    out, lse = sdpa(query, key, value, mask, return_lse=True)
    assert lse.flatten().tolist() == [0.0, -math.inf, pytest.approx(math.log(2))]
    assert out[0, 0, :, 0].tolist() == [1.0, 0.0, 1.0]


def test_dropout_rates_of_zero_and_evaluation_are_one_call(calls):
    tensors = inputs()
    plain = sdpa(*tensors)
    for p in (0.0, torch.tensor(0.0), 1e-12):
        assert torch.equal(sdpa(*tensors, dropout_p=p, seed=1), plain)
    layer = ScaledDotProductAttention(p=0.3).eval()
    assert torch.equal(layer(*tensors), plain)
    assert calls == ["_FORWARD"] * 5


def test_blocks_of_keys_add_up_to_the_whole(calls):
    """The backward that ring attention calls, from the log-sum-exp of all keys."""
    query, key, value = inputs()
    whole = results([query, key, value])
    grad = draw(*whole[0].shape, seed=7).half().float()
    parts = [
        tridrop.scaled_dot_product_attention_backward(
            grad, whole[0], whole[1], query, key[:, :, s], value[:, :, s], seed=1
        )
        for s in (slice(0, 20), slice(20, 37))
    ]
    assert calls.count("_BACKWARD") == 3
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[2], rtol=1e-4, atol=1e-5)
    for i in (1, 2):
        torch.testing.assert_close(
            torch.cat([part[i] for part in parts], 2), whole[2 + i], rtol=1e-4, atol=1e-5
        )


# ------------------------------------------------------------------------------------- blocks

OFFSETS = [torch.tensor(o, dtype=torch.int32) for o in ([0, 7, 7, 17], [0, 5, 20, 33])]
CUT = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 5), "softcap": 2.0},
    "masks": {"attn_mask": HOLES, "key_mask": PADDING, "is_causal": True},
    "sinks": {"sinks": draw(4, seed=8), "attn_mask": BIAS},
    "shard": {"shard": tridrop.Shard((8, 9, 90, 90), (3, 4, 11, 5)), "is_causal": True},
    "packed": {"cu_seqlens_q": OFFSETS[0], "cu_seqlens_k": OFFSETS[1], "is_causal": True},
}


@pytest.mark.parametrize("scores", [1, 100, 19 * 37, 3 * 19 * 37, 7 * 19 * 37])
@pytest.mark.parametrize("options", CUT.values(), ids=CUT)
def test_blocks_are_pieces_of_the_whole(monkeypatch, in_blocks, options, scores):
    tensors = inputs(1 if "cu_seqlens_q" in options else 2, shared=2)
    options = {**options, "enable_gqa": True, "dropout_p": 0.3, "seed": 3}
    whole = results(tensors, with_lse=True, **options)
    monkeypatch.setattr(blocks, "_SMALL", 0)
    sizes = []
    real = attention.scores

    def recorded(*call):
        score, capped = real(*call)
        sizes.append(score.numel())
        return score, capped

    monkeypatch.setattr(attention, "scores", recorded)
    monkeypatch.setitem(blocks._SCORES, "cpu", scores)
    found = results(tensors, with_lse=True, **options)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert max(sizes) <= max(scores, 37)


@pytest.mark.parametrize("shape", [(19, 37), (2, 1, 1, 37), (1, 4, 19, 1), (2, 4, 19, 37), ()])
def test_gradients_of_masks_and_sinks_sum_over_blocks(monkeypatch, shape):
    query, key, value = inputs()

    def gradients():
        bias, sinks = draw(*shape).requires_grad_(), draw(4).requires_grad_()
        out = sdpa(query, key, value, bias, 0.3, True, sinks=sinks, seed=3)
        return torch.autograd.grad(out.square().sum(), (bias, sinks))

    whole = gradients()
    monkeypatch.setattr(blocks, "_SMALL", 0)
    monkeypatch.setitem(blocks._SCORES, "cpu", 200)
    torch.testing.assert_close(gradients(), whole, rtol=1e-4, atol=1e-5)


def test_blocks_have_the_exported_mask(monkeypatch, in_blocks):
    query, key, _ = inputs()
    identity = torch.eye(37).expand(2, 4, 37, 37)
    keep = tridrop.attention_keep_mask(3, (2, 4, 19, 37), 0.4)
    monkeypatch.setattr(blocks, "_SMALL", 0)
    monkeypatch.setitem(blocks._SCORES, "cpu", 50)
    assert torch.equal(sdpa(query, key, identity, dropout_p=0.4, seed=3) != 0, keep)
    causal = sdpa(query, key, identity, dropout_p=0.4, is_causal=True, seed=3)
    assert torch.equal(causal != 0, keep & torch.ones(19, 37, dtype=torch.bool).tril())


def test_second_derivatives_go_through_blocks(monkeypatch, in_blocks):
    monkeypatch.setattr(blocks, "_SMALL", 0)
    monkeypatch.setitem(blocks._SCORES, "cpu", 8)
    tensors = [t.double().requires_grad_() for t in inputs(1, 2, 3, 4, 2)]
    bias = draw(3, 4).double().requires_grad_()
    for p in (0.0, 0.4):  # the kernel makes the first derivatives without dropout

        def call(q, k, v, bias, p=p):
            return sdpa(q, k, v, bias, p, is_causal=True, seed=3)

        assert torch.autograd.gradcheck(call, (*tensors, bias))
        assert torch.autograd.gradgradcheck(call, (*tensors, bias))
        assert torch.autograd.gradgradcheck(lambda *t: call(*t, bias.detach()), tensors)
