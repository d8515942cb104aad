"""The other dropouts of torch.nn, and those of Keras, as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_choice, check_tensor
from ..contract import recomputation
from ..contract.mask import as_seed, fold_in
from ..spec.elementwise import check_input, check_probability
from .modules import _Site, refuse_keras, refuse_mode

Function = Callable[..., Tensor]


class _OneTensor(_Site):
    """A module whose forward is ``function(input, p, training, seed=...)``."""

    p: float
    inplace: bool = False

    def _call(self, function: Function, input: Tensor, training: bool | None = None) -> Tensor:
        training = self.training if training is None else training
        out = function(input, self.p, training, seed=self._seed(input, training))
        return input.copy_(out) if self.inplace and out is not input else out


class _Torch(_OneTensor):
    """A drop-in for a module of torch, and an instance of that module's class."""

    function: Function

    def __init__(self, p: float = 0.5, inplace: bool = False, **keras: Any) -> None:
        refuse_keras(type(self).__name__, keras)
        check_probability(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:
        return self._call(type(self).function, input)


class Dropout1d(_Torch, nn.Dropout1d):
    """:func:`tridrop.dropout1d` as a module; a drop-in for torch.nn.Dropout1d.

    ``inplace=True`` writes the result into the input and returns it, here and below.

    >>> import torch, tridrop
    >>> tridrop.nn.Dropout1d(0.5).eval()(torch.ones(1, 1, 2))
    tensor([[[1., 1.]]])
    """

    function = staticmethod(F.dropout1d)


class Dropout2d(_Torch, nn.Dropout2d):
    """:func:`tridrop.dropout2d` as a module; a drop-in for torch.nn.Dropout2d.

    >>> import torch, tridrop
    >>> tridrop.nn.Dropout2d(0.5).eval()(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    function = staticmethod(F.dropout2d)


class Dropout3d(_Torch, nn.Dropout3d):
    """:func:`tridrop.dropout3d` as a module; a drop-in for torch.nn.Dropout3d.

    >>> import torch, tridrop
    >>> tridrop.nn.Dropout3d(0.5).eval()(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    function = staticmethod(F.dropout3d)


class AlphaDropout(_Torch, nn.AlphaDropout):
    """:func:`tridrop.alpha_dropout` as a module; a drop-in for torch.nn.AlphaDropout.

    torch's module ignores ``inplace``; this one does not.

    >>> import torch, tridrop
    >>> tridrop.nn.AlphaDropout(0.5).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    function = staticmethod(F.alpha_dropout)

    def forward(self, input: Tensor, training: None = None) -> Tensor:
        if training is not None:
            refuse_mode("AlphaDropout", training)
        return self._dropped(input)

    def _dropped(self, input: Tensor) -> Tensor:
        return super().forward(input)


class FeatureAlphaDropout(_Torch, nn.FeatureAlphaDropout):
    """:func:`tridrop.feature_alpha_dropout`; a drop-in for torch.nn.FeatureAlphaDropout.

    >>> import torch, tridrop
    >>> tridrop.nn.FeatureAlphaDropout(0.5).eval()(torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    function = staticmethod(F.feature_alpha_dropout)


class _Keras(_OneTensor):
    """A module with the arguments of Keras' layers: ``rate``, ``seed`` and the call's ``training``.

    With a ``seed`` the n-th call that drops takes ``fold_in(seed, n)``, so two modules with the
    same seed draw the same sequence of masks. A recomputation of such a call in backward raises.
    An active :func:`tridrop.rng` overrides the seed.
    """

    def __init__(self, rate: float, seed: int | None = None) -> None:
        super().__init__()
        check_probability(rate, "rate")
        self.p = float(rate)
        self.base = seed
        if seed is not None:
            as_seed(seed)  # raises unless it is a seed
        self.calls = 0

    def _seed(self, x: Tensor, training: bool | None = None) -> Tensor | None:
        found = super()._seed(x, training)
        drops = self.training if training is None else training
        if found is not None or self.base is None or not drops:
            return found
        check_input(x, "input")  # a call that is refused does not count
        if recomputation.number() is not None:
            raise RuntimeError(
                "a layer with a seed of its own is being recomputed in backward, where it would "
                "draw the next mask of its sequence: leave seed out and use tridrop.rng(seed)"
            )
        self.calls += 1
        return fold_in(as_seed(self.base, x.device), self.calls - 1)

    def extra_repr(self) -> str:
        return f"rate={self.p}" + ("" if self.base is None else f", seed={self.base}")


class GaussianDropout(_Keras):
    """:func:`tridrop.gaussian_dropout` as a module, with the arguments of Keras' GaussianDropout.

    Args:
        rate: the p of :func:`tridrop.gaussian_dropout`, in [0, 1).
        seed: None, or an int that fixes the sequence of masks: the n-th call that drops takes
            ``fold_in(seed, n)``.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.GaussianDropout(0.5, seed=1).eval()
    >>> layer(torch.ones(2)), layer(torch.ones(2), training=True).std() > 0
    (tensor([1., 1.]), tensor(True))
    """

    def forward(self, input: Tensor, training: bool | None = None) -> Tensor:
        return self._call(F.gaussian_dropout, input, training)


class _Spatial(_Keras):
    """Dropout of whole feature maps, with channels last or first."""

    dimensions = 0  # the number of spatial dimensions

    def __init__(
        self, rate: float, data_format: str = "channels_last", seed: int | None = None
    ) -> None:
        super().__init__(rate, seed)
        check_choice(data_format, "data_format", ("channels_last", "channels_first"))
        self.data_format = data_format

    def forward(self, input: Tensor, training: bool | None = None) -> Tensor:
        check_tensor(input, "input")
        if input.dim() != self.dimensions + 2:
            raise ValueError(
                f"{type(self).__name__} takes {self.dimensions + 2} dimensions: batch, channels "
                f"and {self.dimensions} of space; given shape {tuple(input.shape)}"
            )
        space = (1,) * self.dimensions
        last = self.data_format == "channels_last"
        shape = (None, *space, None) if last else (None, None, *space)

        def drop(x: Tensor, p: float, training: bool, seed: Tensor | None) -> Tensor:
            return F.dropout(x, p, training, noise_shape=shape, seed=seed)

        return self._call(drop, input, training)


class SpatialDropout1D(_Spatial):
    """Drops whole feature maps of ``[N, steps, C]``, as Keras' layer (Tompson et al. 2015).

    It is :func:`tridrop.dropout` with ``noise_shape=(None, 1, None)``. In a sequence model this is
    also one mask for all time steps (Gal and Ghahramani 2016).

    Args:
        rate: the probability of dropping a feature map.
        data_format: "channels_last" (the default, ``[N, ..., C]``) or "channels_first".
        seed: None, or an int that fixes the sequence of masks.

    Called with ``training=True`` it drops, and with False it does not, whatever the module's mode.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.SpatialDropout1D(0.5, seed=1).eval()
    >>> out = layer(torch.ones(4, 3, 8), training=True)
    >>> bool((out == out[:, :1]).all())
    True
    """

    dimensions = 1


class SpatialDropout2D(_Spatial):
    """Drops whole feature maps of ``[N, H, W, C]``; see :class:`SpatialDropout1D`.

    >>> import torch, tridrop
    >>> tridrop.nn.SpatialDropout2D(0.5).eval()(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    dimensions = 2


class SpatialDropout3D(_Spatial):
    """Drops whole feature maps of ``[N, D, H, W, C]``; see :class:`SpatialDropout1D`.

    >>> import torch, tridrop
    >>> tridrop.nn.SpatialDropout3D(0.5).eval()(torch.ones(1, 1, 1, 1, 2))
    tensor([[[[[1., 1.]]]]])
    """

    dimensions = 3
