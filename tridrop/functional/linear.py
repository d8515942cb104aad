"""Linear layers whose input is not kept for backward, which makes it again from other tensors.

The weight's gradient needs the layer's input. Where that is an activation, dropped or not, or the
result of a norm, the activation or the norm keeps the tensors that it was made from. From these,
backward computes the input once more, for all layers that take it, and releases it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..base.arguments import given
from ..ops.remade import Recipe, attach, recipe_of, recipes_allowed, remade
from ..spec import elementwise as spec
from ..spec.product import check_matrix, check_same_dtype
from .elementwise import ShardLike, activation_dropout, dropout, in_batch, seed_of
from .norm import rms_norm_dropout

_WHAT = "the input of a linear layer is made again in backward"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, but if its input has a recipe, that is kept and not the input.

    Under autocast the copy of x that autocast makes is not kept either.
    """
    return of_remade(partial(_linear, weight, bias), x, casts=True)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def of_remade(call: Callable[[Tensor], Any], x: Tensor, casts: bool = False) -> Any:
    """``call(x)``, in which ops that save x keep its recipe instead, if it has one.

    ``casts`` says that under autocast the call uses x only to make a cast copy of it.
    """
    recipe = recipe_of(x)
    if recipe is None:
        return call(x)
    dtype = spec.autocast_dtype(x.device) if casts else None
    if dtype is not None and dtype != x.dtype and x.dtype != torch.float64:
        x, recipe = x.to(dtype), recipe.cast(dtype)
    with remade([(x, recipe)]):
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
    """A linear layer on a dropped activation, for which backward keeps only x and the seed.

        hidden = activation_dropout(x, p, activation=activation, bias=bias)
        out = hidden @ weight^T + linear_bias

    This is the second half of a transformer's feed-forward part. The weight's gradient needs
    ``hidden``, which is as large as x (half as large for a gated activation).
    :func:`activation_dropout` followed by a linear layer keeps it; here backward computes it again,
    in one elementwise pass under the same mask. Values and gradients are the same to the bit. If
    the weight is frozen nothing is kept for it, as in torch.

    Under torch.compile and torch.func it is that composition, and they decide what is kept.

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
    """Linear layers on one norm, for which backward keeps x and one or two numbers per row.

        normed = layer_norm(x) * weight + norm_bias        or rms_norm(x) * weight
        out_i = normed @ weights_i^T + linear_biases_i

    Examples are query, key and value of a pre-norm block, or the gate and up projections. The
    gradients of ``weights`` need ``normed``, which backward computes again, once for all layers.
    Values and gradients are those of the norm followed by the layers.

    Under torch.compile and torch.func it is that composition, and they decide what is kept.

    Args:
        x: [..., D].
        weights: one matrix [out, D], or a sequence of them.
        linear_biases: None, or for each matrix a vector [out] or None.
        norm: "layer_norm", torch's, or "rms_norm" in one op (:func:`tridrop.rms_norm_dropout`).
        weight, norm_bias: the norm's vectors, [D] or None; "rms_norm" takes no norm_bias.
        eps: added to the variance, or the mean square; None for the machine epsilon of x's dtype,
            as torch's RMSNorm has by default.
        zero_centered_weight: multiply by ``1 + weight``; for "rms_norm" only.

    Returns:
        [..., out], or, for a sequence of weights, a tuple of such tensors.

    Raises:
        ValueError, TypeError: operands that do not fit, or that the norm does not take.
        RuntimeError: in backward, if x or a vector of the norm was changed in place since forward.

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
    """Raise unless x, the weight and the bias fit a linear layer."""
    if x.dim() == 0:
        raise ValueError("x is a scalar; a linear layer takes [..., in]")
    check_matrix(weight, name, None, x.shape[-1], x, f"{what} has {x.shape[-1]} features")
    spec.check_vector(bias, bias_name, weight.shape[0], x)
    if spec.autocast_dtype(x.device) is None:
        check_same_dtype(x, weight, (what, name))


# ----------------------------------------------------------------------- tensors with a recipe


def remade_value(
    function: Callable[..., Tensor],
    *sources: Tensor,
    recompute: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``function(*sources)``, with a recipe to compute it once more.

    The function's own backward must keep the sources. ``recompute`` is called to make the value
    again, where that is another function.
    """
    out = function(*sources)
    names = [f"operand {i}" for i in range(len(sources))]
    return attach(out, lambda: Recipe(recompute or function, sources, names, _WHAT))


def remade_product(first: Tensor, second: Tensor) -> Tensor:
    """``first * second`` with a recipe, where ``first``, an activation, has a recipe of its own.

    Neither the activation nor the product is kept, but the activation's sources and ``second`` are.
    The sources and ``second`` must have gradients, or no other op would keep them.
    """
    recipe = recipe_of(first)
    if recipe is None or not second.requires_grad or first.shape != second.shape:
        return of_remade(partial(torch.mul, second), first)
    with remade([(first, recipe)]):
        out = first * second
    if out.dtype != first.dtype or out.dtype != second.dtype:
        return out
    activation = recipe.maker

    def make(other: Tensor, *sources: Tensor) -> Tensor:
        return activation.borrow(*sources) * other

    names = ("the other factor", *recipe.names)
    return attach(out, lambda: Recipe(make, (second, *recipe.sources), names, _WHAT, recipe))


def _drops(p: float | Tensor, training: bool) -> bool:
    """Whether a call drops anything, after a check of its ``p``."""
    spec.check_probability(p, tensor_allowed=True)
    return spec.drops(p, training)


def remade_dropout(
    x: Tensor, p: float | Tensor, seed: int | Tensor | None, training: bool = True
) -> Tensor:
    """``dropout(x)``, with a recipe if x has one."""
    recipe = recipe_of(x)
    if recipe is None or not _drops(p, training):
        return dropout(x, p, training, seed=seed)
    where, drawn = in_batch(x.shape), seed_of(x, seed)
    out = dropout(x, p, training, shard=where, seed=drawn)
    inner, tensor = recipe.maker.make, isinstance(p, Tensor)

    def make(drawn: Tensor, rate: Tensor | None, *sources: Tensor) -> Tensor:
        return dropout(inner(*sources), rate if tensor else p, True, shard=where, seed=drawn)  # type: ignore[arg-type]

    sources = (drawn, p if isinstance(p, Tensor) else None, *recipe.sources)
    names = ("the seed", "p", *recipe.names)
    return attach(out, lambda: Recipe(make, sources, names, _WHAT, recipe))


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
    """:func:`tridrop.activation_dropout`, with a recipe that makes it again under the same mask."""
    options: dict[str, Any] = {"activation": activation, "noise_shape": noise_shape}
    if not recipes_allowed():
        return activation_dropout(x, p, training, bias=bias, shard=shard, seed=seed, **options)
    drawn, where = None, shard
    if isinstance(x, Tensor) and not x.is_nested and _drops(p, training):
        drawn = seed_of(x, seed)
        if shard is None:
            where = in_batch(spec.output_shape(x, spec.check_activation(activation)))
    given = drawn if drawn is not None else seed
    out = activation_dropout(x, p, training, bias=bias, shard=where, seed=given, **options)
    tensor = isinstance(p, Tensor)

    def make(x: Tensor, bias: Tensor | None, drawn: Tensor | None, rate: Tensor | None) -> Tensor:
        value: Any = rate if tensor else p
        return activation_dropout(x, value, training, bias=bias, shard=where, seed=drawn, **options)

    sources = (x, bias, drawn, p if isinstance(p, Tensor) else None)
    return attach(out, lambda: Recipe(make, sources, ("x", "bias", "the seed", "p"), _WHAT))


def remade_layer_norm(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """torch.nn.functional.layer_norm over the last dimension, with a recipe."""
    out = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)
    return attach(out, lambda: _layer_norm_recipe(x, weight, norm_bias, eps, out.dtype))


def _layer_norm_recipe(
    x: Tensor, weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Recipe:
    def make(x: Tensor, weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        if x.dtype != dtype:  # autocast cast the operands in the forward
            x = x.to(dtype)
            weight = None if weight is None else weight.to(dtype)
            norm_bias = None if norm_bias is None else norm_bias.to(dtype)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)

    return Recipe(make, (x, *lasting(weight, norm_bias)), ("x", "weight", "norm_bias"), _WHAT)


def remade_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, zero_centered: bool = False
) -> Tensor:
    """RMSNorm in one op, which keeps x and one number per row, with a recipe."""
    options: dict[str, Any] = {"eps": eps, "zero_centered_weight": zero_centered}

    def make(x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm_dropout(x, weight, 0.0, True, **options)

    out = make(x, weight)
    return attach(out, lambda: Recipe(make, (x, *lasting(weight)), ("x", "weight"), _WHAT))


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
    """(out, stream) of :func:`tridrop.dropout_add_layer_norm` or its RMSNorm, ``function``.

    out has a recipe: it is the norm of the stream, which backward keeps.
    """
    norm: dict[str, Any] = {"eps": eps, "zero_centered_weight": zero_centered_weight}
    found = function(x, residual, weight, norm_bias, p, training, prenorm=True, **norm, **options)
    out, stream = found
    dtype = out.dtype
    if torch.float64 in (dtype, stream.dtype) and dtype != stream.dtype:
        return out, stream  # out is more exact than a norm of the stream would be

    def make(stream: Tensor, weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
        normed = function(stream, None, weight, norm_bias, 0.0, False, out_dtype=dtype, **norm)
        assert isinstance(normed, Tensor)
        return normed

    def make_recipe() -> Recipe:
        names = ("the stream", "weight", "norm_bias")
        return Recipe(make, (stream, *lasting(weight, norm_bias)), names, _WHAT)

    return attach(out, make_recipe), stream


def lasting(*vectors: Tensor | None) -> list[Tensor | None]:
    """A norm's vectors in a form that lasts until backward: copies where processes share a model.

    There the model's wrapper may have freed the vectors when the layers that take the norm's result
    run their backward.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(vectors)
    return [None if t is None else t.detach().clone() for t in vectors]
