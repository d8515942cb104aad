"""The functions that rewritten forwards of LoRA layers call; see adapters.py.

Each takes the layer and the name of an adapter, and inspects both in each call: rates, modes,
dtypes, hooks, and the adapter's modules. Where the op would compute something else than PEFT's
modules, these are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..contract import seeds
from ..spec import elementwise as spec
from ..spec.product import MAX_RANK
from . import lazy
from .lazy import unhooked_kind
from .pending import fits
from .present import Holds


class Variant(NamedTuple):
    """A variant of LoRA: its new forward, if any, and a check that its old one is unchanged."""

    forward: Callable[..., Tensor] | None
    holds: Holds


# Filled when a model is swapped: compiled code can look variants up, but cannot read source.
VARIANTS: dict[type, Variant] = {}

DORA = "DoraLinearVariant"


def why_not(module: Any, name: str) -> str:
    """Why PEFT's own modules compute the branch of an adapter; empty if tridrop does."""
    kind = type(module.lora_variant.get(name))
    if name in module.lora_variant and (kind not in VARIANTS or not VARIANTS[kind].holds()):
        return f"its adapter is a {kind.__name__}"
    if name not in module.lora_A or name not in module.lora_B:
        return "its adapter does not consist of linear layers"
    A, B, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if not _plain(A) or not _plain(B) or A.bias is not None:
        return "its adapter does not consist of plain linear layers"
    if A.out_features > MAX_RANK:
        return f"its rank is above {MAX_RANK}"
    if unhooked_kind(drop, "dropout") is None and unhooked_kind(drop, "identity") is None:
        return "its dropout is not torch's, works in place or has hooks"
    if getattr(drop, "noise_shape", None) is not None:
        return "its dropout has a noise_shape"
    return ""


def _plain(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer, with its own forward and without hooks."""
    plain = type(module) is nn.Linear and unhooked_kind(module, "linear") is not None
    return plain and fits(module.weight)


def _drops(drop: Any) -> bool:
    return spec.drops(getattr(drop, "p", 0.0), drop.training)


def _fuses(module: Any, name: str, x: Tensor) -> bool:
    """Whether tridrop computes the branch of an adapter.

    It does if something drops, or if x would have to be copied to another dtype. In other cases
    PEFT's own calls keep no more for backward, and give the same bits as before.
    """
    if name not in module.lora_A:
        return False
    dtype = module.lora_A[name].weight.dtype
    if x.dtype == dtype and not _drops(module.lora_dropout[name]):
        return False
    if not fits(x) or why_not(module, name):
        return False
    other = module.lora_B[name].weight
    if other.dtype != dtype or other.device != x.device:
        return False
    casts = getattr(module, "cast_input_dtype_enabled", True)
    return x.dtype == dtype or casts or _autocast(x)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _arguments(module: Any, name: str, x: Tensor, scaled: bool) -> dict[str, Any]:
    """The arguments of the op for an adapter."""
    return {
        "A": module.lora_A[name].weight,
        "B": module.lora_B[name].weight,
        "p": _rate(module.lora_dropout[name]),
        "scaling": module.scaling[name] if scaled else 1.0,
        "bias": module.lora_B[name].bias,
        "seed": _seed(module.lora_dropout[name], x),
    }


def _rate(drop: Any) -> Any:
    return drop.p if _drops(drop) else 0.0


def _seed(drop: Any, x: Tensor) -> Tensor | None:
    """The seed of an adapter's dropout under tridrop.rng; None lets the op draw one."""
    if not _drops(drop) or (not seeds.active() and lazy.watcher is None):
        return None
    return lazy.watched(seeds.seed_for(x.device, None, getattr(drop, "site", None)), drop)


def cast(module: Any, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``module._cast_input_dtype(x, dtype)``; not needed where the op casts x as it loads it."""
    if x.dtype == dtype:
        return x
    op_casts = name not in module.lora_variant or (_is_dora(module, name) and not _autocast(x))
    if op_casts and type(module)._tridrop_casts() and _fuses(module, name, x):
        return x
    out: Tensor = module._cast_input_dtype(x, dtype)
    return out


def delta(module: Any, name: str, deltas: dict[str, Tensor], x: Tensor, scaled: bool) -> Tensor:
    """``lora_B(lora_A(dropout(x)))`` of an adapter, times its scaling if ``scaled``.

    If several adapters are active, the call for the first computes all that can share its pass over
    x, and leaves the results of the others in ``deltas``.
    """
    if name in deltas:
        return deltas.pop(name)
    if _fuses(module, name, x):
        names = [name, *_companions(module, name, x)]
        if len(names) == 1:
            return F.lora_delta(x, **_arguments(module, name, x, scaled))
        each = [_arguments(module, n, x, scaled) for n in names]
        made = F.lora_deltas(
            x,
            [a["A"] for a in each],
            [a["B"] for a in each],
            each[0]["p"],
            scaling=[a["scaling"] for a in each],
            biases=[a["bias"] for a in each],
            seed=[a["seed"] for a in each],
        )
        deltas.update(zip(names, made, strict=True))
        return deltas.pop(name)
    out: Tensor = module.lora_B[name](module.lora_A[name](module.lora_dropout[name](x)))
    return out * module.scaling[name] if scaled else out


def _companions(module: Any, name: str, x: Tensor) -> list[str]:
    """The later active adapters that can be computed together with this one."""
    if name in module.lora_variant:
        return []
    later = module.active_adapters[module.active_adapters.index(name) + 1 :]
    return [other for other in later if _joins(module, other, name, x)]


def _joins(module: Any, name: str, first: str, x: Tensor) -> bool:
    """Whether an adapter is computed together with the first."""
    if name not in module.lora_A or name in module.lora_variant or not _fuses(module, name, x):
        return False
    a, b = (_rate(module.lora_dropout[n]) for n in (name, first))
    same = a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
    return same and module.lora_A[name].weight.dtype == module.lora_A[first].weight.dtype


def add(module: Any, name: str, deltas: dict[str, Tensor], x: Tensor, result: Tensor) -> Tensor:
    """``result + lora_B(lora_A(dropout(x))) * scaling``.

    With several adapters, the sum stays in the wider dtype until all are added, as in PEFT.
    """
    dtype = module.lora_A[name].weight.dtype
    dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else dtype
    wide = torch.promote_types(result.dtype, dtype) == result.dtype
    last = len(module.active_adapters) == 1 and not _autocast(x)
    alone = name not in deltas and (wide or last) and fits(result) and _fuses(module, name, x)
    if alone and not _companions(module, name, x):
        return F.lora_linear(x, result, **_arguments(module, name, x, True))
    return result + delta(module, name, deltas, x, True)


def variant(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
    """``module.lora_variant[name].forward(module, ...)``, without storing dropout(x) if possible.

    In a variant with the same lines as plain LoRA, these are replaced. DoRA (Liu et al. 2024, arXiv
    2402.09353) also needs base(dropout(x)), which does not follow from base(x) if something drops,
    and so stays a separate product. That product keeps no input, since its weight is frozen; only
    lora_A kept one.
    """
    if not _is_dora(module, active_adapter) or not _fuses(module, active_adapter, x):
        found = module.lora_variant[active_adapter]
        read = VARIANTS.get(type(found))
        forward = read.forward if read is not None and read.holds() else None
        given = {"active_adapter": active_adapter, "x": x, "result": result, **kwargs}
        return found.forward(module, **given) if forward is None else forward(module, **given)
    branch = _Branch(module, active_adapter, x)
    extra = module.lora_magnitude_vector[active_adapter](
        branch.dropped,
        lora_A=branch,
        lora_B=branch.end,
        scaling=module.scaling[active_adapter],
        base_layer=module.get_base_layer(),
        base_result=None,
        adapter_name=active_adapter,
    )
    out: Tensor = result + extra
    return out


def _is_dora(module: Any, name: str) -> bool:
    """Whether an adapter is a DoRA that drops."""
    kind = type(module.lora_variant.get(name))
    dora = kind.__name__ == DORA and kind in VARIANTS and VARIANTS[kind].holds()
    return dora and module.training and _drops(module.lora_dropout[name])


class _Branch:
    """Stands in for DoRA's lora_A: passes dropout(x) on, since the op starts from x."""

    def __init__(self, module: Any, name: str, x: Tensor) -> None:
        self.A, self.B, self.x = module.lora_A[name], module.lora_B[name], x
        self.weight = self.A.weight
        self.arguments = _arguments(module, name, x, False)
        if self.arguments["seed"] is None:
            self.arguments["seed"] = seeds.seed_for(x.device, None)
        wide = x if _autocast(x) else x.to(self.weight.dtype)
        self.dropped = F.dropout(wide, self.arguments["p"], seed=self.arguments["seed"])

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = x if x is self.dropped else self.A(x)
        return out

    def end(self, x: Tensor) -> Tensor:
        """Stands in for lora_B: if called with what passed through, it runs the op on x."""
        if x is self.dropped:
            return F.lora_delta(self.x, **self.arguments)
        out: Tensor = self.B(x)
        return out
