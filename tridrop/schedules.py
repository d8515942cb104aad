"""Drop rates as functions of the training step, and a class that sets them in a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .base.arguments import check_flag, check_module
from .base.lasting import lasting
from .nn import EmbeddingDropout, LockedDropout, WordDropout
from .nn.attention import MultiheadAttention, ScaledDotProductAttention
from .nn.modules import ActivationDropout, Dropout, DropoutAdd, DropPath
from .nn.norm import DropoutAddLayerNorm, DropoutAddRMSNorm
from .nn.structured import PatchDropout
from .spec.elementwise import check_probability
from .swapping.dropping import find
from .swapping.kinds import kind_of

Schedule = Callable[[int], float]


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; give a number of steps, 1 or more")


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_probability(self.start, "start")
        check_probability(self.end, "end")
        _check_steps(self.steps)


@dataclass(frozen=True)
class Linear(_Ramp):
    """A rate that goes linearly from ``start`` to ``end`` in ``steps`` steps, and then stays.

        p(t) = start + (end - start) * min(t / steps, 1)

    >>> [Linear(0.0, 0.4, steps=4)(t) for t in (0, 1, 4, 9)]
    [0.0, 0.1, 0.4, 0.4]
    """

    def __call__(self, step: int) -> float:
        part = min(step / self.steps, 1)
        return self.start * (1 - part) + self.end * part


@dataclass(frozen=True)
class Cosine(_Ramp):
    """A rate that goes from ``start`` to ``end`` along half a cosine wave, and then stays.

        p(t) = end + (start - end) * (1 + cos(pi * min(t / steps, 1))) / 2

    >>> [round(Cosine(0.2, 0.0, steps=4)(t), 3) for t in (0, 1, 2, 3, 4)]
    [0.2, 0.171, 0.1, 0.029, 0.0]
    """

    def __call__(self, step: int) -> float:
        part = (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2
        return self.start * part + self.end * (1 - part)


@dataclass(frozen=True)
class Curriculum:
    """A rate that rises from 0 towards ``p``: training begins with the whole network.

        p(t) = p * (1 - exp(-gamma * t))

    Morerio et al., "Curriculum dropout", ICCV 2017. They use gamma = 10 / T for T training steps.

    >>> [round(Curriculum(0.5, gamma=10 / 1000)(t), 3) for t in (0, 100, 500, 1000)]
    [0.0, 0.316, 0.497, 0.5]
    """

    p: float
    gamma: float

    def __post_init__(self) -> None:
        check_probability(self.p)
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma = {self.gamma!r}; give a positive number, such as 10 / steps")

    def __call__(self, step: int) -> float:
        return -self.p * math.expm1(-self.gamma * step)


@dataclass(frozen=True)
class Early:
    """Dropout in the first ``steps`` steps only: at ``p``, or, if ``linear``, from p down to 0.

    This reduces underfitting: early in training, dropout makes the gradients of mini-batches agree
    better with each other. Liu et al., "Dropout reduces underfitting", ICML 2023.

    >>> [Early(0.1, steps=2)(t) for t in (0, 1, 2)], [Early(0.1, 2, linear=True)(t) for t in (0, 1)]
    ([0.1, 0.1, 0.0], [0.1, 0.05])
    """

    p: float
    steps: int
    linear: bool = False

    def __post_init__(self) -> None:
        check_probability(self.p)
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return 0.0
        return self.p * (1 - step / self.steps) if self.linear else self.p


@dataclass(frozen=True)
class Late:
    """No dropout in the first ``steps`` steps, then ``p``. Liu et al. 2023, as :class:`Early`.

    >>> [Late(0.1, steps=2)(t) for t in (0, 1, 2)]
    [0.0, 0.0, 0.1]
    """

    p: float
    steps: int

    def __post_init__(self) -> None:
        check_probability(self.p)
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        return 0.0 if step < self.steps else self.p


# Modules whose rate may be a tensor, and the name of the attribute that holds it.
_TENSORS: dict[type[nn.Module], str] = {
    Dropout: "p",
    ActivationDropout: "p",
    DropoutAdd: "p",
    DropoutAddLayerNorm: "p",
    DropoutAddRMSNorm: "p",
    ScaledDotProductAttention: "p",
    DropPath: "drop_prob",
    MultiheadAttention: "dropout",
    LockedDropout: "p",
    EmbeddingDropout: "p",
    WordDropout: "p",
}


@dataclass(frozen=True)
class _Rate:
    """A rate in a model, which is an attribute of a module."""

    name: str  # the module's name
    module: nn.Module
    attribute: str
    base: float  # the rate before the schedule
    tensor: bool  # whether the rate may be a tensor


def _rate(name: str, module: nn.Module) -> _Rate | None:
    """The rate of a module that drops; None if it is not known which attribute holds the rate."""
    tensor = next((name for cls, name in _TENSORS.items() if isinstance(module, cls)), None)
    kind = kind_of(module)
    attribute: str | None = tensor
    if tensor is None and kind is not None and kind.name == "drop_path":
        attribute = kind.names.get("p")
    elif tensor is None:
        by_dropout = isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        attribute = "dropout" if by_dropout else "prob" if isinstance(module, PatchDropout) else "p"
    value = getattr(module, attribute or "", None)
    if isinstance(value, Tensor):
        raise ValueError(
            f"the rate of {name or 'the model'} is a tensor, perhaps set by another schedule: call "
            "that schedule's release() first, or set the rate to a number"
        )
    if attribute is None or isinstance(value, bool) or not isinstance(value, Real):
        return None
    return _Rate(name, module, attribute, float(value), tensor is not None)


class DropoutSchedule:
    """Sets the drop rates of a model by a schedule, once per step.

        p(t) = schedule(t),    or with relative=True    p(t) = (p of the site) * schedule(t)

    It sets the rates of all sites whose rate is above 0 when the schedule is made: the modules of
    tridrop.nn, torch's dropouts, attention and recurrent layers, and drop paths of libraries. It
    warns of forwards that call a dropout function with a rate of their own.

    The rates of tridrop's modules, and of modules that :func:`tridrop.swap` turned into them,
    become 0-d tensors, into which a step writes. So nothing is compiled again, nothing waits for
    the device, and a captured CUDA graph sees the new value. These tensors are plain attributes, so
    the keys of a state_dict do not change. torch's own modules, and drop paths of libraries, take
    numbers only, and torch.compile compiles them again for each new number: swap the model first.

    Call :meth:`step` after the optimizer's step. A step between forward and backward would give
    backward another rate than forward had, and torch raises there.

    Args:
        model: any module.
        schedule: a function of the step, which is 0 at first; see :mod:`tridrop.schedules`.
        relative: whether the schedule gives a factor of each site's own rate.
        where: a function of a site's name in the model and its module, which says whether to set
            its rate; by default all rates are set.

    Raises:
        ValueError: the model has no such site; the schedule gives a value outside [0, 1].
        TypeError: ``model`` is not a module, or ``schedule`` is not callable.

    >>> import tridrop
    >>> model = nn.Sequential(nn.Linear(4, 4), tridrop.nn.Dropout(0.5))
    >>> schedule = DropoutSchedule(model, Linear(0.0, 0.4, steps=4))
    >>> schedule.step()
    >>> model[1]
    Dropout(p=0.1, inplace=False)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        relative: bool = False,
        where: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        check_module(model)
        check_flag(relative, "relative")
        if not callable(schedule):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}; give a function of the step, such as "
                "tridrop.schedules.Linear(0.0, 0.1, steps=1000)"
            )
        self.model, self.schedule, self.relative = model, schedule, relative
        self.steps = 0
        self._rates: list[_Rate] = []
        self._tensors: dict[tuple[torch.device, float], Tensor] = {}
        found, _ = find(model)
        unscheduled = []
        for d in found:
            if not d.drops or (where is not None and not where(d.name, d.module)):
                continue
            rate = None if d.reads else _rate(d.name, d.module)
            if rate is not None and rate.base > 0:
                self._rates.append(rate)
            elif rate is None:
                unscheduled += _other_rates(d.name, d.module)
        if not self._rates:
            raise ValueError(
                f"no dropout of this {type(model).__name__} can be scheduled: none has a rate "
                "above 0 now. Make the model with the rates that the schedule is to reach"
            )
        if unscheduled:
            warnings.warn("rates that are not scheduled: " + ", ".join(unscheduled), stacklevel=2)
        self._apply()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the modules whose rates are set."""
        return tuple(rate.name for rate in self._rates)

    @property
    def value(self) -> float:
        """The schedule's present value: p, or the factor of each site's rate."""
        value = float(self.schedule(self.steps))
        if not 0 <= value <= 1:  # also true for NaN
            raise ValueError(
                f"the schedule gives {value} at step {self.steps}; it must lie in [0, 1]"
            )
        return value

    def step(self) -> None:
        """Set the rates of the next step."""
        self.steps += 1
        self._apply()

    def release(self) -> None:
        """Set every site's rate back to the number that it was before the schedule."""
        for rate in self._rates:
            setattr(rate.module, rate.attribute, rate.base)

    def state_dict(self) -> dict[str, Any]:
        """The step, and the rates of the sites before the schedule, but not the function itself."""
        return {"steps": self.steps, "rates": {rate.name: rate.base for rate in self._rates}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the step of a :meth:`state_dict`; ValueError if that has other sites."""
        rates = state["rates"]
        if set(rates) != set(self.names):
            differ = sorted(set(rates) ^ set(self.names))
            raise ValueError(f"the state has other sites than this model: {', '.join(differ)}")
        self._rates = [replace(rate, base=float(rates[rate.name])) for rate in self._rates]
        self.steps = int(state["steps"])
        self._apply()

    def _apply(self) -> None:
        value = self.value
        for (_, factor), tensor in self._tensors.items():
            tensor.fill_(factor * value)
        for rate in self._rates:
            factor = rate.base if self.relative else 1.0
            if not rate.tensor:
                setattr(rate.module, rate.attribute, factor * value)
                continue
            key = (_device(self.model, rate.name), factor)
            if key not in self._tensors:
                made = torch.tensor(factor * value, dtype=torch.float64, device=key[0])
                self._tensors[key] = lasting(made)
            if getattr(rate.module, rate.attribute) is not self._tensors[key]:
                setattr(rate.module, rate.attribute, self._tensors[key])


def _other_rates(name: str, module: nn.Module) -> list[str]:
    """The attributes of a module that its forward may use as rates, with their values."""
    prefix = f"{name}." if name else ""
    return [
        f"{prefix}{attribute} = {value}"
        for attribute, value in vars(module).items()
        if "drop" in attribute and isinstance(value, float) and value > 0
    ]


def _device(model: nn.Module, name: str) -> torch.device:
    """The device of a site: that of the first parameter in the smallest module around it."""
    while True:
        parameter = next(model.get_submodule(name).parameters(), None)
        if parameter is not None:
            return parameter.device
        if not name:
            return torch.device("cpu")
        name = name.rpartition(".")[0]
