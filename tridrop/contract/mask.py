"""The mask contract in torch: seeds, thresholds, coordinates and the keep decision.

This is the executable form of docs/mask-contract.md; ``backends/triton/mask.py`` and
``backends/cpu/loops/mask.py`` are its twins. Its functions are pure, except :func:`new_seed`, which
draws from torch's generator. The random bits come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw:
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). torch lacks some unsigned operations, so
32-bit words are int64 tensors whose values lie in [0, 2^32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.arguments import check_tensor, check_whole
from ..base.lasting import lasting

# Philox4x32: the multipliers of a round and the Weyl increments of its key (Random123).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

# The key multiplies the stream by the first constant, 2^64 / golden ratio, which spreads the
# multiples of small integers as far apart as any constant can. fold_in multiplies the old stream by
# the second one, an unrelated odd constant. docs/mask-contract.md says when two seeds collide.
STREAM_MULTIPLIER = 0x9E3779B97F4A7C15
FOLD_MULTIPLIER = 0xD1342543DE82EF95

# Which family of masks a counter belongs to: the top four bits of its last word.
DOMAINS = {"elements": 0, "drop_path": 1, "attention": 2, "normal": 3}

LANES = 8  # decisions per Philox call: for eight consecutive columns, or eight keys of one query
TILE = 32  # in attention, four calls decide on 32 consecutive keys
ONE = 1 << 32  # a threshold of ONE drops everything
_WORD = ONE - 1


def philox(
    counter: Sequence[Tensor], key: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words and two key words.

    The words are int64 tensors with values in [0, 2^32), whose shapes broadcast together; so are
    the four results.

    >>> zero = torch.tensor(0)
    >>> [hex(int(w)) for w in philox((zero,) * 4, (zero,) * 2)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # An int64 product wraps around as a uint64 product does. The shift is arithmetic: `& _WORD`
        # cuts off the copies of the sign bit.
        a = c0 * PHILOX_M0
        b = c2 * PHILOX_M1
        c0 = ((b >> 32) ^ (c1 ^ k0)) & _WORD
        c1 = b & _WORD
        c2 = ((a >> 32) ^ (c3 ^ k1)) & _WORD
        c3 = a & _WORD
        k0 = (k0 + PHILOX_W0) & _WORD
        k1 = (k1 + PHILOX_W1) & _WORD
    return c0, c1, c2, c3


# ---------------------------------------------------------------------------------------- seeds


def _wrap(value: int) -> int:
    """``value`` modulo 2^64 as a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def as_seed(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The seed tensor (seed, stream): int64, shape [2]. An int stands for ``(seed, 0)``.

    Raises TypeError for anything but an int or an int64 tensor, and ValueError for an int outside
    int64 or for a tensor of another shape or on another device than ``device``.

    >>> as_seed(7)
    tensor([7, 0])
    """
    if isinstance(seed, Tensor):
        if not torch.compiler.is_compiling() and seed.layout is not torch.strided:
            check_tensor(seed, "seed")
        if seed.dtype != torch.int64:
            raise TypeError(
                f"seed has dtype {seed.dtype}; a seed tensor is int64 of shape [2], "
                "as tridrop.new_seed(device) makes it"
            )
        if tuple(seed.shape) != (2,):
            raise ValueError(
                f"seed has shape {tuple(seed.shape)}; a seed tensor is (seed, stream), of shape "
                "[2]: use tridrop.new_seed(device) or tridrop.fold_in(seed, stream)"
            )
        if device is not None and seed.device != _with_index(device):
            raise ValueError(
                f"seed is on {seed.device} but the data is on {device}: "
                f"move it once with seed.to('{device}')"
            )
        return seed
    seed = check_whole(seed, "seed", wanted="None, an int, or an int64 tensor of shape [2]")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed = {seed} is outside int64, [-2^63, 2^63)")
    # Filled on the device: torch.tensor(..., device="cuda") would wait for a copy.
    result = torch.zeros(2, dtype=torch.int64, device=device)
    result[:1].fill_(seed)
    return lasting(result)


def _with_index(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors have it: "cuda" means the current CUDA device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def new_seed(
    device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Draw a seed tensor, int64 of shape [2], from torch's generator of ``device``.

    This takes one launch and does not synchronise the host with the device. torch.manual_seed,
    torch.utils.checkpoint, CUDA graph capture and the random-state trackers of parallel frameworks
    govern it as they govern torch.nn.functional.dropout. Both entries are drawn.

    Args:
        device: the device of the seed, which must be that of the data it is used for.
        generator: the generator to draw from, instead of the device's default one.

    >>> _ = torch.manual_seed(0)
    >>> new_seed("cpu").shape
    torch.Size([2])
    """
    if generator is None and torch.compiler.is_compiling():
        # Inductor's randint has a generator of its own, but an opaque operator draws as eager code
        # does. The operator takes an empty tensor because the compiler never merges two of these:
        # two calls of an operator without arguments would become one draw.
        place = torch.empty(2, dtype=torch.int64, device=device)
        return torch.ops.tridrop.new_seed(place)
    return lasting(torch.randint((1 << 63) - 1, (2,), device=device, generator=generator))


def fold_in(seed: int | Tensor, stream: int | Tensor) -> Tensor:
    """A seed for call site ``stream`` under ``seed``: ``(seed, old_stream * K + stream)``.

    Arithmetic is modulo 2^64 and K = 0xD1342543DE82EF95, so an int seed gives ``(seed, stream)``.
    Use it to give each rank, step, layer or sample masks of its own, and nest it as deep as needed:
    ``fold_in(fold_in(seed, step), site)``. Nest to the same depth everywhere, because a stream of 0
    leaves no trace: ``fold_in(fold_in(seed, 0), site)`` equals ``fold_in(seed, site)``.

    Args:
        seed: an int or a seed tensor.
        stream: an int in [-2^63, 2^63), or an int64 tensor of shape [] on the seed's device.

    >>> fold_in(7, 3)
    tensor([7, 3])
    """
    base = as_seed(seed)
    if isinstance(stream, Tensor):
        check_tensor(stream, "stream")
        if stream.dtype != torch.int64 or stream.dim() != 0:
            found = f"{stream.dtype} and shape {tuple(stream.shape)}"
            raise TypeError(f"stream has dtype {found}; give an int or an int64 tensor of shape []")
        if stream.device != base.device:
            raise ValueError(f"stream is on {stream.device} but seed is on {base.device}: move it")
    else:
        stream = check_whole(stream, "stream")
        if not -(1 << 63) <= stream < 1 << 63:
            raise ValueError(f"stream = {stream} is outside int64, [-2^63, 2^63)")
    folded = base[1] * _wrap(FOLD_MULTIPLIER) + stream
    return lasting(torch.stack((base[0], folded)))


def key_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two Philox key words of a seed tensor: ``seed + stream * 0x9E3779B97F4A7C15``."""
    key = seed[0] + seed[1] * _wrap(STREAM_MULTIPLIER)
    return key & _WORD, (key >> 32) & _WORD


# ----------------------------------------------------------------------------------- probability


def threshold(p: float) -> int:
    """``T = round(p * 2^32)``, ties to even; an element is dropped iff its 32 bits are below T.

    >>> threshold(0.1), threshold(1.0)
    (429496730, 4294967296)
    """
    return round(p * ONE)  # the product is exact, since it only changes the exponent


def scale(drop_threshold: int) -> float:
    """``2^32 / (2^32 - T)``, the reciprocal of the exact keep rate; 0 where nothing is kept."""
    return ONE / (ONE - drop_threshold) if drop_threshold < ONE else 0.0


def rate_table(p: Tensor) -> Tensor:
    """(T, scale) of a 0-d tensor ``p`` as a float64 tensor of shape [2], without synchronising.

    A ``p`` that is NaN or outside [0, 1] cannot raise, since looking at it would wait for the
    device: it keeps everything with a scale of NaN, so that the loss shows the mistake at once.
    """
    p64 = p.double()
    valid = (p64 >= 0) & (p64 <= 1)
    t = torch.round(p64 * ONE)
    kept = torch.where(t < ONE, ONE / (ONE - t), torch.zeros_like(t))
    nan = torch.full_like(t, math.nan)
    return torch.stack((torch.where(valid, t, 0.0), torch.where(valid, kept, nan)))


# ----------------------------------------------------------------------------------- coordinates


@dataclass(frozen=True)
class Shard:
    """Where a local tensor lies in a larger one: a shard's mask is that piece of the whole mask.

    ``global_shape`` is the shape of the whole tensor, and ``origin`` is the index that the local
    tensor's first element has in it.

    >>> whole = keep_mask(as_seed(1), (4, 6), threshold(0.5))
    >>> part = keep_mask(as_seed(1), (2, 3), threshold(0.5), shard=Shard((4, 6), origin=(2, 3)))
    >>> bool((part == whole[2:, 3:]).all())
    True
    """

    global_shape: tuple[int, ...]
    origin: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, ...]]:  # for functions that take a pair of tuples
        return iter((self.global_shape, self.origin))


@dataclass(frozen=True)
class Coordinates:
    """How the local index (row, col) of an element becomes its coordinate in the contract.

    ``leading`` lists (size, origin, weight) from the innermost leading dimension outwards:

        coordinate(row) = sum over i of ((row // prod(size[:i])) % size[i] + origin[i]) * weight[i]

    It is empty where the coordinate is the row itself. Dimensions that share a mask have weight 0.
    """

    rows: int
    cols: int
    leading: tuple[tuple[int, int, int], ...]
    col_origin: int
    col_shared: bool


def coordinates(
    shape: Sequence[int], shared: Sequence[int] = (), shard: Shard | None = None
) -> Coordinates:
    """The coordinates of a tensor of ``shape`` whose mask is shared along dimensions ``shared``."""
    if len(shape) == 0:
        return Coordinates(1, 1, (), 0, False)
    whole = tuple(shape) if shard is None else shard.global_shape
    origin = (0,) * len(shape) if shard is None else shard.origin
    merged: list[tuple[int, int, int]] = []
    weight = 1
    for dim in range(len(shape) - 2, -1, -1):
        size, start, step = shape[dim], origin[dim], weight
        weight *= whole[dim]
        if dim in shared:
            start, step = 0, 0
        if size == 1 and start * step == 0:
            continue
        if merged:
            inner_size, inner_start, inner_step = merged[-1]
            # Two dimensions become one where the outer one's step is the inner one's whole extent,
            # and where the mask is shared along both.
            if step == inner_size * inner_step:
                size, start, step = size * inner_size, start * inner_size + inner_start, inner_step
                merged.pop()
        merged.append((size, start, step))
    if len(merged) == 1 and merged[0][1:] == (0, 1):
        merged = []
    return Coordinates(
        rows=math.prod(shape[:-1]),
        cols=shape[-1],
        leading=tuple(merged),
        col_origin=origin[-1],
        col_shared=len(shape) - 1 in shared,
    )


def row_coordinates(where: Coordinates, device: torch.device | str | None) -> Tensor:
    """The row coordinate of every local row: int64, shape [rows]."""
    row = torch.arange(where.rows, dtype=torch.int64, device=device)
    if not where.leading:
        return row
    result = torch.zeros_like(row)
    for size, origin, weight in where.leading:
        result += (row % size + origin) * weight
        row = row // size
    return result


# ---------------------------------------------------------------------------------------- masks

# How many Philox calls are computed at a time: the temporaries of so many fit a core's cache.
_BLOCK = 1 << 16


def lanes(words: Sequence[Tensor]) -> Iterator[Tensor]:
    """The 32 bits of each of a call's eight decisions: every word, and every word rotated."""
    for word in words:
        yield word
        yield ((word << 16) & _WORD) | (word >> 16)


def counter_of(domain: int, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The counter words of every row coordinate and column group: [rows or 1, groups or 1]."""
    row, group = rows[:, None], groups[None, :]
    return group & _WORD, row & _WORD, (row >> 32) & _WORD, (group >> 32) | (domain << 28)


def _decisions(
    counter: Sequence[Tensor], rows: int, groups: int, key: tuple[Tensor, Tensor], t: int | Tensor
) -> Tensor:
    """The eight decisions of each counter, whose words are [rows or 1, groups or 1]: bool, [rows,
    groups, 8]."""
    keep = torch.empty((rows, groups, LANES), dtype=torch.bool, device=key[0].device)
    step = max(1, _BLOCK // max(1, groups))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        words = philox([w[part] if w.shape[0] > 1 else w for w in counter], key)
        for i, bits in enumerate(lanes(words)):
            keep[part, :, i] = bits >= t
    return keep


def keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    shared: Sequence[int] = (),
    shard: Shard | None = None,
    domain: str = "elements",
) -> Tensor:
    """The mask of a tensor of ``shape``: bool, True where an element is kept.

    This is the contract itself. The public :func:`tridrop.keep_mask` checks its arguments and takes
    ``p`` and ``noise_shape``.

    Args:
        seed: a seed tensor; the mask is made on its device.
        shape: the shape of the mask.
        drop_threshold: T, an int or an integer 0-d tensor.
        shared: the dimensions along which the mask is shared.
        shard: where this tensor lies in a larger one.
        domain: "elements" or "drop_path".
    """
    where = coordinates(shape, shared, shard)
    if domain == "drop_path" and not where.col_shared:
        raise ValueError("the masks of drop_path are shared along the last dimension")
    rows = row_coordinates(where, seed.device)
    first = 0 if where.col_shared else where.col_origin
    cols = min(1, where.cols) if where.col_shared else where.cols
    groups = torch.arange(
        first // LANES, -(-(first + cols) // LANES), dtype=torch.int64, device=seed.device
    )
    counter = counter_of(DOMAINS[domain], rows, groups)
    keep = _decisions(counter, len(rows), len(groups), key_of(seed), drop_threshold).flatten(1)
    keep = keep[:, first % LANES : first % LANES + cols]
    return keep.expand(where.rows, where.cols).reshape(tuple(shape)).contiguous()


def attention_keep_mask(
    seed: Tensor,
    shape: Sequence[int],
    drop_threshold: int | Tensor,
    *,
    origin: Sequence[int] = (0, 0, 0, 0),
) -> Tensor:
    """The mask of attention probabilities: bool, ``[batch, heads, queries, keys]``.

    The coordinates of an element are its indices plus ``origin``. A Philox call decides for one
    query on eight of 32 consecutive keys, the pair (2i, 2i + 1) of each octet. One thread holds
    just these of a row of a tensor core's accumulator, so kernels need not move decisions.
    """
    device = seed.device
    start, tile, keys = origin[3] % TILE, origin[3] // TILE, shape[3]
    tiles = -(-(start + keys) // TILE)
    group = torch.arange(4 * tile, 4 * (tile + tiles), device=device)[None, :]
    at = (torch.arange(o, o + n, device=device) for o, n in zip(origin, shape[:3], strict=False))
    batch, head, query = (t.reshape(-1, 1) for t in torch.meshgrid(*at, indexing="ij"))
    counter = (query, group, batch, head | DOMAINS["attention"] << 28)
    keep = _decisions(counter, len(query), 4 * tiles, key_of(seed), drop_threshold)
    # [rows, tiles, pairs, octets, 2] -> keys in order
    keep = keep.view(len(query), tiles, 4, 4, 2).transpose(2, 3).flatten(1)
    return keep[:, start : start + keys].reshape(tuple(shape))
