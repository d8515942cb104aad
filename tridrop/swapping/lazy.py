"""The functions that rewritten forwards call, which delay ops until they can be fused.

A dropout returns a :class:`Pending`, which the following addition or norm takes up; code that needs
the tensor calls :func:`value`. Each function calls the module itself if that is no longer what it
was when the forward was rewritten: if it has hooks, was replaced, or works in place. So a rewritten
forward stays right whatever is done to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional as F
from ..base.modules import heard
from ..contract import seeds
from ..contract.mask import fold_in
from ..functional.linear import linear as linear_of
from ..functional.linear import of_remade, remade_add_norm
from ..spec import elementwise as spec
from . import traced
from .calls import call as call
from .forms import ADDERS
from .kinds import Kind, activation_name
from .originals import is_attention, is_dropout, is_softmax
from .pending import Pending, addable, autocasts, drop_samples, eps_of, fits, normalises_last
from .pending import value as value
from .remade_calls import one_activation as one_activation
from .remade_calls import remade_activation as remade_activation
from .remade_calls import remade_linear as remade_linear

# rewritten forwards use this name
from .remade_calls import remade_linear as remade_matrix  # noqa: F401
from .remade_calls import remade_norm as remade_norm
from .remade_calls import remade_product as remade_product
from .remade_calls import unhooked_kind as unhooked_kind

# While a report is verified, this is called with each seed and the place that takes it.
watcher: Callable[[Tensor, nn.Module, int | None], None] | None = None


def _seed(owner: nn.Module, place: int, x: Tensor) -> Tensor | None:
    """The seed of a place under tridrop.rng; None lets the op draw one."""
    if not seeds.active() and watcher is None:
        return None
    return watched(seeds.seed_for(x.device, None, _number(owner, place)), owner, place)


def watched(seed: Tensor, owner: nn.Module, place: int | None = None) -> Tensor:
    """Pass a seed through, and tell the watcher its place; None stands for ``owner`` itself."""
    if watcher is not None:
        watcher(seed, owner, place)
    return seed


def _number(owner: nn.Module, place: int) -> int | None:
    """The number of a place in a method of ``owner``; None if it was not numbered."""
    first = owner.__dict__.get("_tridrop_site")
    return None if first is None else first + place


def _branch(x: Any, *taken: str) -> Pending:
    """``x`` as a branch to which none of ``taken``, nor anything later, was applied."""
    if isinstance(x, Pending):
        clean = x.done is None and x.residual is None and x.path == 0
        if clean and all(getattr(x, name) is None or getattr(x, name) is False for name in taken):
            return x
        x = value(x)
    return Pending(x)


def dropout(owner: nn.Module, place: int, module: nn.Module, x: Any) -> Any:
    """A call of torch's dropout module."""
    kind = unhooked_kind(module, "dropout")
    if kind is None or getattr(module, "noise_shape", None) is not None:
        return _at(owner, place, module, x)
    return _dropped(owner, place, x, kind.get(module, "p"), module.training)


def _at(owner: nn.Module, place: int, module: Any, x: Any) -> Any:
    """Call the module itself, with its hooks, under the number of this place.

    A module that is called at several places has a number at each.
    """
    number = _number(owner, place)
    if number is None or not seeds.active() or not hasattr(module, "_tridrop_base"):
        return module(value(x))
    name = "site" if hasattr(module, "site") else "_tridrop_site"
    before = getattr(module, name, None)
    setattr(module, name, number)
    try:
        return module(value(x))
    finally:
        setattr(module, name, before)


def rate(
    owner: nn.Module,
    place: int,
    function: Callable[..., Any],
    x: Any,
    p: Any,
    training: bool,
    inplace: bool = False,
) -> Any:
    """A call of torch.nn.functional.dropout, or of the function that has replaced it."""
    if inplace or not is_dropout(function):
        return function(value(x), p, training, *([inplace] if inplace else []))
    return _dropped(owner, place, x, p, training)


def _dropped(owner: nn.Module, place: int, x: Any, p: Any, training: bool) -> Any:
    branch = _branch(x, "dropped")
    if not fits(branch.x):
        return traced.dropout(_number(owner, place), value(branch), p, training)
    branch.dropped = True
    if spec.drops(p, training):
        branch.p = p
        branch.seed = _seed(owner, place, branch.x)
    return branch


def drop_path(owner: nn.Module, place: int, module: nn.Module, x: Any) -> Any:
    """A call of a module that drops samples."""
    kind = unhooked_kind(module, "drop_path")
    if kind is None:
        return _at(owner, place, module, x)
    return samples(module, kind, x, _number(owner, place), (owner, place))


def samples(
    module: nn.Module,
    kind: Kind,
    x: Any,
    site: int | None,
    at: tuple[nn.Module, int] | None = None,
) -> Any:
    """The drop path of a module, under the number of its place."""
    p = (kind.get(module, "p") or 0.0) if module.training else 0.0
    if not p:
        return x
    scaled = "scale_by_keep" not in kind.names or kind.get(module, "scale_by_keep")
    branch = _branch(x, "softmax") if scaled else Pending(value(x))
    if seeds.active() and branch.seed is not None:
        branch = Pending(value(branch))  # an op takes one seed, but each place has its own number
    if seeds.active() or watcher is not None:
        if branch.seed is None:
            branch.seed = seeds.seed_for(branch.x.device, None, site)
        watched(branch.seed, *(at or (module,)))
    if not scaled:
        return drop_samples(branch.x, p, branch.seed, scaled=False)
    branch.path = p
    return branch


def scale(module: nn.Module, x: Any) -> Any:
    """A call of a module that multiplies each channel by a weight."""
    kind = unhooked_kind(module, "layer_scale")
    branch = _branch(x, "scale", "softmax", "norm")
    gamma = None if kind is None else kind.get(module, "scale")
    if not isinstance(gamma, Tensor) or not fits(branch.x):
        return module(value(branch))
    if gamma.shape != branch.x.shape[-1:] or gamma.dtype != branch.x.dtype:
        return module(value(branch))
    branch.scale = gamma
    return branch


def linear(module: nn.Module, x: Any) -> Any:
    """A call of a linear layer, which leaves its bias to the op that follows."""
    kind = unhooked_kind(module, "linear")
    x = value(x)
    if kind is None or not module.training or not fits(x):
        return module(x)
    transposed = kind.get(module, "transposed")
    if transposed is not None:
        branch = Pending(of_remade(transposed.__rmatmul__, x, casts=True))
    else:
        branch = Pending(linear_of(x, kind.get(module, "weight")))
    branch.bias = kind.get(module, "bias")
    return branch


def activation(function: Callable[[Tensor], Tensor], x: Any, memory: bool = False) -> Any:
    """A call of an activation."""
    name = activation_name(function)
    hooked = isinstance(function, nn.Module) and heard(function)
    branch = _branch(x, "activation", "dropped", "scale", "softmax", "norm")
    if name is None or hooked or not fits(branch.x):
        return function(value(branch))
    branch.activation, branch.function, branch.memory = name, function, memory
    return branch


def softmax(
    function: Callable[..., Any] | None, x: Tensor, dtype: torch.dtype | None = None
) -> Any:
    """A softmax over the last dimension before a dropout; None stands for the tensor's method."""
    if not fits(x) or x.dim() < 2 or not is_softmax(function):
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return (function or torch.softmax)(x, dim=-1, **options)
    branch = Pending(x)
    branch.softmax = dtype or (torch.float32 if autocasts(x) else x.dtype)
    return branch


def softmax_of(module: nn.Module, x: Tensor) -> Any:
    """A call of torch.nn.Softmax over the last dimension."""
    kind = unhooked_kind(module, "softmax")
    return module(x) if kind is None or kind.get(module, "dim") != -1 else softmax(None, x)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """``x.to(dtype)`` between a softmax and its dropout."""
    if isinstance(x, Pending) and x.done is None and x.softmax is not None and not x.dropped:
        x.softmax = dtype
        return x
    return value(x).to(dtype)


def add(first: Any, second: Any) -> Any:
    """``first + second``, where one of them may be a branch and the other the residual stream."""
    branch, residual = (second, first) if _can_join(second) else (first, second)
    residual = value(residual)
    if not _can_join(branch) or not isinstance(residual, Tensor):
        return value(first) + value(second)
    branch.residual = residual
    return branch


def _can_join(x: Any) -> bool:
    """Whether a residual can be added to it before it is computed."""
    return isinstance(x, Pending) and x.done is None and x.residual is None and x.softmax is None


def norm(module: nn.Module, x: Any, last: bool = False, memory: bool = False) -> Any:
    """A norm of a sum that may be pending; ``last`` says that the sum has no other user."""
    kind = unhooked_kind(module, "layer_norm") or unhooked_kind(module, "rms_norm")
    if kind is None or not isinstance(x, Pending) or x.done is not None or x.residual is None:
        return module(value(x))
    residual, weight = x.residual, kind.get(module, "weight")
    if (
        x.activation is not None
        or x.norm is not None
        or not addable(x, residual)
        or not normalises_last(kind, module, residual)
    ):
        return module(value(x))
    out_dtype = residual.dtype
    if kind.name == "layer_norm" and autocasts(residual):
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    options: dict[str, Any] = {
        "bias": x.bias, "layer_scale": x.scale, "drop_path": x.path,
        "eps": eps_of(kind, module, residual), "zero_centered_weight": kind.zero_centered,
        "out_dtype": out_dtype, "seed": x.seed,
    }  # fmt: skip
    operands = (x.x, residual, weight, kind.get(module, "bias"), x.p, True)
    function = F.dropout_add_rms_norm if kind.name == "rms_norm" else F.dropout_add_layer_norm
    if memory:
        normed, stream = remade_add_norm(function, *operands, **options)
        if not last:
            x.finish(stream)
        return normed
    out = function(*operands, prenorm=not last, **options)
    if isinstance(out, tuple):
        out, stream = out
        x.finish(stream)
    return out


def norm_first(module: nn.Module, x: Any) -> Any:
    """A norm that is followed by a dropout."""
    kind = unhooked_kind(module, "layer_norm") or unhooked_kind(module, "rms_norm")
    x = value(x)
    if kind is None or not fits(x) or autocasts(x) or not normalises_last(kind, module, x):
        return module(x)
    branch = Pending(x)
    branch.norm = (kind, module)
    return branch


def identity(module: nn.Module, x: Any) -> Any:
    """A call of nn.Identity, which stands where other models have a layer scale or a drop path."""
    return module(value(x)) if unhooked_kind(module, "identity") is None else x


def dropout_add(
    owner: nn.Module,
    place: int,
    function: Any,
    x: Any,
    residual: Any,
    p: float | Tensor,
    training: bool,
) -> Any:
    """A call of a function ``residual + dropout(x)``, or of the function that has replaced it."""
    same = ADDERS.get(function) is getattr(function, "__code__", function)
    if not same or not is_dropout(torch.nn.functional.dropout):
        return function(value(x), value(residual), p, training)
    return add(residual, _dropped(owner, place, x, p, training))


def within(
    owner: nn.Module, place: int, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A call of a function that drops inside, and whose source is not rewritten."""
    with _Catch(owner, place):
        return function(*args, **kwargs)


class _Catch(TorchFunctionMode):
    """Replaces calls of torch's dropout and attention while it is active."""

    def __init__(self, owner: nn.Module, place: int) -> None:
        super().__init__()
        self.owner, self.place, self.calls = owner, place, 0
        self.levels = type(owner)._tridrop_recipe.levels  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.dropout:  # whose last argument has another name
            kwargs = {"training" if n == "train" else n: x for n, x in kwargs.items()}
        if func in (torch.nn.functional.dropout, torch.dropout) and self.levels.dropout:
            return self.dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and self.levels.attention:
            return self.attention(*args, **kwargs)
        return func(*args, **kwargs)

    def seed(self, x: Tensor) -> Tensor | None:
        seed = _seed(self.owner, self.place, x)
        if seed is not None and self.calls:  # later calls share the number of the place
            seed = watched(fold_in(seed, self.calls), self.owner, self.place)
        self.calls += 1
        return seed

    def dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if inplace or not training or p == 0 or not fits(input):
            return traced.dropout(_number(self.owner, self.place), input, p, training, inplace)
        return F.dropout(input, p, seed=self.seed(input))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = (query, key, value, attn_mask, dropout_p, *args)
        if dropout_p == 0 or not fits(query):
            return traced.attention(_number(self.owner, self.place), *given, **kwargs)
        return F.scaled_dot_product_attention(*given, **kwargs, seed=self.seed(query))


def attention(
    owner: nn.Module, place: int, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A call of torch.nn.functional.scaled_dot_product_attention; without dropout it stays that."""
    query = args[0] if args else kwargs["query"]
    p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if not is_attention(function):
        return function(*args, **kwargs)
    if p == 0 or not fits(query):
        return traced.attention(_number(owner, place), *args, **kwargs)
    return F.scaled_dot_product_attention(*args, **kwargs, seed=_seed(owner, place, query))
