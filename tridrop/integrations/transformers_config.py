"""Configurations of transformers models whose attention is tridrop's and that ask for attentions.

transformers lets ``output_attentions`` stand in a configuration where the attention is eager, since
of its own functions only that one returns the weights. tridrop's returns them too. But there is a
list of the names that may, and nothing to be registered with: a configuration that was right in
eager could be neither saved nor set. So the two functions that look at the list are wrapped, and
for tridrop's name they do not look; for every other they are what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .transformers_masks import NAME

_CHECK = "validate_output_attentions"


def allow_output_attentions(config: Any) -> None:
    """Let ``output_attentions`` stand beside tridrop's attention.

    Args:
        config: transformers' PreTrainedConfig.
    """
    setting = config.__dict__["output_attentions"]
    if hasattr(setting.fset, "__wrapped__"):
        return  # a second call
    config.output_attentions = setting.setter(_setter(setting.fset))
    check = config.__dict__.get(_CHECK)
    if check is None:
        return  # before 5.4 nothing is checked when a configuration is saved
    allowed = _unless_ours(check)
    setattr(config, _CHECK, allowed)
    kinds = [config]
    for kind in kinds:  # each keeps a list of the checks that it had when it was made
        kinds += kind.__subclasses__()
        checks = kind.__dict__.get("__class_validators__", [])
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
