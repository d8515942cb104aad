"""Attention with dropout, of which each thread computes whole heads: scores are never in memory.

A thread multiplies some queries of a head by its keys, passes over the rows of scores as
``loops/softmax.py`` says, and multiplies again, while these scores are in its cache. It serves
calls in fp32 arithmetic without softcap, sinks, packed sequences and gradients of masks, where
there are as many heads as threads; attention.py computes the others in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...spec.attention import AttentionInputs, AttentionOptions, empty_output
from ...spec.operands import AttentionBackward, inputs_of
from ..reference.attention import Gradients, wide_of
from ..reference.blocks import is_block
from . import products, softmax
from .memory import NONE, NUMBERS, SEED, Operand, Reads, Tensors, handles, in_fp32
from .threads import torchs_team

# Rows of scores of one thread at a time. Of 32 to 1024, 128 took the least time, or 2 % more, for
# 256 and 1024 keys, with and without causal order, and for 4096 (64 columns, two threads).
_ROWS = 128


def _team(
    inputs: AttentionInputs, options: AttentionOptions, *others: Tensor
) -> tuple[int, int, int] | None:
    """The threads; None where the kernels do not compute such calls, or others are quicker."""
    query, key, value, mask, key_mask = inputs[:5]
    if inputs.sinks is not None or inputs.cu_query is not None or options.softcap != 0:
        return None
    if not softmax.serves(inputs.seed, inputs.p, query, key, value, mask, key_mask, *others):
        return None
    if mask is not None and mask.dtype != torch.bool and key_mask is not None:
        return None
    fit = query.dim() == key.dim() == 4 and key.shape[:3] == value.shape[:3]
    if not fit or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return None
    # BLAS leaves a product out whose factor is 0, and has none that is infinite.
    if not 0 < abs(options.scale) <= torch.finfo(torch.float32).max:
        return None
    if query.shape[1] % key.shape[1]:
        return None
    team = torchs_team()
    return team if team is not None and key.shape[0] * key.shape[1] >= team[1] else None


@lru_cache(256)
def _reads(rows: int, backward: bool) -> Reads:
    """What the kernels read besides the tensors that they multiply: the seed, or that and dlse."""
    absent = [Operand(name, 0) for name in ("scores", "dout", "dsoftmax")]
    if not backward:
        return Reads.of(SEED, absent[0])
    return Reads.of(SEED, *absent, Operand("dlse", rows, NUMBERS))


def _narrow(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether products leave out keys that none of their queries sees, as in blocks.py.

    Where something is NaN or infinite, results show it.
    """
    banded = options.lower is not None or options.upper is not None
    return banded and not is_block(inputs, options)


def _mask_of(inputs: AttentionInputs) -> tuple[Tensor | None, bool]:
    """What is added to scores, in fp32, and whether it replaces those that it excludes."""
    mask, replaces = inputs.mask, True
    if inputs.key_mask is not None:
        keys = inputs.key_mask[:, None, None]
        mask = keys if mask is None else mask & keys
    if mask is None:
        return None, False
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    else:
        mask, replaces = mask.to(torch.float32), False
    # Adjacent along the keys, and expanded along the rest.
    shape = *inputs.query.shape[:3], inputs.key.shape[2]
    mask = mask.expand(*mask.shape[:3], shape[3])
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    return mask.expand(shape), replaces


def _run(
    name: str,
    team: tuple[int, int, int],
    options: AttentionOptions,
    reads: Tensors,
    results: Sequence[Any],
    tensors: Sequence[Tensor | None],
    *flags: bool,
) -> bool:
    """Call a kernel, whose first two ``tensors`` are query and key; False if it refuses."""
    query, key = tensors[:2]
    assert query is not None
    assert key is not None
    (batch, heads, queries, _), (shared, keys) = query.shape, key.shape[1:3]
    group, shape = heads // shared, (batch, heads, queries, keys)
    wanted = _reads(batch * heads * queries, len(reads) > 2).wanted
    given = softmax.arguments_of(shape, options, options.scale, *results)
    cut = min(queries, _ROWS), group, *map(int, flags)
    work, operands = (batch * shared, group * queries), (handles(reads), wanted)
    return products.call(name, team, work, operands, (*given, cut), tensors)


def forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor] | None:
    """(out, lse) as attention.py computes them, or None where attention.py must."""
    team = _team(inputs, options)
    if team is None:
        return None
    query, key, value = wide_of(inputs)[:3]
    out = empty_output(inputs.query, value.shape[3])
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    lse = query.new_empty(query.shape[:3])
    mask, replaces = _mask_of(inputs)
    reads, results = (inputs.seed, None), (NONE, NONE, lse.data_ptr())
    tensors = query, key, value, mask, wide
    flags = replaces, _narrow(inputs, options)
    if not _run("softmax_forward", team, options, reads, (results,), tensors, *flags):
        return None
    return (out if wide is out else out.copy_(wide)), lse


def backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> Gradients | None:
    """Gradients of query, key and value in fp32, or None where attention.py must compute them."""
    inputs, dlse = inputs_of(operands), operands.dlse
    team = None if options.block or needs[3] else _team(inputs, options, operands.dout)
    if team is None:
        return None
    dout = operands.dout.to(torch.float32)
    query, key, value = wide_of(inputs)[:3]
    if dout.shape != (*query.shape[:3], value.shape[3]):
        return None
    narrow = _narrow(inputs, options)
    make = torch.zeros_like if narrow else torch.empty_like  # for some keys nothing is written
    dquery = torch.empty_like(query) if needs[0] else None
    dkey, dvalue = (make(t) if need else None for t, need in ((key, needs[1]), (value, needs[2])))
    dlse = None if dlse is None else in_fp32(dlse, "dlse").contiguous()
    reads = inputs.seed, None, None, None, dlse
    mask, replaces = _mask_of(inputs)
    tensors = query, key, value, mask, dout, dquery, dkey, dvalue
    flags = replaces, narrow
    if not _run("softmax_backward", team, options, reads, (NONE, NONE), tensors, *flags):
        return None
    return dquery, dkey, dvalue, None, None
