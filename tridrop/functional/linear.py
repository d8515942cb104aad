"""Linear layers whose input is not kept for backward: it is made again from what is kept anyway.

The weight's gradient needs the layer's input. Where that is an activation, dropped or not, or the
result of a norm, what it was made of is kept as well, by the activation and the norm: with it the
input is computed once more in backward, for all layers that take it, and forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..base.arguments import given
from ..ops.remade import Remade, attach, remade, rule_of, rules
from ..spec import elementwise as spec
from ..spec.product import check_matrix, check_same_dtype
from .elementwise import ShardLike, activation_dropout, dropout, in_batch, seed_of
from .norm import rms_norm_dropout

_WHAT = "the input of a linear layer is made again in backward"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, which keeps the rule of an input that has one, and not the input.

    Under autocast too: the copy of x that autocast makes is not kept either.
    """
    return of_remade(partial(_linear, weight, bias), x, casts=True)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def of_remade(call: Callable[[Tensor], Any], x: Tensor, casts: bool = False) -> Any:
    """``call(x)``, in which whatever saves x keeps its rule instead, where it has one.

    ``casts`` says that autocast makes a copy of x in it and takes x for nothing else.
    """
    rule = rule_of(x)
    if rule is None:
        return call(x)
    dtype = spec.autocast_dtype(x.device) if casts else None
    if dtype is not None and dtype != x.dtype and x.dtype != torch.float64:
        x, rule = x.to(dtype), rule.cast(dtype)
    with remade([(x, rule)]):
        return call(x)


def activation_dropout_linear(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    activation: str | None,
    bias: Tensor | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer on a dropped activation, of which x and the seed alone are kept.

        hidden = activation_dropout(x, p, activation=activation, bias=bias)
        out = hidden @ weight^T + linear_bias

    The second half of a transformer's feed-forward part. The weight's gradient needs ``hidden``,
    as large as x (half as large for a gated activation); it is computed again in backward, one
    elementwise pass under the same mask, where :func:`activation_dropout` followed by a linear
    layer keeps it. Values and gradients are theirs to the bit. Where the weight is frozen nothing
    is kept for it, as in torch.

    Under torch.compile and torch.func it is that composition, and what is kept is their choice.

    Args:
        x: [..., K], or [..., 2 * K] for a gated activation.
        weight: [out, K], of x's dtype; any under autocast.
        linear_bias: [out], or None.
        p, training, activation, bias, noise_shape, shard, seed: as in :func:`activation_dropout`.

    Returns:
        [..., out].

    Raises:
        ValueError, TypeError: as :func:`activation_dropout`; a weight or bias that does not fit.
        RuntimeError: in backward, where x was changed in place since the forward.

    >>> import torch
    >>> x = torch.tensor([[-1.0, 1.0, 2.0, 3.0]])
    >>> activation_dropout_linear(x, torch.ones(1, 4), p=0.5, activation="relu", seed=1)
    tensor([[4.]])
    """
    hidden = remade_activation(
        x, p, training, activation=activation, bias=bias, noise_shape=noise_shape, shard=shard,
        seed=seed,
    )  # fmt: skip
    _check_linear(hidden, weight, linear_bias, "weight", "linear_bias", "its input")
    return linear(hidden, weight, linear_bias)


def norm_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    linear_biases: Tensor | Sequence[Tensor | None] | None = None,
    *,
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm",
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = 1e-5,
    zero_centered_weight: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Linear layers on one norm, whose result is not kept: x is, and one or two numbers a row.

        normed = layer_norm(x) * weight + norm_bias        or rms_norm(x) * weight
        out_i = normed @ weights_i^T + linear_biases_i

    Query, key and value of a pre-norm block, or gate and up. The gradients of ``weights`` need
    ``normed``; it is computed again in backward, once for all of them. Values and gradients are
    those of the norm followed by the layers.

    Under torch.compile and torch.func it is that composition, and what is kept is their choice.

    Args:
        x: [..., D].
        weights: one [out, D], or a sequence of them. ``linear_biases``: of each [out], or None.
        norm: "layer_norm", torch's, or "rms_norm" in one op (:func:`tridrop.rms_norm_dropout`).
        weight, norm_bias: of the norm, [D] or None; "rms_norm" takes no norm_bias.
        eps: added to the variance, or the mean square; None for the machine epsilon of x's dtype,
            as torch's RMSNorm has by default.
        zero_centered_weight: multiply by ``1 + weight``; "rms_norm" alone.

    Returns:
        [..., out]; of a sequence a tuple.

    Raises:
        ValueError, TypeError: operands that do not fit, or that the norm does not take.
        RuntimeError: in backward, where x or a vector of the norm was changed in place since.

    >>> import torch
    >>> x = torch.tensor([[1.0, 7.0]])
    >>> norm_linear(x, [torch.eye(2), torch.ones(1, 2)], norm="rms_norm")
    (tensor([[0.2000, 1.4000]]), tensor([[1.6000]]))
    """
    spec.check_input(x)
    if x.dim() == 0:
        raise ValueError("x has no dimension to normalise over: give it one or more")
    spec.check_vector(weight, "weight", x.shape[-1], x)
    spec.check_vector(norm_bias, "norm_bias", x.shape[-1], x)
    if norm not in ("layer_norm", "rms_norm"):
        raise ValueError(f"norm = {norm!r}; give 'layer_norm' or 'rms_norm'")
    if norm == "rms_norm" and norm_bias is not None:
        raise ValueError("an RMSNorm has no norm_bias: leave it out, or add it to linear_biases")
    if norm == "layer_norm" and zero_centered_weight is not False:
        raise ValueError("zero_centered_weight is for rms_norm: give weight = 1 + weight")
    for name, listed in (("weights", weights), ("linear_biases", linear_biases)):
        if not isinstance(listed, (Tensor, list, tuple, type(None))) or (
            name == "weights" and listed is None
        ):
            raise TypeError(f"{given(listed, name)}; give a tensor, or a list or tuple of them")
    one = isinstance(weights, Tensor)
    layers: list[Any] = [weights] if one else list(weights)
    biases: list[Any] = [None] * len(layers)
    if linear_biases is not None:
        biases = [linear_biases] if isinstance(linear_biases, Tensor) else list(linear_biases)
    if len(biases) != len(layers):
        raise ValueError(f"{len(layers)} weights and {len(biases)} linear_biases: give one each")
    eps = spec.check_eps(torch.finfo(x.dtype).eps if eps is None else eps)
    for i, (matrix, vector) in enumerate(zip(layers, biases, strict=True)):
        at = "" if one else f"[{i}]"
        _check_linear(x, matrix, vector, f"weights{at}", f"linear_biases{at}", "x")
    if norm == "rms_norm":
        normed = remade_rms_norm(x, weight, eps, zero_centered_weight)
    else:
        normed = remade_layer_norm(x, weight, norm_bias, eps)
    found = tuple(linear(normed, m, v) for m, v in zip(layers, biases, strict=True))
    return found[0] if one else found


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, name: str, bias_name: str, what: str
) -> None:
    """Raise unless a linear layer takes x."""
    if x.dim() == 0:
        raise ValueError("x is a scalar; a linear layer takes [..., in]")
    check_matrix(weight, name, None, x.shape[-1], x, f"{what} has {x.shape[-1]} features")
    spec.check_vector(bias, bias_name, weight.shape[0], x)
    if spec.autocast_dtype(x.device) is None:
        check_same_dtype(x, weight, (what, name))


# ------------------------------------------------------------------------- tensors with a rule


def remade_value(
    function: Callable[..., Tensor], *sources: Tensor, again: Callable[..., Tensor] | None = None
) -> Tensor:
    """``function(*sources)``, with the rule to compute that once more.

    Its backward must keep the sources, whatever happens; ``again`` is what is called in the place
    of the function, where that is another one.
    """
    out = function(*sources)
    names = [f"operand {i}" for i in range(len(sources))]
    return attach(out, lambda: Remade(again or function, sources, names, _WHAT))


def remade_product(first: Tensor, second: Tensor) -> Tensor:
    """``first * second`` with its rule: the first one, an activation, has a rule of its own.

    Neither the activation nor the product is kept, but what the activation was made of, and the
    second one. Both of these must have gradients: else nobody else keeps them.
    """
    rule = rule_of(first)
    if rule is None or not second.requires_grad or first.shape != second.shape:
        return of_remade(partial(torch.mul, second), first)
    with remade([(first, rule)]):
        out = first * second
    if out.dtype != first.dtype or out.dtype != second.dtype:
        return out
    activation = rule.again

    def make(other: Tensor, *sources: Tensor) -> Tensor:
        return activation.lent(*sources) * other

    names = ("the other factor", *rule.names)
    return attach(out, lambda: Remade(make, (second, *rule.sources), names, _WHAT, rule))


def remade_dropout(
    x: Tensor, p: float | Tensor, seed: int | Tensor | None, training: bool = True
) -> Tensor:
    """``dropout(x)`` with its rule, where x has one."""
    rule = rule_of(x)
    if rule is None or not spec.drops(p, training):
        return dropout(x, p, training, seed=seed)
    where, drawn = in_batch(x.shape), seed_of(x, seed)
    out = dropout(x, p, training, shard=where, seed=drawn)
    inner, tensor = rule.again.make, isinstance(p, Tensor)

    def make(drawn: Tensor, rate: Tensor | None, *sources: Tensor) -> Tensor:
        return dropout(inner(*sources), rate if tensor else p, True, shard=where, seed=drawn)  # type: ignore[arg-type]

    given = (drawn, p if isinstance(p, Tensor) else None, *rule.sources)
    names = ("the seed", "p", *rule.names)
    return attach(out, lambda: Remade(make, given, names, _WHAT, rule))


def remade_activation(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    *,
    activation: str | None,
    bias: Tensor | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """:func:`tridrop.activation_dropout` with its rule: made again under the same mask."""
    options: dict[str, Any] = {"activation": activation, "noise_shape": noise_shape}
    if not rules():
        return activation_dropout(x, p, training, bias=bias, shard=shard, seed=seed, **options)
    drawn, where = None, shard
    if isinstance(x, Tensor) and not x.is_nested and spec.drops(p, training):
        drawn = seed_of(x, seed)
        if shard is None:
            where = in_batch(spec.output_shape(x, spec.check_activation(activation)))
    given = drawn if drawn is not None else seed
    out = activation_dropout(x, p, training, bias=bias, shard=where, seed=given, **options)
    tensor = isinstance(p, Tensor)

    def make(x: Tensor, bias: Tensor | None, drawn: Tensor | None, rate: Tensor | None) -> Tensor:
        again: Any = rate if tensor else p
        return activation_dropout(x, again, training, bias=bias, shard=where, seed=drawn, **options)

    sources = (x, bias, drawn, p if isinstance(p, Tensor) else None)
    return attach(out, lambda: Remade(make, sources, ("x", "bias", "the seed", "p"), _WHAT))


def remade_layer_norm(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """torch.nn.functional.layer_norm over the last dimension, with its rule."""
    out = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)
    return attach(out, lambda: _layer_norm_again(x, weight, norm_bias, eps, out.dtype))


def _layer_norm_again(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Remade:
    def make(x: Tensor, weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        if x.dtype != dtype:  # autocast had the operands cast
            x = x.to(dtype)
            weight = None if weight is None else weight.to(dtype)
            norm_bias = None if norm_bias is None else norm_bias.to(dtype)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)

    return Remade(make, (x, *lasting(weight, norm_bias)), ("x", "weight", "norm_bias"), _WHAT)


def remade_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, zero_centered: bool = False
) -> Tensor:
    """RMSNorm in one op, which keeps x and a number a row, with its rule."""
    options: dict[str, Any] = {"eps": eps, "zero_centered_weight": zero_centered}

    def make(x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm_dropout(x, weight, 0.0, True, **options)

    out = make(x, weight)
    return attach(out, lambda: Remade(make, (x, *lasting(weight)), ("x", "weight"), _WHAT))


def remade_add_norm(
    function: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    p: float | Tensor,
    training: bool = True,
    *,
    eps: float | None,
    zero_centered_weight: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``function``, :func:`tridrop.dropout_add_layer_norm` or its RMSNorm: (out, stream).

    out has a rule: it is the norm of the stream, which backward keeps.
    """
    own: dict[str, Any] = {"eps": eps, "zero_centered_weight": zero_centered_weight}
    found = function(x, residual, weight, norm_bias, p, training, prenorm=True, **own, **options)
    out, stream = found
    dtype = out.dtype
    if torch.float64 in (dtype, stream.dtype) and dtype != stream.dtype:
        return out, stream  # computed more exactly than from the stream

    def make(stream: Tensor, weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        again = function(stream, None, weight, norm_bias, 0.0, False, out_dtype=dtype, **own)
        assert isinstance(again, Tensor)
        return again

    def rule() -> Remade:
        names = ("the stream", "weight", "norm_bias")
        return Remade(make, (stream, *lasting(weight, norm_bias)), names, _WHAT)

    return attach(out, rule), stream


def lasting(*vectors: Tensor | None) -> list[Tensor | None]:
    """A norm's vectors for the time until backward.

    Where processes share a model its wrapper may have freed them by then: a layer's backward comes
    after that of the layers which take its result. So they are copied there.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(vectors)
    return [None if t is None else t.detach().clone() for t in vectors]
