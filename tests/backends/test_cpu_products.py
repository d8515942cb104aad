"""Attention's products on a CPU: what the reference gives, for operands of any strides."""

import pytest
import torch

import tridrop
from tridrop.backends import reference
from tridrop.backends.cpu import products
from tridrop.backends.cpu.serving import can_serve
from tridrop.backends.reference.attention import Product

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


@pytest.mark.skipif(not can_serve(), reason="the cpu backend needs numba")
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


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("layout", ["heads adjacent", "contiguous", "rows apart"])
def test_a_product_is_written_or_added(layout, rows, add):
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


def test_heads_that_share_a_gradient_are_summed():
    left, right = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 5, 3)
    into = torch.zeros(2, 2, 4, 3)
    products.write(Product(left, right, 1.0, 2), into, True)
    torch.testing.assert_close(into, (left @ right).unflatten(1, (2, 3)).sum(2))


@pytest.mark.skipif(not can_serve(), reason="the cpu backend needs numba")
@pytest.mark.parametrize("scale", [1e300, -1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_beyond_fp32_is_infinite(scale, dtype):
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
