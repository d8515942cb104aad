"""Where a call's seed comes from: it is given, or the active ``rng`` block has it, or it is drawn.

This file is bookkeeping on the host; the arithmetic of seeds is in mask.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.arguments import check_module, check_whole
from ..base.lasting import lasting
from ..base.modules import all_modules
from ..base.torch_private import backward_task, dispatch_modes
from . import recomputation
from .mask import as_seed, fold_in, new_seed
from .recomputation import now

# The seeds of so many sites are made at once: a few launches per block instead of a few per call.
_TABLE = 1024
# Calls without a site number have streams of their own, folded under this number.
_UNNUMBERED = -1

_is_compiling = torch.compiler.is_dynamo_compiling


class _Context:
    """The seeds of one ``with rng(seed)`` block."""

    def __init__(self, seed: int | Tensor, rank: int | None) -> None:
        # An int is kept together with its seed tensor: compiled code reads the tensor, since it
        # would be compiled again for each new int.
        self.compiled = _is_compiling()
        self.seed, self.base, self.rank = seed, as_seed(seed), rank
        self.calls = 0
        self.sites: set[tuple[int, int]] = set()  # (site, origin in the batch) of the calls so far
        self.tables: dict[tuple[bool, torch.device], Tensor] = {}
        self.captured = _capturing()
        # A seed tensor has a device, so its tables can be made now and not in a compiled call.
        self.ready = isinstance(seed, Tensor) and not self.compiled
        if self.ready:
            for numbered in (True, False):
                self.tables[numbered, self.base.device] = self._table(self.base, numbered)

    def copy(self) -> _Context:
        """The block with its present count of calls and its present tables."""
        other = copy.copy(self)
        other.tables = dict(self.tables)
        return other

    def _branch(self, seed: Tensor, numbered: bool) -> Tensor:
        if self.rank is not None:
            seed = fold_in(seed, self.rank)
        return seed if numbered else fold_in(seed, _UNNUMBERED)

    def _table(self, seed: Tensor, numbered: bool, size: int = _TABLE) -> Tensor:
        base = self._branch(seed, numbered)
        streams = torch.arange(size, dtype=torch.int64, device=seed.device)
        folded = fold_in(base, 0)[1] + streams
        return lasting(torch.stack((base[0].expand(size), folded), dim=1))

    def take(self, index: int, numbered: bool, device: torch.device) -> Tensor:
        """The seed of site ``index``, or, without ``numbered``, of call number ``index``."""
        compiling = _is_compiling()
        if compiling and not self.ready:
            # No table is made here, since the graph would have to store it in this object.
            seed = as_seed(self.seed, device) if self.compiled else self.base.to(device)
            return fold_in(self._branch(seed, numbered), index)
        table = self.tables.get((numbered, device))
        if table is None or index >= len(table):
            if device.type == "cuda" and not self.captured and _capturing():
                raise RuntimeError(
                    f"a CUDA graph is being captured, and the tridrop.rng block around it has no "
                    f"seed number {index} on {device} yet: the seed would be made in the graph's "
                    "own memory, which only replays fill. Give rng a seed tensor on that device, "
                    "make one such call before the capture, or enter rng inside the capture"
                )
            size = max(_TABLE, 2 * index)
            if compiling:
                return self._table(as_seed(self.base, device), numbered, size)[index]
            # A dispatch mode, perhaps a fake-tensor mode, must see tensors made inside it alone.
            reusable = self.base.device == device and not dispatch_modes()
            seed = self.base if reusable else as_seed(self.seed, device)
            table = self._table(seed, numbered, size)
            if type(table) is Tensor:  # a fake tensor is not kept: its mode ends before the block
                self.tables[numbered, device] = table
        return table[index]


def _capturing() -> bool:
    """Whether launches are being captured into a CUDA graph, which runs them at each replay."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


class _State:
    # Each warning is given once; one of them needs to know whether there was ever an rng block.
    entered = False
    warned_of_generator = False
    warned_of_others = False


_state = _State()


@contextmanager
def rng(seed: int | Tensor, *, fold_rank: Any = None) -> Iterator[None]:
    """Derive the seeds of all tridrop calls inside the block, except explicit ones, from ``seed``.

    A module of tridrop.nn that :func:`tridrop.nn.number_sites` has numbered takes
    ``fold_in(seed, site)``: its mask does not depend on the order of calls, so activation
    checkpointing, pipelining and compilation keep it. Every other call takes the next number of a
    count that starts again in each block.

    A recomputation by torch.utils.checkpoint has the seeds of its forward wherever backward is
    called: inside the block, after it or in another one. The setting is process-wide: do not enter
    it in several threads at once.

    Args:
        seed: an int or a seed tensor. Under torch.compile a tensor on the device of the data is
            best, made outside the compiled region: it enters the graph as an input.
        fold_rank: gives each of the processes that share ``seed`` masks of its own, those of
            ``fold_in(seed, rank)``. Give the rank as an int; True for the rank among all processes
            of torch.distributed; or a process group or DeviceMesh for the rank in it. On a mesh of
            several dimensions :func:`tridrop.distributed.mesh_seed` says which processes share.

    >>> import tridrop
    >>> with tridrop.rng(7):
    ...     first = tridrop.dropout(torch.ones(8), 0.5)
    >>> with tridrop.rng(7):
    ...     second = tridrop.dropout(torch.ones(8), 0.5)
    >>> bool((first == second).all())
    True
    """
    rank = None if fold_rank is None or fold_rank is False else _rank(fold_rank)
    blocks = now()
    before, blocks.context = blocks.context, _Context(seed, rank)
    if not _is_compiling():
        _state.entered = True
    try:
        yield
    finally:
        blocks.context = before


def _rank(of: Any) -> int:
    """The number that ``rng(fold_rank=of)`` folds into the seed."""
    if isinstance(of, int) and of is not True:
        return of
    if of is True:
        return torch.distributed.get_rank()
    if hasattr(of, "get_coordinate"):
        rank = 0
        for dim, place in enumerate(of.get_coordinate()):
            rank = rank * of.size(dim) + place
        return rank
    if isinstance(of, torch.distributed.ProcessGroup):
        return torch.distributed.get_rank(of)
    raise TypeError(
        f"fold_rank is {of!r} of type {type(of).__name__}; give a rank, True for this process's, a "
        "process group or a DeviceMesh"
    )


@contextmanager
def batch_slice(origin: int, size: int) -> Iterator[None]:
    """Inside the block, calls get samples ``origin .. origin + size - 1`` of a larger batch.

    Their masks are then rows of the masks of the whole batch: data-parallel ranks, microbatches and
    the steps of gradient accumulation, all under one seed, drop exactly what a single process with
    the whole batch would drop. This holds for every tridrop call without a ``shard`` of its own.
    The size of its result's first dimension (in attention, of its batch) decides how:

    ===================  ====================================================================
    size                 one index per sample, beginning at ``origin``
    k * size             k indices per sample, samples outermost, beginning at ``k * origin``
    1, and size > 1      shared by all samples, such as position embeddings: as without the block
    anything else        ValueError
    ===================  ====================================================================

    So samples must come first. For ``[L, N, E]`` (``batch_first=False``), and for tokens that a
    model sorts by expert, give each call a ``shard`` instead.

    A recomputation by torch.utils.checkpoint has the slice of its forward, wherever backward is
    called. The setting is process-wide, as that of :func:`tridrop.rng`.

    >>> import tridrop
    >>> x = torch.ones(4, 8)
    >>> whole = tridrop.dropout(x, 0.5, seed=1)
    >>> with tridrop.distributed.batch_slice(origin=2, size=2):
    ...     part = tridrop.dropout(x[2:], 0.5, seed=1)
    >>> bool((part == whole[2:]).all())
    True
    """
    for name, value, least in (("origin", origin, 0), ("size", size, 1)):
        check_whole(value, name, least)
    blocks = now()
    before, blocks.batch = blocks.batch, (origin, size)
    try:
        yield
    finally:
        blocks.batch = before


def in_batch() -> bool:
    """Whether a :func:`batch_slice` block is active."""
    return now().batch is not None


def refuse_batch(name: str) -> None:
    """Raise inside a :func:`batch_slice` block, for an op that depends on all samples it gets."""
    if in_batch():
        raise ValueError(
            f"{name} depends on all the samples that it is given, so a slice of a batch would give "
            "another result than the whole: call it outside of batch_slice, with a seed for each "
            "rank, such as tridrop.fold_in(seed, rank)"
        )


def batch_origin(count: int) -> int:
    """The place in the whole batch of a first dimension that has ``count`` indices."""
    batch = now().batch
    if batch is None:
        return 0
    origin, size = batch
    if count % size == 0:
        return origin * (count // size)
    if count == 1:
        return 0
    raise ValueError(
        f"a tensor has {count} indices in its first dimension, inside batch_slice(origin={origin},"
        f" size={size}), where it needs one index per sample, a multiple of that, or one for all "
        "samples. Give the call a shard=, or make it outside of the block"
    )


def active() -> bool:
    """Whether an :func:`rng` block is active."""
    return now().context is not None


def seed_for(device: torch.device, seed: int | Tensor | None, site: int | None = None) -> Tensor:
    """The seed tensor of one call: the given seed, or one from the active rng, or a drawn one.

    Raises RuntimeError where a recomputation in backward would get another mask than its forward.
    """
    if seed is not None:
        return as_seed(seed, device)
    blocks = now()
    context = blocks.context
    if not _is_compiling():
        if blocks.call is not None:
            if context is None:
                _check_generator(blocks.call)
        elif backward_task() != -1:
            _check_unknown(blocks, site)
        elif context is not None and site is not None:
            _note_use(blocks, site)
    if context is None:
        return new_seed(device)
    if site is not None:
        return context.take(site, True, device)
    context.calls += 1
    return context.take(context.calls - 1, False, device)


def host_seed(seed: int | Tensor | None, site: int | None = None) -> Tensor:
    """A seed for the host's own decisions: on the CPU, drawn from the CPU's generator.

    It waits for an accelerator only where the given seed, or that of the active rng, is a tensor
    on one.
    """
    context = now().context
    given = seed if seed is not None or context is None else context.base
    device = given.device if isinstance(given, Tensor) else torch.device("cpu")
    return seed_for(device, seed, site).cpu().resolve_neg()  # callers read its memory


def _use(blocks: recomputation.Blocks, site: int) -> tuple[int, int]:
    return site, 0 if blocks.batch is None else blocks.batch[0]


def _note_use(blocks: recomputation.Blocks, site: int) -> None:
    use, sites = _use(blocks, site), blocks.context.sites
    if use in sites:
        warnings.warn(
            f"site {site} was called twice in one tridrop.rng block: both calls have the same "
            "mask. Use a separate module at each place of the model, and a separate seed in each "
            "step: tridrop.fold_in(seed, step)",
            stacklevel=5,
        )
    sites.add(use)


def _check_unknown(blocks: recomputation.Blocks, site: int | None) -> None:
    """Check a call in backward that torch.utils.checkpoint does not run, and so without blocks."""
    if blocks.context is None:
        if _state.entered and not _state.warned_of_others:
            _state.warned_of_others = True
            warnings.warn(
                "a tridrop call is computed in backward, by other means than torch.utils."
                "checkpoint, and draws a new seed. If it recomputes a forward that ran inside "
                "tridrop.rng, it has another mask than that forward and the gradients are wrong: "
                "call backward() inside the same block, or give the call an explicit seed",
                stacklevel=4,
            )
    elif site is None or _use(blocks, site) not in blocks.context.sites:
        raise RuntimeError(
            "a tridrop call is being recomputed in backward inside a tridrop.rng block, by other "
            "means than torch.utils.checkpoint, and "
            + (
                "has neither a seed nor a site: its number in the order of calls is not that of "
                "its forward. Number the modules with tridrop.nn.number_sites(model), or give the "
                "call an explicit seed"
                if site is None
                else f"its forward, of site {site}, did not run in this block: call backward() "
                "inside the block of its forward"
            )
        )


def _check_generator(call: recomputation.Carried) -> None:
    """Warn of a recomputation that draws its seed from a generator with another state."""
    if _state.warned_of_generator or call.restores:
        return
    _state.warned_of_generator = True
    warnings.warn(
        "a tridrop call is being recomputed by torch.utils.checkpoint with "
        "preserve_rng_state=False and draws another mask than its forward did: gradients are "
        "wrong. Leave preserve_rng_state on, or pass explicit seeds, for instance with "
        "tridrop.rng(seed)",
        stacklevel=4,
    )


def number_sites(model: nn.Module, first: int = 0) -> int:
    """Number the dropout sites of ``model`` by their place in it; return the next free number.

    A site is a module with an attribute ``site``, as all modules of tridrop.nn that drop have, or a
    place in the forward of a module that :func:`tridrop.swap` has rewritten (and numbered). The
    numbers follow the order of ``model.modules()``; Keras' layers are numbered in Keras' own order.
    Call it when the model is complete, since a copy of a module copies its number. The number gives
    a module the same stream of :func:`tridrop.rng` in every run, whatever the order of calls.

    >>> import tridrop
    >>> model = nn.Sequential(tridrop.nn.Dropout(0.1), nn.ReLU(), tridrop.nn.Dropout(0.1))
    >>> tridrop.nn.number_sites(model), model[2].site
    (2, 1)
    """
    check_module(model)
    first = check_whole(first, "first", 0)
    for module in all_modules(model):
        attributes = module.__dict__
        if "_tridrop_count" in attributes:
            if "_tridrop_attention_site" in attributes:
                attributes["_tridrop_attention_site"] += first - attributes.get("_tridrop_site", 0)
            attributes["_tridrop_site"] = first
            first += attributes["_tridrop_count"]
        if hasattr(module, "site"):
            module.site = first  # type: ignore[assignment]
            first += 1
    return first
