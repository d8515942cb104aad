"""vmap of the elementwise and norm ops in one call for all samples.

Under vmap a sample has the mask that it would have alone. Where all samples have one seed that is a
mask shared along the dimension of the samples: it has index 0 there, and so the coordinates that
are left are those of a sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .common import each_sample

# In the arguments of both families' functions: what has a row for every sample, a vector that may
# be a gate, and the end.
_X, _RESIDUAL = 0, 3
_LAYER_SCALE = 2
_PACKED = -1
# In packed options.
_DROP_PATH, _SHARED, _WHOLE, _ORIGIN = 2, 3, 4, 5


def all_samples(
    function: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """The vmap rule of a forward, ``function(x, bias, layer_scale, residual, ..., packed)``.

    Samples with seeds or vectors of their own, those with a mask of drop_path or a gate, whose
    first dimension would no longer be the first, and numbers are left to :func:`each_sample`.
    """
    free = (_X, _RESIDUAL)
    # Options have entries of their own, so only tensors are looked at.
    given = {i for i, a in enumerate(args) if isinstance(a, Tensor) and in_dims[i] is not None}
    numbers = args[_X].dim() == (_X in given)
    gain = args[_LAYER_SCALE]
    by_sample = args[_PACKED][_DROP_PATH] > 0 or (isinstance(gain, Tensor) and gain.dim() > 1)
    if not given <= set(free) or by_sample or numbers:
        return each_sample(function, info, in_dims, args)
    batch = info.batch_size
    arguments = [*args[:_PACKED], _with_samples(args[_PACKED], batch)]
    for i in free:
        t, dim = args[i], in_dims[i]
        if isinstance(t, Tensor):
            arguments[i] = t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    results = function(*arguments)
    if isinstance(results, Tensor):
        return results, 0
    # A norm: a stream that is not kept is empty, of one dimension.
    return results, tuple(0 if t.dim() == results[0].dim() else None for t in results)


def _with_samples(packed: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """Packed options with a dimension of samples in front, along which the mask is shared."""
    changed = list(packed)
    changed[_SHARED] = [0, *(dim + 1 for dim in packed[_SHARED])]
    if packed[_WHOLE]:
        changed[_WHOLE], changed[_ORIGIN] = [batch, *packed[_WHOLE]], [0, *packed[_ORIGIN]]
    return tuple(changed)
