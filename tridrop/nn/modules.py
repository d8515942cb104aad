"""The dropout modules: they hold hyper-parameters only, and a forward is one function call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..base.arguments import check_flag, check_sequence, check_tensor
from ..contract import seeds
from ..functional.linear import remade_activation
from ..spec.elementwise import check_activation, check_probability


class _Site(nn.Module):
    """A module that drops, and that :func:`number_sites` can number as a site."""

    site: int | None = None

    def _seed(self, x: Tensor, training: bool | None = None) -> Tensor | None:
        """This site's seed under an active tridrop.rng; otherwise None, and the op draws one."""
        if not (self.training if training is None else training) or not seeds.active():
            return None
        check_tensor(x, "the module's input")
        return seeds.seed_for(x.device, None, self.site)


# The arguments of Keras' layers, which users of Keras may pass out of habit.
_KERAS = ("rate", "seed", "noise_shape", "name", "dtype", "training")
_LAYERS = {f"Dropout{n}d": f"SpatialDropout{n}D" for n in (1, 2, 3)}  # the layers' names there
_LAYERS["FeatureAlphaDropout"] = "AlphaDropout"


def refuse_keras(name: str, given: Mapping[str, object]) -> None:
    """Raise TypeError for arguments that torch's modules do not have."""
    for key in given:
        if key not in _KERAS:
            raise TypeError(f"{name} got an unexpected keyword argument {key!r}")
        raise TypeError(
            f"{name} got {key}=, an argument of Keras. tridrop.nn.{name} is torch's: "
            f"tridrop.nn.{name}(p), with train() and eval(), and tridrop.rng(seed) for its seed. "
            "The layer of Keras with tridrop's masks is "
            f"tridrop.keras.{_LAYERS.get(name, name)}(rate, seed=...), which is called as "
            "layer(x, training=True)"
        )


def refuse_mode(name: str, training: object) -> None:
    """Raise TypeError for Keras' ``training`` in a call, except for a Proxy.

    torch.fx passes a Proxy for every argument.
    """
    if not isinstance(training, Proxy):
        refuse_keras(name, {"training": training})


class Dropout(nn.Dropout, _Site):
    """:func:`tridrop.dropout` as a module; a drop-in for torch.nn.Dropout, and an instance of it.

    Args:
        p: the probability of dropping an element.
        inplace: True writes the result into the input and returns it, as torch.nn.Dropout does. It
            frees no memory here, since no mask is stored either way.
        noise_shape: as in :func:`tridrop.dropout`.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.Dropout(0.5)
    >>> layer.eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    noise_shape: tuple[int | None, ...] | None = None

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        noise_shape: Sequence[int | None] | None = None,
        **keras: Any,
    ) -> None:
        refuse_keras("Dropout", keras)
        check_probability(p)
        super().__init__(p, inplace)
        if noise_shape is not None:
            check_sequence(noise_shape, "noise_shape", "a tuple with one entry per dimension")
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)

    def forward(self, input: Tensor, training: None = None) -> Tensor:
        if training is not None:
            refuse_mode("Dropout", training)
        return self._dropped(input)

    def _dropped(self, input: Tensor) -> Tensor:
        # torch.fx traces with objects whose is_nested is something else, or does not exist.
        if getattr(input, "is_nested", False) is not False:
            return self._nested(input)
        out = F.dropout(
            input, self.p, self.training, noise_shape=self.noise_shape, seed=self._seed(input)
        )
        return input.copy_(out) if self.inplace and out is not input else out

    def _nested(self, input: Tensor) -> Tensor:
        """The dropout of a nested tensor: itself, or an error. Swapped modules override this."""
        return F.dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        shape = "" if self.noise_shape is None else f", noise_shape={self.noise_shape}"
        return f"p={self.p}, inplace={self.inplace}{shape}"


class DropPath(_Site):
    """Stochastic depth (Huang et al. 2016): drops whole samples, indices of the first dimension.

    Arguments as in timm: ``drop_prob``, and ``scale_by_keep=False`` to leave the kept samples
    unscaled.

    >>> import torch, tridrop
    >>> with tridrop.rng(3):
    ...     tridrop.nn.DropPath(0.5)(torch.ones(3, 2))
    tensor([[0., 0.],
            [2., 2.],
            [0., 0.]])
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        check_probability(drop_prob, "drop_prob")
        check_flag(scale_by_keep, "scale_by_keep")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        check_tensor(x, "x")
        if x.dim() == 0:
            raise ValueError("DropPath drops indices of the first dimension; x has none")
        noise_shape = (None, *(1,) * (x.dim() - 1))
        out = F.dropout(
            x, self.drop_prob, self.training, noise_shape=noise_shape, seed=self._seed(x)
        )
        if self.scale_by_keep or out is x:
            return out
        return out * (1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


class ActivationDropout(_Site):
    """:func:`tridrop.activation_dropout` as a module; ``bias`` is the bias of the linear before it.

    With ``remake`` a linear layer of a :class:`TransformerBlock` that takes the result does not
    keep it for backward, see :func:`tridrop.activation_dropout_linear`.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.ActivationDropout("relu", p=0.1)
    >>> layer.eval()(torch.tensor([-1.0, 2.0]), bias=torch.tensor([0.5, 0.5]))
    tensor([0.0000, 2.5000])
    """

    def __init__(self, activation: str | None, p: float = 0.5, *, remake: bool = False) -> None:
        super().__init__()
        check_activation(activation)
        check_probability(p)
        check_flag(remake, "remake")
        self.activation = activation
        self.p = p
        self.remake = remake

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        function = remade_activation if self.remake else F.activation_dropout
        return function(
            x, self.p, self.training, activation=self.activation, bias=bias, seed=self._seed(x)
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, p={self.p}"


class DropoutAdd(_Site):
    """:func:`tridrop.dropout_add` as a module: the end of a residual branch.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.DropoutAdd(p=0.1)
    >>> layer.eval()(torch.ones(2), torch.ones(2), bias=torch.ones(2))
    tensor([3., 3.])
    """

    def __init__(
        self, p: float = 0.5, drop_path: float = 0.0, activation: str | None = None
    ) -> None:
        super().__init__()
        check_activation(activation)
        check_probability(p)
        check_probability(drop_path, "drop_path")
        self.p = p
        self.drop_path = drop_path
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        bias: Tensor | None = None,
        layer_scale: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        return F.dropout_add(
            x,
            residual,
            self.p,
            self.training,
            bias=bias,
            activation=self.activation,
            layer_scale=layer_scale,
            gate=gate,
            drop_path=self.drop_path,
            seed=self._seed(x),
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, drop_path={self.drop_path}, activation={self.activation!r}"
