"""Pipelines: numbers the samples of every microbatch within the global batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..contract.seeds import batch_slice

# The methods that schedules of torch.distributed.pipelining call; the first argument is the number
# of the microbatch.
_CALLS = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


def number_microbatches(stage: Any, size: int, origin: int = 0) -> None:
    """Give the microbatches of a pipeline stage their positions in the global batch.

    The forward and backward of microbatch i then run in ``batch_slice(origin + i * size, size)``.
    If :func:`tridrop.swap` or :func:`tridrop.nn.number_sites` numbered the sites in the whole model
    before it was split, and :func:`tridrop.rng` has one seed, then the masks are those of a single
    process with the whole batch, for any schedule.

    Args:
        stage: a PipelineStage of torch.distributed.pipelining.
        size: the number of samples in a microbatch.
        origin: the index in the global batch of this process's first sample; with data parallelism
            around the pipeline, rank times batch size.

    >>> number_microbatches(stage, size=4)  # doctest: +SKIP
    """
    with batch_slice(origin, size):  # raises if this is no valid slice
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
