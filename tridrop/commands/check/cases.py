"""The table of cases of the elementwise and norm families.

Tests, ``tridrop check`` and the benchmarks read these rows. A new op is one builder function and
its rows; a new combination of stages is one row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...spec.elementwise import ACTIVATIONS, check_functions
from .case import Case, Drop, Inputs

# Written with torch's own functions: independent of the backends.
EAGER_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
check_functions(EAGER_FUNCTIONS, "commands/check/cases.EAGER_FUNCTIONS")


def eager_activation(activation: str, x: Tensor) -> Tensor:
    """An activation of tridrop, computed by the functions above."""
    function, gated = ACTIVATIONS[activation]
    if not gated:
        return EAGER_FUNCTIONS[function](x)
    first, second = x.chunk(2, -1)
    return EAGER_FUNCTIONS[function](first) * second


def _resizable(builder: Callable[..., Case]) -> Callable[..., Case]:
    """Lets a builder of rows (op, shape, options) also give its rows other shapes."""

    @functools.wraps(builder)
    def build(op: str, shape: tuple[int, ...], **options: Any) -> Case:
        row = builder(op, shape, **options)
        if any(n is not None and n != 1 for n in options.get("noise_shape") or ()):
            return row

        def at(shape: tuple[int, ...], p: float, *, apart: bool = False) -> Case:
            both = {"apart": True} if apart and row.joins else {}
            return build(op, shape, **options | {"p": p} | both)

        return replace(row, at=at)

    return build


@_resizable
def _elementwise(
    op: str,
    shape: tuple[int, ...],
    *,
    p: float = 0.3,
    activation: str = "none",
    bias: bool = False,
    layer_scale: bool = False,
    gate: bool = False,
    drop_path: float = 0.0,
    noise_shape: tuple[int | None, ...] | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Case:
    width = shape[-1] * (2 if ACTIVATIONS[activation][1] else 1)
    shapes: dict[str, tuple[int, ...]] = {"x": (*shape[:-1], width), "out": shape}
    if bias:
        shapes["bias"] = (width,)
    if layer_scale:
        shapes["layer_scale"] = (shape[-1],)
    if gate:
        shapes["gate"] = (shape[0], shape[-1])
    if op == "dropout_add":
        shapes["residual"] = shape

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        options: dict[str, Any] = {"seed": seed, "noise_shape": noise_shape}
        if op == "dropout":
            return functional.dropout(inputs["x"], p, training, **options)
        options |= {"activation": activation, "bias": inputs.get("bias")}
        if op == "activation_dropout":
            return functional.activation_dropout(inputs["x"], p, training, **options)
        options |= {
            "layer_scale": inputs.get("layer_scale"),
            "gate": inputs.get("gate"),
            # p = 0 means without any dropout, so without drop_path too
            "drop_path": drop_path if p else 0.0,
        }
        return functional.dropout_add(inputs["x"], inputs["residual"], p, training, **options)

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        value = inputs["x"]
        if bias:
            value = value + inputs["bias"]
        value = drop("elements", eager_activation(activation, value))
        if layer_scale:
            value = value * inputs["layer_scale"]
        if gate:
            value = value * inputs["gate"].view(shape[0], *(1 for _ in shape[1:-1]), shape[-1])
        if drop_path:
            value = drop("drop_path", value)
        return inputs["residual"] + value if op == "dropout_add" else value

    stages = [activation] if activation != "none" else []
    given = {"bias": bias, "layer_scale": layer_scale, "gate": gate, "drop_path": drop_path}
    stages += [stage for stage, on in given.items() if on]
    stages += [f"noise_shape {noise_shape}"] if noise_shape else []
    stages += [f"{str(residual_dtype).removeprefix('torch.')} stream"] if residual_dtype else []
    rates = {"elements": p, **({"drop_path": drop_path} if drop_path else {})}
    return Case(
        name=f"{op}: {', '.join(stages) or 'plain'} {list(shape)}",
        op=op,
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates=rates,
        noise_shape=noise_shape,
        residual_dtype=residual_dtype,
    )


def rms_norm_by_hand(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm written in elementary operations, as in transformers' LlamaRMSNorm."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) if weight is None else weight * wide.to(x.dtype)


@_resizable
def _norm(
    op: str,
    shape: tuple[int, ...],
    *,
    p: float = 0.3,
    bias: bool = False,
    layer_scale: bool = False,
    drop_path: float = 0.0,
    residual: bool = True,
    affine: bool = True,
    prenorm: bool = False,
    zero_centered: bool = False,
    noise_shape: tuple[int | None, ...] | None = None,
    residual_dtype: torch.dtype | None = None,
    apart: bool = False,
) -> Case:
    rms, after = "rms" in op, op.endswith("norm_dropout")
    shapes: dict[str, tuple[int, ...]] = {"x": shape, "out": shape}
    vectors = {"weight": affine, "norm_bias": affine and not rms}
    vectors |= {"bias": bias, "layer_scale": layer_scale}
    shapes |= {name: shape[-1:] for name, on in vectors.items() if on}
    if residual:
        shapes["residual"] = shape
    function = getattr(functional, op)
    eps = 1e-5

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Any:
        options: dict[str, Any] = {"seed": seed, "noise_shape": noise_shape, "eps": eps}
        options |= {"zero_centered_weight": zero_centered, "drop_path": drop_path if p else 0.0}
        weight, norm_bias = inputs.get("weight"), inputs.get("norm_bias")
        arguments = (inputs["x"], weight) if rms else (inputs["x"], weight, norm_bias)
        if after:
            options["residual"] = inputs.get("residual")
            return function(*arguments, p, training, **options)
        options |= {"bias": inputs.get("bias"), "layer_scale": inputs.get("layer_scale")}
        result = function(
            inputs["x"], inputs.get("residual"), weight, norm_bias, p, training,
            prenorm=prenorm, **options,
        )  # fmt: skip
        # Both results of the pre-norm form are checked at once.
        joined = prenorm and not apart
        return result[0] + result[1].to(result[0].dtype) if joined else result

    def stream_of(inputs: Inputs, seed: Any) -> Tensor:
        result = function(
            inputs["x"], inputs.get("residual"), None, None, p, True, prenorm=True, seed=seed,
            bias=inputs.get("bias"), layer_scale=inputs.get("layer_scale"), drop_path=drop_path,
            noise_shape=noise_shape,
        )  # fmt: skip
        return result[1]

    def normalise(stream: Tensor, inputs: Inputs, rms_norm: Callable[..., Tensor]) -> Tensor:
        weight = inputs.get("weight")
        if zero_centered and weight is not None:
            weight = weight + 1
        cast = [
            None if t is None else t.to(stream.dtype) for t in (weight, inputs.get("norm_bias"))
        ]
        if rms:
            return rms_norm(stream, stream.shape[-1:], cast[0], eps)
        return F.layer_norm(stream, stream.shape[-1:], cast[0], cast[1], eps)

    def eager(inputs: Inputs, drop: Drop, rms_norm: Callable[..., Tensor] = F.rms_norm) -> Any:
        value = inputs["x"]
        if after:
            value = normalise(value, inputs, rms_norm)
        if bias:
            value = value + inputs["bias"]
        value = drop("elements", value)
        if layer_scale:
            value = value * inputs["layer_scale"]
        if drop_path:
            value = drop("drop_path", value)
        stream = inputs["residual"] + value if residual else value
        if after:
            return stream
        out = normalise(stream, inputs, rms_norm).to(inputs["x"].dtype)
        if apart and prenorm:
            return out, stream
        return out + stream.to(out.dtype) if prenorm else out

    stages = [name for name, on in vectors.items() if on]
    stages += [] if residual else ["no residual"]
    stages += ["drop_path"] if drop_path else []
    stages += ["prenorm"] if prenorm else []
    stages += ["1 + weight"] if zero_centered else []
    stages += [f"noise_shape {noise_shape}"] if noise_shape else []
    stages += [f"{str(residual_dtype).removeprefix('torch.')} stream"] if residual_dtype else []
    return Case(
        name=f"{op}: {', '.join(stages) or 'plain'} {list(shape)}",
        op=op,
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"elements": p, **({"drop_path": drop_path} if drop_path else {})},
        noise_shape=noise_shape,
        residual_dtype=residual_dtype,
        linear=after,
        probe=None if after else stream_of,
        backward_shows_mask=not after,
        saved_extra=8 * math.prod(shape[:-1]),
        out_like="residual" if after and residual else "x",
        joins=prenorm,
        by_hand=functools.partial(eager, rms_norm=rms_norm_by_hand) if rms else None,
    )


CASES: Sequence[Case] = (
    _elementwise("dropout", (6, 11, 40)),
    _elementwise("dropout", (4099,), p=0.1),
    _elementwise("dropout", (700, 1), p=0.5),
    _elementwise("dropout", (16, 12, 24), noise_shape=(None, 1, None)),
    _elementwise("dropout", (16, 40, 9), noise_shape=(16, 40, 1), p=0.5),
    *(
        _elementwise("activation_dropout", (5, 9, 56), activation=name, bias=True)
        for name in ACTIVATIONS
    ),
    _elementwise("activation_dropout", (30, 33), activation="gelu", p=0.9),
    _elementwise("dropout_add", (6, 11, 40), p=0.1),
    _elementwise("dropout_add", (7, 5, 64), bias=True),
    _elementwise("dropout_add", (48, 4, 24), bias=True, layer_scale=True, drop_path=0.25),
    _elementwise("dropout_add", (24, 4, 30), activation="gelu", bias=True, layer_scale=True),
    _elementwise(
        "dropout_add", (24, 4, 20), activation="swiglu", bias=True, layer_scale=True, drop_path=0.1
    ),
    _elementwise("dropout_add", (6, 21, 40), gate=True),
    _elementwise("dropout_add", (9, 24), gate=True, p=0.5),
    _elementwise(
        "dropout_add", (5, 2, 3, 20), activation="swiglu", bias=True, gate=True, drop_path=0.1
    ),
    _elementwise("dropout_add", (6, 11, 40), gate=True, residual_dtype=torch.float32),
    _elementwise("dropout_add", (16, 6, 24), noise_shape=(16, 1, 24), bias=True),
    _elementwise("dropout_add", (6, 11, 40), bias=True, residual_dtype=torch.float32),
    *(
        row
        for op in ("dropout_add_layer_norm", "dropout_add_rms_norm")
        for row in (
            _norm(op, (6, 7, 40), bias=True),
            _norm(op, (24, 4, 30), bias=True, layer_scale=True, drop_path=0.25, p=0.1),
            _norm(op, (33, 65), prenorm=True, residual_dtype=torch.float32),
            _norm(op, (9, 56), residual=False, affine=False),
            _norm(op, (9, 3, 24), zero_centered=True, noise_shape=(None, 1, None)),
        )
    ),
    *(
        row
        for op in ("layer_norm_dropout", "rms_norm_dropout")
        for row in (
            _norm(op, (6, 7, 40), residual=False),
            _norm(op, (24, 4, 30), drop_path=0.25, zero_centered=True),
        )
    ),
)
