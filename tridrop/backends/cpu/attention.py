"""Attention on a CPU: torch's own kernel where nothing is dropped, else the loops of the softmax.

The reference computes all the rest: the blocks, and the calls that neither serves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ...spec.attention import AttentionInputs, AttentionOptions
from ...spec.operands import AttentionBackward, inputs_of
from ..reference import attention as reference
from ..reference.attention import Gradients, ScoreGradients, Steps, as_tensors, without_autocast
from . import by_head, flash, products, softmax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _by_loops(inputs: AttentionInputs, *others: Tensor) -> bool:
    """Whether compiled loops compute the probabilities of such a block, and their gradient."""
    given = (inputs.query, inputs.key, inputs.value, inputs.mask, inputs.key_mask, *others)
    return inputs.sinks is None and softmax.serves(inputs.seed, inputs.p, *given)


def _scores(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """The reference's ``scores``, for loops, which apply the band."""
    return reference.scores(inputs, softmax.without_band(options), products.multiply)


def _kept(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The reference's ``kept_probabilities``, by loops where they serve."""
    if not _by_loops(inputs):
        return reference.kept_probabilities(inputs, options, softmax.attention_multiplier)
    kept = _scores(inputs, options)[0].contiguous()
    lse = kept.new_empty(*kept.shape[:-1], dtype=torch.float32)
    softmax.forward(kept, inputs.seed, options, 1.0, kept, lse=lse)
    return kept, lse


def _of_scores(
    dkept: Tensor,
    delta: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
) -> ScoreGradients:
    """The reference's ``score_gradients``, by loops where they serve."""
    if delta is not None or not _by_loops(inputs, dkept):
        drawn = softmax.attention_multiplier
        return reference.score_gradients(dkept, delta, dlse, lse, inputs, options, drawn)
    kept, capped = _scores(inputs, options)
    kept, dkept = kept.contiguous(), dkept.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    softmax.backward(kept, inputs.seed, options, 1.0, dkept, dkept, dlse=dlse, kept=kept)
    return ScoreGradients(kept, dkept, capped, None)


_STEPS = Steps(_kept, _of_scores, products.multiply, products.write, True)


def _undifferentiated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function without autocast and autograd: products are written to memory that is given."""
    plain = without_autocast(function)

    @wraps(plain)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        with torch.no_grad():  # an operator that is called by its name, without autograd's function
            return plain(*args, **kwargs)

    return call


@_undifferentiated
def attention_forward(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse), as in the reference."""
    for forward in (flash.forward, by_head.forward):
        found = forward(inputs, options)
        if found is not None:
            return found
    return reference.attention_forward(inputs, options, _STEPS)


@_undifferentiated
def attention_backward(
    operands: AttentionBackward, options: AttentionOptions, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients, as in the reference."""
    found = flash.backward(operands, options, needs) or by_head.backward(operands, options, needs)
    if found is None:
        several = ("dout", "query", "key")  # what several products read
        given = operands._replace(**{n: products.merged(getattr(operands, n)) for n in several})
        found = reference.wide_gradients(given, options, needs, _STEPS)
    return as_tensors(found, inputs_of(operands))
