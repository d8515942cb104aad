"""The compiled loops over short rows, several at a time: the results of one at a time."""

import pytest
import torch
from test_cpu import _no_choice, compare, needs_numba, pair, tensors  # noqa: F401

import tridrop
from tridrop.backends.cpu import masks, threads
from tridrop.contract import mask
from tridrop.contract.mask import Shard

FAR = (1 << 35) - 8  # groups on both sides of 2^32
PLACES = {  # of [7, 11, columns]: the whole and the origin without columns, the first one, shared
    "whole": (None, None, 0, ()),
    "shared rows": (None, None, 0, (1,)),
    "shared samples": (None, None, 0, (0,)),
    "all shared": (None, None, 0, (0, 1)),
    "a piece of rows": ((9, 1 << 33), (2, (1 << 32) - 5), 0, ()),
    "a piece that shares": ((20, 30), (3, 17), 8, (0,)),
    "far columns": ((7, 11), (0, 0), FAR, ()),
    "inside a group": ((7, 11), (0, 0), 12, ()),
}


@needs_numba
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [8, 16, 64, 72, 320, 512, 520])
def test_several_short_rows_at_a_time(place, columns):
    whole, origin, first, shared = PLACES[place]
    shape, t = (7, 11, columns), mask.threshold(0.3)
    shard = Shard((*whole, first + columns), (*origin, first)) if whole else None
    plain = mask.keep_mask(pair(3, 4), shape, t, shared=shared, shard=shard)
    quick = masks.keep_mask(pair(3, 4), shape, t, shared=shared, shard=shard)
    assert torch.equal(quick, plain)
    where = {
        "noise_shape": [1 if d in shared else None for d in range(3)],
        "seed": pair(3, 4),
        "shard": shard,
    }
    expected = plain * torch.tensor(mask.scale(t), dtype=torch.float32)
    assert torch.equal(tridrop.dropout(torch.ones(shape), 0.3, **where), expected)
    if not first:  # a norm takes whole rows; that of zeros is its bias
        x, ones = torch.zeros(shape), torch.ones(columns)
        assert torch.equal(tridrop.layer_norm_dropout(x, None, ones, 0.3, **where), expected)


@needs_numba
@pytest.mark.parametrize("op", ["everything", "swiglu", "layer_norm", "layer_norm plain", "after"])
@pytest.mark.parametrize("columns", [16, 64, 144, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows(op, columns, dtype, monkeypatch):
    x, r, grad = tensors(dtype, 131, columns)
    w, b = grad[0].abs() + 0.5, grad[1].clone()
    compare(op, (x, r, w, b), grad, monkeypatch)


@needs_numba
@pytest.mark.parametrize("own", [False, True], ids=["torch", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(131, 64), (131, 8), (37, 512), (5000, 64), (300, 1000)])
def test_sums_take_the_rows_in_turn(shape, dtype, own, monkeypatch):
    """Also in tridrop's own threads, where the sums of the parts are added after all parts."""
    if own:
        monkeypatch.setattr(threads, "_parallel", 0)
    x, r, grad = tensors(torch.float32, *shape)
    b, gain = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, b, gain)]
    out = tridrop.dropout_add(x, r, 0.3, bias=b, layer_scale=gain, seed=1)
    dx, db, dgain = torch.autograd.grad(out, leaves, grad)
    keep, scale = tridrop.keep_mask(1, shape, 0.3), torch.tensor(mask.scale(mask.threshold(0.3)))
    assert torch.equal(dx == 0, ~keep)
    for found, rows in ((db, dx), (dgain, keep * (x.detach() * grad) * scale)):
        sums = torch.zeros(shape[1], dtype=torch.float64)
        for part_of_rows in rows.split(threads.parts_of(*shape).step):
            part = torch.zeros(shape[1])
            for row in part_of_rows:
                part += row
            sums += part
        assert found.dtype == dtype
        assert torch.equal(found, sums.to(dtype))
