"""Lets a configuration of transformers combine tridrop's attention with output_attentions.

transformers allows ``output_attentions`` in a configuration only for eager attention, since no
other function of its own returns the weights. tridrop's attention returns them too, but
transformers has a fixed list of names and no way to register another: a configuration that is valid
with eager could be neither set nor saved. So the two functions that check the list are wrapped, and
skip the check for tridrop's name only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .transformers_masks import NAME

_CHECK = "validate_output_attentions"


def allow_output_attentions(config: Any) -> None:
    """Allow ``output_attentions`` together with tridrop's attention.

    Args:
        config: transformers' PreTrainedConfig.
    """
    setting = config.__dict__["output_attentions"]
    if hasattr(setting.fset, "__wrapped__"):
        return  # this was done before
    config.output_attentions = setting.setter(_setter(setting.fset))
    check = config.__dict__.get(_CHECK)
    if check is None:
        return  # before 5.4 there is no check when a configuration is saved
    allowed = _unless_ours(check)
    setattr(config, _CHECK, allowed)
    classes = [config]
    for cls in classes:  # each has its own list of checks, from when the class was defined
        classes += cls.__subclasses__()
        checks = cls.__dict__.get("__class_validators__", [])
        checks[:] = [allowed if one is check else one for one in checks]


def _setter(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(original)
    def setter(self: Any, value: bool) -> None:
        if self._attn_implementation == NAME:
            self._output_attentions = value
        else:
            original(self, value)

    return setter


def _unless_ours(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def check(self: Any) -> None:
        if self._attn_implementation != NAME:
            original(self)

    return check
