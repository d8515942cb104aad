"""A recomputation in backward runs inside the ``rng`` and ``batch_slice`` blocks of its forward.

torch.utils.checkpoint computes a part of the forward once more while backward runs. By then other
``rng`` and ``batch_slice`` blocks may be active, or none, and the thread may be another one. So the
checkpointed call carries its blocks along, as it carries torch's state of the generators and of
autocast: they are copied where the call begins, and are active again while it is recomputed.

The only public way to add to that state is ``context_fn``, which the caller of ``checkpoint`` would
have to pass, and which reentrant checkpoints do not take. So this file, and no other, wraps the two
places where torch's checkpoints keep the function that they will recompute:

- ``_CheckpointFrame(recompute_fn, ...)``, made once per call without reentrant autograd, whose
  ``recompute_fn`` is a closure over ``preserve_rng_state``;
- ``CheckpointFunction.forward(ctx, run_function, preserve_rng_state, *args)``, for reentrant calls.
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
    """The blocks that are active in the process, or in one recomputation."""

    def __init__(self) -> None:
        self.context: Any = None  # the seeds of the innermost rng
        self.batch: tuple[int, int] | None = None  # (origin, size) of the innermost batch_slice
        self.call: Carried | None = None  # the function that is being recomputed, if one is
        self.number: int | None = None  # a number that no other recomputation has
        self.counts: dict[Counter, int] = {}  # how far each counter has come in it


class _Contested:
    """The blocks that compiled code sees while several threads recompute, each under its own."""

    @property
    def context(self) -> Any:
        raise RuntimeError("several threads recompute compiled calls at once")

    batch = context


class _State:
    # The blocks that compiled code sees. It cannot look them up by thread: Dynamo would treat the
    # thread that traces as a constant.
    shown: Any


_process = Blocks()
_recomputed: dict[int, Blocks] = {}  # the blocks of the running recomputations, by thread
_state = _State()
_state.shown = _process
_lock = threading.Lock()
_numbers = itertools.count()


class Counter:
    """Numbers the calls of a layer that has a sequence of seeds, such as a layer of Keras.

    A recomputation counts from where its forward began, so that each call gets the same number.
    """

    def __init__(self) -> None:
        self.calls = 0
        _counters.add(self)

    def next(self) -> int:
        """Count a call, and return how many calls ago its forward was: 0 for a forward itself.

        Raises RuntimeError where backward computes the call by other means than
        torch.utils.checkpoint.
        """
        blocks = now()
        if blocks.call is not None:
            number = blocks.counts.get(self, 0)  # 0 if the counter was made after the forward began
            blocks.counts[self] = number + 1
            return self.calls - number
        if backward_task() != -1:
            raise RuntimeError(
                "a layer with a sequence of seeds is computed in backward, by other means than "
                "torch.utils.checkpoint, so tridrop cannot know which mask of the sequence its "
                "forward had. Use tridrop.rng(seed) around forward and backward"
            )
        self.calls += 1
        return 0


_counters: weakref.WeakSet[Counter] = weakref.WeakSet()


def _counted(blocks: Blocks) -> dict[Counter, int]:
    """How far each counter has come."""
    return {c: c.calls if blocks.call is None else blocks.counts.get(c, 0) for c in _counters}


def now() -> Blocks:
    """The blocks around the caller: those of its recomputation, or else those of the process."""
    if _is_compiling():
        shown: Blocks = _state.shown
        return shown
    return _recomputed.get(_thread(), _process) if _recomputed else _process


def number() -> int | None:
    """The number of the running recomputation; None outside of one.

    A recomputation by other means than torch.utils.checkpoint has the number of its backward.
    """
    if _is_compiling():
        return None
    blocks = now()
    if blocks.call is not None:
        return blocks.number
    task: int = backward_task()
    return None if task == -1 else -1 - task


def _place(blocks: Blocks | None) -> Blocks | None:
    """Set the blocks of this thread's recomputation, and return those that it had before."""
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
    """A function that will be computed again, with a copy of the blocks that are active now.

    Args:
        function: the function.
        restores: whether torch restores the state of its generators for the recomputation; None
            where ``function``, a closure of torch.utils.checkpoint, knows.
        in_forward: whether the first call is the forward itself.
    """

    def __init__(
        self, function: Callable[..., Any], restores: bool | None, in_forward: bool
    ) -> None:
        blocks = now()
        self.function, self.in_forward = function, in_forward
        self._restores = restores
        # The copy holds the number of calls so far and the tables of seeds that exist already, so
        # that the recomputation runs the same operators in the same order: selective checkpointing
        # counts them.
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
        """Whether torch's generators have the state that they had in the forward."""
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
