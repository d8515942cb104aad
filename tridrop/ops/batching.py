"""vmap of the elementwise and norm ops, in one call for all samples.

Under vmap a sample has the mask that it would have alone. Where all samples have one seed, this is
a mask that is shared along the dimension of the samples: the index there counts as 0, and the other
coordinates are those of a single sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .common import each_sample


def all_samples(
    function: Callable[..., Any],
    operands: type[Any],
    info: Any,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
) -> tuple[Any, Any]:
    """The vmap rule of a forward, ``function(*operands, packed)``.

    :func:`each_sample` serves samples that have seeds or vectors of their own, and scalars. It also
    serves drop_path and gates, which refer to the first dimension: a dimension of samples in front
    would change that.
    """
    *tensors, packed = args
    given = operands(*tensors)
    # in_dims also has entries for the options, which zip leaves out.
    dims = dict(zip(operands._fields, in_dims, strict=False))
    batched = {name for name, dim in dims.items() if dim is not None}
    scalars = given.x.dim() == ("x" in batched)
    gain = given.layer_scale
    by_sample = packed.drop_path > 0 or (gain is not None and gain.dim() > 1)
    if not batched <= {"x", "residual"} or by_sample or scalars:
        return each_sample(function, info, in_dims, args)
    batch = info.batch_size

    def in_front(name: str) -> Tensor | None:
        t, dim = getattr(given, name), dims[name]
        if t is None:
            return None
        return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    moved = given._replace(x=in_front("x"), residual=in_front("residual"))
    results = function(*moved, _with_samples(packed, batch))
    if isinstance(results, Tensor):
        return results, 0
    # These are the results of a norm, whose stream is an empty vector where it is not kept.
    return results, tuple(0 if t.dim() == results[0].dim() else None for t in results)


def _with_samples(packed: Any, batch: int) -> Any:
    """Packed options for a dimension of samples in front, along which the mask is shared."""
    packed = packed._replace(shared=[0, *(dim + 1 for dim in packed.shared)])
    if not packed.global_shape:
        return packed
    return packed._replace(global_shape=[batch, *packed.global_shape], origin=[0, *packed.origin])
