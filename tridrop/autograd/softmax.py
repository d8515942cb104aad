"""The autograd functions of the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.reference import softmax as reference
from ..distributed import layouts
from ..ops.library import Known, composes
from ..ops.softmax import softmax_backward, softmax_forward
from .common import (
    Function,
    apply_in_backward,
    differentiate,
    each_sample,
    packed_and_prepared,
    prepared_backward,
    save,
    unchanged,
    wanted,
)

_SAVED = ("scores", "mask", "lse", "seed", "p")


def _is_plain(
    seed: Tensor | None, p: Tensor | None, packed: ops.PackedAttention, dtypes: Sequence[Any]
) -> bool:
    """Whether the result is the softmax of the scores, masked at most, and only they have a
    gradient: then backward is torch's, and keeps what torch's would."""
    if seed is not None or p is not None or dtypes[1] is not None or packed[-1] == "triton":
        return False
    return ops.unpack_attention(*packed).scale == 1


class SoftmaxDropout(Function):
    """(out, softmax, log-sum-exp of each row); see ``backends/reference/softmax.py``."""

    sharding = staticmethod(layouts.softmax)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor, None] | None:
        *tensors, packed = arguments
        if not composes(tensors[2]):
            return None
        return *reference.composed(*tensors, ops.unpack_attention(*packed[:-1])), None  # type: ignore[call-arg]

    @staticmethod
    def forward(
        scores: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: ops.PackedAttention | Known,
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...]
        if isinstance(packed, Known):
            results = packed.prepared.forward(scores, mask, seed, packed.packed[-1])
        else:
            results = softmax_forward(scores, mask, seed, p, *packed)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scores, mask, seed, p, packed = inputs
        (*packed, ctx.return_softmax), ctx.prepared = packed_and_prepared(packed)
        ctx.packed = tuple(packed)
        out, softmax, lse = output
        ctx.dtypes = tuple(
            t.dtype if t is not None and needed else None
            for t, needed in zip((scores, mask), ctx.needs_input_grad[:2], strict=True)
        )
        unused = () if ctx.return_softmax or softmax is None else (softmax,)
        ctx.mark_non_differentiable(lse, *unused)
        ctx.set_materialize_grads(False)
        ctx.plain = _is_plain(seed, p, ctx.packed, ctx.dtypes) and not ctx.return_softmax
        if ctx.plain:
            save(ctx, ctx.packed, ("out",), out)
        else:
            save(ctx, inputs[-1], _SAVED, scores, mask, lse, seed, p)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dsoftmax: Tensor | None, *_: Any) -> Any:
        if not ctx.return_softmax:
            dsoftmax = None  # compiled code makes a gradient for the empty result
        if dout is None and dsoftmax is None:
            return (None,) * 5
        if ctx.plain and dout is not None:
            return reference.of_scores(dout, *unchanged(ctx, ctx.saved_tensors)), *(None,) * 4
        saved = ctx.saved_tensors
        found = prepared_backward(ctx, (dout, dsoftmax), saved, ctx.dtypes)
        if found is None:
            given = (dout, dsoftmax, *unchanged(ctx, saved), ctx.packed, ctx.dtypes)
            found = apply_in_backward(SoftmaxBackward, *given)
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(SoftmaxDropout.apply, info, in_dims, args)


class SoftmaxBackward(Function):
    """The gradients of :class:`SoftmaxDropout`. lse is a function of the scores and the mask."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, dtypes = inputs
        return wanted(softmax_backward(*tensors, *packed, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        save(ctx, ctx.packed, ("dout", "dsoftmax", *_SAVED), *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dsoftmax, scores, mask, _, seed, p = unchanged(ctx, ctx.saved_tensors)
        options = ops.unpack_attention(*ctx.packed)
        drop = reference.attention_multiplier(scores.shape, seed, p, options)
        gradients = reference.softmax_gradients
        given = {"dout": dout, "dsoftmax": dsoftmax, "scores": scores}
        if mask is None or mask.dtype == torch.bool:
            found = differentiate(
                partial(gradients, mask=mask), given, cotangents, drop, options, ctx.dtypes
            )
            found.append(None)
        else:
            given["mask"] = mask
            found = differentiate(gradients, given, cotangents, drop, options, ctx.dtypes)
        return *found, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        return each_sample(SoftmaxBackward.apply, info, in_dims, args)
