"""What a recomputation has to know of its forward: the blocks that were open then.

torch.utils.checkpoint computes a part of the forward once more while backward runs. By then other
blocks of ``rng`` and ``batch_slice`` may be open, or none, and the thread may be another. So the
blocks go with the checkpointed call, as torch's own state of the generators and of autocast does:
they are noted where the call begins, and open again for as long as it is recomputed.

torch has no public way to add to that state but ``context_fn``, which whoever calls ``checkpoint``
would have to pass, and which the reentrant kind does not have. So the two places where torch's
checkpoints keep what they will recompute are wrapped, here and nowhere else:

- ``_CheckpointFrame(recompute_fn, ...)``, made once a call of the kind without reentrant autograd,
  whose ``recompute_fn`` is a closure over ``preserve_rng_state``;
- ``CheckpointFunction.forward(ctx, run_function, preserve_rng_state, *args)``, of the reentrant.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from ..base.torch_private import CheckpointFrame, backward_task

_is_compiling = torch.compiler.is_dynamo_compiling
_thread = threading.get_ident


class Blocks:
    """The blocks that are open, of the process or of a recomputation."""

    def __init__(self) -> None:
        self.context: Any = None  # the seeds of the innermost rng
        self.batch: tuple[int, int] | None = None  # of the innermost batch_slice
        self.call: Carried | None = None  # what is being recomputed, if anything is
        self.number: int | None = None  # of that recomputation: each has another
        self.counts: dict[Counter, int] = {}  # where counters stand in it


class _Contested:
    """What compiled code sees while recomputations in several threads have blocks of their own."""

    @property
    def context(self) -> Any:
        raise RuntimeError("several threads recompute compiled calls at once")

    batch = context


class _State:
    # What compiled code sees. It cannot ask for the thread: Dynamo would take the answer that it
    # gets while it traces for a constant.
    shown: Any


_process = Blocks()
_recomputed: dict[int, Blocks] = {}  # those of the recomputations that are being run, by thread
_state = _State()
_state.shown = _process
_lock = threading.Lock()
_numbers = itertools.count()


class Counter:
    """Numbers the calls of something that has a sequence of seeds, such as a layer of Keras.

    A recomputation counts from where its forward began, so that each call has its number again.
    """

    def __init__(self) -> None:
        self.calls = 0
        _counters.add(self)

    def next(self) -> int:
        """Count a call. One of a forward gives 0; a recomputed one how many calls ago it was.

        Raises RuntimeError in a backward that is not torch.utils.checkpoint's.
        """
        blocks = now()
        if blocks.call is not None:
            number = blocks.counts.get(self, 0)  # 0 where it was made after the forward began
            blocks.counts[self] = number + 1
            return self.calls - number
        if backward_task() != -1:
            raise RuntimeError(
                "a layer with a sequence of seeds is computed in backward, by other means than "
                "torch.utils.checkpoint: it cannot be told which mask of the sequence its forward "
                "had. Use tridrop.rng(seed) around forward and backward"
            )
        self.calls += 1
        return 0


_counters: weakref.WeakSet[Counter] = weakref.WeakSet()


def _counted(blocks: Blocks) -> dict[Counter, int]:
    """Where all counters stand."""
    return {c: c.calls if blocks.call is None else blocks.counts.get(c, 0) for c in _counters}


def now() -> Blocks:
    """The blocks in which the caller is: of its recomputation, or else of the process."""
    if _is_compiling():
        shown: Blocks = _state.shown
        return shown
    return _recomputed.get(_thread(), _process) if _recomputed else _process


def number() -> int | None:
    """The number of the recomputation that is being run; None outside.

    One that is not torch.utils.checkpoint's has that of the backward that it is part of.
    """
    if _is_compiling():
        return None
    blocks = now()
    if blocks.call is not None:
        return blocks.number
    task: int = backward_task()
    return None if task == -1 else -1 - task


def _place(blocks: Blocks | None) -> Blocks | None:
    """Set the blocks of this thread's recomputation; returns those that it had."""
    with _lock:
        before = _recomputed.pop(_thread(), None)
        if blocks is not None:
            _recomputed[_thread()] = blocks
        all_ = list(_recomputed.values())
        if len(all_) > 1 and any(b.context is not None or b.batch is not None for b in all_):
            _state.shown = _Contested()
        else:
            _state.shown = all_[-1] if all_ else _process
    return before


class Carried:
    """A function that will be computed again, with the blocks that are open as this is made.

    Args:
        function: what is computed again.
        restores: whether torch's generators are then as they are now; None: as ``function``, a
            closure of torch.utils.checkpoint, has it.
        in_forward: whether the first call is that of the forward.
    """

    def __init__(
        self, function: Callable[..., Any], restores: bool | None, in_forward: bool
    ) -> None:
        blocks = now()
        self.function, self.in_forward = function, in_forward
        self._restores = restores
        # A copy, which knows how many calls were counted and which tables of seeds were made: so
        # all is done again in the same order, which selective checkpointing counts on.
        self.context = None if blocks.context is None else blocks.context.copy()
        self.batch = blocks.batch
        self.counts = _counted(blocks) if _counters else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_forward:
            self.in_forward = False
            return self.function(*args, **kwargs)
        blocks = Blocks()
        blocks.call, blocks.number = self, next(_numbers)
        blocks.context = None if self.context is None else self.context.copy()
        blocks.batch = self.batch
        blocks.counts = dict(self.counts)
        before = _place(blocks)
        try:
            return self.function(*args, **kwargs)
        finally:
            _place(before)

    @property
    def restores(self) -> bool:
        """Whether torch's generators are as they were in the forward."""
        if self._restores is not None:
            return self._restores
        function: Any = self.function
        place = function.__code__.co_freevars.index("preserve_rng_state")
        return bool(function.__closure__[place].cell_contents)


def _wrap() -> None:
    frame = CheckpointFrame
    make, run = frame.__init__, torch_checkpoint.CheckpointFunction.forward

    @functools.wraps(make)
    def __init__(self: Any, recompute_fn: Any, *rest: Any, **options: Any) -> None:
        make(self, Carried(recompute_fn, None, in_forward=False), *rest, **options)

    @functools.wraps(run)
    def forward(ctx: Any, run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        carried = Carried(run_function, preserve_rng_state, in_forward=True)
        return run(ctx, carried, preserve_rng_state, *args)

    frame.__init__ = __init__  # type: ignore[method-assign]
    torch_checkpoint.CheckpointFunction.forward = staticmethod(forward)  # type: ignore[method-assign]


_wrap()
