"""Attention among torch's habits: layouts, memory, seeds, compilation, transforms, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hosts import DEVICE, PLAIN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop import scaled_dot_product_attention as sdpa
from tridrop.commands.check.measure import MAX_Z
from tridrop.spec.operands import AttentionBackward

BACKENDS = [PLAIN, "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with tridrop.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(batch=2, heads=2, queries=20, keys=37, width=16, **more):
    return (
        draw(batch, heads, queries, width, seed=1, **more),
        draw(batch, heads, keys, width, seed=2, **more),
        draw(batch, heads, keys, width, seed=3, **more),
    )


def run(function, *tensors: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    incoming = torch.ones_like(out) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


dropped = functools.partial(sdpa, dropout_p=0.3, seed=3)

LAYOUTS = {
    "heads last in memory": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of a projection": lambda t: torch.cat((t, t, t), -1)[..., : t.shape[-1]],
    "every second column": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "expanded": lambda t: t[:1, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_inputs_and_gradients_do_not_matter(backend, layout):
    change = LAYOUTS[layout]
    strided = [change(t) for t in inputs()]
    grad = change(draw(2, 2, 20, 16, seed=5))
    found = run(dropped, *strided, grad=grad)
    expected = run(dropped, *(t.contiguous() for t in strided), grad=grad.contiguous())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_result_is_laid_out_as_the_query(backend):
    query, key, value = inputs()
    moved = LAYOUTS["heads last in memory"](query)
    out = dropped(moved, key, value)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, dropped(query, key, value))


def test_other_numbers_of_dimensions(backend):
    query, key, value = inputs(batch=6, heads=4)
    four = dropped(query, key, value)
    five = dropped(*(t.unflatten(0, (2, 3)) for t in (query, key, value)))
    assert torch.equal(five.flatten(0, 1), four)
    # A product of one matrix may be rounded in another way than one of many, by the processor;
    # a number dropped in one and kept in the other differs by 0.01 and more.
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(dropped(query[0], key[0], value[0]), four[0])
    close(dropped(query[0, 0], key[0, 0], value[0, 0]), four[0, 0])
    # a mask that is shared along one of two batch dimensions
    mask = draw(2, 1, 1, 20, 37, seed=4)
    found = dropped(*(t.unflatten(0, (2, 3)) for t in (query, key, value)), mask)
    expected = dropped(query, key, value, mask.expand(2, 3, 1, 20, 37).flatten(0, 1))
    assert torch.equal(found.flatten(0, 1), expected)


def test_batch_and_heads_of_one_are_shared(backend):
    query, key, value = inputs()
    found = dropped(query, key[:1], value[:1])
    assert torch.equal(found, dropped(query, *(t[:1].expand_as(t) for t in (key, value))))
    found = dropped(query, key[:, :1], value[:, :1])
    expected = dropped(query, *(t[:, :1].expand_as(t) for t in (key, value)))
    assert torch.equal(found, expected)
    found = dropped(query[:, :1], key, value)
    assert torch.equal(found, dropped(query[:, :1].expand_as(query), key, value))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty_tensors(backend, sizes):
    batch, heads, queries, keys = sizes
    out, *gradients = run(dropped, *inputs(batch, heads, queries, keys))
    assert out.shape == (batch, heads, queries, 16)
    for t in (out, *gradients):
        assert torch.equal(t, torch.zeros_like(t))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_pass_holds_anything_of_the_size_of_the_scores():
    tensors = inputs(1, 1, 160, 160)
    # The launchers themselves: what an operator makes inside, a dispatch mode does not see.
    module = tridrop.backends.load("triton")
    given = tridrop.spec.attention.AttentionInputs(*tensors, seed=torch.tensor([3, 0]).to(DEVICE))
    how = tridrop.spec.attention.AttentionOptions(p=0.3, scale=0.25, upper=0)
    with Largest() as seen:
        forward, backward = module.FAMILIES["attention"]
        out, lse = forward(given, how)
        needs = (True, True, True, False, False)
        backward(AttentionBackward(out, None, out, lse, *given), how, needs)
    assert seen.bytes == 4 * out.numel() < 160 * 160
    options = {"is_causal": True, "dropout_p": 0.3, "seed": 3}
    # what autograd keeps: the operands, the result, the log-sum-exp and the seed
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with tridrop.backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = sdpa(*leaves, **options)
    assert sum(kept.values()) == 4 * (4 * out.numel() + 160) + 16


def test_seeds_follow_torchs_generator_and_rng(backend):
    query, key, value = inputs()
    torch.manual_seed(5)
    first, second = sdpa(query, key, value, dropout_p=0.3), sdpa(query, key, value, dropout_p=0.3)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(sdpa(query, key, value, dropout_p=0.3), first)
    with tridrop.rng(7):
        a = sdpa(query, key, value, dropout_p=0.3)
    with tridrop.rng(7):
        assert torch.equal(sdpa(query, key, value, dropout_p=0.3), a)


def test_without_dropout_no_seed_is_drawn(backend):
    state = torch.random.get_rng_state()
    tensors = inputs()
    plain = sdpa(*tensors)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(plain, sdpa(*tensors, dropout_p=0.0, seed=3))


def test_a_tensor_p_is_its_value(backend):
    p = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    found = run(lambda q, k, v: sdpa(q, k, v, dropout_p=p, seed=3), *inputs())
    assert_same(found, run(dropped, *inputs()))


@pytest.mark.parametrize("dim", range(4))
def test_masks_of_shards_are_pieces_of_the_whole(backend, dim):
    """Queries and keys with the identity for values, cut along one dimension at an odd place."""
    query, key, _ = inputs(2, 4, 20, 70)
    whole = (2, 4, 20, 70)
    cut = (1, 3, 7, 45)[dim]
    keep = tridrop.attention_keep_mask(3, whole, 0.3, device=DEVICE)
    band = torch.ones(20, 70, dtype=torch.bool, device=DEVICE).tril().triu(-9)
    for start, size in ((0, cut), (cut, whole[dim] - cut)):
        origin = tuple(start if i == dim else 0 for i in range(4))
        q, k = query, key
        if dim < 3:
            q = q.narrow(dim, start, size)
        if dim != 2:
            k = k.narrow(min(dim, 2), start, size)
        n = k.shape[2]
        identity = torch.eye(n, device=DEVICE).expand(*k.shape[:2], n, n)
        where = (whole, origin)
        out = sdpa(q, k, identity, dropout_p=0.3, shard=where, seed=3)
        assert torch.equal(out != 0, keep.narrow(dim, start, size))
        out = sdpa(q, k, identity, None, 0.3, True, window=(9, None), shard=where, seed=3)
        assert torch.equal(out != 0, (keep & band).narrow(dim, start, size))


def test_repeats_are_bitwise_equal(backend):
    tensors = (*inputs(1, 2, 9, 40), draw(1, 1, 9, 40, seed=4))
    grad = draw(1, 2, 9, 16, seed=5)
    first = run(dropped, *tensors, grad=grad)
    # every sum has one order, so that a GPU has no choice either; there it is worth many runs
    for _ in range(200 if DEVICE == "cuda" or backend != "triton" else 5):
        assert_same(run(dropped, *tensors, grad=grad), first)


def test_checkpoint_recomputes_the_same_mask(backend):
    tensors = inputs()

    def once(query, key, value):
        torch.manual_seed(11)
        return sdpa(query, key, value, dropout_p=0.3)

    def again(query, key, value):
        torch.manual_seed(11)
        return checkpoint(
            lambda *t: sdpa(*t, dropout_p=0.3), query, key, value, use_reentrant=False
        )

    assert_same(run(again, *tensors), run(once, *tensors))


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.arange(37, device=DEVICE) % 3 > 0},
    "float": {"attn_mask": draw(1, 2, 20, 37, seed=4)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_mean_is_that_of_torchs_dropout(mask):
    """Both functions with dropout over many seeds, as a z-test on a projection."""
    query, key, value = inputs(1, 2)
    direction = draw(1, 2, 20, 16, seed=6)

    def moments(function):
        samples = torch.tensor([float((function(s) * direction).sum()) for s in range(400)])
        return float(samples.mean()), float(samples.var()) / len(samples)

    def torchs(seed):
        torch.manual_seed(seed)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.4, **MASKS[mask])

    with tridrop.backend("reference"):
        ours = moments(lambda s: sdpa(query, key, value, dropout_p=0.4, seed=s, **MASKS[mask]))
    theirs = moments(torchs)
    z = abs(ours[0] - theirs[0]) / math.sqrt(ours[1] + theirs[1])
    assert z <= MAX_Z
    assert 0.5 < ours[1] / theirs[1] < 2  # and of the same spread


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(backend, dynamic):
    def function(query, key, value, mask):
        out, lse = sdpa(query, key, value, mask, 0.3, return_lse=True, seed=3, window=(9, 4))
        return torch.cat([out, lse[..., None]], -1).transpose(1, 2).flatten(2)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (20, 21) if dynamic else (20,):
        tensors = (*inputs(queries=queries), draw(1, 2, queries, 37, seed=4))
        assert_same(run(compiled, *tensors), run(function, *tensors))


def test_compiled_packed_sequences_and_drawn_seeds(backend):
    starts = torch.tensor([0, 12, 20], dtype=torch.int32, device=DEVICE)

    def function(query, key, value):
        return sdpa(
            query, key, value, dropout_p=0.3, cu_seqlens_q=starts, cu_seqlens_k=starts,
            max_seqlen_q=12, max_seqlen_k=12,
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = inputs(1, 2, 20, 20)
    torch.manual_seed(3)
    expected = run(function, *tensors)
    torch.manual_seed(3)
    assert_same(run(compiled, *tensors), expected)


def test_functional_transforms(backend):
    query, key, value = inputs(3, 2, 6, 9)

    def loss(query, key, value):
        return (dropped(query, key, value) ** 2).sum()

    found = torch.func.grad(loss)(query[0], key[0], value[0])
    leaf = query[0].detach().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(loss(leaf, key[0], value[0]), leaf)[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(query, key, value)[0], found)


def test_second_derivatives():
    tensors = [t.requires_grad_() for t in inputs(1, 2, 3, 4, 3, dtype=torch.float64)]
    mask = draw(1, 1, 3, 4, seed=4, dtype=torch.float64).requires_grad_()
    sinks = draw(2, seed=6, dtype=torch.float64).requires_grad_()

    def function(query, key, value, mask, sinks):
        return dropped(
            query, key, value, mask, sinks=sinks, softcap=2.0, window=(1, 2), return_lse=True
        )

    with tridrop.backend("reference"):
        assert torch.autograd.gradcheck(function, (*tensors, mask, sinks))
        assert torch.autograd.gradgradcheck(function, (*tensors, mask, sinks))


def test_second_derivative_of_the_kernels():
    """The same for both backends: beyond the first it is the reference's composition."""
    found = []
    for name in BACKENDS:
        with tridrop.backend(name):
            leaves = [t.detach().requires_grad_() for t in inputs(1, 1, 5, 6)]
            first = torch.autograd.grad(dropped(*leaves).square().sum(), leaves, create_graph=True)
            total = sum((t**2).sum() for t in first)
            found.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_operators_pass_torchs_checks(backend):
    query, key, value = (t.requires_grad_() for t in inputs(1, 2, 6, 9))
    options = tridrop.spec.attention.AttentionOptions(p=0.3, scale=0.25, upper=0)
    packed = tridrop.ops.pack_attention(options, backend)
    seed = torch.tensor([3, 0], device=DEVICE)
    tensors = (query, key, value, None, None, None, None, None, seed, None)
    tests = ("test_schema", "test_faketensor")
    arguments = (*tensors, *packed)
    torch.library.opcheck(torch.ops.tridrop.attention_forward, arguments, test_utils=tests)
    out, lse = torch.ops.tridrop.attention_forward(*tensors, *packed)
    needs = [True, True, False, False, False]
    arguments = (out.detach(), None, out.detach(), lse.detach(), *arguments, needs, False)
    torch.library.opcheck(torch.ops.tridrop.attention_backward, arguments, test_utils=tests)


Q, K = torch.zeros(2, 4, 5, 16), torch.zeros(2, 4, 7, 16)
CU = torch.tensor([0, 5], dtype=torch.int32)
ERRORS = [
    ({"query": Q.int()}, TypeError, "query has dtype torch.int32"),
    ({"key": K.half()}, TypeError, "key has dtype torch.float16 but query has torch.float32"),
    ({"key": K[..., :8]}, ValueError, "last dimensions of query and key"),
    ({"value": K[:, :, :3]}, ValueError, "key and value must have the same length"),
    ({"key": K[:, :2], "value": K[:, :2]}, ValueError, "enable_gqa=True"),
    ({"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}, ValueError, "must divide"),
    ({"query": Q[0]}, ValueError, "same number of dimensions"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p = 1.5"),
    ({"attn_mask": torch.zeros(5, 6)}, ValueError, "does not broadcast"),
    ({"attn_mask": torch.zeros(5, 7, dtype=torch.int32)}, TypeError, "attn_mask has dtype"),
    ({"key_mask": torch.zeros(2, 7)}, TypeError, "key_mask is torch.float32"),
    ({"key_mask": torch.ones(7, 2).bool()}, ValueError, "it must be"),
    ({"window": (-1, 2)}, ValueError, "window's left = -1"),
    ({"window": "3"}, TypeError, "window is '3'"),
    ({"softcap": 0.0}, ValueError, "softcap = 0.0"),
    ({"scale": math.inf}, ValueError, "scale = inf"),
    ({"sinks": torch.zeros(3)}, ValueError, "one logit per query head"),
    ({"cu_seqlens_q": CU}, ValueError, "give both"),
    ({"cu_seqlens_q": CU, "cu_seqlens_k": CU}, ValueError, "packed"),
    ({"max_seqlen_q": 5}, ValueError, "belong to cu_seqlens"),
    ({"shard": ((2, 4, 5), (0, 0, 0))}, ValueError, "shard has global_shape"),
    ({"shard": ((2, 4, 5, 7), (1, 0, 0, 0))}, ValueError, "does not fit"),
    ({"shard": ((2, 1 << 29, 5, 7), (0, 0, 0, 0))}, ValueError, "head"),
]


@pytest.mark.parametrize(("given", "kind", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_errors_say_what_was_given_and_what_to_do(given, kind, message):
    tensors = {"query": Q, "key": K, "value": K} | given
    with pytest.raises(kind, match=message):
        sdpa(**tensors)


def test_offsets_that_are_wrong_are_refused():
    one = {"query": Q[:1], "key": Q[:1], "value": Q[:1]}
    for offsets in ([1, 5], [0, 4, 3], [0, 6]):
        wrong = torch.tensor(offsets, dtype=torch.int32)
        with pytest.raises(ValueError, match="offsets begin at 0"):
            sdpa(**one, cu_seqlens_q=wrong, cu_seqlens_k=wrong)


def test_wide_heads_name_the_backend_that_takes_them():
    wide = torch.zeros(1, 1, 4, 320, device=DEVICE)
    with tridrop.backend("triton"), pytest.raises(ValueError, match="up to 256"):
        sdpa(wide, wide, wide)
    with tridrop.backend("reference"):
        assert sdpa(wide, wide, wide).shape == wide.shape
