"""DropBlock: squares and cubes of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from ..base import arguments as spec_values
from ..contract.seeds import refuse_batch, seed_for
from ..ops import Masked, apply
from ..spec import elementwise as spec
from .masks import keep_mask


def drop_block2d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero squares of feature maps, [N, C, H, W]; torchvision's function.

        keep = no start of a block within the block_size x block_size places up to this one
        out = where(keep, input * (size / (eps + number kept)), 0)

    A block may start at each place where it fits, with probability

        gamma = p * (H W / block_size^2) / ((H - block_size + 1) (W - block_size + 1))

    (Ghiasi, Lin, Le, "DropBlock: a regularization method for convolutional networks", NeurIPS
    2018.) Blocks may overlap, so that a smaller part than p is dropped, even where p is 1: about
    1 - exp(-p) where blocks are much smaller than the map. The starts are ``~tridrop.keep_mask(
    seed, (N, C, H - block_size + 1, W - block_size + 1), gamma)``. The whole batch has one scale.
    Backward draws the blocks again and stores none.

    Args:
        input: [N, C, H, W]; float16, bfloat16, float32 or float64.
        p: approximately the part to drop, a number in [0, 1].
        block_size: the side of a block, odd; a smaller map has blocks of its own size.
        inplace: write the result into ``input`` and return it.
        eps: keeps the scale finite where everything is dropped; finite, 0 or more.
        training: False returns ``input`` itself, as p = 0 does.
        seed: as in :func:`tridrop.dropout`.

    Raises:
        ValueError: p outside [0, 1]; input of other than 4 dimensions; a block size that is not
            odd and positive; an eps that is negative, infinite or NaN.
        TypeError: input of another dtype, p, block_size, eps, inplace or seed of another type.

    >>> import torch
    >>> drop_block2d(torch.ones(1, 1, 5, 5), 0.3, 3, seed=4)[0, 0].round(decimals=2)
    tensor([[1.5600, 1.5600, 1.5600, 1.5600, 1.5600],
            [1.5600, 1.5600, 0.0000, 0.0000, 0.0000],
            [1.5600, 1.5600, 0.0000, 0.0000, 0.0000],
            [1.5600, 1.5600, 0.0000, 0.0000, 0.0000],
            [1.5600, 1.5600, 1.5600, 1.5600, 1.5600]])
    """
    return _drop_block(input, 2, p, block_size, inplace, eps, training, seed)


def drop_block3d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-06,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Zero cubes of feature maps, [N, C, D, H, W]: :func:`drop_block2d` for volumes.

    >>> import torch
    >>> drop_block3d(torch.ones(1, 1, 3, 3, 3), 1.0, 3, seed=1).count_nonzero()
    tensor(0)
    """
    return _drop_block(input, 3, p, block_size, inplace, eps, training, seed)


def _drop_block(
    input: Tensor,
    dims: int,
    p: float,
    block_size: int,
    inplace: bool,
    eps: float,
    training: bool,
    seed: int | Tensor | None,
) -> Tensor:
    spec.check_input(input, "input")
    spec.check_probability(p)
    if input.dim() != dims + 2:
        space = "D, H, W" if dims == 3 else "H, W"
        raise ValueError(f"input has shape {tuple(input.shape)}; give [N, C, {space}]")
    block_size = spec_values.check_whole(block_size, "block_size", wanted="an odd int")
    eps = spec.check_eps(eps)
    spec_values.check_flag(inplace, "inplace")
    if not spec.drops(p, training) or input.numel() == 0:
        return input
    size = min(block_size, *input.shape[2:])
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"block_size = {block_size} on maps of {tuple(input.shape[2:])} makes blocks of side "
            f"{size}; it must be odd and positive"
        )
    refuse_batch("drop_block2d" if dims == 2 else "drop_block3d")
    given = (float(p), size, eps)
    out: Tensor = apply(Masked, input, seed_for(input.device, seed), _blocks, given)
    return input.copy_(out) if inplace else out


def _blocks(
    seed: Tensor, shape: Sequence[int], p: float, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(keep, scale) of DropBlock."""
    dims = len(shape) - 2
    starts = [n - size + 1 for n in shape[2:]]
    gamma = p * (math.prod(shape[2:]) / (size**dims * math.prod(starts)))
    dropped = ~keep_mask(seed, (*shape[:2], *starts), gamma)
    dropped = pad(dropped, [size - 1] * (2 * dims))
    for dim in range(2, 2 + dims):
        dropped = dropped.unfold(dim, size, 1).any(-1)
    keep = ~dropped
    return keep, keep.numel() / (eps + keep.sum().double())
