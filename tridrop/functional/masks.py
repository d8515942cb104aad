"""The masks themselves, as the ops draw them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, ops
from ..base import arguments as spec_values
from ..contract.mask import as_seed
from ..spec import elementwise as spec
from ..spec.elementwise import Options
from .elementwise import ShardLike


def seed_on(seed: int | Tensor, device: torch.device | str | None) -> Tensor:
    """The seed tensor, which decides the mask's device: for an int this is the CPU by default."""
    return as_seed(seed, device if isinstance(seed, Tensor) or device is not None else "cpu")


def _rate(p: float | Tensor, seed: Tensor) -> tuple[float, Tensor | None]:
    """(p, None), or (0, p) if p is a tensor, after checks of p and of its device."""
    spec.check_probability(p, tensor_allowed=True)
    spec.check_rate(p, seed.device)
    return (0.0, p) if isinstance(p, Tensor) else (float(p), None)


def keep_mask(
    seed: int | Tensor,
    shape: Sequence[int],
    p: float | Tensor,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    device: torch.device | str | None = None,
    domain: str = "elements",
) -> Tensor:
    """The mask that an elementwise or norm op draws: bool, True where an element is kept.

    docs/mask-contract.md defines every bit of it.

    Args:
        seed: the op's seed, an int or a seed tensor.
        shape: the shape of the op's result (with ``shard``, of the local piece).
        p: the probability of dropping, as in :func:`tridrop.dropout`; for ``domain="drop_path"``
            the probability of dropping a sample.
        noise_shape, shard: those of the op.
        device: the mask's device for an int seed, "cpu" by default; a seed tensor's own device
            decides otherwise.
        domain: "elements", or "drop_path" for the mask of the samples in
            :func:`tridrop.dropout_add`, which is constant along all but the first dimension.

    >>> keep_mask(1, (8,), 0.5)
    tensor([ True, False,  True, False,  True, False,  True,  True])
    """
    seed = seed_on(seed, device)
    rate, p_tensor = _rate(p, seed)
    shape = spec.check_shape(shape)
    shared = spec.resolve_noise_shape(noise_shape, shape)
    spec_values.check_choice(domain, "domain", ("elements", "drop_path"))
    if domain == "drop_path":
        if noise_shape is not None or len(shape) < 2:
            raise ValueError(
                f"domain = 'drop_path' has one decision per sample, for a shape of two dimensions "
                f"or more and without noise_shape; given shape {shape} and noise_shape "
                f"{noise_shape}"
            )
        shared = tuple(range(1, len(shape)))
    where = spec.resolve_shard(shard, shape)
    *_, whole, origin, _, name = ops.pack(
        Options(shared=shared, shard=where), backends.name_for(seed.device)
    )
    mask: Tensor = torch.ops.tridrop.keep_mask(
        seed, list(shape), p_tensor, rate, domain, list(shared), whole, origin, name
    )
    return mask


def kept_indices(
    seed: int | Tensor, shape: Sequence[int], k: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The k elements of each row that a rising p would drop last: int64, ``[..., k]``.

    A row is the last dimension of ``shape``. The result holds the indices of the elements with the
    largest random bits in :func:`keep_mask`, the largest first. They are a uniformly random subset
    of exactly k elements, in random order, and a function of the seed alone.
    :func:`tridrop.patch_dropout` and :func:`tridrop.drop_path_subset` keep these elements.

    Raises:
        ValueError: k outside [0, shape[-1]]; a shape without dimensions or with negative sizes.
        TypeError: seed, shape or k of another type.

    >>> kept_indices(1, (2, 6), 3)
    tensor([[2, 0, 4],
            [1, 3, 5]])
    """
    shape = spec.check_shape(shape)
    k = spec_values.check_whole(k, "k", wanted="how many to keep, an int")
    if not shape or not 0 <= k <= shape[-1]:
        raise ValueError(
            f"k = {k} for shape {shape}; give a number from 0 to the size of the last dimension"
        )
    seed = seed_on(seed, device)
    chosen: Tensor = torch.ops.tridrop.choose(seed, list(shape), k, backends.name_for(seed.device))
    return chosen


def attention_keep_mask(
    seed: int | Tensor,
    shape: Sequence[int],
    p: float | Tensor,
    *,
    shard: ShardLike | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask that attention draws for its probabilities: bool, ``[B, H, Sq, Sk]``.

        out = where(keep, softmax(scores) * scale, 0) @ value

    The decision at (batch, head, query, key) is a function of the seed, p and these four
    coordinates alone; docs/mask-contract.md defines every bit. A position that an attention mask or
    causal order excludes has a decision too, which attention ignores.

    Args:
        seed: the seed of the attention, an int or a seed tensor.
        shape: (batch, heads of the queries, queries, keys); with ``shard``, those of the local
            piece. For packed sequences, the batch is the number of sequences, and queries and keys
            count from the start of each sequence: give the lengths of the longest ones.
        p: the probability of dropping, as in :func:`tridrop.dropout`.
        shard: where ``shape`` lies in the whole attention: ``tridrop.Shard(global_shape, origin)``,
            both with four numbers. Any dimension may be cut anywhere.
        device: the mask's device for an int seed, "cpu" by default; a seed tensor's own device
            decides otherwise.

    Returns:
        True where a probability is kept. It takes one byte per element, which attention itself
        never needs: for long sequences, ask for a shard of the mask.

    Raises:
        ValueError: p outside [0, 1], a shape that is not four non-negative integers, a shard that
            does not fit it, coordinates beyond the contract's: 2^32 sequences, 2^28 heads, 2^32
            queries, 2^35 keys.
        TypeError: p, seed, shape or shard of another type.

    >>> import tridrop
    >>> keep = attention_keep_mask(1, (2, 4, 16, 64), 0.25)
    >>> keep[1, 3, 15, 60:]
    tensor([ True, False,  True,  True])
    >>> where = tridrop.Shard(global_shape=(2, 4, 16, 64), origin=(1, 3, 15, 60))
    >>> attention_keep_mask(1, (1, 1, 1, 4), 0.25, shard=where)
    tensor([[[[ True, False,  True,  True]]]])
    """
    seed = seed_on(seed, device)
    rate, p_tensor = _rate(p, seed)
    shape = spec.check_shape(shape)
    spec.check_attention_coordinates(shape)
    where = spec.resolve_shard(shard, shape, flattened=False)
    origin = [0, 0, 0, 0]
    if where is not None:
        spec.check_attention_coordinates(where.global_shape)
        origin = list(where.origin)
    mask: Tensor = torch.ops.tridrop.attention_keep_mask(
        seed, list(shape), p_tensor, rate, origin, backends.name_for(seed.device)
    )
    return mask
