"""How the operands of an op may lie on a mesh of processes, and which piece each process computes.

An op names the dimensions of its operands and results, as einsum does. A dimension of a mesh cuts
one name, or none. Then every operand with that name is cut along it, every operand without it is
whole in each process, and its gradient is a sum over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..spec.elementwise import ACTIVATIONS

Names = tuple[str, ...]
SHARED = ""  # a dimension of size 1 that is broadcast: nobody has a part of it


class Piece(NamedTuple):
    """The part of a named dimension that this process has."""

    size: int
    start: int
    whole: int


class Operand(NamedTuple):
    """A tensor argument: what it is called, and the name of each of its dimensions."""

    label: str
    names: Names
    plain: bool = False  # it may also be a plain tensor, the whole one in every process: a mask


@dataclass(frozen=True)
class Layout:
    """What an op says of its arguments.

    ``operands`` are tensor arguments by their place, ``seed`` is the seed's. ``whole`` are the
    names that cannot be cut, and why. ``linear`` are the places of the operands that may, all
    together, be Partial: the result is then a sum over processes as well. ``settle`` gives the
    options of a process.
    """

    operands: Mapping[int, Operand]
    seed: int
    results: Sequence[Names | None]
    whole: Mapping[str, str]
    settle: Callable[[Mapping[str, Piece]], tuple[Any, ...]]
    linear: tuple[int, ...] = ()
    even: Mapping[str, str] = field(default_factory=dict)  # cut as another name is, evenly


def aligned(shape: Sequence[int], names: Names, sizes: Sequence[int]) -> Names:
    """The names of an operand that broadcasts, from the last dimension, to ``names``."""
    last = list(zip(reversed(shape), reversed(names), reversed(sizes), strict=False))
    return tuple(SHARED if n == 1 and size != 1 else name for n, name, size in reversed(last))


# ------------------------------------------------------------------------ elementwise and norms

# In the arguments of both families' functions, and in packed options.
_X, _BIAS, _LAYER_SCALE, _RESIDUAL = range(4)
_WHOLE, _ORIGIN, _NOISE = 4, 5, 6


def _rows(
    arguments: Sequence[Any],
    packed: tuple[Any, ...],
    vectors: Mapping[int, str],
    seed: int,
    results: int,
    whole: Mapping[str, str],
) -> Layout:
    x = arguments[_X]
    gated = ACTIVATIONS[packed[0]][1]
    outer: Names = tuple(f"dimension {i}" for i in range(x.dim() - 1))
    names = (*outer, "columns") if x.dim() else ()
    wide: Names = (*outer, "halves") if gated else names
    operands = {_X: Operand("x", wide), _RESIDUAL: Operand("residual", names)}
    for place, label in vectors.items():
        width: Names = ("halves",) if gated and place == _BIAS else ("columns",)
        operands[place] = Operand(label, width)
    gain = arguments[_LAYER_SCALE]
    if gain is not None and gain.dim() > 1:
        operands[_LAYER_SCALE] = Operand("gate", (names[0], "columns"))
    if gated:
        why = f"{packed[0]} needs both halves of the last dimension"
        whole = {**whole, "columns": why, "halves": why}
    shape = [*x.shape[:-1], x.shape[-1] // 2] if gated else list(x.shape)

    def settle(pieces: Mapping[str, Piece]) -> tuple[Any, ...]:
        return _settle_rows(packed, shape, [pieces[name].start for name in names])

    # What is added besides the parts would be added in each of them.
    linear = packed[0] == "none" and packed[_NOISE] != "alpha" and arguments[_BIAS] is None
    return Layout(
        operands=operands,
        seed=seed,
        results=(names,) * results,
        whole=whole,
        settle=settle,
        linear=(_X, _RESIDUAL) if linear and not whole else (),
    )


def _settle_rows(
    packed: tuple[Any, ...], shape: list[int], starts: Sequence[int]
) -> tuple[Any, ...]:
    """Packed options for the piece that begins at ``starts`` of a tensor of ``shape``."""
    given = packed[_ORIGIN] or [0] * len(shape)
    changed = list(packed)
    changed[_WHOLE] = packed[_WHOLE] or shape
    changed[_ORIGIN] = [a + b for a, b in zip(given, starts, strict=True)]
    return tuple(changed)


def elementwise(*arguments: Any) -> Layout:
    """Of ``Fused``: any dimension may be cut; both halves of a gated activation belong together."""
    vectors = {_BIAS: "bias", _LAYER_SCALE: "layer_scale"}
    return _rows(arguments, arguments[-1], vectors, 4, 1, {})


def norm(*arguments: Any) -> Layout:
    """Of ``FusedNorm``: any dimension but the last may be cut."""
    vectors = {_BIAS: "bias", _LAYER_SCALE: "layer_scale", 4: "weight", 5: "norm_bias"}
    whole = {"columns": "a norm needs the last dimension whole"}
    return _rows(arguments, arguments[-1], vectors, 6, 2, whole)


def product(*arguments: Any) -> Layout:
    """Of ``Product``: any dimension of x may be cut; of the last, results are partial sums."""
    x, packed = arguments[_X], arguments[-1]
    outer: Names = tuple(f"dimension {i}" for i in range(x.dim() - 1))
    names = (*outer, "columns")

    def settle(pieces: Mapping[str, Piece]) -> tuple[Any, ...]:
        return _settle_rows(packed, list(x.shape), [pieces[name].start for name in names])

    return Layout(
        operands={_X: Operand("x", names), 1: Operand("the matrix A", ("ranks", "columns"))},
        seed=2,
        results=((*outer, "ranks"),),
        whole={"ranks": "the ranks of adapters are not cut"},
        settle=settle,
        linear=(_X,),
    )


# ------------------------------------------------------------------------- softmax and attention

_LOWER, _UPPER, _FIRST, _MAX_QUERY, _MAX_KEY = 2, 3, 5, 6, 7


def _settle_scores(
    packed: tuple[Any, ...], batch: Piece, head: int, query: Piece, key: Piece
) -> tuple[Any, ...]:
    """Packed options of attention for a piece of the scores."""
    changed = list(packed)
    starts = (batch.start, head, query.start, key.start)
    changed[_FIRST] = [a + b for a, b in zip(packed[_FIRST], starts, strict=True)]
    for bound in (_LOWER, _UPPER):  # of local indices, which differ from those of the whole
        if packed[bound] is not None:
            changed[bound] = packed[bound] + query.start - key.start
    if query.size != query.whole:
        changed[_MAX_QUERY] = query.size
    return tuple(changed)


def softmax(*arguments: Any) -> Layout:
    """Of ``SoftmaxDropout``: any dimension but the keys may be cut."""
    scores, mask, _, _, packed = arguments
    count = scores.dim()
    inner: Names = ("heads", "queries", "keys")[max(0, 3 - count) :]
    outer: Names = tuple(f"dimension {i}" for i in range(count - len(inner)))
    names = (*outer, *inner)
    operands = {0: Operand("scores", names)}
    if mask is not None:
        operands[1] = Operand("mask", aligned(mask.shape, names, scores.shape), plain=True)
    whole = {"keys": "a softmax needs all keys of a query"}
    # Batch dimensions count as one: a part of an inner one has no single origin.
    whole |= dict.fromkeys(outer[1:], "only the first of several batch dimensions can be cut")
    inner_batch = 1
    for n in scores.shape[1 : len(outer)]:
        inner_batch *= n

    def settle(pieces: Mapping[str, Piece]) -> tuple[Any, ...]:
        start = pieces[outer[0]].start * inner_batch if outer else 0
        head = pieces["heads"].start if count > 2 else 0
        batch = Piece(0, start, 0)
        return _settle_scores(packed, batch, head, pieces["queries"], pieces["keys"])

    return Layout(operands, 2, (names, names, None), whole, settle)


def attention(*arguments: Any) -> Layout:
    """Of ``Attention``: the batch, heads and queries may be cut."""
    query, key, _, mask, key_mask, sinks, cu_query, _, _, _, packed = arguments
    heads, shared = query.shape[1], key.shape[1]
    of_keys = "heads" if heads == shared else "key heads" if shared > 1 else SHARED
    operands = {
        0: Operand("query", ("batch", "heads", "queries", "features")),
        1: Operand("key", ("batch", of_keys, "keys", "features")),
        2: Operand("value", ("batch", of_keys, "keys", "width")),
    }
    whole = {
        "keys": "the softmax needs all keys of a query (for a ring over blocks of keys see "
        "docs/distributed.md)",
        "features": "the scores are sums over the features",
        "width": "the width of the values is not cut",
    }
    packed_names = ("sequences", "heads", "longest queries", "longest keys")
    if cu_query is None:
        sizes = (query.shape[0], heads, query.shape[2], key.shape[2])
    else:  # dimensions of masks count sequences, which lie anywhere in the tokens
        why = "packed sequences lie anywhere in the tokens: only heads can be cut"
        whole |= {n: why for n in ("batch", "queries", *packed_names) if n != "heads"}
        sizes = (cu_query.shape[0] - 1, heads, packed[_MAX_QUERY], packed[_MAX_KEY])
    names: Names = ("batch", "heads", "queries", "keys") if cu_query is None else packed_names
    if mask is not None:
        operands[3] = Operand("attn_mask", aligned(mask.shape, names, sizes), plain=True)
    if key_mask is not None:
        operands[4] = Operand("key_mask", (names[0], names[3]), plain=True)
    if sinks is not None:
        operands[5] = Operand("sinks", ("heads",))

    def settle(pieces: Mapping[str, Piece]) -> tuple[Any, ...]:
        head = pieces["heads"].start
        return _settle_scores(packed, pieces["batch"], head, pieces["queries"], pieces["keys"])

    return Layout(
        operands,
        8,
        (("batch", "heads", "queries", "width"), ("batch", "heads", "queries")),
        whole,
        settle,
        even={"key heads": "heads"},
    )
