"""Pipelines: every microbatch knows which samples of the global batch it holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..contract.seeds import batch_slice

# What a schedule of torch.distributed.pipelining calls, with the number of a microbatch first.
_CALLS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


def number_microbatches(stage: Any, size: int, origin: int = 0) -> None:
    """Give the microbatches of a pipeline stage their places in the global batch.

    Forward and backward of microbatch i then run under ``batch_slice(origin + i * size, size)``.
    With the sites' numbers, which :func:`tridrop.swap` or :func:`tridrop.nn.number_sites` fixed in
    the whole model before it was split, and one seed in :func:`tridrop.rng`, the masks are those of
    one process that sees the whole batch: whatever the schedule and its order.

    Args:
        stage: a PipelineStage of torch.distributed.pipelining.
        size: the number of samples in a microbatch.
        origin: the first sample of this process's batch in the global one: with data parallelism
            around the pipeline, its rank times its batch.

    >>> number_microbatches(stage, size=4)  # doctest: +SKIP
    """
    with batch_slice(origin, size):  # raises for what is no slice
        pass

    def placed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(chunk: int, *args: Any, **kwargs: Any) -> Any:
            with batch_slice(origin + chunk * size, size):
                return function(chunk, *args, **kwargs)

        return call

    missing = [name for name in _CALLS[:2] if not hasattr(stage, name)]
    if missing:
        raise TypeError(
            f"stage is a {type(stage).__name__} without {', '.join(missing)}; give a PipelineStage "
            "of torch.distributed.pipelining"
        )
    for name in _CALLS:
        if hasattr(stage, name):
            setattr(stage, name, placed(getattr(stage, name)))
