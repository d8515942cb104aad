"""What is public, looked up in the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import tridrop
from tridrop import functional, shims

# Names that take no argument that could be wrong: records that an op returns.
_RECORDS = {"Prediction"}


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: str
    keyword: bool
    optional: bool


@dataclass(frozen=True)
class Target:
    """A public function, or a module's constructor and its forward."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    forward: tuple[Parameter, ...] | None = None  # of a module

    @property
    def twin(self) -> Any:
        """The module of torch.nn that this one is a drop-in for."""
        other = getattr(nn, self.name, None)
        is_one = self.forward is not None and inspect.isclass(other)
        return other if is_one and issubclass(self.function, other) else None


def parameters(function: Callable[..., Any], skip: int = 0) -> tuple[Parameter, ...]:
    """What a function takes; not what it has a name for only to refuse it, which can be None."""
    found = list(inspect.signature(function).parameters.values())[skip:]
    return tuple(
        Parameter(p.name, str(p.annotation), p.kind is p.KEYWORD_ONLY, p.default is not p.empty)
        for p in found
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.annotation != "None"
    )


def targets() -> dict[str, Target]:
    """name -> target, of tridrop, tridrop.functional, tridrop.nn and tridrop.shims."""
    found: dict[str, Target] = {}
    for place in (tridrop, functional, tridrop.nn, shims):
        for name in place.__all__:
            thing = getattr(place, name)
            if not callable(thing) or name in _RECORDS or name in found:
                continue
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                own = parameters(thing.__init__, 1)
                found[name] = Target(name, thing, own, parameters(thing.forward, 1))
            else:
                found[name] = Target(name, thing, parameters(thing))
    return found
