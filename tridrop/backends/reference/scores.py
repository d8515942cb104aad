"""Softmax and dropout of scores on a CPU, each direction a compiled loop of :mod:`tridrop.fast`.

The formulas and the rounding are those of softmax.py and attention.py, which compute what numba
does not serve: fp64, a rate in a tensor, sinks, blocks of keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import fast
from ... import mask as contract
from ...fast_calls import matrix, vector
from ...spec_attention import AttentionOptions, four

_FAR = 1 << 62  # beyond all indices


def serves(seed: Tensor | None, p: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the loops take such scores and masks."""
    for t in tensors:
        if t is not None and (t.dtype == torch.float64 or t.device.type != "cpu" or not t.numel()):
            return False
    return p is None and fast.readable(seed) and fast.serves()


def without_band(options: AttentionOptions) -> AttentionOptions:
    """For scores that the loops are given: they see to the band themselves."""
    return replace(options, lower=None, upper=None)


def _call(
    name: str,
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    held: Any,
    *arguments: Any,
) -> None:
    """Call a kernel for all rows of the scores ``x``, by several threads.

    ``held`` is what the arguments point to.
    """
    batch, heads, queries, keys = four(x.shape)
    rows = batch * heads * queries
    threshold = options.threshold()
    pair, address = fast.pair_of(seed)
    decisions = (address, contract.DOMAINS["attention"] << 28, threshold - 1, *options.origin)
    band = (
        -_FAR if options.lower is None else options.lower,
        _FAR if options.upper is None else options.upper,
    )
    kernel = getattr(fast.kernels(), name)
    given = (keys, (heads, queries), decisions, options.keep_scale(), band, *arguments)

    def call(_: int, start: int, stop: int) -> None:
        kernel(start, stop, *given)

    fast.share(fast.parts_of(rows, keys), rows * keys, call, (held, pair))


def forward(
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    scale: float,
    out: Tensor,
    probabilities: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Fill ``out``, the softmax of scale * x within the band after dropout, and what else is given.

    All are contiguous, ``lse`` of fp32; ``out`` may be ``x``.
    """
    rows, count = x.numel() // x.shape[-1], x.numel()
    (_x, u), (_out, o) = matrix(x, count, "scores"), matrix(out, count, "out")
    (_both, b), (_lse, m) = matrix(probabilities, count, "softmax"), vector(lse, rows, "lse")
    _call(
        "softmax_forward", x, seed, options, (_x, _out, _both, _lse),
        float(scale), u, o, b, m,
    )  # fmt: skip


def backward(
    x: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
    scale: float,
    dout: Tensor | None,
    dx: Tensor,
    dsoftmax: Tensor | None = None,
    dlse: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Fill ``dx``, the gradient of x, and ``kept``, the result of :func:`forward`, where given.

    What is filled is contiguous, ``dlse`` of fp32; ``kept`` may be ``x``, ``dx`` may be ``dout``.
    """
    rows, count = x.numel() // x.shape[-1], x.numel()
    (_x, u), (_dx, o) = matrix(x, count, "scores"), matrix(dx, count, "dx")
    (_dout, d), (_both, s) = matrix(dout, count, "dout"), matrix(dsoftmax, count, "dsoftmax")
    (_dlse, m), (_kept, k) = vector(dlse, rows, "dlse"), matrix(kept, count, "kept")
    _call(
        "softmax_backward", x, seed, options, (_x, _dx, _dout, _both, _dlse, _kept),
        float(scale), (u, d, s, m), k, o,
    )  # fmt: skip
