"""The kernel families of benchmarks/tune.py: their sizes, candidate settings and problems.

A family is a kernel whose launch setting is decided by one pure function of a launch module. A
candidate is a possible result of that function and, for a sum over rows, also the number of
programs that share it. Only attention has pipeline stages to choose: Triton overlaps loads with
earlier iterations of a loop only where the loads feed a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

import tridrop
from tridrop.backends.triton import attention_launch, launch, softmax_launch
from tridrop.backends.triton.gpu import Gpu

P, SEED = 0.1, 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Size = tuple[int, ...]
Settings = dict[str, Any]
"""name in the launch module -> a number, or the result for the function of that name"""
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """A kernel, and the pure function that decides how it is launched."""

    name: str
    module: ModuleType
    setting: str
    """the function's name in the module"""
    kernel: str
    sizes: tuple[Size, ...]
    problem: Callable[..., Call]
    """(size, dtype, device, probe) -> the call. A probe is a small call whose results show its
    masks: a decision changes them by 1 or more, and rounding by far less than a half"""
    candidates: Callable[[Size], list[Settings]]
    rows: dict[str, Size]
    """row of ``tridrop inspect`` that compiles the kernel without a GPU -> its size"""

    def present(self, size: Size, dtype: torch.dtype, device: Gpu) -> Settings:
        """What the function returns now."""
        function = getattr(self.module, self.setting)
        if self.module is attention_launch:
            bytes_ = torch.finfo(dtype).bits // 8
            return {self.setting: function(size[-1], bytes_, device)}
        return {self.setting: function(*size[-2:])}


@contextmanager
def replaced(module: ModuleType, settings: Settings) -> Iterator[None]:
    """Replace the settings of a module inside, and restore them afterwards.

    Raises:
        RuntimeError: no launch inside asked for them, so something else was measured.
    """
    originals = {name: getattr(module, name) for name in settings}
    functions = {name for name, value in originals.items() if callable(value)}
    asked: set[str] = set()

    def answer(name: str, *_: Any) -> Any:
        asked.add(name)
        return settings[name]

    for name, value in settings.items():
        setattr(module, name, partial(answer, name) if name in functions else value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)
    if asked != functions:
        missing = ", ".join(sorted(functions - asked))
        raise RuntimeError(f"no launch asked {module.__name__} for {missing}: nothing was tried")


# Problems.


def _fill(probe: bool, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A maker of tensors: of ones for a probe, so that masks show, else of normal numbers."""
    make = torch.ones if probe else torch.randn
    return partial(make, device=device, dtype=dtype)


def _gradients(out: Any, leaves: list[Tensor], grads: Any, count: int | None = None) -> Call:
    """A call that runs a graph's backward, repeatably, for its first ``count`` gradients."""
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)[:count]


def elementwise(
    size: Size, dtype: torch.dtype, device: str, probe: bool, *, way: str, gated: bool = False
) -> Call:
    rows, cols = (40, size[1]) if probe else size
    make = _fill(probe, device, dtype)
    x = make(rows, cols * (2 if gated else 1), requires_grad=True)
    residual, bias = torch.zeros_like(make(rows, cols)), torch.zeros_like(x[0])
    if not probe:
        residual.normal_()
    bias = bias.detach().requires_grad_(way == "sums")

    def forward() -> Tensor:
        vector = bias if way == "sums" else None
        if gated:
            # relu(1) * 1: a kept element passes its gradient on to both halves
            return tridrop.activation_dropout(x, P, activation="reglu", bias=vector, seed=SEED)
        return tridrop.dropout_add(x, residual, P, bias=vector, seed=SEED)

    if way == "forward":
        return lambda: (forward().detach(),)
    leaves = [x, bias] if way == "sums" else [x]
    return _gradients(forward(), leaves, make(rows, cols), 1 if probe else None)


def norm(
    size: Size, dtype: torch.dtype, device: str, probe: bool, *, way: str, p: float = P
) -> Call:
    rows, cols = (40, size[1]) if probe else size
    make = _fill(probe, device, dtype)
    x, weight = make(rows, cols, requires_grad=True), make(cols, requires_grad=True)
    # The residual is zero, so that the stream of a probe shows its mask.
    residual = torch.zeros(rows, cols, device=device, dtype=dtype)
    shift = torch.zeros(cols, device=device, dtype=dtype, requires_grad=True)
    if not probe:
        residual.normal_()
    residual.requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        return tridrop.dropout_add_layer_norm(
            x, residual, weight, shift, p, prenorm=True, seed=SEED
        )

    if way == "forward":
        return lambda: tuple(t.detach() for t in forward()[1 if probe else 0 :])
    out, stream = forward()
    grads = (torch.zeros_like(out) if probe else make(rows, cols), make(rows, cols))
    return _gradients((out, stream), [x, residual, weight, shift], grads, 1 if probe else None)


def softmax(size: Size, dtype: torch.dtype, device: str, probe: bool, *, way: str) -> Call:
    shape = (1, 2, 24, size[-1]) if probe else size
    scores = torch.randn(shape, device=device, dtype=dtype)
    if probe:  # every probability is 1 / keys
        scores.zero_()
    scores.requires_grad_()
    unit = size[-1] if probe else 1

    def forward() -> Tensor:
        return tridrop.softmax_dropout(scores, P, seed=SEED)

    if way == "forward":
        return lambda: (forward().detach() * unit,)
    run = _gradients(forward(), [scores], _fill(probe, device, dtype)(shape))
    return lambda: tuple(t * unit for t in run())


def _coded(dim: int, device: str, dtype: torch.dtype) -> Tensor:
    """[4 * dim, dim] with powers of two: a sum over rows shows four decisions per column."""
    blocks = [torch.eye(dim, device=device, dtype=dtype) * 2**bit for bit in range(4)]
    return torch.cat(blocks)[None, None]


def attention(
    size: Size, dtype: torch.dtype, device: str, probe: bool, *, way: str, p: float = P
) -> Call:
    batch, heads, tokens, causal, dim = size
    shape = (batch, heads, tokens, dim)
    if probe:
        # All probabilities are 1 / keys. In forward the values are coded, so that a result shows
        # the decisions of four keys. For dV the gradient is coded, and for dQ the keys.
        shape, coded = (1, 1, 4 * dim, dim), _coded(dim, device, dtype)
        query = torch.zeros(shape, device=device, dtype=dtype)
        key = coded if way == "dquery" else query.clone()
        value = torch.full_like(query, 1 / dim) if way == "dquery" else coded.clone()
        dout = torch.ones_like(query) if way == "dquery" else coded
    else:
        query, key, value, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (query, key.clone(), value)]
    unit = 4 * dim if probe else 1

    def forward() -> Tensor:
        options = {"is_causal": bool(causal) and not probe, "seed": SEED}
        return tridrop.scaled_dot_product_attention(
            *leaves, dropout_p=p, scale=1.0 if probe else None, **options
        )

    if way == "forward":
        return lambda: (forward().detach() * unit,)
    wanted = leaves[:1] if way == "dquery" else leaves[1:]
    run = _gradients(forward(), wanted, dout)
    return lambda: tuple(t * unit for t in run())


# Candidates.


def _per_thread(tile: launch.Tile) -> float:
    """Elements per thread."""
    return tile.rows * tile.cols / (32 * tile.num_warps)


def tiles(
    size: Size, name: str, elements: tuple[int, ...], programs: tuple[int, ...] = ()
) -> list[Settings]:
    """Tiles of these sizes with 8 to 64 elements per thread, and the programs of a reduction."""
    shapes = [launch.tile(*size, n) for n in elements]
    found = [t._replace(num_warps=w) for t in shapes for w in (2, 4, 8)]
    found = [t for t in found if 8 <= _per_thread(t) <= 64]
    return _each(name, found, programs)


def row_tiles(size: Size, name: str, programs: tuple[int, ...] = ()) -> list[Settings]:
    """Tiles of whole rows, or chunks of wide rows, with 8 to 32 elements per thread."""
    width = triton.next_power_of_2(size[1])
    shapes = [(rows, width) for rows in (1, 2, 4)]
    if size[1] > launch.ROW_FORWARD or (programs and size[1] > launch.ROW_BACKWARD):
        shapes = [(rows, cols) for rows in (4, 8, 16) for cols in (256, 512, 1024)]
    found = [launch.Tile(*shape, w) for shape in shapes for w in (1, 2, 4, 8, 16)]
    return _each(name, [t for t in found if 8 <= _per_thread(t) <= 32], programs)


def _each(name: str, found: list[launch.Tile], programs: tuple[int, ...]) -> list[Settings]:
    if not programs:
        return [{name: t} for t in found]
    return [{name: t, "REDUCTION_PROGRAMS": n} for t in found for n in programs]


def softmax_tiles(size: Size) -> list[Settings]:
    """Tiles of whole rows, or chunks of rows too long for registers; 16 to 64 keys per thread."""
    width = triton.next_power_of_2(size[-1])
    shapes = [(rows, width) for rows in (1, 2, 4)]
    if size[-1] > softmax_launch.ROW_KEYS:
        shapes = [(1, n) for n in (4096, 8192, 16384)]
    found = [launch.Tile(*shape, w) for shape in shapes for w in (1, 2, 4, 8, 16)]
    return [{"tile": t} for t in found if 16 <= _per_thread(t) <= 64]


# Queries, keys, warps, stages.
ATTENTION = (
    (128, 128, 8, 2), (128, 128, 8, 1), (128, 128, 8, 3), (128, 128, 16, 2),
    (128, 64, 8, 2), (128, 64, 8, 1), (128, 64, 8, 3), (128, 64, 4, 2),
    (128, 32, 8, 2), (128, 32, 8, 1), (128, 32, 4, 2), (64, 128, 8, 2), (64, 128, 4, 2),
    (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (64, 64, 8, 2),
    (64, 32, 4, 2), (32, 64, 4, 1), (32, 64, 4, 2),
)  # fmt: skip


def attention_tiles(size: Size, name: str) -> list[Settings]:
    return [{name: attention_launch.Tile(*t)} for t in ATTENTION]


MATRICES = ((8192, 1024), (8192, 4096), (2048, 16384))
NORMS = ((16384, 768), (8192, 4096), (4096, 8192))
SCORES = ((16, 16, 512, 512), (4, 16, 2048, 2048), (1, 8, 512, 32768))
HEADS = tuple((4, 16, 4096, causal, dim) for dim in (64, 128) for causal in (0, 1))
INSPECTED: Size = (8192, 4096)
PROGRAMS = (256, 512, 1024, 2048)


def _attention(name: str, setting: str, kernel: str, way: str) -> Family:
    direction = "forward" if way == "forward" else "backward"
    rows = {
        f"scaled_dot_product_attention D={size[-1]}{' causal' * size[3]} {direction}": size
        for size in HEADS
    }
    return Family(
        name, attention_launch, setting, kernel, HEADS, partial(attention, way=way),
        partial(attention_tiles, name=setting), rows,
    )  # fmt: skip


def _families() -> Iterator[Family]:
    flat = partial(tiles, name="tile", elements=(1024, 2048, 4096, 8192))
    for way in ("forward", "backward"):
        yield Family(
            f"elementwise_{way}", launch, "tile", f"{way}_kernel", MATRICES,
            partial(elementwise, way=way), flat, {f"dropout_add {way}": INSPECTED},
        )  # fmt: skip
    reduction = ("reduction_tile", (1024, 2048, 4096), PROGRAMS)
    yield Family(
        "elementwise_sums", launch, "reduction_tile", "backward_kernel", MATRICES,
        partial(elementwise, way="sums"), lambda size: tiles(size, *reduction),
        {"dropout_add bias backward": INSPECTED},
    )  # fmt: skip
    gated = ("gated_reduction_tile", (512, 1024, 2048), PROGRAMS)
    yield Family(  # no row of `tridrop inspect` has the sums of a gated activation
        "gated_sums", launch, "gated_reduction_tile", "backward_kernel", MATRICES,
        partial(elementwise, way="sums", gated=True), lambda size: tiles(size, *gated), {},
    )  # fmt: skip
    for way, programs in (("forward", ()), ("backward", PROGRAMS)):
        setting = f"norm_{way}_tile"
        yield Family(
            f"norm_{way}", launch, setting, f"norm_{way}_kernel", NORMS, partial(norm, way=way),
            partial(row_tiles, name=setting, programs=programs),
            {f"dropout_add_layer_norm {way}": INSPECTED},
        )  # fmt: skip
    for way in ("forward", "backward"):
        yield Family(
            f"softmax_{way}", softmax_launch, "tile", f"softmax_{way}_kernel", SCORES,
            partial(softmax, way=way), softmax_tiles,
            {f"softmax_dropout {way}": (4, 16, 4096, 4096)},
        )  # fmt: skip
    for way in ("forward", "dquery", "dkey"):
        yield _attention(f"attention_{way}", f"{way}_tile", f"attention_{way}_kernel", way)


FAMILIES = {family.name: family for family in _families()}
