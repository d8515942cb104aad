"""Keras' dropout layers with tridrop's masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from torch import Tensor

from .. import functional as F
from .seeds import Drops, check_seed

_registered = keras.saving.register_keras_serializable(package="tridrop")


def _full(noise_shape: Sequence[int | None] | None, x: Tensor) -> tuple[int | None, ...] | None:
    """Keras' noise_shape as tridrop's: a shorter one belongs to the last dimensions."""
    if noise_shape is None or len(noise_shape) >= x.dim():
        return None if noise_shape is None else tuple(noise_shape)
    sizes = [x.shape[i] if size is None else size for i, size in enumerate(noise_shape)]
    return (*(1,) * (x.dim() - len(sizes)), *sizes)


class _Dropping(Drops):
    """The call of the layers below: it returns ``inputs`` itself if nothing is to be dropped."""

    rate: float

    def call(self, inputs: Tensor, training: bool | None = False) -> Tensor:
        # Keras determines shapes and dtypes with tensors on the meta device, which have no values.
        if not training or not self.rate > 0 or inputs.device.type == "meta":
            return inputs
        return self._drop(inputs, self.next_seed(inputs))

    def _drop(self, x: Tensor, seed: Tensor) -> Tensor:
        raise NotImplementedError


@_registered
class Dropout(_Dropping, keras.layers.Dropout):  # type: ignore[misc]
    """:func:`tridrop.dropout` as a Keras layer; in all else like ``keras.layers.Dropout``.

        out = where(keep, inputs / (1 - rate), 0)    in training, else inputs

    Args:
        rate: the probability of dropping an element, in [0, 1].
        noise_shape: as in Keras: 1 for a dimension along which the mask is shared, None or the size
            for any other.
        seed: an int in [-2^31, 2^31); by default one that Keras draws from Python's ``random``,
            which ``keras.utils.set_random_seed`` seeds. The n-th call that drops, counted from 0,
            has the mask of ``tridrop.keep_mask(tridrop.fold_in(seed, n), shape, rate)``. The number
            of calls is saved with the weights, and a loaded model continues with the next one.
        **kwargs: name, dtype and the other arguments of keras.layers.Layer.

    Call arguments:
        inputs: floating-point, of any rank. Keras' masks pass through.
        training: as in Keras, where ``fit`` sets it. Inside :func:`tridrop.rng` the seed given
            there is used instead of the layer's own, and the layer's calls are not counted.

    Raises:
        ValueError: a rate, noise_shape or seed out of range.
        TypeError: inputs that are not floating-point, if something is to be dropped.

    >>> import torch, tridrop, tridrop.keras
    >>> layer = tridrop.keras.Dropout(0.5, seed=7)
    >>> first, second = layer(torch.ones(8), training=True), layer(torch.ones(8), training=True)
    >>> bool((second.bool() == tridrop.keep_mask(tridrop.fold_in(7, 1), (8,), 0.5)).all())
    True
    >>> layer(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_seed(seed)
        super().__init__(rate, noise_shape=noise_shape, seed=seed, **kwargs)

    def _drop(self, x: Tensor, seed: Tensor) -> Tensor:
        return F.dropout(x, self.rate, noise_shape=_full(self.noise_shape, x), seed=seed)


class _Spatial(_Dropping):
    """Dropout of whole feature maps."""

    data_format: str = "channels_last"

    def _drop(self, x: Tensor, seed: Tensor) -> Tensor:
        space = (1,) * (x.dim() - 2)
        last = self.data_format == "channels_last"
        shape = (None, *space, None) if last else (None, None, *space)
        return F.dropout(x, self.rate, noise_shape=shape, seed=seed)


@_registered
class SpatialDropout1D(_Spatial, keras.layers.SpatialDropout1D):  # type: ignore[misc]
    """Drops whole feature maps of ``[batch, steps, channels]``.

    The mask is that of ``tridrop.dropout(..., noise_shape=(None, 1, None))``; seed, training and
    everything else are as in :class:`Dropout`.

    >>> import torch, tridrop.keras
    >>> out = tridrop.keras.SpatialDropout1D(0.5, seed=1)(torch.ones(4, 3, 8), training=True)
    >>> bool((out == out[:, :1]).all())
    True
    """

    def __init__(
        self, rate: float, seed: int | None = None, name: str | None = None, dtype: Any = None
    ) -> None:
        check_seed(seed)
        super().__init__(rate, seed=seed, name=name, dtype=dtype)


class _Maps(_Spatial):
    """The arguments of the layers for images and volumes."""

    def __init__(
        self,
        rate: float,
        data_format: str | None = None,
        seed: int | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        check_seed(seed)
        super().__init__(  # type: ignore[call-arg]  # of keras' layer
            rate, data_format=data_format, seed=seed, name=name, dtype=dtype
        )


@_registered
class SpatialDropout2D(_Maps, keras.layers.SpatialDropout2D):  # type: ignore[misc]
    """Drops whole feature maps of images.

    Args:
        rate, seed, name, dtype: as in :class:`SpatialDropout1D`.
        data_format: "channels_last", ``[batch, rows, columns, channels]``, or "channels_first",
            ``[batch, channels, rows, columns]``; by default Keras' setting.

    >>> import torch, tridrop.keras
    >>> out = tridrop.keras.SpatialDropout2D(0.5, seed=1)(torch.ones(1, 2, 2, 8), training=True)
    >>> bool((out == out[:, :1, :1]).all())
    True
    """


@_registered
class SpatialDropout3D(_Maps, keras.layers.SpatialDropout3D):  # type: ignore[misc]
    """Drops whole feature maps of volumes; see :class:`SpatialDropout2D`.

    >>> import torch, tridrop.keras
    >>> layer = tridrop.keras.SpatialDropout3D(0.5, data_format="channels_first", seed=1)
    >>> out = layer(torch.ones(1, 8, 2, 2, 2), training=True)
    >>> bool((out == out[:, :, :1, :1, :1]).all())
    True
    """


@_registered
class GaussianDropout(_Dropping, keras.layers.GaussianDropout):  # type: ignore[misc]
    """:func:`tridrop.gaussian_dropout` as a Keras layer: it multiplies by noise of mean 1.

    Args:
        rate: in [0, 1); the noise has the standard deviation ``sqrt(rate / (1 - rate))``.
        seed, **kwargs: as in :class:`Dropout`.

    Raises:
        ValueError: a rate of 1, whose noise would be infinite, or a rate outside [0, 1].

    >>> import torch, tridrop, tridrop.keras
    >>> layer = tridrop.keras.GaussianDropout(0.5, seed=7)
    >>> noise = tridrop.normal_noise(tridrop.fold_in(7, 0), (4,))
    >>> torch.testing.assert_close(layer(torch.ones(4), training=True), 1 + noise)
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        check_seed(seed)
        super().__init__(rate, seed=seed, **kwargs)
        if rate == 1:
            raise ValueError(
                "rate = 1 means infinite noise in GaussianDropout: give a rate in [0, 1)"
            )

    def _drop(self, x: Tensor, seed: Tensor) -> Tensor:
        return F.gaussian_dropout(x, self.rate, seed=seed)


@_registered
class AlphaDropout(_Dropping, keras.layers.AlphaDropout):  # type: ignore[misc]
    """:func:`tridrop.alpha_dropout` as a Keras layer: it keeps mean and variance, for SELU
    networks.

    Args:
        rate, noise_shape, seed, **kwargs: as in :class:`Dropout`.

    >>> import torch, tridrop.keras
    >>> tridrop.keras.AlphaDropout(0.5, seed=1)(torch.zeros(4), training=True)
    tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_seed(seed)
        super().__init__(rate, noise_shape=noise_shape, seed=seed, **kwargs)

    def _drop(self, x: Tensor, seed: Tensor) -> Tensor:
        return F.alpha_dropout(
            x, self.rate, True, noise_shape=_full(self.noise_shape, x), seed=seed
        )
