"""The table of cases: what each op is given, the fused call, and what it should equal.

Tests, ``tridrop check`` and the benchmarks read these rows. A new op is one builder function and
its rows; a new combination of stages is one row.

The eager composition takes its random part as an argument, ``drop(domain, value)``: given the
exported masks it is what the op must equal, given the identity it is the op's expected value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..spec import ACTIVATIONS
from ..spec_attention import four

Inputs = dict[str, Tensor]
Drop = Callable[[str, Tensor], Tensor]

# Written with torch's own functions: independent of both backends.
EAGER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "reglu": lambda x: F.relu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


class At(Protocol):
    """A row again at another shape, the result's, and another p."""

    def __call__(self, shape: tuple[int, ...], p: float, *, apart: bool = False) -> Case:
        """``apart``: both results of a row that ``joins`` them, as a tuple."""


@dataclass(frozen=True)
class Case:
    """A row: ``call`` is held to ``eager`` under the masks that ``masks`` exports."""

    name: str
    op: str
    p: float
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Inputs, Any, float, bool], Any]
    """(inputs, seed, p, training) -> result"""
    eager: Callable[[Inputs, Drop], Any]
    rates: dict[str, float] = field(default_factory=dict)
    """domain -> probability of dropping"""
    noise_shape: tuple[int | None, ...] | None = None
    residual_dtype: torch.dtype | None = None
    """the residual stream's dtype where it is not that of the other operands"""
    linear: bool = True
    """whether the result is linear in the masks, so that its expected value is known"""
    probe: Callable[[Inputs, Any], Tensor] | None = None
    """(inputs, seed) -> a result that is zero just where something is dropped, if call's is not"""
    backward_shows_mask: bool = True
    """whether a constant gradient reaches x just where the element is kept"""
    saved_extra: int = 0
    """bytes of statistics that backward may keep"""
    out_like: str = "residual"
    """the operand whose dtype the result has, where it is given; x otherwise"""
    main: str = "x"
    """the operand whose gradient shows the mask"""
    kept: tuple[str, ...] = ()
    """operands that backward may keep and eager PyTorch need not"""
    scores_shape: tuple[int, ...] | None = None
    """the shape of the masks of attention, [..., queries, keys]; None for the result's"""
    visible: Callable[[str], Tensor] | None = None
    """(device) -> where a result shows the mask, if not everywhere; it is zero elsewhere"""
    multiplies: bool = False
    """whether the kernels multiply matrices, which the interpreter cannot in bf16"""
    joins: bool = False
    """whether the op returns two results, of which the row is the sum"""
    at: At | None = None
    """the row at another shape, for the benchmarks; None where its options name a shape"""
    by_hand: Callable[[Inputs, Drop], Any] | None = None
    """eager, as models write it that do not use torch's function"""
    of_torch: Callable[[Inputs, float], Tensor] | None = None
    """(inputs, p) -> result of torch's own fused function, where it has one"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, and of the masks but for attention's."""
        return self.shapes["residual"] if "residual" in self.shapes else self.shapes["out"]

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the masks."""
        return self.shape if self.scores_shape is None else self.scores_shape

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
        """Normal inputs of the dtype: drawn in fp64 on the host, the same for every device."""
        tensors = {}
        for name, shape in self.shapes.items():
            if name != "out":
                drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
                wanted = self.residual_dtype if name == "residual" else None
                tensors[name] = drawn.to(device, wanted or dtype)
        return tensors

    def drawn_shape(self, domain: str) -> list[int]:
        """The shape of the random numbers of a domain: 1 where they are shared."""
        if domain == "attention":
            return list(self.mask_shape)
        if domain == "drop_path":
            return [self.shape[0], *(1 for _ in self.shape[1:])]
        noise = self.noise_shape or (None,) * len(self.shape)
        return [s if n is None else n for n, s in zip(noise, self.shape, strict=True)]

    def eager_dropout(self, generator: torch.Generator) -> Drop:
        """The random part as eager PyTorch draws it, from a generator."""

        def drop(domain: str, value: Tensor) -> Tensor:
            shape, rate = self.drawn_shape(domain), self.rates[domain]
            keep = torch.rand(shape, generator=generator, dtype=torch.float64) >= rate
            return value * (keep / (1 - rate)).to(value.device, value.dtype)

        return drop

    def masks(self, seed: Any, device: str) -> dict[str, Tensor]:
        """The exported mask of each domain."""
        return {domain: self._mask(domain, seed, device) for domain in self.rates}

    def _mask(self, domain: str, seed: Any, device: str) -> Tensor:
        rate = self.rates[domain]
        if domain == "attention":
            keep = functional.attention_keep_mask(seed, four(self.mask_shape), rate, device=device)
            return keep.reshape(self.mask_shape)
        return functional.keep_mask(
            seed,
            self.shape,
            rate,
            noise_shape=self.noise_shape if domain == "elements" else None,
            device=device,
            domain=domain,
        )


def _resizable(builder: Callable[..., Case]) -> Callable[..., Case]:
    """A builder of rows (op, shape, options) whose rows can be had at other shapes."""

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
            # p = 0 asks for the op without any dropout
            "drop_path": drop_path if p else 0.0,
        }
        return functional.dropout_add(inputs["x"], inputs["residual"], p, training, **options)

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        value = inputs["x"]
        if bias:
            value = value + inputs["bias"]
        value = drop("elements", EAGER_ACTIVATIONS[activation](value))
        if layer_scale:
            value = value * inputs["layer_scale"]
        if drop_path:
            value = drop("drop_path", value)
        return inputs["residual"] + value if op == "dropout_add" else value

    stages = [activation] if activation != "none" else []
    stages += [s for s, on in (("bias", bias), ("layer_scale", layer_scale)) if on]
    stages += ["drop_path"] if drop_path else []
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
    """RMSNorm out of elementary operations, as in transformers' LlamaRMSNorm."""
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
        for name in ("none", "relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "swiglu")
    ),
    _elementwise("activation_dropout", (30, 33), activation="gelu", p=0.9),
    _elementwise("dropout_add", (6, 11, 40), p=0.1),
    _elementwise("dropout_add", (7, 5, 64), bias=True),
    _elementwise("dropout_add", (48, 4, 24), bias=True, layer_scale=True, drop_path=0.25),
    _elementwise("dropout_add", (24, 4, 30), activation="gelu", bias=True, layer_scale=True),
    _elementwise(
        "dropout_add", (24, 4, 20), activation="swiglu", bias=True, layer_scale=True, drop_path=0.1
    ),
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
