"""The opaque operators that torch sees: torch.ops.tridrop.*

Schemas, shape functions and the way to a backend; no math. They are opaque so that torch.compile,
export and the autograd engine treat a call as one node, with the same random bits everywhere. The
derivative lives above, in autograd.py.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends
from .mask import Shard
from .spec import FLOATS, NormOptions, Options, check_probability, output_shape

_library = torch.library.Library("tridrop", "DEF")

# What every op of the family is told besides its tensors; pack() below makes the values. An empty
# global_shape means the tensor is whole.
_OPTIONS = (
    "str activation, float p, float drop_path, int[] shared, "
    "SymInt[] global_shape, SymInt[] origin, str backend"
)
_library.define(
    "new_seed(Tensor place) -> Tensor",
    # torch.compile must neither drop, merge nor recompute a draw.
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define(
    "forward(Tensor x, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? seed, "
    f"Tensor? p_tensor, {_OPTIONS}) -> Tensor"
)
# Absent gradients come back as empty tensors: an op cannot return None.
_library.define(
    "backward(Tensor grad, Tensor? x, Tensor? bias, Tensor? layer_scale, Tensor? seed, "
    f"Tensor? p_tensor, {_OPTIONS}, ScalarType? x_dtype, ScalarType? bias_dtype, "
    "ScalarType? layer_scale_dtype) -> (Tensor, Tensor, Tensor)"
)
_NORM = (
    f"{_OPTIONS}, str norm, float eps, bool zero_centered, bool after, bool keep_stream, "
    "ScalarType stream_dtype, ScalarType out_dtype"
)
_library.define(
    "norm_forward(Tensor x, Tensor? bias, Tensor? layer_scale, Tensor? residual, Tensor? weight, "
    f"Tensor? norm_bias, Tensor? seed, Tensor? p_tensor, {_NORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "norm_backward(Tensor dout, Tensor? dstream, Tensor stream, Tensor mean, Tensor rstd, "
    "Tensor? x, Tensor? bias, Tensor? layer_scale, Tensor? weight, Tensor? seed, "
    f"Tensor? p_tensor, {_NORM}, ScalarType? x_dtype, ScalarType? bias_dtype, "
    "ScalarType? layer_scale_dtype, ScalarType? residual_dtype, ScalarType? weight_dtype, "
    "ScalarType? norm_bias_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "keep_mask(Tensor seed, SymInt[] shape, Tensor? p_tensor, float p, str domain, int[] shared, "
    "SymInt[] global_shape, SymInt[] origin, str backend) -> Tensor"
)

Packed = tuple[str, float, float, list[int], list[int], list[int], str]


def pack(options: Options, backend: str) -> Packed:
    """The options as the arguments that an operator takes."""
    shard = options.shard
    return (
        options.activation,
        float(options.p),
        float(options.drop_path),
        list(options.shared),
        [] if shard is None else list(shard.global_shape),
        [] if shard is None else list(shard.origin),
        backend,
    )


def unpack(
    activation: str,
    p: float,
    drop_path: float,
    shared: Sequence[int],
    global_shape: Sequence[int],
    origin: Sequence[int],
) -> Options:
    """The inverse of :func:`pack`."""
    shard = Shard(tuple(global_shape), tuple(origin)) if len(global_shape) else None
    return Options(activation, p, drop_path, tuple(shared), shard)


def pack_norm(options: NormOptions, backend: str) -> tuple[Any, ...]:
    """The options of the norm family as the arguments that its operators take."""
    own = [getattr(options, field.name) for field in _NORM_FIELDS]
    return (*pack(options, backend), *own)


def unpack_norm(*packed: Any) -> NormOptions:
    """The inverse of :func:`pack_norm`."""
    own = packed[-len(_NORM_FIELDS) :]
    shared = vars(unpack(*packed[: -len(_NORM_FIELDS) - 1]))
    return NormOptions(**shared, **dict(zip((f.name for f in _NORM_FIELDS), own, strict=True)))


_NORM_FIELDS = dataclasses.fields(NormOptions)[len(dataclasses.fields(Options)) :]
_O = TypeVar("_O", bound=Options)


def _rate(p_tensor: Tensor | None, options: _O) -> tuple[Tensor | None, _O]:
    """A tensor p that the host can read becomes a float, checked as any other."""
    if p_tensor is None or p_tensor.device.type != "cpu":
        return p_tensor, options
    p = float(p_tensor)
    check_probability(p)
    return None, dataclasses.replace(options, p=p)


# ------------------------------------------------------------------------------------- new_seed


def _new_seed(place: Tensor) -> Tensor:
    return torch.randint_like(place, (1 << 63) - 1)


_warned_of_recomputation = False


def _new_seed_fake(place: Tensor) -> Tensor:
    global _warned_of_recomputation
    from torch._functorch import config

    if not _warned_of_recomputation and (
        config.activation_memory_budget < 1 or config.aggressive_recomputation
    ):
        _warned_of_recomputation = True
        warnings.warn(
            "tridrop draws a seed inside a graph compiled with activation_memory_budget < 1 or "
            "aggressive_recomputation: torch may draw it again in backward, with another mask. "
            "Pass explicit seeds, for instance with tridrop.rng(tridrop.new_seed(device)).",
            stacklevel=2,
        )
    return torch.empty_like(place)


# -------------------------------------------------------------------------------------- forward


def _forward(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> Tensor:
    *values, backend = packed
    p_tensor, options = _rate(p_tensor, unpack(*values))  # type: ignore[arg-type]
    module = backends.serving(str(backend), x, bias, layer_scale, residual)
    return module.forward(x, bias, layer_scale, residual, seed, p_tensor, options)


def _forward_fake(
    x: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    activation: str,
    *_: object,
) -> Tensor:
    dtype = x.dtype if residual is None else residual.dtype
    return torch.empty(output_shape(x, activation), dtype=dtype, device=x.device)


# ------------------------------------------------------------------------------------- backward


def _backward(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> tuple[Tensor, Tensor, Tensor]:
    *values, backend, x_dtype, bias_dtype, layer_scale_dtype = packed
    p_tensor, options = _rate(p_tensor, unpack(*values))  # type: ignore[arg-type]
    module = backends.serving(str(backend), grad, x, bias, layer_scale)
    dtypes = (x_dtype, bias_dtype, layer_scale_dtype)
    results = module.backward(grad, x, bias, layer_scale, seed, p_tensor, options, dtypes)  # type: ignore[arg-type]
    a, b, c = (grad.new_empty(0) if t is None else t for t in results)
    return a, b, c


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    p_tensor: Tensor | None,
    *packed: object,
) -> tuple[Tensor, Tensor, Tensor]:
    *values, _backend, x_dtype, bias_dtype, layer_scale_dtype = packed
    cols = grad.shape[-1] if grad.dim() else 1
    width = 2 * cols if unpack(*values).gated else cols  # type: ignore[arg-type]
    shapes = ((*grad.shape[:-1], width) if grad.dim() else (), (width,), (cols,))
    dtypes = (x_dtype, bias_dtype, layer_scale_dtype)
    a, b, c = (
        grad.new_empty(0) if dtype is None else torch.empty(shape, dtype=dtype, device=grad.device)  # type: ignore[call-overload]
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return a, b, c


# ----------------------------------------------------------------------------------------- norm


def _norm_forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, p_tensor, packed = arguments[:7], arguments[7], arguments[8:]
    p_tensor, options = _rate(p_tensor, unpack_norm(*packed))
    module = backends.serving(packed[_BACKEND], *tensors[:6])
    results = module.norm_forward(*tensors, p_tensor, options)  # type: ignore[call-arg]
    return tuple(tensors[0].new_empty(0) if t is None else t for t in results)


def _norm_forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options = unpack_norm(*arguments[7:])
    rows = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)  # numel() would be static
    has_stream = options.keep_stream and not options.after
    stream = x.new_empty(x.shape if has_stream else 0, dtype=options.stream_dtype)
    out = x.new_empty(x.shape, dtype=options.out_dtype)
    return out, stream if has_stream else x.new_empty(0), rows, torch.empty_like(rows)


def _norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, p_tensor, packed = arguments[:10], arguments[10], arguments[11:-6]
    p_tensor, options = _rate(p_tensor, unpack_norm(*packed))
    module = backends.serving(packed[_BACKEND], tensors[0], *tensors[5:9])
    results = module.norm_backward(*tensors, p_tensor, options, arguments[-6:])  # type: ignore[call-arg]
    return tuple(tensors[0].new_empty(0) if t is None else t for t in results)


def _norm_backward_fake(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dtypes, options = arguments[-6:], unpack_norm(*arguments[10:-6])
    vector = dout.shape[-1:]
    shapes = (dout.shape, vector, vector, dout.shape, vector, vector)
    wanted = [*dtypes[:3], None if options.after else dtypes[3], *dtypes[4:]]
    return tuple(
        dout.new_empty(0) if dtype is None else dout.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, wanted, strict=True)
    )


_BACKEND = len(dataclasses.fields(Options)) + 1  # of packed options; a shard is two arguments

# ------------------------------------------------------------------------------------ keep_mask


def _keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    p_tensor: Tensor | None,
    p: float,
    domain: str,
    shared: Sequence[int],
    global_shape: Sequence[int],
    origin: Sequence[int],
    backend: str,
) -> Tensor:
    p_tensor, options = _rate(p_tensor, unpack("none", p, 0.0, shared, global_shape, origin))
    module = backends.load(backend)
    reason = module.why_not(seed.device, [FLOATS[0]])
    if reason is not None:
        raise RuntimeError(reason)
    return module.keep_mask(seed, tuple(shape), p_tensor, options, domain)


def _keep_mask_fake(seed: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.bool, device=seed.device)


for _name, _function, _fake in (
    ("new_seed", _new_seed, _new_seed_fake),
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("norm_forward", _norm_forward, _norm_forward_fake),
    ("norm_backward", _norm_backward, _norm_backward_fake),
    ("keep_mask", _keep_mask, _keep_mask_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tridrop::{_name}", _fake, lib=_library)
