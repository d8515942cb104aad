"""Rows of the ops that multiply a matrix after dropping its elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...spec.elementwise import ACTIVATIONS
from .case import Case, Drop, Inputs
from .cases import eager_activation


def _lora(
    op: str,
    shape: tuple[int, ...],
    rank: int,
    out: int,
    *,
    p: float = 0.3,
    scaling: float = 1.0,
    bias: bool = False,
    adapters: int = 1,
) -> Case:
    """The branch of an adapter; for ``lora_deltas``, the sum of several with one mask."""
    shapes: dict[str, tuple[int, ...]] = {"x": shape, "out": (*shape[:-1], out)}
    for i in range(adapters):
        shapes |= {f"A{i}": (rank + i, shape[-1]), f"B{i}": (out, rank + i)}
    if bias:
        shapes["bias"] = (out,)
    if op == "lora_linear":
        shapes["residual"] = shapes["out"]

    def matrices(inputs: Inputs, letter: str) -> list[Tensor]:
        return [inputs[f"{letter}{i}"] for i in range(adapters)]

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        x, As, Bs = inputs["x"], matrices(inputs, "A"), matrices(inputs, "B")
        options: dict[str, Any] = {"scaling": scaling, "seed": seed}
        if op == "lora_deltas":
            deltas = functional.lora_deltas(x, As, Bs, p, training, shared_mask=True, **options)
            return torch.stack(deltas).sum(0)
        options["bias"] = inputs.get("bias")
        if op == "lora_linear":
            return functional.lora_linear(
                x, inputs["residual"], As[0], Bs[0], p, training, **options
            )
        return functional.lora_delta(x, As[0], Bs[0], p, training, **options)

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        x = drop("elements", inputs["x"])
        pairs = zip(matrices(inputs, "A"), matrices(inputs, "B"), strict=True)
        branch = torch.stack([x @ A.T @ B.T for A, B in pairs]).sum(0)
        branch = scaling * (branch + inputs["bias"] if bias else branch)
        return inputs["residual"] + branch if op == "lora_linear" else branch

    def probe(inputs: Inputs, seed: Any) -> Tensor:
        same = torch.eye(shape[-1], device=inputs["x"].device, dtype=inputs["x"].dtype)
        return functional.lora_delta(inputs["x"], same, same, p, True, seed=seed)

    stages = [f"rank {rank}"] + (["bias"] if bias else [])
    stages += [f"{adapters} adapters"] if adapters > 1 else []
    return Case(
        name=f"{op}: {', '.join(stages)} {list(shape)}",
        op=op,
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"elements": p},
        probe=probe,
        mask_over=shape,
        multiplies=True,
    )


def _dropconnect(shape: tuple[int, ...], out: int, *, p: float = 0.3, bias: bool = True) -> Case:
    shapes = {"x": shape, "weight": (out, shape[-1]), "out": (*shape[:-1], out)}
    if bias:
        shapes["bias"] = (out,)

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        return functional.dropconnect_linear(
            inputs["x"], inputs["weight"], inputs.get("bias"), p, training, seed=seed
        )

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        return F.linear(inputs["x"], drop("elements", inputs["weight"]), inputs.get("bias"))

    def probe(inputs: Inputs, seed: Any) -> Tensor:
        weight = inputs["weight"]
        same = torch.eye(shape[-1], device=weight.device, dtype=weight.dtype)
        return functional.dropconnect_linear(same, weight, None, p, True, seed=seed).T

    return Case(
        name=f"dropconnect_linear: {'bias' if bias else 'plain'} {list(shape)}, {out} outputs",
        op="dropconnect_linear",
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"elements": p},
        probe=probe,
        main="weight",
        mask_over=(out, shape[-1]),
        multiplies=True,
    )


def _of_activation(
    shape: tuple[int, ...], out: int, activation: str, *, p: float = 0.3, bias: bool = True
) -> Case:
    """A linear layer after an activation and dropout of ``shape``, which are not kept."""
    width = shape[-1] * (2 if ACTIVATIONS[activation][1] else 1)
    shapes = {"x": (*shape[:-1], width), "matrix": (out, shape[-1]), "out": (*shape[:-1], out)}
    if bias:
        shapes |= {"bias": (width,), "last": (out,)}

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        return functional.activation_dropout_linear(
            inputs["x"], inputs["matrix"], inputs.get("last"), p, training,
            activation=activation, bias=inputs.get("bias"), seed=seed,
        )  # fmt: skip

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        x = inputs["x"] + inputs["bias"] if bias else inputs["x"]
        hidden = drop("elements", eager_activation(activation, x))
        return F.linear(hidden, inputs["matrix"], inputs.get("last"))

    def probe(inputs: Inputs, seed: Any) -> Tensor:
        same = torch.eye(shape[-1], device=inputs["x"].device, dtype=inputs["x"].dtype)
        return functional.activation_dropout_linear(
            inputs["x"], same, None, p, activation=activation, bias=inputs.get("bias"), seed=seed
        )

    return Case(
        name=f"activation_dropout_linear: {activation} {list(shape)}, {out} outputs",
        op="activation_dropout_linear",
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"elements": p},
        probe=probe,
        mask_over=shape,
        multiplies=True,
        # Elements have two bytes or more. With relu nothing is saved: torch's keeps its result too.
        saved_extra=0 if activation == "relu" else -2 * math.prod(shape),
    )


CASES: Sequence[Case] = (
    _of_activation((6, 7, 40), 24, "gelu"),
    _of_activation((30, 33), 10, "relu", p=0.5, bias=False),
    _of_activation((5, 9, 28), 12, "swiglu"),
    _lora("lora_delta", (6, 7, 40), 8, 24),
    _lora("lora_delta", (70, 65), 5, 9, p=0.05, scaling=2.0, bias=True),
    _lora("lora_delta", (3, 250), 100, 16, p=0.9),
    _lora("lora_linear", (2, 20, 72), 16, 30, p=0.5, scaling=0.25),
    _lora("lora_linear", (9, 33), 1, 7, p=0.1, bias=True),
    _lora("lora_deltas", (33, 48), 8, 12, adapters=3),
    _dropconnect((2, 9, 40), 24),
    _dropconnect((150, 33), 10, p=0.5, bias=False),
)
