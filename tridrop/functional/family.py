"""Dropout of whole feature maps, alpha dropout and Gaussian dropout: functions of one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..contract import noise
from ..ops.common import whole
from ..spec import elementwise as spec
from ..spec.elementwise import Options
from .elementwise import ShardLike, dropout, fused
from .masks import seed_on


def _feature_shape(x: Tensor) -> tuple[int | None, ...]:
    """The noise_shape for one decision per feature map of x, [N, C, ...]."""
    if x.dim() < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; feature dropout drops channels and takes two "
            "dimensions or more, [N, C, ...]"
        )
    return (None, None, *(1,) * (x.dim() - 2))


def _feature_dropout(
    x: Tensor, p: float | Tensor, training: bool, batched: bool, seed: int | Tensor | None
) -> Tensor:
    if not batched:
        return _feature_dropout(x.unsqueeze(0), p, training, True, seed).squeeze(0)
    return dropout(x, p, training, noise_shape=_feature_shape(x), seed=seed)


def dropout1d(
    x: Tensor, p: float | Tensor = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """Zero whole channels of ``[N, C, L]``, or of one sample ``[C, L]``.

    Each (sample, channel) has one decision, shared along L. With element-wise dropout of a smooth
    signal, a dropped element could be guessed from its neighbours (Tompson et al., "Efficient
    object localization using convolutional networks", CVPR 2015). The mask is that of
    :func:`tridrop.dropout` with ``noise_shape=(None, None, 1)``.

    Args, raises: as :func:`tridrop.dropout`; ValueError for other than 2 or 3 dimensions.

    >>> import torch
    >>> dropout1d(torch.ones(1, 4, 2), 0.5, seed=4)[0, :, 0]
    tensor([0., 2., 0., 2.])
    """
    spec.check_input(x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x has {x.dim()} dimensions; dropout1d takes [N, C, L] or [C, L]: use tridrop.dropout "
            "with a noise_shape for others"
        )
    return _feature_dropout(x, p, training, x.dim() == 3, seed)


def dropout2d(
    x: Tensor, p: float | Tensor = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """Zero whole channels of ``[N, C, H, W]``: :func:`dropout1d` for images.

    As torch.nn.functional.dropout2d, it takes 3-D input as ``[N, C, L]`` and not as ``[C, H, W]``,
    and input of other dimensions as ``[N, C, ...]``, both with a warning.

    Args, raises: as :func:`tridrop.dropout`; ValueError for fewer than two dimensions.

    >>> import torch
    >>> dropout2d(torch.ones(1, 4, 2, 2), 0.5, seed=4).sum((2, 3))
    tensor([[0., 0., 0., 8.]])
    """
    spec.check_input(x)
    if x.dim() == 3:
        warnings.warn(
            "dropout2d takes this 3-D input as [N, C, L], as torch does, and not as one image "
            "[C, H, W]: use dropout1d, or add a batch dimension",
            stacklevel=2,
        )
    elif x.dim() != 4:
        _warn_of_dimensions("dropout2d", x, "[N, C, H, W]")
    return _feature_dropout(x, p, training, True, seed)


def dropout3d(
    x: Tensor, p: float | Tensor = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """Zero whole channels of ``[N, C, D, H, W]``, or of one sample: :func:`dropout1d` for volumes.

    As torch.nn.functional.dropout3d, it takes input of other than 5 dimensions as one sample
    without a batch dimension, with a warning unless there are 4.

    Args, raises: as :func:`tridrop.dropout`; ValueError for a scalar.

    >>> import torch
    >>> dropout3d(torch.ones(4, 2, 2, 2), 0.5, seed=4).sum((1, 2, 3))
    tensor([ 0.,  0., 16., 16.])
    """
    spec.check_input(x)
    if x.dim() not in (4, 5):
        _warn_of_dimensions("dropout3d", x, "[N, C, D, H, W] or [C, D, H, W]")
    return _feature_dropout(x, p, training, x.dim() == 5, seed)


def _warn_of_dimensions(name: str, x: Tensor, wanted: str) -> None:
    warnings.warn(
        f"{name} is for {wanted}; the input has {x.dim()} dimensions, which torch deprecates: use "
        "tridrop.dropout with a noise_shape",
        stacklevel=3,
    )


def alpha_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Dropout that keeps the mean and the variance of standard normal input, for SELU networks.

        out = a * where(keep, x, alpha) + b
        alpha = -1.7580993408473766,  a = ((1 - p) (1 + p alpha^2))^(-1/2),  b = -a p alpha

    Dropped elements take the value that SELU tends to, and the affine map restores mean 0 and
    variance 1 (Klambauer, Unterthiner, Mayr, Hochreiter, "Self-normalizing neural networks", 2017).
    Where x has mean m and variance v the result has mean a (1 - p) m and variance
    a^2 (1 - p) (v + p (m - alpha)^2).

    Args:
        x, p, noise_shape, shard, seed: as in :func:`tridrop.dropout`, whose mask this is.
        training: as in torch.nn.functional.alpha_dropout; False, the default, returns ``x`` itself.

    Returns:
        A tensor of x's shape and dtype, with strides as of :func:`tridrop.dropout`; zeros for p =
        1. A dropped element is ``a * alpha + b``, even where x is NaN or infinite.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`.

    >>> import torch
    >>> alpha_dropout(torch.zeros(4), 0.5, True, seed=1)
    tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
    """
    return _noisy("alpha", x, p, training, noise_shape, shard, seed)


def feature_alpha_dropout(
    x: Tensor, p: float | Tensor = 0.5, training: bool = False, *, seed: int | Tensor | None = None
) -> Tensor:
    """:func:`alpha_dropout` of whole feature maps of ``[N, C, ...]``.

    The mask is that of ``noise_shape=(None, None, 1, ...)``.

    Args, raises: as :func:`alpha_dropout`; ValueError for fewer than two dimensions.

    >>> import torch
    >>> feature_alpha_dropout(torch.zeros(1, 2, 3), 0.5, True, seed=4)
    tensor([[[-0.7792, -0.7792, -0.7792],
             [ 0.7792,  0.7792,  0.7792]]])
    """
    spec.check_input(x)
    return _noisy("alpha", x, p, training, _feature_shape(x), None, seed)


def gaussian_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Multiply by normal noise with the mean, 1, and the variance of dropout's own noise.

        out = x * (1 + sigma * n),    sigma = sqrt(p / (1 - p)),    n standard normal

    (Srivastava et al., JMLR 2014, section 10; Keras' GaussianDropout.) Nothing is dropped; p says
    which Bernoulli dropout has the same first two moments. :func:`tridrop.normal_noise` exports n.
    Backward draws the noise again and stores none.

    Args:
        x, training, noise_shape, shard, seed: as in :func:`tridrop.dropout`.
        p: in [0, 1): at 1 the noise would be infinite.

    Returns:
        A tensor of x's shape and dtype, with strides as of :func:`tridrop.dropout`.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`; p of 1, or less than 2^-33 away.

    >>> import torch
    >>> gaussian_dropout(torch.ones(4), 0.5, seed=1)
    tensor([ 0.3084, -0.0215, -0.1691,  2.8071])
    """
    if not isinstance(p, Tensor) and isinstance(p, Real) and p <= 1 and p > 1 - 2**-33:
        raise ValueError(f"p = {p}; Gaussian dropout has infinite noise there: give p in [0, 1)")
    return _noisy("gaussian", x, p, training, noise_shape, shard, seed)


def _noisy(
    noise_name: str,
    x: Tensor,
    p: float | Tensor,
    training: bool,
    noise_shape: Sequence[int | None] | None,
    shard: ShardLike | None,
    seed: int | Tensor | None,
) -> Tensor:
    """Dropout with another noise than a mask; see ``contract/noise.py``."""
    spec.check_input(x)
    spec.check_probability(p, tensor_allowed=True)
    shared = spec.resolve_noise_shape(noise_shape, x.shape)
    where = spec.resolve_shard(shard, x.shape)
    if not spec.drops(p, training):
        return x
    options = Options(shared=shared, shard=where, noise=noise_name)
    return fused(x, None, None, None, p, True, seed, options)


def normal_noise(
    seed: int | Tensor,
    shape: Sequence[int],
    *,
    noise_shape: Sequence[int | None] | None = None,
    shard: ShardLike | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normal numbers ``n`` of :func:`gaussian_dropout`: fp32.

    They are functions of the seed and the coordinates alone. docs/mask-contract.md defines their
    random words bit for bit, and the arithmetic on these. This function computes them with torch on
    any backend; a kernel's numbers agree with them to a few units in the last place.

    Args:
        seed, shape, noise_shape, shard, device: as in :func:`tridrop.keep_mask`.

    >>> normal_noise(1, (4,))
    tensor([-0.6916, -1.0215, -1.1691,  1.8071])
    """
    shape = spec.check_shape(shape)
    shared = spec.resolve_noise_shape(noise_shape, shape)
    numbers = whole(seed_on(seed, device), "seed")
    return noise.normals(numbers, shape, shared, spec.resolve_shard(shard, shape))
