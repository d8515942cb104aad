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
    """The seed tensor, on whose device the mask is made: an int's on the CPU by default."""
    return as_seed(seed, device if isinstance(seed, Tensor) or device is not None else "cpu")


def _rate(p: float | Tensor, seed: Tensor) -> tuple[float, Tensor | None]:
    """(p, None), or (0, p) where it is a tensor; checked, also beside the seed."""
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
        seed: an int or a seed tensor, such as an op was given.
        shape: the shape of the op's result (of the local piece, where ``shard`` is given).
        p: the probability of dropping, as in :func:`tridrop.dropout`; for ``domain="drop_path"``
            that of dropping a sample.
        noise_shape, shard: as the op was given them.
        device: where to make an int's mask, "cpu" by default; a seed tensor's is made on its own.
        domain: "elements", or "drop_path" for the mask of :func:`tridrop.dropout_add`'s samples,
            which is constant over all but the first dimension.

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
                f"domain = 'drop_path' has one mask per sample of two dimensions or more and no "
                f"noise_shape; given shape {shape} and noise_shape {noise_shape}"
            )
        shared = tuple(range(1, len(shape)))
    where = spec.resolve_shard(shard, shape)
    *_, whole, origin, _, name = ops.pack(
        Options(shared=shared, shard=where), backends.choose(seed.device)
    )
    mask: Tensor = torch.ops.tridrop.keep_mask(
        seed, list(shape), p_tensor, rate, domain, list(shared), whole, origin, name
    )
    return mask


def kept_indices(
    seed: int | Tensor, shape: Sequence[int], k: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The k elements of each row that a rising p would drop last: int64, ``[..., k]``.

    Of the elements of the last dimension of ``shape``, those whose bits in :func:`keep_mask` are
    the largest, in falling order: a uniformly random subset of exactly k, in a random order, and a
    function of the seed alone. :func:`tridrop.patch_dropout` and :func:`tridrop.drop_path_subset`
    keep these.

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
        raise ValueError(f"k = {k} of shape {shape}; give from 0 to the size of the last dimension")
    seed = seed_on(seed, device)
    chosen: Tensor = torch.ops.tridrop.choose(seed, list(shape), k, backends.choose(seed.device))
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
    coordinates alone; docs/mask-contract.md defines every bit. A position that a causal or another
    mask excludes has a decision too, which attention does not look at.

    Args:
        seed: an int or a seed tensor, such as attention was given.
        shape: (batch, heads of the queries, queries, keys); of the local piece, where ``shard`` is
            given. Of packed sequences, batch counts them and queries and keys count from the start
            of each: the longest sequences give the shape.
        p: the probability of dropping, as in :func:`tridrop.dropout`.
        shard: where ``shape`` lies in the whole attention: ``tridrop.Shard(global_shape, origin)``,
            each of four numbers. Any dimension may be cut, anywhere.
        device: where to make an int's mask, "cpu" by default; a seed tensor's is made on its own.

    Returns:
        True where a probability is kept. It takes one byte per element, which attention itself
        never spends: cut out a shard of a long one.

    Raises:
        ValueError: p outside [0, 1], a shape that is not of four non-negative integers, a shard
            that does not fit it, coordinates past the contract's: 2^32 sequences, 2^28 heads, 2^32
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
        seed, list(shape), p_tensor, rate, origin, backends.choose(seed.device)
    )
    return mask
