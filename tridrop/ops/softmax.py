"""The operators and the autograd functions of the softmax of scores."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.reference import softmax as reference
from ..distributed import layouts
from ..spec.attention import SoftmaxOptions
from ..spec.operands import Softmax, SoftmaxBackward
from .attention import OPTIONS, pack_attention, score_options
from .common import (
    Function,
    apply_in_backward,
    by_sample,
    differentiate,
    prepared_backward,
    resume,
    save,
    unchanged,
    wanted,
)
from .library import Known, composes, define, filled, prepared


class PackedSoftmax(NamedTuple):
    """The options in the form that operators take."""

    p: float
    scale: float
    lower: int | None
    upper: int | None
    softcap: float
    origin: list[int]
    max_query: int
    max_key: int
    backend: str
    return_softmax: bool


def pack_softmax(options: SoftmaxOptions, backend: str) -> PackedSoftmax:
    """The options and the name of a backend, packed."""
    return PackedSoftmax(*pack_attention(options, backend), options.return_softmax)


def unpack_softmax(packed: PackedSoftmax) -> SoftmaxOptions:
    """The inverse of :func:`pack_softmax`."""
    return SoftmaxOptions(**score_options(packed), return_softmax=packed.return_softmax)


_OPERANDS, _INCOMING = len(Softmax._fields), len(SoftmaxBackward._fields)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    operands, packed = Softmax(*arguments[:_OPERANDS]), PackedSoftmax(*arguments[_OPERANDS:])
    scores, options = operands.scores, unpack_softmax(packed)
    op, operands = prepared("softmax", scores.shape, options, packed.backend, operands)
    return filled(op.forward(operands), scores)


def _forward_fake(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    packed = PackedSoftmax(*arguments[_OPERANDS - 1 :])
    out = scores.new_empty(scores.shape)
    softmax = scores.new_empty(scores.shape if packed.return_softmax else 0)
    return out, softmax, scores.new_empty(scores.shape[:-1], dtype=torch.float32)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    operands = SoftmaxBackward(*arguments[:_INCOMING])
    *values, scores_dtype, mask_dtype = arguments[_INCOMING:]
    packed, dtypes = PackedSoftmax(*values), (scores_dtype, mask_dtype)
    scores, options = operands.scores, unpack_softmax(packed)
    op, operands = prepared("softmax", scores.shape, options, packed.backend, operands, dtypes)
    return filled(op.backward(operands, dtypes), scores)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    operands = SoftmaxBackward(*arguments[:_INCOMING])
    *_, scores_dtype, mask_dtype = arguments
    scores, mask = operands.scores, operands.mask
    results = (
        None if t is None or dtype is None else scores.new_empty(t.shape, dtype=dtype)
        for t, dtype in ((scores, scores_dtype), (mask, mask_dtype))
    )
    return filled(list(results), scores)


# Without return_softmax the second result is empty, as are absent gradients.
softmax_forward = define(
    "softmax_forward(Tensor scores, Tensor? mask, Tensor? seed, Tensor? p_tensor, "
    f"{OPTIONS}, bool return_softmax) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
softmax_backward = define(
    "softmax_backward(Tensor? dout, Tensor? dsoftmax, Tensor scores, Tensor? mask, Tensor lse, "
    f"Tensor? seed, Tensor? p_tensor, {OPTIONS}, bool return_softmax, ScalarType? scores_dtype, "
    "ScalarType? mask_dtype) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


@by_sample
class SoftmaxDropout(Function):
    """(out, softmax, log-sum-exp of each row); see ``backends/reference/softmax.py``."""

    sharding = staticmethod(layouts.softmax)

    @staticmethod
    def composed(*arguments: Any) -> tuple[Tensor, Tensor, None] | None:
        *tensors, packed = arguments
        operands = Softmax(*tensors)
        if not composes(operands.seed):
            return None
        return *reference.composed(operands, unpack_softmax(packed)), None

    @staticmethod
    def forward(
        scores: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        p: Tensor | None,
        packed: PackedSoftmax | Known,
    ) -> tuple[Tensor, ...]:
        operands = Softmax(scores, mask, seed, p)
        results: tuple[Tensor, ...]
        if isinstance(packed, Known):
            results = packed.prepared.forward(operands)
        else:
            results = softmax_forward(*operands, *packed)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, packed = inputs
        scores, mask, seed, p = tensors
        out, softmax, lse = output
        if not resume(ctx, packed):
            ctx.dtypes = tuple(
                t.dtype if t is not None and needed else None
                for t, needed in zip((scores, mask), ctx.needs_input_grad[:2], strict=True)
            )
            # Where the result is the softmax of the scores, at most with an attention mask, and
            # only the scores have a gradient, backward is torch's own, which needs the result
            # alone.
            ctx.plain = (
                seed is None and p is None and ctx.dtypes[1] is None
                and not ctx.packed.return_softmax
                and ctx.packed.backend != "triton" and ctx.packed.scale == 1
            )  # fmt: skip
        unused = () if ctx.packed.return_softmax or softmax is None else (softmax,)
        ctx.mark_non_differentiable(lse, *unused)
        ctx.set_materialize_grads(False)
        if ctx.plain:
            save(ctx, packed, ("out",), out)
        else:
            save(ctx, packed, SoftmaxBackward, scores, mask, lse, seed, p)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dsoftmax: Tensor | None, *_: Any) -> Any:
        if not ctx.packed.return_softmax:
            dsoftmax = None  # compiled code makes a gradient for the empty result
        if dout is None and dsoftmax is None:
            return (None,) * 5
        if ctx.plain and dout is not None:
            return reference.of_scores(dout, *unchanged(ctx, ctx.saved_tensors)), *(None,) * 4
        saved = ctx.saved_tensors
        found = prepared_backward(ctx, SoftmaxBackward, (dout, dsoftmax), saved, ctx.dtypes)
        if found is None:
            given = (dout, dsoftmax, *unchanged(ctx, saved), ctx.packed, ctx.dtypes)
            found = apply_in_backward(SoftmaxDropoutBackward, *given)
        return *found, None, None, None


@by_sample
class SoftmaxDropoutBackward(Function):
    """The gradients of :class:`SoftmaxDropout`; lse counts as a function of scores and mask."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, packed, dtypes = inputs
        return wanted(softmax_backward(*tensors, *packed, *dtypes), dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.packed, ctx.dtypes = inputs
        save(ctx, ctx.packed, SoftmaxBackward, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        dout, dsoftmax, scores, mask, _, seed, p = unchanged(ctx, ctx.saved_tensors)
        options = unpack_softmax(ctx.packed)
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
