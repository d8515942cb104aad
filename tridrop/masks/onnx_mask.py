"""tridrop's masks as integer operators of ONNX. Apache-2.0; contract version 1.

They use int64, from opset 18 on. The seed is an input, so that the caller chooses each mask.

>>> build = Builder("mask")
>>> keep = keep_mask(build, "shape", 2, 0.5)  # the name of the result
>>> len(build.nodes), {node.op_type for node in build.nodes} & {"Dropout", "RandomUniform"}
(240, set())
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import onnx
from onnx import helper, numpy_helper

# ----- Seeds, rates and coordinates in plain Python: the same lines in the file of each framework.

ONE, TWO63, TWO64 = 1 << 32, 1 << 63, 1 << 64
STREAM, FOLD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
DOMAINS = {"elements": 0, "drop_path": 1}
LIMITS = (1 << 32, 1 << 28, 1 << 32, 1 << 35)  # for attention: batch, heads, queries, keys


def threshold(p: float) -> int:
    """``T = round(p * 2^32)``, ties to even: an element is dropped if its bits are below T."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p is a {type(p).__name__}; give the probability of dropping, a number")
    if not 0 <= p <= 1:
        raise ValueError(f"p = {p} is not a probability; give a number in [0, 1]")
    return round(float(p) * ONE)


def scale(p: float) -> float:
    """The factor of kept elements: one over the exact probability of keeping; 0 if p is 1."""
    return ONE / (ONE - threshold(p)) if threshold(p) < ONE else 0.0


def _whole(value: Any, name: str, low: int = 0, high: int = TWO63) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} has {value!r}, a {type(value).__name__}; give integers")
    value = operator.index(value)
    if not low <= value < high:
        raise ValueError(f"{name} has {value}; give integers from {low} up to {high - 1}")
    return int(value)


def _sizes(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}; give a tuple of ints")
    return tuple(_whole(n, name) for n in values)


def _pair(seed: Any) -> tuple[int, int]:
    """The pair (seed, stream) for an int or such a pair."""
    entries = seed if isinstance(seed, (tuple, list)) else (seed, 0)
    if len(entries) != 2:
        raise ValueError(f"seed = {seed!r}; give an int or a pair (seed, stream)")
    first, stream = (_whole(n, "seed", -TWO63) for n in entries)
    return first, stream


def _fold(seed: Any, stream: int) -> tuple[int, int]:
    first, old = _pair(seed)
    folded = (old * FOLD + _whole(stream, "stream", -TWO63)) % TWO64
    return first, folded if folded < TWO63 else folded - TWO64


def _key(seed: Any) -> tuple[int, int]:
    """The two words of Philox's key."""
    first, stream = _pair(seed)
    key = (first + stream * STREAM) % TWO64
    return key % ONE, key // ONE


def _shard(shard: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pair (global_shape, origin), after checks."""
    if shard is None:
        return shape, (0,) * len(shape)
    whole, origin = (_sizes(part, "shard") for part in shard)
    fits = len(whole) == len(origin) == len(shape) and all(
        o + m <= n for o, m, n in zip(origin, shape, whole, strict=True)
    )
    if not fits:
        raise ValueError(
            f"shard = {(whole, origin)} for shape {shape}; give (global_shape, origin), each with "
            "an entry per dimension, and origin + shape within global_shape"
        )
    return whole, origin


def _place(
    shape: Sequence[int], noise_shape: Sequence[int | None] | None, shard: Any, domain: str
) -> tuple[tuple[int, ...], list[int], list[int], int, int]:
    """The shape, the sizes to draw, leading strides in rows, and the first row and column."""
    shape = _sizes(shape, "shape")
    if domain not in DOMAINS:
        raise ValueError(f"domain = {domain!r}; give one of {', '.join(DOMAINS)}")
    if domain == "drop_path":
        if noise_shape is not None or len(shape) < 2:
            raise ValueError(
                "domain = 'drop_path' is for two dimensions or more and has no noise_shape; "
                f"given shape {shape} and noise_shape {noise_shape}"
            )
        noise_shape = (None,) + (1,) * (len(shape) - 1)
    noise = (None,) * len(shape) if noise_shape is None else tuple(noise_shape)
    if len(noise) != len(shape) or any(
        n is not None and _whole(n, "noise_shape") not in (1, size)
        for n, size in zip(noise, shape, strict=True)
    ):
        raise ValueError(
            f"noise_shape = {noise} for shape {shape}; give for each dimension 1, if the mask is "
            "shared along it, or else its size or None"
        )
    whole, origin = _shard(shard, shape)
    if math.prod(whole) >= TWO63:
        raise ValueError(f"the global shape is {whole}, which is 2^63 elements or more")
    sizes = [min(1, m) if n == 1 else m for n, m in zip(noise, shape, strict=True)]
    start = [0 if n == 1 else o for n, o in zip(noise, origin, strict=True)]
    strides = [math.prod(whole[k + 1 : -1]) for k in range(len(shape) - 1)]
    row = sum(o * stride for o, stride in zip(start, strides, strict=False))
    return shape, sizes or [1], strides, row, (start or [0])[-1]


def _attention_place(shape: Sequence[int], shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the first coordinates of an attention mask."""
    shape = _sizes(shape, "shape")
    whole, origin = _shard(shard, shape)
    if len(whole) != 4 or any(n > limit for n, limit in zip(whole, LIMITS, strict=True)):
        raise ValueError(
            f"the global shape is {whole}; an attention mask has (batch, heads, queries, keys), "
            f"at most {LIMITS} of each"
        )
    return shape, origin


# ----- ONNX. Words are int64 numbers below 2^32; products wrap as in uint64.

WORD, STANDARD = ONE - 1, ("", "ai.onnx")


class Builder:
    """Collects nodes and constants, whose names begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node with one result. Inputs that are ints or lists of ints become constants."""
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = f"{self.prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, given, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        values = value if isinstance(value, list) else [value]
        signed = [(n + TWO63) % TWO64 - TWO63 for n in values]
        key = repr(value)
        if key not in self.constants:
            name, dims = f"{self.prefix}_c{len(self.constants)}", [len(values)] * (value is values)
            self.constants[key] = helper.make_tensor(name, onnx.TensorProto.INT64, dims, signed)
        return str(self.constants[key].name)

    def shifted(self, a: str, places: int) -> str:
        """``a >> places`` for an unsigned number."""
        wide = self("Cast", a, to=onnx.TensorProto.UINT64)
        name = f"{self.prefix}_u{places}"
        self.constants[name] = helper.make_tensor(name, onnx.TensorProto.UINT64, [], [places])
        moved = self("BitShift", wide, name, direction="RIGHT")
        return self("Cast", moved, to=onnx.TensorProto.INT64)

    def low(self, a: str) -> str:
        return self("BitwiseAnd", a, WORD)

    def xor(self, a: str, b: str, c: str) -> str:
        return self("BitwiseXor", a, self("BitwiseXor", b, c))

    def key(self, seed: str, site: int | None) -> tuple[str, str]:
        first, stream = self("Gather", seed, 0), self("Gather", seed, 1)
        if site is not None:
            stream = self("Add", self("Mul", stream, FOLD), site)
        key = self("Add", first, self("Mul", stream, STREAM))
        return self.low(key), self.shifted(key, 32)

    def philox(self, c0: str, c1: str, c2: str, c3: str, k0: str, k1: str) -> list[str]:
        for _ in range(10):
            a, b = self("Mul", c0, 0xD2511F53), self("Mul", c2, 0xCD9E8D57)
            c0, c1 = self.xor(self.shifted(b, 32), c1, k0), self.low(b)
            c2, c3 = self.xor(self.shifted(a, 32), c3, k1), self.low(a)
            k0 = self.low(self("Add", k0, 0x9E3779B9))
            k1 = self.low(self("Add", k1, 0xBB67AE85))
        return [c0, c1, c2, c3]

    def decisions(self, words: list[str], calls: str, p: float) -> str:
        """[*calls, 4, 2]: the decisions of each word, and of the word with its halves swapped."""
        wide = [self("Unsqueeze", self("Expand", word, calls), [-1]) for word in words]
        word = self("Concat", *wide, axis=-1)
        turned = self("BitwiseOr", self.low(self("Mul", word, 1 << 16)), self.shifted(word, 16))
        drawn = [self("Unsqueeze", w, [-1]) for w in (word, turned)]
        return self("GreaterOrEqual", self("Concat", *drawn, axis=-1), threshold(p))


def keep_mask(
    build: Builder,
    shape: str,
    rank: int,
    p: float,
    *,
    seed: str = "seed",
    site: int | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: Any = None,
    domain: str = "elements",
) -> str:
    """Add the mask of ``tridrop.keep_mask`` to ``build``; return the name of a bool tensor.

    Args:
        build: collects the nodes and constants.
        shape: the name of an int64 tensor, the shape of the mask, which may be dynamic.
        rank: the number of dimensions.
        p: the probability of dropping, in [0, 1].
        seed: the name of an int64 tensor of shape [2], (seed, stream).
        site: a number to fold into the seed, as ``tridrop.fold_in(seed, site)`` does.
        noise_shape: for each dimension 1, if the mask is shared along it, or None.
        shard: (global_shape, origin) of the larger mask of which this is a piece, as ints.
        domain: "elements", or "drop_path" for a mask of whole samples.

    Raises:
        ValueError: p is outside [0, 1], or noise_shape or shard do not have ``rank`` entries.
        TypeError: an argument has a wrong type.
    """
    _place((1,) * rank, noise_shape, None, domain)  # for its checks
    noise = (None,) * rank if noise_shape is None else tuple(noise_shape)
    if domain == "drop_path":
        noise = (None,) + (1,) * (rank - 1)
    whole, origin = (None, (0,) * rank) if shard is None else (_sizes(s, "shard") for s in shard)
    if len(origin) != rank or (whole is not None and len(whole) != rank):
        raise ValueError(f"shard = {shard} for rank {rank}; give an entry for each dimension")
    size = [build("Gather", shape, k) for k in range(rank)]
    drawn = [build.constant(1) if n == 1 else s for n, s in zip(noise, size, strict=True)]
    row = build.constant([0])
    for k in range(rank - 1):
        row = build("Mul", row, size[k] if whole is None else whole[k])
        if noise[k] != 1:
            along = build("Add", build("Range", 0, size[k], 1), origin[k])
            row = build("Add", build("Unsqueeze", row, [-1]), along)
        else:
            row = build("Unsqueeze", row, [-1])
    leads = [build("Unsqueeze", name, [0]) for name in drawn[:-1]]
    row = build("Reshape", row, build("Concat", *leads, [1], axis=0) if leads else [1])
    first = origin[-1] if rank and noise[-1] != 1 else 0
    cols = drawn[-1] if rank else build.constant(1)
    stop = build("Div", build("Add", cols, first + 7), 8)
    group = build("Range", first // 8, stop, 1)
    groups = build("Sub", stop, first // 8)
    last = build("BitwiseOr", build.shifted(group, 32), DOMAINS[domain] << 28)
    counter = (build.low(group), build.low(row), build.shifted(row, 32), last)
    words = build.philox(*counter, *build.key(seed, site))
    calls = build("Concat", *leads, build("Unsqueeze", groups, [0]), axis=0)
    eights = build("Unsqueeze", build("Mul", groups, 8), [0])
    keep = build.decisions(words, calls, p)
    keep = build("Reshape", keep, build("Concat", *leads, eights, axis=0))
    end = build("Add", [first % 8], build("Unsqueeze", cols, [0]))
    keep = build("Slice", keep, [first % 8], end, [-1])
    return build("Expand", build("Squeeze", keep, [0]) if rank == 0 else keep, shape)


def attention_keep_mask(
    build: Builder,
    shape: str,
    p: float,
    *,
    seed: str = "seed",
    site: int | None = None,
    shard: Any = None,
) -> str:
    """Add the mask of ``tridrop.attention_keep_mask``; ``shape`` is (batch, heads, queries, keys).

    The other arguments are those of :func:`keep_mask`.
    """
    origin = (0,) * 4 if shard is None else _attention_place((0,) * 4, shard)[1]
    size, first = [build("Gather", shape, k) for k in range(4)], origin[3]
    at = [
        build("Unsqueeze", build("Add", build("Range", 0, size[k], 1), origin[k]), axes)
        for k, axes in enumerate(([1, 2, 3], [0, 2, 3], [0, 1, 3]))
    ]
    stop = build("Div", build("Add", size[3], first + 31), 32)
    tiles = build("Sub", stop, first // 32)
    group = build("Range", first // 32 * 4, build("Mul", stop, 4), 1)
    head = build("BitwiseOr", at[1], 2 << 28)
    words = build.philox(at[2], group, at[0], head, *build.key(seed, site))
    leads = [build("Unsqueeze", name, [0]) for name in size[:3]]
    calls = build("Concat", *leads, build("Unsqueeze", build("Mul", tiles, 4), [0]), axis=0)
    keep = build.decisions(words, calls, p)
    # [..., tiles, pairs, octets, 2]: one Philox call decides one pair of each octet
    tile = build("Unsqueeze", tiles, [0])
    keep = build("Reshape", keep, build("Concat", *leads, tile, [4, 4, 2], axis=0))
    keep = build("Transpose", keep, perm=[0, 1, 2, 3, 5, 4, 6])
    keys = build("Mul", tile, [32])
    keep = build("Reshape", keep, build("Concat", *leads, keys, axis=0))
    end = build("Unsqueeze", build("Add", size[3], first % 32), [0])
    return build("Slice", keep, [first % 32], end, [-1])


def fold_in(seed: Any, stream: int) -> tuple[int, int]:
    """The pair (seed, stream) for call site ``stream`` under an int or a pair; can be nested."""
    return _fold(seed, stream)


def _value(graph: Any, name: str) -> Any:
    """The constant with a name, or None."""
    found = [numpy_helper.to_array(t) for t in graph.initializer if t.name == name]
    if found:
        return found[0]
    for node in graph.node:
        if name in node.output and node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            return numpy_helper.to_array(value) if node.attribute[0].name == "value" else value
    return None


def _nodes(graph: Any) -> list[Any]:
    """The nodes of a graph or function, including those in branches and loops."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.node, *(node for branch in inner for node in _nodes(branch))]


def replace_dropout(model: Any, seed: str = "seed") -> Any:
    """A copy of a model in which each Dropout that would drop is replaced by tridrop's mask.

    The n-th of these, from 0, has the mask of ``tridrop.fold_in(seed, n)``. The copy has one more
    input, ``seed``: int64 of shape [2], (seed, stream). A Dropout that does not drop, because its
    training_mode is false or absent or its ratio is 0, stays.

    Raises:
        ValueError: the opset is before 18, which added bitwise operators; a ratio or training_mode
            is not a constant; the rank of a Dropout's input is unknown; its mask output is used; a
            Dropout is within a branch, a loop or a function; or the name ``seed`` is taken.
    """
    opset = next(o.version for o in model.opset_import if o.domain in STANDARD)
    if opset < 18:
        raise ValueError(f"the model has opset {opset}; export it with opset_version=18 or higher")
    result = onnx.shape_inference.infer_shapes(model)
    graph, nodes, spare, site = result.graph, [], set(), 0
    inner = _nodes(graph)[len(graph.node) :] + [n for f in model.functions for n in _nodes(f)]
    if any(node.op_type == "Dropout" for node in inner):
        raise ValueError("a Dropout is within a branch, a loop or a function; inline it first")
    values = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    read = {name for node in _nodes(graph) for name in node.input} | {v.name for v in graph.output}
    if seed in read or seed in values:
        raise ValueError(f"the model has a value named {seed!r} already; give another name")
    for node in list(graph.node):
        given = [*node.input, "", ""]
        if node.op_type != "Dropout" or node.domain not in STANDARD or not given[2]:
            nodes.append(node)
            continue
        ratio, training = (_value(graph, name) if name else 0.5 for name in given[1:3])
        if ratio is None or training is None:
            raise ValueError(f"ratio and training_mode of {node.output[0]} are not constants")
        if not training or not ratio:
            nodes.append(node)
            continue
        info = values.get(node.input[0])
        if info is None or not info.type.tensor_type.HasField("shape"):
            raise ValueError(f"the rank of {node.input[0]} is unknown; export it with its shape")
        if len(node.output) > 1 and node.output[1] in read:
            raise ValueError(f"{node.output[1]}, the mask of a Dropout, is read by another node")
        rank, dtype = len(info.type.tensor_type.shape.dim), info.type.tensor_type.elem_type
        build = Builder(f"tridrop_{site}")
        shape = build("Shape", node.input[0])
        keep = keep_mask(build, shape, rank, float(ratio), seed=seed, site=site)
        # Computed in at least float32, and rounded once.
        exact = dtype if dtype == onnx.TensorProto.DOUBLE else onnx.TensorProto.FLOAT
        for name, number in {"zero": 0.0, "scale": scale(float(ratio))}.items():
            name = f"tridrop_{site}_{name}"
            build.constants[name] = helper.make_tensor(name, exact, [], [number])
        value = build("Cast", node.input[0], to=exact)
        kept = build("Where", keep, value, f"tridrop_{site}_zero")
        scaled = build("Mul", kept, f"tridrop_{site}_scale")
        nodes += [*build.nodes, helper.make_node("Cast", [scaled], node.output[:1], to=dtype)]
        graph.initializer.extend(build.constants.values())
        spare |= set(given[1:3])
        site += 1
    del graph.node[:]
    graph.node.extend(nodes)
    spare -= {name for node in _nodes(graph) for name in node.input}
    for node in [node for node in nodes if spare & set(node.output)]:
        graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name in spare]:
        graph.initializer.remove(tensor)
    if site:
        graph.input.append(helper.make_tensor_value_info(seed, onnx.TensorProto.INT64, [2]))
    return result
