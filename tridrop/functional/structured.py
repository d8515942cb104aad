"""Structured dropout along the width of a model: tokens and attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ..base import arguments as spec_values
from ..contract import choice
from ..contract.mask import Shard
from ..contract.seeds import refuse_batch, seed_for
from ..ops import Masked, apply
from ..spec import elementwise as spec
from .elementwise import dropout
from .masks import keep_mask, kept_indices


@overload
def patch_dropout(
    x: Tensor,
    p: float = ...,
    training: bool = ...,
    *,
    num_prefix_tokens: int = ...,
    ordered: bool = ...,
    return_indices: Literal[False] = ...,
    seed: int | Tensor | None = ...,
) -> Tensor: ...


@overload
def patch_dropout(
    x: Tensor,
    p: float = ...,
    training: bool = ...,
    *,
    num_prefix_tokens: int = ...,
    ordered: bool = ...,
    return_indices: Literal[True],
    seed: int | Tensor | None = ...,
) -> tuple[Tensor, Tensor | None]: ...


def patch_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Keep a random subset of each sample's tokens, so that later layers get shorter sequences.

        out = concat(x[:, :prefix], x[:, prefix:][kept]),    k = max(1, floor(n (1 - p))) of n

    Liu et al., "PatchDropout: economizing vision transformers using patch dropout", 2022; Li et
    al., "Scaling language-image pre-training via masking", 2022. Nothing is scaled. ``kept`` is
    :func:`tridrop.kept_indices` of ``(B, n)``. Backward keeps the indices and no copy of x.

    Args:
        x: tokens, [B, prefix + n, ...], of any dtype; position embeddings must be added before.
        p: the rate of dropping tokens, a number in [0, 1). At least one token is kept.
        training: False returns ``x`` itself, as p = 0 does.
        num_prefix_tokens: the number of class and register tokens in front, which are all kept.
        ordered: keep the tokens in their order, which costs a sort. Otherwise the order is random.
        return_indices: return (out, indices), where indices says which of the n tokens were kept,
            [B, k], or is None if all were.
        seed: as in :func:`tridrop.dropout`.

    Raises:
        ValueError: p outside [0, 1); fewer than two dimensions; more prefix tokens than tokens.
        TypeError: p or seed of another type.

    >>> tokens = torch.arange(7)[None]
    >>> patch_dropout(tokens, 0.5, ordered=True, return_indices=True, seed=1)
    (tensor([[0, 1, 3, 5]]), tensor([[0, 2, 4]]))
    """
    spec_values.check_tensor(x, "x")
    spec.check_probability(p)
    spec_values.check_flag(ordered, "ordered")
    spec_values.check_flag(return_indices, "return_indices")
    if p == 1:
        raise ValueError("p = 1 leaves no token; give a rate in [0, 1)")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [batch, tokens, ...]")
    batch, tokens = x.shape[:2]
    num_prefix_tokens = spec_values.check_whole(num_prefix_tokens, "num_prefix_tokens")
    if not 0 <= num_prefix_tokens <= tokens:
        raise ValueError(
            f"num_prefix_tokens = {num_prefix_tokens} of {tokens} tokens; give from 0 to {tokens}"
        )
    if not spec.drops(p, training):
        return (x, None) if return_indices else x
    refuse_batch("patch_dropout")
    n = tokens - num_prefix_tokens
    kept = kept_indices(seed_for(x.device, seed), (batch, n), choice.left(n, p))
    if ordered:
        kept = kept.sort(dim=-1).values
    # One index_select for all, by positions in the flattened tokens: its backward needs only the
    # shape of x.
    prefix = torch.arange(num_prefix_tokens, device=x.device).expand(batch, -1)
    starts = torch.arange(batch, device=x.device)[:, None] * tokens
    at = torch.cat((prefix, kept + num_prefix_tokens), dim=1) + starts
    out = x.flatten(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape)
    return (out, kept) if return_indices else out


def head_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    dim: int = 1,
    rescale: str = "expected",
    seed: int | Tensor | None = None,
) -> Tensor:
    """Drop whole attention heads, with separate decisions for each sample.

        out = where(keep, x * scale, 0),    keep of shape [B, H]

    Zhou et al., "Scheduled DropHead: a regularization method for transformer models", 2020. ``x``
    holds the heads' results, before they are concatenated and projected; if queries or keys were
    dropped, a head would still pass on its values. The mask is that of :func:`tridrop.dropout` with
    a ``noise_shape`` of None for the samples and the heads and 1 elsewhere.

    Args:
        x: [B, H, L, D], or any shape with the samples first and the heads at ``dim``.
        p: as in :func:`tridrop.dropout`; a number for ``rescale="kept"``.
        training: False returns ``x`` itself, as p = 0 does.
        dim: the dimension of the heads: 2 for [B, L, H, D].
        rescale: with "expected", scale is 1 / (1 - p). With "kept", it is H / (number of heads that
            the sample kept), as in the paper; the expected result is then (1 - p^H) x.
        seed: as in :func:`tridrop.dropout`.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`; ``dim`` not that of the heads; another
            ``rescale``.

    >>> head_dropout(torch.ones(2, 4, 1, 1), 0.5, seed=4).flatten(1)
    tensor([[0., 2., 0., 2.],
            [0., 0., 2., 0.]])
    """
    spec.check_input(x)
    spec_values.check_choice(rescale, "rescale", ("expected", "kept"))
    dim = spec_values.check_whole(dim, "dim")
    if not (1 <= dim < x.dim() or 1 - x.dim() <= dim < 0):
        raise ValueError(
            f"dim = {dim} for shape {tuple(x.shape)}; give the dimension of the heads, not the "
            "first, which is the dimension of the samples"
        )
    dim %= x.dim()
    if rescale == "expected":
        return dropout(x, p, training, noise_shape=_head_shape(x.dim(), dim), seed=seed)
    spec.check_probability(p)
    if not spec.drops(p, training):
        return x
    refuse_batch('head_dropout(rescale="kept")')
    out: Tensor = apply(Masked, x, seed_for(x.device, seed), _heads, (p, dim))
    return out


def _head_shape(dims: int, dim: int) -> tuple[int | None, ...]:
    return tuple(None if i in (0, dim) else 1 for i in range(dims))


def _heads(seed: Tensor, shape: Sequence[int], p: float, dim: int) -> tuple[Tensor, Tensor]:
    """(keep, scale) of head dropout that scales by the number of heads kept."""
    noise_shape = _head_shape(len(shape), dim)
    # One decision per sample and head: that of its first row in the whole tensor.
    small = tuple(1 if n == 1 else size for n, size in zip(noise_shape, shape, strict=True))
    whole = Shard(tuple(shape), (0,) * len(shape))
    keep = keep_mask(seed, small, p, noise_shape=noise_shape, shard=whole)
    return keep, shape[dim] / keep.sum(dim, keepdim=True, dtype=torch.float64).clamp(min=1)
