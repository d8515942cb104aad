"""How a call comes by its seed: an explicit one, that of the active ``rng``, or a drawn one.

This is bookkeeping of the host; the arithmetic of seeds is in mask.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .mask import as_seed, fold_in, new_seed

# Sites whose seeds are made ahead, in a few launches a context and not a few launches a call.
_TABLE = 1024
# Calls without a site number are counted in a branch of the streams of their own.
_UNNUMBERED = -1


class _Context:
    """The seeds of one ``with rng(seed)`` block."""

    def __init__(self, seed: int | Tensor, rank: int | None) -> None:
        self.seed, self.rank = seed, rank
        self.calls = 0
        self.sites: set[tuple[int, int]] = set()  # and the batch's origins there
        self.tables: dict[tuple[bool, torch.device], Tensor] = {}
        self.captured = _capturing()
        if isinstance(seed, Tensor):  # known device: nothing is left to do inside a compiled call
            for numbered in (True, False):
                self.tables[numbered, seed.device] = self._table(seed, numbered, _TABLE)

    def _table(self, seed: Tensor, numbered: bool, size: int) -> Tensor:
        if self.rank is not None:
            seed = fold_in(seed, self.rank)
        base = seed if numbered else fold_in(seed, _UNNUMBERED)
        streams = torch.arange(size, dtype=torch.int64, device=seed.device)
        folded = fold_in(base, 0)[1] + streams
        return torch.stack((base[0].expand(size), folded), dim=1)

    def take(self, index: int, numbered: bool, device: torch.device) -> Tensor:
        table = self.tables.get((numbered, device))
        if table is None or index >= len(table):
            if device.type == "cuda" and not self.captured and _capturing():
                raise RuntimeError(
                    f"a CUDA graph is being captured, and the tridrop.rng block around it has no "
                    f"seed number {index} on {device} yet: it would be made in the graph's own "
                    "memory, where only replays fill it in. Give rng a seed tensor on that device, "
                    "make one such call before the capture, or enter rng inside the capture"
                )
            size = max(_TABLE, 2 * index)
            table = self._table(as_seed(self.seed, device), numbered, size)
            self.tables[numbered, device] = table
        return table[index]


def _capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph, and runs when that is replayed."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


class _State:
    # Process-wide, since backward and the recomputation in it run in threads of their own.
    active: _Context | None = None
    # Whether the last forward call that was given no seed took it from an rng block.
    last_from_context = False
    warned_of_recomputation = False
    # Of what is computed, the first sample in the whole batch, and the number of samples.
    batch: tuple[int, int] | None = None


_state = _State()


@contextmanager
def rng(seed: int | Tensor, *, fold_rank: Any = None) -> Iterator[None]:
    """Give every tridrop call inside the block, that has no seed of its own, one under ``seed``.

    A module of tridrop.nn that :func:`tridrop.nn.number_sites` has numbered takes
    ``fold_in(seed, site)``: its mask does not depend on the order of calls, so activation
    checkpointing, pipelining and compilation keep it. Every other call takes the next number of a
    count that begins anew in each block; such a call cannot be recomputed in backward, and raises
    there.

    Put ``loss.backward()`` inside the block too where activations are recomputed. The setting is
    process-wide: do not enter it in several threads at once.

    Args:
        seed: an int or a seed tensor. Under torch.compile pass a tensor, made outside the compiled
            region: it enters the graph as an input, so no seed is ever compiled in.
        fold_rank: gives processes that share ``seed`` masks of their own, those of
            ``fold_in(seed, rank)``: the rank as an int; True for that among all processes of
            torch.distributed; or a process group or DeviceMesh, for that in it. For a mesh of
            several dimensions, :func:`tridrop.distributed.mesh_seed` says which share.

    >>> import tridrop
    >>> with tridrop.rng(7):
    ...     first = tridrop.dropout(torch.ones(8), 0.5)
    >>> with tridrop.rng(7):
    ...     second = tridrop.dropout(torch.ones(8), 0.5)
    >>> bool((first == second).all())
    True
    """
    before = _state.active
    if not isinstance(seed, Tensor):
        as_seed(seed)  # raises for what is not a seed
    rank = None if fold_rank is None or fold_rank is False else _rank(fold_rank)
    _state.active = _Context(as_seed(seed) if isinstance(seed, Tensor) else seed, rank)
    try:
        yield
    finally:
        _state.active = before


def _rank(of: Any) -> int:
    """The number to fold for ``rng(fold_rank=of)``."""
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
    """What is computed inside is samples ``origin .. origin + size - 1`` of a larger batch.

    Masks are then the rows of the masks of the whole batch: data-parallel ranks, microbatches and
    the turns of gradient accumulation, each under the same seed, drop what one process would that
    sees all samples at once. It holds for every tridrop call without a ``shard`` of its own, by
    the size of the first dimension of its result (attention: of its batch):

    ===================  ====================================================================
    size                 one index a sample, beginning at ``origin``
    k * size             k indices a sample, samples outermost, beginning at ``k * origin``
    1, and size > 1      the same for all samples, such as position embeddings: as without this
    anything else        ValueError
    ===================  ====================================================================

    So samples must come first: of ``[L, N, E]`` (``batch_first=False``), and of tokens that a model
    sorts by expert, give a ``shard`` to each call instead.

    Put ``loss.backward()`` inside too where activations are recomputed. Process-wide, as
    :func:`tridrop.rng`.

    >>> import tridrop
    >>> x = torch.ones(4, 8)
    >>> whole = tridrop.dropout(x, 0.5, seed=1)
    >>> with tridrop.distributed.batch_slice(origin=2, size=2):
    ...     part = tridrop.dropout(x[2:], 0.5, seed=1)
    >>> bool((part == whole[2:]).all())
    True
    """
    for name, value, least in (("origin", origin, 0), ("size", size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; give an int")
        if value < least:
            raise ValueError(f"{name} = {value}; give {least} or more")
    before, _state.batch = _state.batch, (origin, size)
    try:
        yield
    finally:
        _state.batch = before


def in_batch() -> bool:
    """Whether a :func:`batch_slice` block is being run."""
    return _state.batch is not None


def refuse_batch(name: str) -> None:
    """Raise inside a :func:`batch_slice` block: an op's choices have no place in a batch."""
    if _state.batch is not None:
        raise ValueError(
            f"{name} chooses among the samples that it is given, which have no place in a larger "
            "batch: leave it out of batch_slice, with a seed for each rank, such as "
            "tridrop.fold_in(seed, rank)"
        )


def batch_origin(count: int) -> int:
    """Where the first of ``count`` indices of a first dimension lies, of a whole batch."""
    if _state.batch is None:
        return 0
    origin, size = _state.batch
    if count % size == 0:
        return origin * (count // size)
    if count == 1:
        return 0
    raise ValueError(
        f"a tensor with {count} indices in its first dimension, inside batch_slice(origin={origin},"
        f" size={size}): it has neither one for each sample, nor a multiple, nor one for all. Give "
        "the call a shard=, or leave it out of the block"
    )


def active() -> bool:
    """Whether a :func:`rng` block is being run."""
    return _state.active is not None


def seed_for(device: torch.device, seed: int | Tensor | None, site: int | None = None) -> Tensor:
    """The seed tensor of one call: the given one, or the active rng's, or a drawn one.

    Raises RuntimeError where a recomputation in backward could not have the mask of its forward.
    """
    if seed is not None:
        return as_seed(seed, device)
    recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    context = _state.active
    if context is None:
        if recomputing:
            _check_drawn_recomputation()
        else:
            _state.last_from_context = False
        return new_seed(device)
    if not recomputing:
        _state.last_from_context = True
    if site is not None:
        if not recomputing and not torch.compiler.is_compiling():
            _note_use(context, site)
        return context.take(site, True, device)
    if recomputing:
        raise RuntimeError(
            "a tridrop call without a seed or a site is being recomputed in backward inside "
            "tridrop.rng: its number in the order of calls is not that of its forward. Number the "
            "modules with tridrop.nn.number_sites(model), or give the call an explicit seed"
        )
    context.calls += 1
    return context.take(context.calls - 1, False, device)


def host_seed(seed: int | Tensor | None, site: int | None = None) -> Tensor:
    """The seed of a decision that the host takes: on the CPU, drawn from the CPU's generator.

    It waits for an accelerator only where the seed that is given, or that of the active rng, is a
    tensor there.
    """
    given = seed
    if given is None and _state.active is not None:
        given = _state.active.seed
    device = given.device if isinstance(given, Tensor) else torch.device("cpu")
    return seed_for(device, seed, site).cpu()


def _note_use(context: _Context, site: int) -> None:
    use = (site, 0 if _state.batch is None else _state.batch[0])
    if use in context.sites:
        warnings.warn(
            f"site {site} was called twice in one tridrop.rng block: both calls have the same "
            "mask. Give each place in the model a module of its own, and each step a seed of its "
            "own: tridrop.fold_in(seed, step)",
            stacklevel=5,
        )
    context.sites.add(use)


def _check_drawn_recomputation() -> None:
    """Of a recomputation in backward that draws its seed from torch's generator."""
    if _state.last_from_context:
        raise RuntimeError(
            "a tridrop call is being recomputed in backward, outside the tridrop.rng block that "
            "its forward ran in, and would draw another mask: call backward() inside the block"
        )
    if _state.warned_of_recomputation or not _generator_not_restored():
        return
    _state.warned_of_recomputation = True
    warnings.warn(
        "a tridrop call is being recomputed by torch.utils.checkpoint with "
        "preserve_rng_state=False and draws another mask than its forward did: gradients are "
        "wrong. Leave preserve_rng_state on, or pass explicit seeds, for instance with "
        "tridrop.rng(seed)",
        stacklevel=4,
    )


def _generator_not_restored() -> bool:
    """Whether the caller is a recomputation with preserve_rng_state=False.

    torch has no public way to ask. The setting is a variable of the frame that recomputes: of the
    closure in the non-reentrant form, of the context in the reentrant one.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("checkpoint.py"):
            values = frame.f_locals
            ctx = values.get("ctx")
            preserved = values.get("preserve_rng_state", getattr(ctx, "preserve_rng_state", None))
            if preserved is not None:
                return not preserved
        frame = frame.f_back  # type: ignore[assignment]
    return False


def number_sites(model: nn.Module, first: int = 0) -> int:
    """Number the dropout sites of ``model`` by their place in it; returns the next free number.

    A site is a module with an attribute ``site``, as all modules of tridrop.nn that drop have, or a
    place in the forward of a module that :func:`tridrop.swap` has rewritten (and numbered). The
    numbers follow ``model.modules()``; call it once the model is whole, since copies of a module
    copy its number. It is what gives a module the same stream of :func:`tridrop.rng` in every run,
    whatever the order of calls.

    >>> import tridrop
    >>> model = nn.Sequential(tridrop.nn.Dropout(0.1), nn.ReLU(), tridrop.nn.Dropout(0.1))
    >>> tridrop.nn.number_sites(model), model[2].site
    (2, 1)
    """
    for module in model.modules():
        own = module.__dict__
        if "_tridrop_count" in own:
            if "_tridrop_attention_site" in own:
                own["_tridrop_attention_site"] += first - own.get("_tridrop_site", 0)
            own["_tridrop_site"] = first
            first += own["_tridrop_count"]
        if hasattr(module, "site"):
            module.site = first  # type: ignore[assignment]
            first += 1
    return first
