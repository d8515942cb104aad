"""The elementwise family in torch.

    u   = x + bias
    v   = f(u)                          gated: f(first half of u) * second half
    out = residual + layer_scale * v * multiplier

``layer_scale`` is a vector or a gate: one vector per sample, [B, C], which is the same along the
dimensions between the two. ``multiplier`` is keep * scale of the elements times keep * scale of
drop_path. It is the whole random part of a call, and a constant for the derivative. :func:`compose`
and :func:`gradients` are differentiable functions of their other arguments, and every backend's
double backward uses them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import mask, noise
from ...spec.elementwise import Options, check_functions, output_shape
from ...spec.operands import Elementwise, ElementwiseBackward

Dtypes = tuple[torch.dtype | None, ...]

SQRT_HALF = 0.5**0.5
INV_SQRT_2PI = 0.3989422804014327
SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715
QUICK_GELU = 1.702


def _gelu_grad(u: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(u * SQRT_HALF))
    return cdf + u * INV_SQRT_2PI * torch.exp(-0.5 * u * u)


def _gelu_tanh_grad(u: Tensor) -> Tensor:
    t = torch.tanh(SQRT_2_OVER_PI * (u + GELU_CUBIC * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * u * u)


def _silu_grad(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(QUICK_GELU * u)


def _quick_gelu_grad(u: Tensor) -> Tensor:
    s = torch.sigmoid(QUICK_GELU * u)
    return s * (1 + QUICK_GELU * u * (1 - s))


def _gelu(u: Tensor) -> Tensor:
    """gelu with gelu(inf) = inf, where torch's vectorised loop gives NaN and its scalar one inf."""
    return torch.where(u == math.inf, u, F.gelu(u))


class Function(NamedTuple):
    """A function of one argument, and torch's own form of it for calls that drop nothing."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # the derivative; torch can differentiate both
    torchs: Callable[[Tensor], Tensor]  # as a model without tridrop computes it
    steps: int = 1  # how many operators of torch that takes, each of which rounds its result
    curved: bool = True  # whether results are rounded, so that implementations differ in their bits
    # (grad, u) -> grad * f'(u) in one operator of torch
    backward: Callable[[Tensor, Tensor], Tensor] | None = None


def _identity(u: Tensor) -> Tensor:
    return u


_gelu_tanh = partial(F.gelu, approximate="tanh")
_aten = torch.ops.aten

FUNCTIONS = {
    "none": Function(_identity, torch.ones_like, _identity, steps=0, curved=False),
    "relu": Function(
        torch.relu, lambda u: (~(u <= 0)).to(u.dtype), torch.relu, curved=False
    ),
    "gelu": Function(_gelu, _gelu_grad, F.gelu, backward=_aten.gelu_backward.default),
    "gelu_tanh": Function(
        _gelu_tanh, _gelu_tanh_grad, _gelu_tanh,
        backward=partial(_aten.gelu_backward.default, approximate="tanh"),
    ),
    "silu": Function(F.silu, _silu_grad, F.silu, backward=_aten.silu_backward.default),
    "quick_gelu": Function(_quick_gelu, _quick_gelu_grad, _quick_gelu, steps=3),
}  # fmt: skip
check_functions(FUNCTIONS, "backends/reference/elementwise.FUNCTIONS")


class Multiplier(NamedTuple):
    """The random part of a call: which elements are kept (None: all) and their scale.

    For Gaussian noise, the scale is a tensor of noise. ``offset`` is the number that alpha dropout
    adds.
    """

    keep: Tensor | None
    scale: float | Tensor
    offset: float | Tensor = 0.0

    def __call__(self, value: Tensor) -> Tensor:
        """value * scale where kept, exactly 0 elsewhere, even where the value is not finite."""
        if self.keep is None:
            return value * self.scale if isinstance(self.scale, Tensor) else value
        return torch.where(self.keep, value, torch.zeros((), dtype=value.dtype)) * self.scale


def multiplier(
    shape: tuple[int, ...],
    seed: Tensor | None,
    p: Tensor | None,
    options: Options,
    draw: ModuleType = mask,
) -> Multiplier:
    """Draw both masks of a call: forward and backward, with the same seed, get the same masks.

    ``draw`` is the module that draws them: contract/mask.py, or a backend's twin of it.
    """
    keep: Tensor | None = None
    scale: float | Tensor = 1.0
    (elements, path), (element_scale, path_scale) = options.thresholds(), options.scales()
    threshold: int | Tensor = elements
    factor: float | Tensor = element_scale
    if p is not None:
        table = noise.rate_table(options.noise, p)
        threshold, factor = table[0].to(torch.int64), table[1]
    if options.noise == "gaussian":
        if p is not None or elements > 0:
            assert seed is not None
            scale = 1 + noise.normals(seed, shape, options.shared, options.shard) * factor
    elif p is not None or elements > 0:
        assert seed is not None
        keep = draw.keep_mask(seed, shape, threshold, shared=options.shared, shard=options.shard)
        scale = scale * factor
    if path > 0:
        assert seed is not None
        samples = draw.keep_mask(
            seed, shape, path, shared=range(1, len(shape)), shard=options.shard, domain="drop_path"
        )
        keep = samples if keep is None else keep & samples
        scale = scale * path_scale
    if options.noise == "alpha":
        return Multiplier(keep, scale, noise.ALPHA * scale * (1 - threshold / mask.ONE))
    return Multiplier(keep, scale)


def activate(u: Tensor, options: Options, exact: bool = True) -> Tensor:
    """v = f(u), or f(first half) * second half; without ``exact``, f is torch's own function."""
    function = FUNCTIONS[options.function]
    f = function.value if exact else function.torchs
    if not options.gated:
        return f(u)
    first, second = u.chunk(2, dim=-1)
    return f(first) * second


def is_torchs(function: Function, gated: bool, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call without dropout is computed by torch's own operators.

    It is where a single operation of torch does it, which rounds once as the loops do; and for
    curved functions in fp32, so that results have torch's bits. All operands must have one dtype.
    """
    dtype, steps = x.dtype, function.steps + gated
    for t in others:
        if t is not None:
            if t.dtype is not dtype:
                return False
            steps += 1
    return steps < 2 or (function.curved and dtype is torch.float32)


def compose(
    operands: Elementwise, drop: Multiplier, options: Options, exact: bool = True
) -> Tensor:
    """The formula at the top of this file, in the dtype of its operands."""
    x, bias, layer_scale, residual, *_ = operands
    value = activate(x if bias is None else x + bias, options, exact)
    if layer_scale is not None:
        value = value * _along(layer_scale, value)
    if options.noise == "alpha":
        return _alpha(value, drop)
    value = drop(value)
    return value if residual is None else residual + value


def _alpha(value: Tensor, drop: Multiplier) -> Tensor:
    """a * (value where kept, ALPHA elsewhere) + b, with b = -a * p * ALPHA."""
    return value if drop.keep is None else drop(value - noise.ALPHA) + drop.offset


def gradients(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop: Multiplier,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, bias and layer_scale, in the dtype of the arguments.

    ``x`` may be None if the activation is "none" and layer_scale needs no gradient.
    """
    scaled = grad if layer_scale is None else grad * _along(layer_scale, grad)
    parts: list[Tensor] = [scaled]
    dlayer_scale: Tensor | None = None
    if x is not None:
        u = x if bias is None else x + bias
        if needs[2]:
            assert layer_scale is not None
            dlayer_scale = _sum_to(layer_scale, drop(grad * activate(u, options)))
        function = FUNCTIONS[options.function]
        if options.gated:
            first, second = u.chunk(2, dim=-1)
            parts = [scaled * second * function.slope(first), scaled * function.value(first)]
        else:
            parts = [scaled * function.slope(u)]
    # The selection comes last, so that a dropped element's gradient is 0 whatever its input was.
    dropped = [drop(part) for part in parts]
    dx = dropped[0] if len(dropped) == 1 else torch.cat(dropped, -1)
    return dx if needs[0] else None, sum_rows(dx) if needs[1] else None, dlayer_scale


def _along(gain: Tensor, t: Tensor) -> Tensor:
    """``gain``, a vector or one vector per sample, reshaped so that it broadcasts to t."""
    if gain.dim() < 2:
        return gain
    return gain.reshape(gain.shape[0], *(1 for _ in t.shape[1:-1]), gain.shape[1])


def _sum_to(gain: Tensor, t: Tensor) -> Tensor:
    """Sum ``t``, the gradient of each element's gain, to the shape of ``gain``."""
    if gain.dim() < 2:
        return sum_rows(t)
    return t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1]).sum(1)


def sum_rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1] if t.dim() else 1).sum(0)


def compute(
    *tensors: Tensor | None, dtypes: Sequence[torch.dtype | None] = ()
) -> list[Tensor | None]:
    """The tensors in fp32, or all in fp64 if one of them or of ``dtypes`` is."""
    wide = torch.float64 in dtypes
    wide = wide or any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if wide else torch.float32
    return [None if t is None else to(t, dtype) for t in tensors]


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, but without an operator in a traced graph where nothing changes."""
    return t if t.dtype == dtype else t.to(dtype)


def forward(operands: Elementwise, options: Options, draw: ModuleType = mask) -> Tensor:
    """The op, with a contiguous result."""
    return unaliased(composed(operands, options, draw), operands.x)


def composed(operands: Elementwise, options: Options, draw: ModuleType = mask) -> Tensor:
    """The op in torch's own operators; its result may be a view of x."""
    x, bias, layer_scale, residual, seed, p = operands
    dtype = x.dtype if residual is None else residual.dtype
    drop = multiplier(output_shape(x, options.activation), seed, p, options, draw)
    function = FUNCTIONS[options.function]
    bare = drop.keep is None and not isinstance(drop.scale, Tensor)
    bare = bare and function.torchs is not function.value
    if bare and is_torchs(function, options.gated, x, bias, layer_scale, residual):
        return compose(operands, drop, options, exact=False)  # with torch's own bits
    u, b, g, r = compute(x, bias, layer_scale, residual)
    assert u is not None
    return to(compose(Elementwise(u, b, g, r), drop, options), dtype)


def unaliased(result: Tensor, argument: Tensor) -> Tensor:
    """The result, contiguous and not in the argument's memory: torch forbids an op to return it."""
    if shares_memory(result, argument):
        return result.clone(memory_format=torch.contiguous_format)
    return result.contiguous()


def shares_memory(result: Tensor, argument: Tensor) -> bool:
    """Whether the two tensors have one storage."""
    return result.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()


def backward(
    operands: ElementwiseBackward, options: Options, dtypes: Dtypes, draw: ModuleType = mask
) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias and layer_scale in these dtypes; None where the dtype is None."""
    *tensors, seed, p = operands
    grad = operands.grad
    drop = multiplier(tuple(grad.shape), seed, p, options, draw)
    g, u, b, s = compute(*tensors, dtypes=dtypes)
    assert g is not None
    needs = (dtypes[0] is not None, dtypes[1] is not None, dtypes[2] is not None)
    results = gradients(g, u, b, s, drop, options, needs)
    return tuple(
        None if t is None or dtype is None else unaliased(t.to(dtype), grad)
        for t, dtype in zip(results, dtypes, strict=True)
    )


def keep_mask(
    seed: Tensor,
    shape: tuple[int, ...],
    p: Tensor | None,
    options: Options,
    domain: str,
    draw: ModuleType = mask,
) -> Tensor:
    """The mask itself; see :meth:`tridrop.backends.protocol.Backend.keep_mask`."""
    threshold: int | Tensor = options.thresholds()[0]
    if p is not None:
        threshold = mask.rate_table(p)[0].to(torch.int64)
    keep = draw.keep_mask(
        seed, shape, threshold, shared=options.shared, shard=options.shard, domain=domain
    )
    return keep.clone(memory_format=torch.contiguous_format)  # it may be a slice of whole groups


def why_not(device: torch.device, dtypes: list[torch.dtype]) -> str | None:
    """None: the reference backend serves any device and any floating-point dtype."""
    return None
