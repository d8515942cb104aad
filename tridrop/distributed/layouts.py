"""How the operands of an op may be distributed on a mesh, and which piece each process computes.

An op names the dimensions of its operands and results, as einsum does. A mesh dimension cuts one
named dimension, or none. Every operand with that name is cut along it; every operand without it is
whole in each process, and its gradient is a sum over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..spec.attention import AttentionInputs
from ..spec.elementwise import ACTIVATIONS
from ..spec.operands import Elementwise, Norm, Product, Softmax

Names = tuple[str, ...]
SHARED = ""  # the name of a dimension of size 1 that is broadcast, and is never cut


class Piece(NamedTuple):
    """The part of a named dimension that this process has."""

    size: int
    start: int
    whole: int


class Operand(NamedTuple):
    """A tensor operand: its name in error messages, and the name of each of its dimensions."""

    label: str
    names: Names
    # whether it may be a plain tensor that is whole in every process, as a mask
    plain: bool = False


@dataclass(frozen=True)
class Layout:
    """The layout of an op's arguments.

    ``tensors`` is the tuple of operands, and ``seed`` the operand that is a seed. ``operands``
    describes those that can be distributed, by field name. ``whole`` has the names of dimensions
    that cannot be cut, with the reason. ``linear`` names the operands that may be Partial, if all
    of them are; the result is then Partial too. ``settle`` gives the packed options of this
    process.
    """

    tensors: Any
    operands: Mapping[str, Operand]
    seed: Tensor | None
    results: Sequence[Names | None]
    whole: Mapping[str, str]
    settle: Callable[[Mapping[str, Piece]], Any]
    linear: tuple[str, ...] = ()
    # name -> another name with which it is cut evenly
    even: Mapping[str, str] = field(default_factory=dict)


def aligned(shape: Sequence[int], names: Names, sizes: Sequence[int]) -> Names:
    """The names of an operand that broadcasts to ``names``, aligned at the last dimension."""
    last = list(zip(reversed(shape), reversed(names), reversed(sizes), strict=False))
    return tuple(SHARED if n == 1 and size != 1 else name for n, name, size in reversed(last))


# ------------------------------------------------------------------------ elementwise and norms


def _rows(
    tensors: Elementwise | Norm,
    packed: Any,
    vectors: Sequence[str],
    results: int,
    whole: Mapping[str, str],
) -> Layout:
    x, gain = tensors.x, tensors.layer_scale
    gated = ACTIVATIONS[packed.activation][1]
    outer: Names = tuple(f"dimension {i}" for i in range(x.dim() - 1))
    names = (*outer, "columns") if x.dim() else ()
    wide: Names = (*outer, "halves") if gated else names
    operands = {"x": Operand("x", wide), "residual": Operand("residual", names)}
    for name in vectors:
        width: Names = ("halves",) if gated and name == "bias" else ("columns",)
        operands[name] = Operand(name, width)
    if gain is not None and gain.dim() > 1:
        operands["layer_scale"] = Operand("gate", (names[0], "columns"))
    if gated:
        why = f"{packed.activation} needs both halves of the last dimension"
        whole = {**whole, "columns": why, "halves": why}
    shape = [*x.shape[:-1], x.shape[-1] // 2] if gated else list(x.shape)

    def settle(pieces: Mapping[str, Piece]) -> Any:
        return _settle_rows(packed, shape, [pieces[name].start for name in names])

    # With a bias or an alpha mask the op is not linear: each part of a sum would add them again.
    linear = packed.activation == "none" and packed.noise != "alpha" and tensors.bias is None
    return Layout(
        tensors=tensors,
        operands=operands,
        seed=tensors.seed,
        results=(names,) * results,
        whole=whole,
        settle=settle,
        linear=("x", "residual") if linear and not whole else (),
    )


def _settle_rows(packed: Any, shape: list[int], starts: Sequence[int]) -> Any:
    """The packed options for the piece that begins at ``starts`` in a tensor of ``shape``."""
    given = packed.origin or [0] * len(shape)
    origin = [a + b for a, b in zip(given, starts, strict=True)]
    return packed._replace(global_shape=packed.global_shape or shape, origin=origin)


def elementwise(*arguments: Any) -> Layout:
    """The layout of ``Fused``: any dimension can be cut, except halves of a gated activation."""
    *tensors, packed = arguments
    return _rows(Elementwise(*tensors), packed, ("bias", "layer_scale"), 1, {})


def norm(*arguments: Any) -> Layout:
    """The layout of ``FusedNorm``: any dimension except the last can be cut."""
    *tensors, packed = arguments
    vectors = ("bias", "layer_scale", "weight", "norm_bias")
    whole = {"columns": "a norm needs the last dimension whole"}
    return _rows(Norm(*tensors), packed, vectors, 2, whole)


def product(*arguments: Any) -> Layout:
    """The layout of ``DroppedProduct``: any dimension of x; if the last, results are partial."""
    *given, packed = arguments
    tensors = Product(*given)
    x = tensors.x
    outer: Names = tuple(f"dimension {i}" for i in range(x.dim() - 1))
    names = (*outer, "columns")

    def settle(pieces: Mapping[str, Piece]) -> Any:
        return _settle_rows(packed, list(x.shape), [pieces[name].start for name in names])

    return Layout(
        tensors=tensors,
        operands={
            "x": Operand("x", names),
            "weight": Operand("the matrix A", ("ranks", "columns")),
        },
        seed=tensors.seeds,
        results=((*outer, "ranks"),),
        whole={"ranks": "the ranks of adapters are not cut"},
        settle=settle,
        linear=("x",),
    )


# ------------------------------------------------------------------------- softmax and attention


def _settle_scores(packed: Any, batch: Piece, head: int, query: Piece, key: Piece) -> Any:
    """The packed options of attention for a piece of the scores."""
    starts = (batch.start, head, query.start, key.start)
    # The limits of the band refer to local indices, which are shifted against the global ones.
    shift = query.start - key.start
    return packed._replace(
        origin=[a + b for a, b in zip(packed.origin, starts, strict=True)],
        lower=None if packed.lower is None else packed.lower + shift,
        upper=None if packed.upper is None else packed.upper + shift,
        max_query=packed.max_query if query.size == query.whole else query.size,
    )


def softmax(*arguments: Any) -> Layout:
    """The layout of ``SoftmaxDropout``: any dimension except the keys can be cut."""
    *given, packed = arguments
    tensors = Softmax(*given)
    scores, mask = tensors.scores, tensors.mask
    count = scores.dim()
    inner: Names = ("heads", "queries", "keys")[max(0, 3 - count) :]
    outer: Names = tuple(f"dimension {i}" for i in range(count - len(inner)))
    names = (*outer, *inner)
    operands = {"scores": Operand("scores", names)}
    if mask is not None:
        operands["mask"] = Operand("mask", aligned(mask.shape, names, scores.shape), plain=True)
    whole = {"keys": "a softmax needs all keys of a query"}
    # Batch dimensions count as one, in which a piece of an inner one would have no single origin.
    whole |= dict.fromkeys(outer[1:], "only the first of several batch dimensions can be cut")
    inner_batch = 1
    for n in scores.shape[1 : len(outer)]:
        inner_batch *= n

    def settle(pieces: Mapping[str, Piece]) -> Any:
        start = pieces[outer[0]].start * inner_batch if outer else 0
        head = pieces["heads"].start if count > 2 else 0
        batch = Piece(0, start, 0)
        return _settle_scores(packed, batch, head, pieces["queries"], pieces["keys"])

    return Layout(tensors, operands, tensors.seed, (names, names, None), whole, settle)


def attention(*arguments: Any) -> Layout:
    """The layout of ``Attention``: batch, heads and queries can be cut."""
    *given, packed = arguments
    tensors = AttentionInputs(*given)
    query, key, cu_query = tensors.query, tensors.key, tensors.cu_query
    heads, shared = query.shape[1], key.shape[1]
    of_keys = "heads" if heads == shared else "key heads" if shared > 1 else SHARED
    operands = {
        "query": Operand("query", ("batch", "heads", "queries", "features")),
        "key": Operand("key", ("batch", of_keys, "keys", "features")),
        "value": Operand("value", ("batch", of_keys, "keys", "width")),
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
    else:  # masks have a dimension of sequences, which begin anywhere among the tokens
        why = "packed sequences may begin at any token: only heads can be cut"
        whole |= {n: why for n in ("batch", "queries", *packed_names) if n != "heads"}
        sizes = (cu_query.shape[0] - 1, heads, packed.max_query, packed.max_key)
    names: Names = ("batch", "heads", "queries", "keys") if cu_query is None else packed_names
    if tensors.mask is not None:
        shape = tensors.mask.shape
        operands["mask"] = Operand("attn_mask", aligned(shape, names, sizes), plain=True)
    if tensors.key_mask is not None:
        operands["key_mask"] = Operand("key_mask", (names[0], names[3]), plain=True)
    if tensors.sinks is not None:
        operands["sinks"] = Operand("sinks", ("heads",))

    def settle(pieces: Mapping[str, Piece]) -> Any:
        head = pieces["heads"].start
        return _settle_scores(packed, pieces["batch"], head, pieces["queries"], pieces["keys"])

    return Layout(
        tensors,
        operands,
        tensors.seed,
        (("batch", "heads", "queries", "width"), ("batch", "heads", "queries")),
        whole,
        settle,
        even={"key heads": "heads"},
    )
