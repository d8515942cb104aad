"""What ``tridrop inspect`` compiles: the calls of the Triton backend that each op makes.

Sizes are those of a transformer: 8192 tokens of 4096 features, or 4 x 16 heads of 4096 tokens. A
new op is a function here; which kernels a call launches is found automatically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...contract.mask import LANES
from ...contract.noise import PAIR
from ...spec.attention import AttentionInputs, AttentionOptions, SoftmaxOptions
from ...spec.elementwise import NormOptions, Options
from ...spec.operands import (
    AttentionBackward,
    Elementwise,
    ElementwiseBackward,
    Norm,
    NormBackward,
    Product,
    ProductBackward,
    Softmax,
    SoftmaxBackward,
)
from ...spec.product import ProductOptions

ROWS, COLS = 8192, 4096
BATCH, HEADS, TOKENS = 4, 16, 4096
P = 0.1

NONE, FUSED, NAIVE = "none", "tridrop", "naive"


@dataclass(frozen=True)
class Row:
    """A call, with and without dropout."""

    op: str
    variant: str
    direction: str
    call: Callable[[Any, torch.dtype, str], object]
    """(backend, dtype, method) -> the result of the launcher"""
    methods: tuple[str, ...] = (NONE, FUSED)
    elements: int = ROWS * COLS
    """the number of elements of the result, or of scores"""
    written: int = 1
    """tensors of that size that a kernel with a loop writes per iteration"""
    flops: Mapping[str, float] = field(default_factory=dict)
    """kernel -> operations of matrix products per element"""
    calls: float = 1 / 8
    """Philox calls per element, by the mask contract"""

    @property
    def name(self) -> str:
        """The name of the row, which is unique."""
        return " ".join(filter(None, (self.op, self.variant, self.direction)))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed(method: str) -> Tensor | None:
    return None if method == NONE else _empty(2, dtype=torch.int64)


def _rate(method: str) -> float:
    return 0.0 if method == NONE else P


# The elementwise family.


def _forward(
    backend: Any, dtype: torch.dtype, method: str, *,
    activation: str, bias: bool, residual: bool, noise: str,
) -> object:  # fmt: skip
    options = Options(activation, _rate(method), noise=noise)
    width = COLS * (2 if options.gated else 1)
    x = _empty(ROWS, width, dtype=dtype)
    stream = _empty(ROWS, COLS, dtype=dtype) if residual else None
    if method == NAIVE:
        return backend.yardstick.naive(x, stream, _seed(method), options)
    vector = _empty(width, dtype=dtype) if bias else None
    operands = Elementwise(x, vector, residual=stream, seed=_seed(method))
    return backend.FAMILIES["elementwise"].forward(operands, options)


def _backward(
    backend: Any, dtype: torch.dtype, method: str, *, activation: str, bias: bool, noise: str
) -> object:
    options = Options(activation, _rate(method), noise=noise)
    width = COLS * (2 if options.gated else 1)
    grad = _empty(ROWS, COLS, dtype=dtype)
    if method == NAIVE:
        return backend.yardstick.naive(grad, None, _seed(method), options)
    x = None if activation == "none" else _empty(ROWS, width, dtype=dtype)
    vector = _empty(width, dtype=dtype) if bias else None
    dtypes = (dtype, dtype if bias else None, None)
    operands = ElementwiseBackward(grad, x, vector, seed=_seed(method))
    return backend.FAMILIES["elementwise"].backward(operands, options, dtypes)


def _elementwise(
    op: str, variant: str, activation: str = "none", bias: bool = False, residual: bool = False,
    noise: str = "mask",
) -> list[Row]:  # fmt: skip
    naive = (NAIVE,) if op == "dropout_add" and not bias else ()
    forward = partial(_forward, activation=activation, bias=bias, residual=residual, noise=noise)
    backward = partial(_backward, activation=activation, bias=bias, noise=noise)
    calls = 1 / (PAIR if noise == "gaussian" else LANES)
    row = Row(op, variant, "forward", forward, (NONE, FUSED, *naive), calls=calls)
    return [
        row,
        replace(
            row,
            direction="backward",
            call=backward,
            written=2 if activation in ("reglu", "geglu", "swiglu") else 1,
        ),
    ]


def _keep_mask(backend: Any, dtype: torch.dtype, method: str) -> object:
    return backend.keep_mask(_seed(method), (ROWS, COLS), None, Options(p=P), "elements")


def _decision_bits(backend: Any, dtype: torch.dtype, method: str) -> object:
    return backend.decision_bits(_seed(method), (ROWS, COLS))


# The norm family.


def _norm(backend: Any, dtype: torch.dtype, method: str, *, norm: str, after: bool) -> object:
    options = _norm_options(dtype, method, norm, after)
    x, weight = _empty(ROWS, COLS, dtype=dtype), _empty(COLS, dtype=dtype)
    bias = _empty(COLS, dtype=dtype) if norm == "layer_norm" else None
    stream = None if after else _empty(ROWS, COLS, dtype=dtype)
    operands = Norm(x, residual=stream, weight=weight, norm_bias=bias, seed=_seed(method))
    return backend.FAMILIES["norm"].forward(operands, options)


def _norm_backward(
    backend: Any, dtype: torch.dtype, method: str, *, norm: str, after: bool
) -> object:
    options = _norm_options(dtype, method, norm, after)
    matrices = [_empty(ROWS, COLS, dtype=dtype) for _ in range(3)]
    statistics = _empty(ROWS, 2, dtype=torch.float32)
    last = dtype if norm == "layer_norm" else None
    operands = NormBackward(
        matrices[0],
        None if after else matrices[1],
        matrices[2],
        statistics,
        weight=_empty(COLS, dtype=dtype),
        seed=_seed(method),
    )
    dtypes = (dtype, None, None, None if after else dtype, dtype, last)
    return backend.FAMILIES["norm"].backward(operands, options, dtypes)


def _norm_options(dtype: torch.dtype, method: str, norm: str, after: bool) -> NormOptions:
    return NormOptions(p=_rate(method), norm=norm, after=after, stream_dtype=dtype, out_dtype=dtype)


def _norms(op: str, norm: str, after: bool) -> list[Row]:
    forward = partial(_norm, norm=norm, after=after)
    backward = partial(_norm_backward, norm=norm, after=after)
    return [
        Row(op, "", "forward", forward),
        Row(op, "", "backward", backward, written=1 if after else 2),
    ]


# Softmax and attention.


def _softmax(backend: Any, dtype: torch.dtype, method: str) -> object:
    scores = _empty(BATCH, HEADS, TOKENS, TOKENS, dtype=dtype)
    operands, options = Softmax(scores, seed=_seed(method)), SoftmaxOptions(p=_rate(method))
    return backend.FAMILIES["softmax"].forward(operands, options)


def _softmax_backward(backend: Any, dtype: torch.dtype, method: str) -> object:
    scores, grad = (_empty(BATCH, HEADS, TOKENS, TOKENS, dtype=dtype) for _ in range(2))
    lse = _empty(BATCH, HEADS, TOKENS, dtype=torch.float32)
    operands = SoftmaxBackward(grad, None, scores, None, lse, _seed(method))
    options = SoftmaxOptions(p=_rate(method))
    return backend.FAMILIES["softmax"].backward(operands, options, (dtype, None))


def _attention(
    backend: Any, dtype: torch.dtype, method: str, *, dim: int, causal: bool, way: str
) -> object:
    shape = (BATCH, HEADS, TOKENS, dim)
    query, key, value, dout, out = (_empty(*shape, dtype=dtype) for _ in range(5))
    options = AttentionOptions(
        p=_rate(method), scale=dim**-0.5, upper=0 if causal else None,
        max_query=TOKENS, max_key=TOKENS,
    )  # fmt: skip
    masked = way == "mask gradient"
    mask = _empty(1, HEADS, TOKENS, TOKENS, dtype=dtype) if masked else None
    inputs = AttentionInputs(query, key, value, mask, seed=_seed(method))
    if way == "forward":
        return backend.FAMILIES["attention"].forward(inputs, options)
    lse = _empty(*shape[:-1], dtype=torch.float32)
    needs = (not masked, not masked, not masked, masked, False)
    operands = AttentionBackward(dout, None, out, lse, *inputs)
    return backend.FAMILIES["attention"].backward(operands, options, needs)


def _attentions() -> list[Row]:
    op, scores = "scaled_dot_product_attention", BATCH * HEADS * TOKENS * TOKENS
    rows = []
    for dim in (64, 128):
        # Each product is a multiplication and an addition for each dimension of the head.
        products = {"forward": 2, "dquery": 3, "dkey": 4, "dmask": 2}
        flops = {f"attention_{name}_kernel": 2.0 * dim * n for name, n in products.items()}
        for causal in (False, True):
            variant = f"D={dim}{' causal' if causal else ''}"
            elements = scores // 2 if causal else scores
            for way in ("forward", "backward", "mask gradient"):
                if way == "mask gradient" and (causal or dim != 64):
                    continue
                call = partial(_attention, dim=dim, causal=causal, way=way)
                rows.append(Row(op, variant, way, call, elements=elements, flops=flops))
    return rows


# Products with a dropped matrix.


def _lora(
    backend: Any, dtype: torch.dtype, method: str, *, ranks: tuple[int, ...], forward: bool
) -> object:
    options = ProductOptions(p=_rate(method), ranks=ranks)
    x, weight = _empty(ROWS, COLS, dtype=dtype), _empty(sum(ranks), COLS, dtype=dtype)
    seeds = None if method == NONE else _empty(len(ranks), 2, dtype=torch.int64)
    if forward:
        return backend.FAMILIES["product"].forward(Product(x, weight, seeds), options)
    operands = ProductBackward(_empty(ROWS, sum(ranks), dtype=dtype), x, weight, seeds)
    return backend.FAMILIES["product"].backward(operands, options, (True, True))


def _loras(variant: str, ranks: tuple[int, ...]) -> list[Row]:
    calls = len(ranks) / 8
    flops = {"product_kernel": 2.0 * sum(ranks), "product_backward_kernel": 4.0 * sum(ranks)}
    return [
        Row(
            "lora_delta" if len(ranks) == 1 else "lora_deltas", variant, way,
            partial(_lora, ranks=ranks, forward=way == "forward"),
            written=0 if way == "forward" else 1, flops=flops, calls=calls,
        )
        for way in ("forward", "backward")
    ]  # fmt: skip


def _attention_keep_mask(backend: Any, dtype: torch.dtype, method: str) -> object:
    shape = (BATCH, HEADS, TOKENS, TOKENS)
    return backend.attention_keep_mask(_seed(method), shape, None, AttentionOptions(p=P))


def _all() -> list[Row]:
    scores = BATCH * HEADS * TOKENS * TOKENS
    only = (FUSED,)
    return [
        *_elementwise("dropout", ""),
        *_elementwise("dropout_add", "", residual=True),
        *_elementwise("dropout_add", "bias", bias=True, residual=True),
        *_elementwise("activation_dropout", "gelu, bias", "gelu", bias=True),
        *_elementwise("activation_dropout", "swiglu", "swiglu"),
        *_elementwise("alpha_dropout", "", noise="alpha"),
        *_elementwise("gaussian_dropout", "", noise="gaussian"),
        *_norms("dropout_add_layer_norm", "layer_norm", after=False),
        *_norms("dropout_add_rms_norm", "rms_norm", after=False),
        *_norms("layer_norm_dropout", "layer_norm", after=True),
        *_norms("rms_norm_dropout", "rms_norm", after=True),
        Row("softmax_dropout", "", "forward", _softmax, elements=scores),
        Row("softmax_dropout", "", "backward", _softmax_backward, elements=scores),
        *_attentions(),
        *_loras("r=16", (16,)),
        *_loras("r=64", (64,)),
        *_loras("3 adapters, r=16", (16, 16, 16)),
        Row("keep_mask", "", "forward", _keep_mask, only),
        Row("attention_keep_mask", "", "forward", _attention_keep_mask, only, scores),
        Row("kept_indices", "", "forward", _decision_bits, only),
    ]


TABLE = {row.name: row for row in _all()}
OPS = tuple(dict.fromkeys(row.op for row in TABLE.values()))
