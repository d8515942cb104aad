"""Attention with dropout on a CPU, whole heads in each thread: what blocks of scores give."""

import math
from types import SimpleNamespace

import pytest
import torch

import tridrop
from tridrop.backends.cpu import by_head, products, serving, torch_library
from tridrop.commands.check.measure import error, tolerance
from tridrop.spec.attention import AttentionInputs, AttentionOptions
from tridrop.spec.operands import AttentionBackward

pytestmark = pytest.mark.skipif(
    not serving.can_serve() or not torch_library.table, reason="kernels cannot call torch here"
)


@pytest.fixture(autouse=True)
def two_threads():
    """As many as there are key heads at least, or attention goes in blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def served(monkeypatch):
    """The names of the kernels that whole heads ran, in order."""
    names = []

    def counted(name, *arguments):
        found = products.call(name, *arguments)
        names.append((name, found))
        return found

    # Those of blocks, which go by the same function, are not counted.
    monkeypatch.setattr(by_head, "products", SimpleNamespace(call=counted))
    return names


BOTH = [("softmax_forward", True), ("softmax_backward", True)]


def in_blocks(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(by_head, "torchs_team", lambda: None)
        return call()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adjacent(batch, heads, rows, width, seed=0, dtype=torch.float32):
    """Heads next to each other, as projections leave them."""
    return draw(batch, rows, heads, width, seed=seed, dtype=dtype).transpose(1, 2)


def operands(queries=19, keys=37, heads=4, shared=4, width=16, values=16, make=adjacent, **more):
    return [
        make(2, heads, queries, width, seed=1, **more),
        make(2, shared, keys, width, seed=2, **more),
        make(2, shared, keys, values, seed=3, **more),
    ]


def results(tensors, p=0.3, computed=None, with_lse=False, **options):
    """out, the log-sum-exp, and the gradients of query, key and value.

    Options that are functions get the numbers of queries and keys.
    """
    lengths = tensors[0].shape[2], tensors[1].shape[2]
    options = {k: v(*lengths) if callable(v) else v for k, v in options.items()}
    leaves = [t.to(computed or t.dtype).detach().requires_grad_() for t in tensors]
    group = leaves[0].shape[1] != leaves[1].shape[1]
    out, lse = tridrop.scaled_dot_product_attention(
        *leaves, dropout_p=p, seed=3, return_lse=True, enable_gqa=group, **options
    )
    total = (out * draw(*out.shape, seed=7).half().to(out.dtype)).sum()
    if with_lse:
        total = total + torch.where(lse == -math.inf, 0, lse).square().sum().to(total.dtype)
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def some(queries, keys):
    """Some keys of a query, or none: whichever head it is of."""
    return draw(2, 1, queries, keys, seed=5) > 0


def padding(_, keys):
    return torch.arange(keys) < torch.tensor([[keys // 2], [keys]])


def floats(queries, keys):
    """Of every head, with strides of their own, and minus infinity in places."""
    made = draw(4, keys, queries, seed=6)
    return made.masked_fill_(made > 1.5, -math.inf).mT


CASES = {
    "plain": {},
    "bool mask": {"attn_mask": some},
    "key mask": {"key_mask": padding},
    "all masks": {"attn_mask": some, "key_mask": padding, "is_causal": True, "with_lse": True},
    "float mask": {"attn_mask": floats, "scale": 0.7},
    "float mask, window": {"attn_mask": floats, "window": (4, 3)},
    "a number for each query": {"attn_mask": lambda q, _: draw(2, 1, q, 1)},
    "causal": {"is_causal": True},
    "gradient of lse": {"with_lse": True, "is_causal": True},
    "window": {"window": (3, 5)},
    "window to the left": {"window": (4, None), "is_causal": True},
    "scale": {"scale": -0.3},
    "shard": {"shard": tridrop.Shard((8, 9, 900, 900), (3, 4, 11, 5)), "is_causal": True},
    "everything dropped": {"p": 1.0, "with_lse": True},
}
SIZES = {
    "more keys": {},
    "more queries": {"queries": 41, "keys": 23},  # with causal order, rows without keys
    "shared heads": {"shared": 2},
    "one key head": {"shared": 1},
    "wide values": {"values": 24},
    "one of each": {"queries": 1, "keys": 1},
    "several chunks": {"queries": 300, "keys": 140},
    "heads apart": {"make": draw},
}


def test_a_gradient_of_the_log_sum_exp_without_dropout(monkeypatch, served):
    """torch's kernel computes forward alone."""
    tensors = operands(shared=2)
    with tridrop.backend("cpu"):
        found = results(tensors, p=0.0, with_lse=True)
        assert served == [("softmax_backward", True)]
        expected = in_blocks(monkeypatch, lambda: results(tensors, p=0.0, with_lse=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_gradient_in_fp64_is_not_rounded(served):
    inputs = AttentionInputs(*operands(), seed=torch.tensor([3, 0]))
    options = AttentionOptions(p=0.3)
    out, lse = by_head.forward(inputs, options)
    for dtype in (torch.float64, torch.float32):
        given = AttentionBackward(out.to(dtype), None, out, lse, *inputs)
        found = by_head.backward(given, options, (True, True, True, False, False))
        assert (found is None) == (dtype == torch.float64)
    assert served == BOTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_heads_give_what_blocks_give(monkeypatch, served, options, sizes, dtype):
    """As near to fp64 as blocks are, with the same mask and strides."""
    tensors = operands(**sizes, dtype=dtype)
    with tridrop.backend("cpu"):
        found = results(tensors, **options)
        assert served == BOTH
        blocks = in_blocks(monkeypatch, lambda: results(tensors, **options))
        wide = results(tensors, computed=torch.float64, **options)
    assert served == BOTH
    for ours, theirs, expected in zip(found, blocks, wide, strict=True):
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype
        finite = expected.isfinite()
        assert torch.equal(ours[~finite], expected[~finite].to(ours.dtype))
        ours, theirs, expected = (t[finite] for t in (ours, theirs, expected))
        sums = 2e-6 * max(1.0, float(expected.abs().max())) if expected.numel() else 0
        assert error(ours, expected) <= tolerance(theirs, expected) + sums


def test_the_mask_is_the_exported_one(monkeypatch):
    """Values that are the identity show the probabilities; dropped ones are exactly 0."""
    monkeypatch.setattr(by_head, "_ROWS", 7)
    query, key, _ = operands()
    identity = torch.eye(37).expand(2, 4, 37, 37)
    keep = tridrop.attention_keep_mask(3, (2, 4, 19, 37), 0.4)
    with tridrop.backend("cpu"):
        out = tridrop.scaled_dot_product_attention(query, key, identity, dropout_p=0.4, seed=3)
    assert torch.equal(out != 0, keep)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_threads_do_not_change_a_bit(options):
    tensors, found = operands(queries=150, shared=2), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with tridrop.backend("cpu"):
            found.append(results(tensors, **options))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_chunks_add_up(monkeypatch, options, rows):
    tensors = operands(queries=41, shared=2)
    with tridrop.backend("cpu"):
        expected = results(tensors, **options)
        monkeypatch.setattr(by_head, "_ROWS", rows)
        found = results(tensors, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_that_nobody_needs_are_not_made(served, needs):
    leaves = operands()
    with tridrop.backend("cpu"):
        every = results(leaves)[2:]
        for i in needs:
            leaves[i] = leaves[i].detach().requires_grad_()
        out = tridrop.scaled_dot_product_attention(*leaves, dropout_p=0.3, seed=3)
        grad = draw(*out.shape, seed=7).half().to(out.dtype)
        found = torch.autograd.grad(out, [leaves[i] for i in needs], grad)
    assert served == 2 * BOTH
    for i, grad in zip(needs, found, strict=True):
        assert torch.equal(grad, every[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", ["query", "key", "value", "dout"])
@pytest.mark.parametrize("case", ["plain", "causal", "window", "bool mask", "float mask"])
def test_numbers_that_are_not_finite(monkeypatch, served, case, place, bad):
    options = {k: v(40, 40) if callable(v) else v for k, v in CASES[case].items()}
    tensors = operands(queries=40, keys=40, shared=2)
    grad = draw(2, 40, 4, 16, seed=7).transpose(1, 2)
    where = [*tensors, grad][["query", "key", "value", "dout"].index(place)]
    where[0, 1, 17, 3] = bad

    def call():
        leaves = [t.detach().requires_grad_() for t in tensors]
        with tridrop.backend("cpu"):
            out = tridrop.scaled_dot_product_attention(
                *leaves, dropout_p=0.3, seed=3, enable_gqa=True, **options
            )
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

    found, expected = call(), in_blocks(monkeypatch, call)
    assert served == BOTH
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs[theirs.isfinite()].abs().max().clamp(min=1)  # others may be its difference
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=float(1e-5 * largest), equal_nan=True
        )


OTHERS = {
    "float mask and key mask": {"attn_mask": floats, "key_mask": padding},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": draw(4, seed=8)},
    "infinite scale": {"scale": 1e300},
    "no scale": {"scale": 0.0},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_calls_go_in_blocks(served, options):
    with tridrop.backend("cpu"):
        results(operands(), **options)
        results(operands(dtype=torch.float64))
    assert served == []


def test_gradients_of_masks_go_in_blocks(served):
    bias = draw(19, 37).requires_grad_()
    with tridrop.backend("cpu"):
        out = tridrop.scaled_dot_product_attention(*operands(), bias, 0.3, seed=3)
        torch.autograd.grad(out.sum(), bias)
    assert served == BOTH[:1]


def test_fewer_heads_than_threads_go_in_blocks(monkeypatch, served):
    monkeypatch.setattr(by_head, "torchs_team", lambda: (1, 9, torch_library.table))
    with tridrop.backend("cpu"):
        results(operands())
    assert served == []


def test_a_key_without_its_memory_is_read_by_nobody(served):
    """The kernel refuses what lies outside of its storage, and torch's operators decide then."""
    query, key, value = operands(make=draw)
    inputs = AttentionInputs(query, key.clone(), value, seed=torch.tensor([3, 0]))
    options = AttentionOptions(p=0.3, upper=0)
    assert by_head.forward(inputs, options) is not None
    key.untyped_storage().resize_(0)
    assert by_head.forward(inputs._replace(key=key), options) is None
    assert served == [("softmax_forward", True), ("softmax_forward", False)]
