"""LoRA's branch: dropout and two small products, without a dropped copy of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import arguments as spec_values
from ..contract.mask import fold_in
from ..distributed.dtensor import is_dtensor
from ..spec import elementwise as spec
from ..spec.product import check_matrix, check_rank, check_same_dtype, groups
from .elementwise import ShardLike, seed_of
from .product import dropped_product


def lora_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """What a low-rank adapter adds to a linear layer.

        delta = scaling * (dropout(x) @ A^T @ B^T + bias)

    (Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685; dropout as
    in PEFT.) The mask is applied while x is loaded for the product, and backward draws it again.
    Backward keeps x, ``dropout(x) @ A^T`` and the seed's 16 bytes; adapters of the same x keep it
    once.

    Args:
        x: [..., in], any strides; float16, bfloat16, float32, or float64 (reference backend).
        A: [r, in], with r from 1 to 256. The products are computed in A's dtype (under autocast, in
            autocast's dtype); x is converted to it while it is loaded, and not in memory.
        B: [out, r], of A's dtype.
        p: the probability of dropping an element of x, as in :func:`tridrop.dropout`.
        training: False stands for p = 0.
        scaling: a number, alpha / r or alpha / sqrt(r).
        bias: [out], if the adapter has one.
        shard, seed: as in :func:`tridrop.dropout`, for x. The mask is
            ``tridrop.keep_mask(seed, x.shape, p)``.

    Returns:
        [..., out] in the dtype of the products.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`; A, B or bias that do not fit, or of two
            dtypes; a scaling that is not a finite number.

    >>> import torch
    >>> x, A, B = torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1)
    >>> lora_delta(x, A, B, 0.5, scaling=0.5, seed=1)
    tensor([[2., 2., 2.],
            [3., 3., 3.]])
    """
    return lora_deltas(
        x, (A,), (B,), p, training,
        scaling=scaling, biases=None if bias is None else (bias,), shard=shard, seed=[seed],
    )[0]  # fmt: skip


def lora_linear(
    x: Tensor,
    base_out: Tensor,
    A: Tensor,
    B: Tensor,
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """``base_out`` + :func:`lora_delta`; where dtypes allow it, the second product adds the two.

    Args:
        base_out: [..., out], the base layer's result for x, in any floating-point dtype.
        x, A, B, p, training, scaling, bias, shard, seed: as in :func:`lora_delta`.

    Returns:
        [..., out] in the dtype of base_out.

    Raises:
        ValueError, TypeError: as :func:`lora_delta`; a base_out of another shape or device.

    >>> import torch
    >>> x, A, B = torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1)
    >>> lora_linear(x, torch.ones(2, 3), A, B, 0.5, seed=1)
    tensor([[5., 5., 5.],
            [7., 7., 7.]])
    """
    _check_adapters(x, (A,), (B,), None if bias is None else (bias,))
    spec.check_residual(base_out, (*x.shape[:-1], B.shape[0]), x, "base_out")
    (down,) = _way_down(x, (A,), p, training, [scaling], shard, [seed], False)
    if bias is None and down.dtype == base_out.dtype and not is_dtensor(x):
        rows, up = base_out.reshape(-1, B.shape[0]), B.to(down.dtype)
        return torch.addmm(rows, down.reshape(-1, B.shape[1]), up.T).view(base_out.shape)
    return (base_out + _way_up(down, B, bias, scaling)).to(base_out.dtype)


def lora_deltas(
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    scaling: float | Sequence[float] = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    shared_mask: bool = False,
    shard: ShardLike | None = None,
    seed: int | Tensor | Sequence[int | Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_delta` of several adapters on one x, which is read once for all of them.

    x is read once for up to three adapters, or for fewer if these have more than 192 rows together,
    because the sums of a pass are held in registers.

    Args:
        x, p, training, shard: as in :func:`lora_delta`.
        As, Bs, biases: one entry per adapter. All As have the same dtype.
        scaling: one number for all adapters, or one per adapter.
        shared_mask: False gives each adapter a mask of its own, as separate layers have in PEFT.
            True gives all adapters one mask, with one decision per element of x in place of one per
            element and adapter.
        seed: adapter i has the mask of ``tridrop.fold_in(seed, i)``; with ``shared_mask`` all have
            the mask of ``seed``. A list gives each mask a seed of its own.

    Returns:
        A tuple of [..., out_i].

    Raises:
        ValueError, TypeError: as :func:`lora_delta`; lists of different lengths.

    >>> import torch
    >>> x, A, B = torch.ones(2, 4), torch.ones(1, 4), torch.ones(1, 1)
    >>> lora_deltas(x, (A, A), (B, B), 0.5, scaling=0.5, seed=1)
    (tensor([[2.],
            [3.]]), tensor([[1.],
            [3.]]))
    """
    spec_values.check_flag(shared_mask, "shared_mask")
    matrices = "a list of matrices, one for each adapter"
    spec_values.check_sequence(As, "As", matrices)
    spec_values.check_sequence(Bs, "Bs", matrices)
    biases = [None] * len(Bs) if biases is None else biases
    spec_values.check_sequence(biases, "biases", "a list of vectors or None, one for each adapter")
    count = len(As)
    gains = list(scaling) if isinstance(scaling, Sequence) else [scaling] * count
    for name, given in (("Bs", Bs), ("biases", biases), ("scaling", gains)):
        if len(given) != count:
            raise ValueError(f"{name} has {len(given)} entries for {count} adapters: give one each")
    if not count:
        raise ValueError("As is empty: give the matrices of one adapter or more")
    _check_adapters(x, As, Bs, biases)
    spec.check_probability(p, tensor_allowed=True)
    seeds = _seeds(x, seed, None if shared_mask else count, p, training)
    parts = _way_down(x, As, p, training, gains, shard, seeds, shared_mask)
    return tuple(map(_way_up, parts, Bs, biases, gains))


def _check_adapters(
    x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> None:
    spec.check_input(x)
    if x.dim() == 0:
        raise ValueError("x is a scalar; LoRA takes [..., in]")
    for A, B, bias in zip(As, Bs, biases or [None] * len(As), strict=True):
        check_matrix(A, "A", None, x.shape[-1], x, f"x has {x.shape[-1]} features")
        check_rank((A.shape[0],), "A")
        check_same_dtype(As[0], A, ("the first A", "another"))
        check_matrix(B, "B", None, A.shape[0], x, f"A has rank {A.shape[0]}")
        check_same_dtype(A, B, ("A", "B"))
        spec.check_vector(bias, "bias", B.shape[0], x)


def _check_scaling(scaling: float) -> float:
    return spec_values.check_finite(scaling, "scaling")


def _seeds(
    x: Tensor,
    seed: int | Tensor | Sequence[int | Tensor | None] | None,
    count: int | None,
    p: float | Tensor,
    training: bool,
) -> Sequence[int | Tensor | None]:
    """The seeds of ``count`` masks; for None, the seed of the mask that all adapters share."""
    if isinstance(seed, (list, tuple)):
        if len(seed) != (count or 1):
            raise ValueError(f"seed has {len(seed)} entries for {count or 1} masks: give one each")
        return seed
    if count is None or not spec.drops(p, training):
        return [seed] * (count or 1)  # type: ignore[list-item]
    base = seed_of(x, seed)  # type: ignore[arg-type]
    return [fold_in(base, i) for i in range(count)]


def _way_down(
    x: Tensor,
    As: Sequence[Tensor],
    p: float | Tensor,
    training: bool,
    gains: Sequence[float],
    shard: ShardLike | None,
    seeds: Sequence[int | Tensor | None],
    one_mask: bool,
) -> list[Tensor]:
    """scaling_i * dropout_i(x) @ A_i^T for each i."""
    spec.check_probability(p, tensor_allowed=True)
    checked = [_check_scaling(gain) for gain in gains]
    parts: list[Tensor] = []
    for some in groups([A.shape[0] for A in As]):
        equal = len(set(checked[some])) == 1
        down = dropped_product(
            x, As[some], p, training,
            gain=checked[some.start] if equal else 1.0, one_mask=one_mask, shard=shard,
            seeds=seeds if one_mask else seeds[some],
        )  # fmt: skip
        found = down.split([A.shape[0] for A in As[some]], -1)
        if not equal:
            found = tuple(part * gain for part, gain in zip(found, checked[some], strict=True))
        parts += found
    return parts


def _way_up(down: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """down @ B^T + scaling * bias"""
    # The scaling is a float here, since torch takes no int of more than 64 bits.
    shift = None if bias is None else (bias * _check_scaling(scaling)).to(B.dtype)
    return F.linear(down, B.to(down.dtype), None if shift is None else shift.to(down.dtype))
