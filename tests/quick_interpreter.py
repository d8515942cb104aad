"""Triton's interpreter without what it does again and again to the same effect.

Importing this module in a process whose kernels are interpreted changes three things, and no
result. Most of the time of a small kernel goes into these, and little into its arithmetic:

- A call of a device function replaces the functions of ``triton.language``, which the launch has
  replaced already. Here that is done once a launch.
- numpy's type for a type of Triton is looked up in a table that is made for the lookup. Here each
  answer is kept.
- Every sum and product of integers is made a second time in 64 bits, and compared with the limits
  of its type; the outcome is used in the interpreter's debug mode alone. Here it is not made
  outside that mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

PLAIN_PATCH: Callable[..., Any] = interpreter._patch_lang
PLAIN_TYPE: Callable[..., Any] = interpreter._get_np_dtype
PLAIN_OPTIONS: Any = interpreter.interpreter_builder.options

_types: dict[str, Any] = {}
_languages: dict[Any, frozenset[str]] = {}  # of a function: the modules that it sees
_replaced: set[str] = set()  # by the launch that is running


def numpy_type(given: Any) -> Any:
    """As Triton's ``_get_np_dtype``."""
    own = given.element_ty if isinstance(given, tl.block_type) else given
    if isinstance(own, tl.pointer_type):
        return PLAIN_TYPE(own)
    if own.name not in _types:
        _types[own.name] = PLAIN_TYPE(own)
    return _types[own.name]


def patch_once(function: Any) -> Any:
    """As Triton's ``_patch_lang``, which a launch undoes at its end; nothing within the launch."""
    if function not in _languages:
        seen = function.__globals__.values()
        _languages[function] = frozenset(v.__name__ for v in seen if v is tl or v is tl.core)
    languages = _languages[function]
    if _replaced and languages <= _replaced:
        return interpreter._LangPatchScope()
    launches = not _replaced
    scope = PLAIN_PATCH(function)
    _replaced.update(languages)
    if launches:
        restore = scope.restore

        def end() -> None:
            _replaced.clear()
            restore()

        scope.restore = end
    return scope


def unchecked(options: Any) -> Any:
    """The interpreter's options without checks of which it makes no use."""
    return options if options.debug else dataclasses.replace(options, sanitize_overflow=False)


interpreter._patch_lang = patch_once
interpreter._get_np_dtype = numpy_type
interpreter.interpreter_builder.options = unchecked(PLAIN_OPTIONS)
