"""The rows of the attention ops; cases.py explains what a row is.

Their random part is ``drop("attention", probabilities)``. Attention masks that need a gradient are
operands of the row; the functions of the row create those that need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from .case import Case, Drop, Inputs

Device = str | torch.device


def some_keys(shape: tuple[int, ...], device: Device) -> Tensor:
    """A bool mask of ``shape``: about two thirds of the keys take part, always the first."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    mask = torch.rand(shape, dtype=torch.float32, generator=generator) < 2 / 3
    mask[..., 0] = True
    return mask.to(device)


def taking_part(
    shape: tuple[int, ...], mask: tuple[int, ...] | None, is_causal: bool, device: Device
) -> Tensor:
    """Which scores take part, as a bool tensor that broadcasts to ``shape``.

    ``mask`` is the shape of a bool attention mask, or None.
    """
    part = torch.ones(shape[-2:], dtype=torch.bool, device=device)
    if is_causal:
        part = part.tril()
    return part if mask is None else part & some_keys(mask, device)


def eager_softmax(scores: Tensor, part: Tensor | None, mask: Tensor | None) -> Tensor:
    """The probabilities in eager PyTorch. In every row at least one key takes part."""
    if mask is not None:
        scores = scores + mask
    if part is not None:
        scores = scores.masked_fill(~part, -math.inf)
    return torch.softmax(scores, -1)


def _resizable(row: Case, rebuild: Callable[..., Case]) -> Case:
    """The row, with ``rebuild(shape, p, apart)`` as the function that gives it another shape."""

    def at(shape: tuple[int, ...], p: float, *, apart: bool = False) -> Case:
        return _resizable(rebuild(shape, p, apart), rebuild)

    return replace(row, at=at)


def _softmax(
    shape: tuple[int, ...],
    *,
    p: float = 0.3,
    scale: float | None = None,
    bool_mask: tuple[int, ...] | None = None,
    float_mask: tuple[int, ...] | None = None,
    is_causal: bool = False,
    return_softmax: bool = False,
    apart: bool = False,
) -> Case:
    """softmax_dropout, with a bool mask of a shape, or with a float mask and its gradient."""
    shapes: dict[str, tuple[int, ...]] = {"scores": shape, "out": shape}
    if float_mask is not None:
        shapes["mask"] = float_mask

    def run(inputs: Inputs, seed: Any, p: float, training: bool, both: bool) -> Any:
        scores = inputs["scores"]
        mask = inputs.get("mask")
        if bool_mask is not None:
            mask = some_keys(bool_mask, str(scores.device))
        return functional.softmax_dropout(
            scores, p, training, mask=mask, is_causal=is_causal, scale=scale, seed=seed,
            return_softmax=both,
        )  # type: ignore[call-overload]  # fmt: skip

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Any:
        result = run(inputs, seed, p, training, return_softmax)
        # Both results are checked at once.
        return result[0] + result[1] if return_softmax and not apart else result

    def eager(inputs: Inputs, drop: Drop) -> Any:
        scores = inputs["scores"] if scale is None else inputs["scores"] * scale
        part = None
        if bool_mask is not None or is_causal:
            part = taking_part(shape, bool_mask, is_causal, scores.device)
        probabilities = eager_softmax(scores, part, inputs.get("mask"))
        out = drop("attention", probabilities)
        if apart and return_softmax:
            return out, probabilities
        return out + probabilities if return_softmax else out

    stages = [f"bool mask {list(bool_mask)}"] if bool_mask is not None else []
    stages += [f"float mask {list(float_mask)}"] if float_mask is not None else []
    stages += [f"scale {scale}"] if scale is not None else []
    stages += [name for name, on in (("causal", is_causal), ("both", return_softmax)) if on]
    row = Case(
        name=f"softmax_dropout: {', '.join(stages) or 'plain'} {list(shape)}",
        op="softmax_dropout",
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"attention": p},
        probe=lambda inputs, seed: run(inputs, seed, p, True, False),
        # The gradient of a score is P * (dP - sum(dP * P)), which is not zero where dP is zero.
        backward_shows_mask=False,
        saved_extra=4 * math.prod(shape[:-1]),
        main="scores",
        kept=("mask",) if float_mask is not None else (),
        mask_over=shape,
        visible=lambda device: taking_part(shape, bool_mask, is_causal, device),
        joins=return_softmax,
    )
    if bool_mask is not None or float_mask is not None:
        return row
    return _resizable(
        row,
        lambda shape, p, apart: _softmax(
            shape, p=p, scale=scale, is_causal=is_causal, return_softmax=return_softmax, apart=apart
        ),
    )


def _attention(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    *,
    p: float = 0.3,
    scale: float | None = None,
    bool_mask: tuple[int, ...] | None = None,
    float_mask: tuple[int, ...] | None = None,
    key_mask: bool = False,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    sinks: bool = False,
    softcap: float | None = None,
) -> Case:
    """scaled_dot_product_attention. Heads and lengths are (query, key), widths (key, value)."""
    (query_heads, key_heads), (queries, keys), (width, value_width) = heads, lengths, widths
    scores_shape = (batch, query_heads, queries, keys)
    shapes: dict[str, tuple[int, ...]] = {
        "query": (batch, query_heads, queries, width),
        "key": (batch, key_heads, keys, width),
        "value": (batch, key_heads, keys, value_width),
        "out": (batch, query_heads, queries, value_width),
    }
    if float_mask is not None:
        shapes["mask"] = float_mask
    if sinks:
        shapes["sinks"] = (query_heads,)
    factor = width**-0.5 if scale is None else scale

    masked = bool_mask is not None or float_mask is not None or key_mask
    everywhere = bool_mask is None and not key_mask and not is_causal and window is None

    def part_of(device: Device) -> Tensor:
        part = taking_part(scores_shape, bool_mask, is_causal, device)
        if key_mask:
            part = part & some_keys((batch, keys), device)[:, None, None, :]
        if window is not None:
            distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
            left, right = window
            near = torch.ones_like(distance, dtype=torch.bool)
            near = near if left is None else near & (distance >= -left)
            near = near if right is None else near & (distance <= right)
            part = part & near.to(device)
        return part

    def run(inputs: Inputs, seed: Any, p: float, value: Tensor) -> Tensor:
        device = str(value.device)
        mask = inputs.get("mask")
        if bool_mask is not None:
            mask = some_keys(bool_mask, device)
        out = functional.scaled_dot_product_attention(
            inputs["query"], inputs["key"], value, mask, p, is_causal, scale,
            enable_gqa=query_heads != key_heads, window=window, sinks=inputs.get("sinks"),
            key_mask=some_keys((batch, keys), device) if key_mask else None, softcap=softcap,
            seed=seed,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def call(inputs: Inputs, seed: Any, p: float, training: bool) -> Tensor:
        return run(inputs, seed, p if training else 0.0, inputs["value"])

    def probabilities_of(inputs: Inputs, seed: Any) -> Tensor:
        """Attention with the identity as values, which returns its probabilities."""
        identity = torch.eye(keys, dtype=inputs["value"].dtype, device=inputs["value"].device)
        return run(inputs, seed, p, identity.expand(batch, key_heads, keys, keys))

    def eager(inputs: Inputs, drop: Drop) -> Tensor:
        group = query_heads // key_heads
        key, value = (inputs[n].repeat_interleave(group, 1) for n in ("key", "value"))
        scores = inputs["query"] @ key.transpose(-1, -2) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        part, mask = None if everywhere else part_of(scores.device), inputs.get("mask")
        if sinks:
            # The sink is one more key, whose probability is discarded.
            sink = inputs["sinks"][None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores if mask is None else scores + mask, sink], -1)
            mask, part = None, None if part is None else F.pad(part, (0, 1), value=True)
        probabilities = eager_softmax(scores, part, mask)[..., :keys]
        return drop("attention", probabilities) @ value

    def of_torch(inputs: Inputs, p: float) -> Tensor:
        return F.scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], None, p, is_causal, scale=scale,
            enable_gqa=query_heads != key_heads,
        )  # fmt: skip

    stages = [f"bool mask {list(bool_mask)}"] if bool_mask is not None else []
    stages += [f"float mask {list(float_mask)}"] if float_mask is not None else []
    stages += [f"scale {scale}"] if scale is not None else []
    stages += [f"window {window}"] if window is not None else []
    stages += [f"softcap {softcap}"] if softcap is not None else []
    named = (("causal", is_causal), ("key mask", key_mask), ("sinks", sinks))
    stages += [name for name, on in named if on]
    row = Case(
        name=f"scaled_dot_product_attention: {', '.join(stages) or 'plain'} "
        f"{[list(shapes[n]) for n in ('query', 'key', 'value')]}",
        op="scaled_dot_product_attention",
        p=p,
        shapes=shapes,
        call=call,
        eager=eager,
        rates={"attention": p},
        probe=probabilities_of,
        backward_shows_mask=False,
        # backward keeps the result and the log-sum-exp
        saved_extra=math.prod(scores_shape[:-1]) * (4 + 8 * value_width),
        main="query",
        kept=("mask",) if float_mask is not None else (),
        mask_over=scores_shape,
        visible=part_of,
        multiplies=True,
        of_torch=None if masked or sinks or softcap or window else of_torch,
    )
    if masked:
        return row

    def rebuild(shape: tuple[int, ...], p: float, apart: bool) -> Case:
        # Query, key and value get the same heads, lengths and widths: [B, H, S, D].
        batch, heads, length, width = shape
        return _attention(
            batch, (heads, heads), (length, length), (width, width), p=p, scale=scale,
            is_causal=is_causal, window=window, sinks=sinks, softcap=softcap,
        )  # fmt: skip

    return _resizable(row, rebuild)


CASES: Sequence[Case] = (
    _softmax((2, 1, 16, 48)),
    _softmax((24, 33), p=0.1, scale=0.125),
    _softmax((2, 16, 65), is_causal=True),
    _softmax((2, 2, 15, 40), bool_mask=(2, 1, 1, 40), p=0.5),
    _softmax((1, 2, 16, 31), bool_mask=(16, 31), is_causal=True, scale=-0.5),
    _softmax((2, 1, 8, 100), float_mask=(8, 100), p=0.1),
    _softmax((2, 2, 1, 9, 64), float_mask=(2, 1, 1, 64)),
    _softmax((2, 9, 24), float_mask=(2, 9, 24), is_causal=True, return_softmax=True),
    _softmax((2, 4, 200), return_softmax=True, p=0.9),
    _attention(1, (2, 2), (20, 40), (16, 16)),
    _attention(1, (4, 2), (15, 33), (24, 40), is_causal=True, p=0.1),
    _attention(2, (2, 1), (9, 50), (16, 8), bool_mask=(2, 1, 1, 50), scale=-0.3, p=0.5),
    _attention(2, (2, 2), (17, 30), (16, 16), float_mask=(1, 2, 17, 30), is_causal=True),
    _attention(2, (1, 1), (12, 40), (20, 16), float_mask=(2, 1, 1, 40), p=0.1),
    _attention(1, (2, 2), (32, 32), (16, 16), window=(7, 3), p=0.1),
    _attention(2, (2, 2), (30, 30), (16, 16), key_mask=True, sinks=True, softcap=1.5),
    _attention(2, (3, 1), (1, 50), (16, 16), p=0.9),
)
