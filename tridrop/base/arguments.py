"""The checks of single arguments that all ops and modules share.

Each check raises a TypeError or ValueError that names the argument. Checks of numbers return a
plain int or float, since a look-alike such as ``Fraction(0)`` or an ``IntEnum`` must neither be
compared with another call's options nor become a type that a loop is compiled for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .modules import is_keras


def given(value: object, name: str) -> str:
    """The beginning of a message: the argument's name, value and type."""
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    return f"{name} is {shown} of type {type(value).__name__}"


def check_tensor(t: Tensor, name: str) -> None:
    """Raise unless ``t`` is a tensor in plain memory, of any dtype and strides."""
    if not isinstance(t, Tensor):
        if isinstance(t, Proxy):
            raise TypeError(
                f"{name} is a torch.fx.Proxy: torch.fx.symbolic_trace cannot look into this call. "
                "Trace the model as it was before the swap, after tridrop.unswap(model), or with a "
                "torch.fx.Tracer whose is_leaf_module keeps the module that makes the call whole"
            )
        raise TypeError(f"{name} is of type {type(t).__name__}; give a torch.Tensor")
    if t.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, whose elements have no coordinates in one mask: pad it "
            f"with torch.nested.to_padded_tensor({name}, 0.0), or give its values, "
            f"torch.cat({name}.unbind())"
        )
    # Dynamo cannot trace `.layout` inside the backward of an autograd.Function.
    if not torch.compiler.is_compiling() and t.layout is not torch.strided:
        raise TypeError(
            f"{name} has the layout {t.layout}, and ops read plain memory: use {name}.to_dense()"
        )
    if t.is_quantized:
        raise TypeError(f"{name} is quantised, {t.dtype}: use {name}.dequantize()")


def check_flag(value: bool, name: str) -> None:
    """Raise unless ``value`` is True or False, as torch does."""
    if value is not True and value is not False:
        raise TypeError(f"{given(value, name)}; give True or False")


def check_flags(**values: bool) -> None:
    """:func:`check_flag` for several arguments."""
    for name, value in values.items():
        if value is not True and value is not False:
            check_flag(value, name)


def check_whole(value: Any, name: str, least: int | None = None, wanted: str = "an int") -> int:
    """``value`` as a plain int, or as a compiler's SymInt; TypeError for another type.

    Raises ValueError for a number below ``least``. ``wanted`` tells the reader what to give.
    """
    if isinstance(value, torch.SymInt):
        number: Any = value
    elif isinstance(value, int) and not isinstance(value, bool):
        number = int(value)
    else:
        raise TypeError(f"{given(value, name)}; give {wanted}")
    if least is not None and number < least:
        raise ValueError(f"{name} = {number}; give {wanted}, {least} or more")
    return number


def check_finite(value: Any, name: str) -> float:
    """``value`` as a float; TypeError unless it is a number, ValueError unless it is finite."""
    if isinstance(value, (bool, Tensor)) or not isinstance(
        value, (int, float, torch.SymFloat, torch.SymInt)
    ):
        raise TypeError(f"{given(value, name)}; give a number")
    try:
        number = float(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not -math.inf < number < math.inf:  # also true for NaN; math.isfinite cannot be traced
        raise ValueError(f"{name} = {number}; it must be finite")
    return number


def check_choice(value: Any, name: str, allowed: Collection[str]) -> None:
    """Raise unless ``value`` is one of these words."""
    if not isinstance(value, str):
        words = ", ".join(map(repr, allowed))
        raise TypeError(f"{given(value, name)}; give one of {words}")
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; known: {', '.join(map(repr, allowed))}")


def check_sequence(value: Any, name: str, wanted: str) -> None:
    """Raise unless ``value`` is a list, a tuple or another sequence, but not a string."""
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        raise TypeError(f"{given(value, name)}; give {wanted}")


def check_module(module: nn.Module, name: str = "model") -> None:
    """Raise unless ``module`` is a torch.nn.Module."""
    if not isinstance(module, nn.Module):
        found = type(module).__name__
        if is_keras(module):
            raise TypeError(
                f"{name} is a {found} of Keras on another backend than torch's: set "
                'os.environ["KERAS_BACKEND"] = "torch" before keras is imported'
            )
        raise TypeError(f"{name} is a {found}; give a torch.nn.Module")
