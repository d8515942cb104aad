"""Attention's products on a CPU: what the reference gives, for operands of any strides."""

import ctypes

import pytest
import torch

import tridrop
from tridrop.backends import reference
from tridrop.backends.cpu import products, threads, torch_library
from tridrop.backends.cpu.serving import can_serve
from tridrop.backends.reference.attention import Product

needs_numba = pytest.mark.skipif(not can_serve(), reason="the cpu backend needs numba")
needs_table = pytest.mark.skipif(
    not can_serve() or not torch_library.table, reason="kernels cannot call torch here"
)

SHAPES = [  # batch, heads, queries, keys, width, width of the values
    (2, 3, 5, 7, 4, 4),
    (0, 2, 3, 3, 4, 4),
    (2, 2, 0, 4, 4, 4),
    (3, 2, 1, 9, 8, 1),
    (5, 12, 130, 64, 32, 32),  # a product per sample
    (3, 8, 300, 300, 16, 16),  # several blocks
]


def heads_adjacent(batch, heads, rows, width):
    return torch.randn(batch, rows, heads, width).transpose(1, 2)


LAYOUTS = {
    "heads adjacent": heads_adjacent,
    "contiguous": torch.randn,
    "rows apart": lambda b, h, rows, width: torch.randn(b, h, width, rows).mT,
    "one head for all": lambda b, h, *rest: heads_adjacent(b, 1, *rest).expand(-1, h, -1, -1),
    "one sample for all": lambda b, *rest: heads_adjacent(1, *rest).expand(b, -1, -1, -1),
}


@needs_numba
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_that_of_the_reference(layout, shape):
    torch.manual_seed(0)
    batch, heads, queries, keys, width, values = shape
    sizes = (queries, width), (keys, width), (keys, values)
    tensors = [LAYOUTS[layout](batch, heads, *size) for size in sizes]
    grad = heads_adjacent(batch, heads, queries, values)
    for options in ({}, {"softcap": 3.0}, {"window": (2, 1)}):
        found = []
        for name in ("cpu", "reference"):
            leaves = [t.detach().requires_grad_() for t in tensors]
            with tridrop.backend(name):
                out = tridrop.scaled_dot_product_attention(
                    *leaves, dropout_p=0.2, seed=3, **options
                )
            found.append((out, *torch.autograd.grad(out, leaves, grad)))
        for ours, expected in zip(*found, strict=True):
            assert ours.stride() == expected.stride()
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["by the kernel", "by baddbmm"])
def way(request, monkeypatch):
    """How matrices are multiplied: several at a time by threads that have one each, or not."""
    if request.param == "by baddbmm":
        monkeypatch.setattr(products, "_by_threads", lambda *_: False)
    return request.param


@needs_numba
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("layout", ["heads adjacent", "contiguous", "rows apart"])
def test_a_product_is_written_or_added(layout, rows, add, way):
    """Also where what is written over is NaN."""
    torch.manual_seed(0)
    left, right = LAYOUTS[layout](2, 3, rows, 9), LAYOUTS[layout](2, 3, 9, 40)
    into = LAYOUTS[layout](2, 3, rows, 40)
    expected = into.clone()
    if not add:
        into.fill_(torch.nan)
    product = Product(left, right, 0.3, 3)
    products.write(product, into, add)
    reference.attention.write(product, expected, add)
    torch.testing.assert_close(into, expected, rtol=1e-5, atol=1e-5)


def by_kernel(out, left, right, count=2):
    """Whether the kernel takes such operands, with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return products._by_threads(out, left, right, 1.0, False)
    finally:
        torch.set_num_threads(before)


@needs_table
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_product(count):
    torch.manual_seed(0)
    left, right = heads_adjacent(2, 5, 130, 96), heads_adjacent(2, 5, 96, 128)
    found = torch.full((2, 5, 130, 128), torch.nan), torch.full((2, 5, 130, 128), torch.nan)
    for out, threads_now in zip(found, (1, count), strict=True):
        assert by_kernel(out, left, right, threads_now)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], left @ right, rtol=1e-4, atol=1e-4)


REFUSED = {
    "fp64": lambda t: t.double(),
    "bf16": lambda t: t.bfloat16(),
    "three dimensions": lambda t: t[0],
    "other heads": lambda t: t[:, :1],
    "other rows": lambda t: t[..., :5, :],
    "no rows": lambda t: t[..., :0, :],
    "negated": torch._neg_view,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
}


@needs_table
@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("place", range(3))
def test_the_kernel_refuses_other_operands(change, place):
    operands = [torch.ones(2, 2, 6, 6) for _ in range(3)]
    assert by_kernel(*operands)
    operands[0].zero_()
    given = list(operands)
    given[place] = REFUSED[change](operands[place])
    assert not by_kernel(*given)
    assert not operands[0].any()  # nothing was written


@needs_table
@pytest.mark.parametrize("rows", [5, 6])
def test_the_kernel_reads_nothing_outside_of_a_storage(rows):
    """The view of six rows needs more memory than its storage still has, the one of five does not.

    The storage is made smaller under the view, as frameworks do that free parameters between uses.
    """
    memory = torch.ones(2 * 2 * 6 * 6)
    left = torch.as_strided(memory, (2, 2, rows, 6), (0, 0, 6, 1))
    memory.untyped_storage().resize_(4 * 30)
    out, right = torch.zeros(2, 2, rows, 6), torch.ones(2, 2, 6, 6)
    assert by_kernel(out, left, right) == (rows == 5)
    assert out.unique().tolist() == ([6.0] if rows == 5 else [0.0])


@needs_table
def test_an_error_of_torch_is_raised(monkeypatch):
    """Here of a function that makes tensors, which the other two follow only where it made them."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, *([ctypes.c_int64] * 9))
    fails = kind(lambda *_: 7)
    words = (ctypes.c_int64 * 15).from_address(torch_library.table)
    table = (ctypes.c_int64 * 15)(*words)
    table[torch_library.CREATE] = ctypes.cast(fails, ctypes.c_void_p).value
    team = 0, 1, ctypes.addressof(table)
    monkeypatch.setattr(products, "torchs_team", lambda: team)
    operands = [torch.ones(2, 2, 6, 6) for _ in range(3)]
    with pytest.raises(RuntimeError, match="torch could not multiply"):
        products.multiply(*operands[1:])


@needs_table
def test_few_heads_are_left_to_torch(monkeypatch):
    """With fewer matrices than threads, and for many small matrices, which are quicker in a batch.

    And in a forked child, which has none of OpenMP's threads.
    """
    few, many = torch.ones(1, 2, 6, 6), torch.ones(2, 8, 6, 6)
    assert by_kernel(few, few.clone(), few.clone(), 2)
    assert not by_kernel(few, few.clone(), few.clone(), 3)
    assert not by_kernel(many, many.clone(), many.clone())
    monkeypatch.setattr(threads, "_parallel", 0)
    assert not by_kernel(few, few.clone(), few.clone(), 2)
    assert by_kernel(few, few.clone(), few.clone(), 1)


@needs_numba
def test_heads_that_share_a_gradient_are_summed():
    left, right = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 5, 3)
    into = torch.zeros(2, 2, 4, 3)
    products.write(Product(left, right, 1.0, 2), into, True)
    torch.testing.assert_close(into, (left @ right).unflatten(1, (2, 3)).sum(2))


@needs_numba
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_factor_of_0_leaves_nan(scale, way):
    """BLAS returns 0 for 0 times a product, whatever the product is."""
    left, into = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 3)
    left[0, 1, 2, 3] = torch.nan
    products.write(Product(left, torch.ones(1, 2, 4, 3), scale, 2), into, False)
    assert into[0, 1, 2].isnan().all()
    assert torch.equal(into.isnan().sum(), torch.tensor(3))


@needs_numba
@pytest.mark.parametrize("scale", [1e300, -1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_beyond_fp32_is_infinite(scale, dtype, way):
    """As where it multiplies a tensor; baddbmm refuses to convert such a number."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    found = []
    for name in ("cpu", "reference"):
        with tridrop.backend(name):
            out = tridrop.scaled_dot_product_attention(q, k, v, None, 0.25, scale=scale, seed=1)
            found.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for a, b in zip(*found, strict=True):
        assert not b.isfinite().all()
        torch.testing.assert_close(a, b, equal_nan=True)
