"""DropConnect as modules: a linear layer, and a function that drops parameters of any module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .. import functional as F
from ..base.arguments import check_module, check_sequence
from ..contract.seeds import seed_for
from ..functional.dropconnect import drop_weight
from ..ops.remade import remade
from ..spec.elementwise import check_probability
from .modules import _Site

_READS = 2  # reads of a parameter that may precede the first call, to see its dtype or to print it


class DropConnectLinear(nn.Linear, _Site):
    """:func:`tridrop.dropconnect_linear` as a module: torch.nn.Linear with dropped weights.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        p: the probability of dropping a weight.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.DropConnectLinear(4, 2, p=0.5)
    >>> layer(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.5,
    ) -> None:
        check_probability(p)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = float(p)

    def forward(self, input: Tensor) -> Tensor:
        return F.dropconnect_linear(
            input, self.weight, self.bias, self.p, self.training, seed=self._seed(input)
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class WeightDropped(_Site):
    """The parametrisation that :func:`weight_drop` registers, one for each parameter.

    During the module's forward in training it returns a dropped copy of the weight, drawn once; at
    other times, and in evaluation, the weight itself.
    """

    reads: int = 0  # reads in training outside of a call; -1 once the module has been called

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = float(p)
        self.current: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.current is not None:
            return self.current
        if self.training and self.p > 0 and 0 <= self.reads <= _READS and torch.is_grad_enabled():
            self.reads += 1
            if self.reads > _READS:
                warnings.warn(
                    "a parameter of weight_drop is read in training and its module is not called: "
                    "if a parent reads module.weight and calls a function, nothing is dropped. "
                    "Apply weight_drop to a module that is called",
                    stacklevel=2,
                )
        return weight

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Call:
    """The hooks before and after a module's forward, pickled and copied with the module."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.inside: list[AbstractContextManager[None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "inside": []}

    def before(self, module: nn.Module, inputs: Any) -> None:
        drawn = []
        for name in self.names:
            site, weight = _site_of(module, name)
            if site.training and site.p > 0:
                seed = site._seed(weight)
                found = drop_weight(weight, site.p, seed_for(weight.device, seed))
                site.reads = -1
                drawn.append(found)
                site.current = found[0]
        _show_to_rnn(module)
        context = remade(drawn)
        context.__enter__()
        self.inside.append(context)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for name in self.names:
            _site_of(module, name)[0].current = None
        _show_to_rnn(module)
        if self.inside:
            self.inside.pop().__exit__(None, None, None)


def _site_of(module: nn.Module, name: str) -> tuple[WeightDropped, Tensor]:
    """The parametrisation of a parameter that drops, and the parameter."""
    chain = cast(Any, module.parametrizations)[name]
    return next(m for m in chain if isinstance(m, WeightDropped)), chain.original


def _show_to_rnn(module: nn.Module) -> None:
    """Renew the list from which torch's recurrent modules read their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def weight_drop(module: nn.Module, names: str | Sequence[str], p: float = 0.5) -> nn.Module:
    """Drop parameters of a module in training: DropConnect for any module, such as an LSTM.

    Each named parameter gets a parametrisation of torch.nn.utils.parametrize. A call of the module
    draws one mask for each of them, and backward draws the dropped weight again (Wan et al. 2013;
    ``weight_hh_l0`` of an LSTM: AWD-LSTM, Merity, Keskar, Socher, arXiv 1708.02182). Outside of a
    call the attribute is the weight itself.

    Args:
        module: any torch.nn.Module whose forward reads the parameters as attributes, or a
            recurrent module of torch.
        names: the names of its parameters, such as "weight".
        p: the probability of dropping a weight.

    Returns:
        The module itself. Its state_dict names the weight ``parametrizations.<name>.original``;
        :func:`remove_weight_drop` undoes that.

    Raises:
        ValueError: a name that is no parameter of the module, or is dropped already; p outside
            [0, 1]; the ``out_proj`` of a MultiheadAttention, which is read but never called.
        TypeError: names of another type.

    Warns:
        UserWarning: the parameter is read repeatedly in training, but the module is never called,
            because a parent takes ``module.weight`` and calls a function. Nothing is dropped then.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.weight_drop(torch.nn.Linear(8, 8), "weight", 0.5)
    >>> bool((layer(torch.eye(8)) - layer.bias == 0).any())
    True
    """
    check_module(module, "module")
    check_probability(p)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            "this is the out_proj of a torch.nn.MultiheadAttention, which reads its parameters and "
            "never calls it, so that nothing would drop: drop the attention's own in_proj_weight, "
            "or its weights with dropout="
        )
    if not isinstance(names, str):
        check_sequence(names, "names", "a name, or a list of them")
    wanted = [names] if isinstance(names, str) else list(names)
    parameters = dict(module.named_parameters(recurse=False))
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"names has {name!r} of type {type(name).__name__}; give strings")
        if dropped_names(module).count(name):
            raise ValueError(f"{name} is dropped already: call remove_weight_drop first")
        parametrized = parametrize.is_parametrized(module, name)
        if name not in parameters and not parametrized:
            raise ValueError(
                f"{name!r} is no parameter of {type(module).__name__}; it has: "
                f"{', '.join(parameters) or 'none'}"
            )
    call = _call_of(module)
    if call is None:
        call = _Call()
        object.__setattr__(module, "_tridrop_weight_drop", call)
        module.register_forward_pre_hook(call.before)
        module.register_forward_hook(call.after, always_call=True)
    for name in wanted:
        site = WeightDropped(p).train(module.training)
        parametrize.register_parametrization(module, name, site)
        site.reads = 0
        call.names.append(name)
    return module


def _call_of(module: nn.Module) -> _Call | None:
    return cast("_Call | None", getattr(module, "_tridrop_weight_drop", None))


def dropped_names(module: nn.Module) -> list[str]:
    """The names of a module's parameters that :func:`weight_drop` drops."""
    call = _call_of(module)
    return [] if call is None else list(call.names)


def remove_weight_drop(module: nn.Module) -> nn.Module:
    """Undo :func:`weight_drop`, so that the parameters are plain parameters again.

    Returns the module, unchanged if it drops nothing. Raises ValueError while the parameters have
    other parametrisations: remove these with torch.nn.utils.parametrize first.

    >>> import torch, tridrop
    >>> layer = tridrop.nn.weight_drop(torch.nn.Linear(2, 2), "weight", 0.5)
    >>> sorted(dict(tridrop.nn.remove_weight_drop(layer).named_parameters()))
    ['bias', 'weight']
    """
    check_module(module, "module")
    call = _call_of(module)
    if call is None:
        return module
    for name in call.names:
        chain = cast(Any, module.parametrizations)[name]
        if any(not isinstance(m, WeightDropped) for m in chain):
            raise ValueError(
                f"{name} has other parametrisations too, which cannot stay when this one goes: "
                "remove them with torch.nn.utils.parametrize.remove_parametrizations"
            )
    for name in call.names:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is call:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    del module._tridrop_weight_drop
    _show_to_rnn(module)
    return module
