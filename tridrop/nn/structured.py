"""Structured dropout as modules: of branches, layers, tokens, heads, blocks of feature maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_choice
from ..contract.seeds import host_seed
from ..functional.depth import left_layers
from ..spec.elementwise import check_probability
from .modules import _Site


class StochasticDepth(_Site):
    """:func:`tridrop.stochastic_depth` as a module; a drop-in for torchvision's.

    ``mode="row"`` is :class:`DropPath`, ``mode="batch"`` drops the branch of all samples together.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.StochasticDepth(0.5, "batch")
    >>> with tridrop.rng(4):
    ...     layer(torch.ones(2, 2))
    tensor([[2., 2.],
            [2., 2.]])
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        check_probability(p)
        check_choice(mode, "mode", ("batch", "row"))
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return F.stochastic_depth(input, self.p, self.mode, self.training, seed=self._seed(input))

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


class DropPathSubset(_Site):
    """:func:`tridrop.drop_path_subset`: ``x + branch(x)``, computed only for samples that keep it.

    Args:
        branch: the residual branch, a module from [k, ...] to [k, ...].
        p: the rate of dropping samples.

    >>> import torch
    >>> block = DropPathSubset(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), p=0.4)
    >>> block(torch.randn(10, 3, 8)).shape  # six went through the branch
    torch.Size([10, 3, 8])
    """

    def __init__(self, branch: nn.Module, p: float = 0.5) -> None:
        super().__init__()
        check_probability(p)
        self.branch = branch
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.drop_path_subset(x, self.branch, self.p, self.training, seed=self._seed(x))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LayerDrop(_Site, nn.ModuleList):
    """A list of layers, each of which a forward in training skips with probability ``p``.

    It is a torch.nn.ModuleList with :func:`tridrop.layer_drop`, and has the list's state_dict.
    Called with an input, it runs the layers one after the other, and passes all further arguments
    to each of them. A forward that does something else between layers iterates over :meth:`kept`::

        for layer in self.layers.kept():
            x = layer(x, mask)

    (fairseq's LayerDropModuleList drops layers whenever it is iterated over. This class does not,
    so that printing or initialising a model sees all layers.) :func:`tridrop.layer_drop` says when
    the host waits for the seed. Under DistributedDataParallel skipped layers have no gradient, so
    set ``find_unused_parameters=True``; under FSDP all ranks must skip the same layers, so give all
    of them one seed.

    Args:
        layers: the modules.
        p: the probability of skipping a layer.

    >>> import tridrop
    >>> layers = LayerDrop([nn.Linear(4, 4) for _ in range(6)], p=0.5)
    >>> with tridrop.rng(3):
    ...     len(layers), len(layers.kept()), len(layers.eval().kept())
    (6, 4, 6)
    """

    def __init__(self, layers: Iterable[nn.Module] | None = None, p: float = 0.5) -> None:
        check_probability(p)
        super().__init__(layers)
        self.p = p

    def kept(self) -> list[nn.Module]:
        """The layers to run in this forward. Each call in training draws again."""
        if not self.training or self.p == 0:
            return list(self)
        return left_layers(list(self), self.p, host_seed(None, self.site))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layers that are kept, one after the other."""
        for layer in self.kept():
            x = layer(x, *args, **kwargs)
        return x

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return type(self)(list(self._modules.values())[idx], self.p)
        return super().__getitem__(idx)


class PatchDropout(_Site):
    """:func:`tridrop.patch_dropout` as a module; a drop-in for timm's PatchDropout.

    Args:
        prob: the rate of dropping tokens, in [0, 1).
        num_prefix_tokens, ordered, return_indices: as in the function. (timm 1.0.20 and later has
            ``return_indices=True`` as a class of its own, PatchDropoutWithIndices.)

    >>> import torch
    >>> PatchDropout(0.75)(torch.randn(2, 1 + 196, 8)).shape
    torch.Size([2, 50, 8])
    """

    def __init__(
        self,
        prob: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        check_probability(prob, "prob")
        if prob == 1:
            raise ValueError("prob = 1 leaves no token; give a rate in [0, 1)")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        out, indices = F.patch_dropout(
            x,
            self.prob,
            self.training,
            num_prefix_tokens=self.num_prefix_tokens,
            ordered=self.ordered,
            return_indices=True,
            seed=self._seed(x),
        )
        return (out, indices) if self.return_indices else out

    def extra_repr(self) -> str:
        return (
            f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}"
        )


class HeadDropout(_Site):
    """:func:`tridrop.head_dropout` as a module, between an attention and its output projection.

    >>> import torch, tridrop
    >>> layer = HeadDropout(0.5, rescale="kept")
    >>> with tridrop.rng(2):
    ...     layer(torch.ones(2, 4, 1, 1)).flatten(1)
    tensor([[0., 2., 0., 2.],
            [0., 4., 0., 0.]])
    """

    def __init__(self, p: float = 0.5, dim: int = 1, rescale: str = "expected") -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        self.dim = dim
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        return F.head_dropout(
            x, self.p, self.training, dim=self.dim, rescale=self.rescale, seed=self._seed(x)
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, rescale={self.rescale!r}"


class DropBlock2d(_Site):
    """:func:`tridrop.drop_block2d` as a module; a drop-in for torchvision's.

    >>> import torch, tridrop
    >>> tridrop.nn.DropBlock2d(0.2, 3).eval()(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    function = staticmethod(F.drop_block2d)

    def __init__(
        self, p: float, block_size: int, inplace: bool = False, eps: float = 1e-06
    ) -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        self.block_size = block_size
        self.inplace = inplace
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return type(self).function(
            input,
            self.p,
            self.block_size,
            self.inplace,
            self.eps,
            self.training,
            seed=self._seed(input),
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}"


class DropBlock3d(DropBlock2d):
    """:func:`tridrop.drop_block3d` as a module; a drop-in for torchvision's.

    >>> import torch, tridrop
    >>> tridrop.nn.DropBlock3d(0.2, 3).eval()(torch.ones(1, 1, 1, 1, 2))
    tensor([[[[[1., 1.]]]]])
    """

    function = staticmethod(F.drop_block3d)
