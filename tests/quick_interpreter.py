"""Triton's interpreter without what it does again and again to the same effect.

Importing this module in a process whose kernels are interpreted changes what follows, and no
result. Most of the time of a small kernel goes into these, and little into its arithmetic:

- A call of a device function replaces the functions of ``triton.language``, which the launch has
  replaced already. Here that is done once a launch.
- numpy's type for a type of Triton is looked up in a table that is made for the lookup. Here each
  answer is kept.
- Every sum and product of integers is made a second time in 64 bits, and compared with the limits
  of its type; the outcome is used in the interpreter's debug mode alone. Here it is not made
  outside that mode.
- The functions of ``triton.language`` are looked for among all its members at each launch, and each
  of them is called through two wrappers. Here they are looked for once, and called through one.
- Types of blocks, tensors of such types, the type in which two operands are computed, and numbers
  that become tensors are made anew for each operation. Here each is made once, and operands whose
  elements are of one type are not compared and converted.
- A conversion asks some twenty questions about its two types, and broadcasting makes the shape of
  two. Here each pair of types is asked about once.

The functions are private to Triton: tests/backends/test_quick_interpreter.py holds each of them to
the one that it replaces, and passes with Triton 3.6, 3.7 and 3.9.
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
PLAIN_ATTRIBUTE: Callable[..., Any] = interpreter._patch_attr
PLAIN_BUILTINS: Callable[..., Any] = interpreter._patch_builtin
PLAIN_BLOCK: Callable[..., Any] = tl.core.block_type.__init__
PLAIN_TENSOR: Callable[..., Any] = tl.core.tensor.__init__
PLAIN_COMPUTATION: Callable[..., Any] = interpreter.interpreter_semantic.computation_type_impl
PLAIN_CONSTANT: Callable[..., Any] = interpreter.interpreter_semantic.scalar_constant
PLAIN_OPERANDS: Callable[..., Any] = interpreter.interpreter_semantic.binary_op_type_checking_impl
PLAIN_BROADCAST: Callable[..., Any] = interpreter.interpreter_semantic.broadcast_impl_value
PLAIN_CAST: Callable[..., Any] = interpreter.interpreter_semantic.cast
PLAIN_UNWRAP: Callable[..., Any] = tl.core._unwrap_if_constexpr

# The code of every wrapper that tl.core.builtin makes.
BUILTIN_CODE = tl.core.builtin(lambda: None).__code__

_types: dict[str, Any] = {}
_languages: dict[Any, frozenset[str]] = {}  # of a function: the modules that it sees
_replaced: set[str] = set()  # by the launch that is running
_builtins: dict[Any, list[tuple[str, Any]]] = {}  # of a module or class: name and function
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}  # what a block type of these has
_tensors: dict[str, dict[str, Any]] = {}  # what a tensor of this type has
_computations: dict[tuple[Any, ...], Any] = {}
_constants: dict[tuple[Any, ...], Any] = {}
_beside: dict[tuple[Any, ...], Any] = {}  # a number as the other operand of a tensor of this type
_broadcasts: dict[tuple[str, str], tuple[Any, Any]] = {}  # the types of both, None if as it was
_casts: dict[tuple[str, str], Any] = {}  # the type of the result, None if not a plain one
_WHOLE = frozenset((tl.tensor, int, float, bool, str, type(None), tl.dtype))  # hold no constexpr


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


def patch_attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """As Triton's ``_patch_attr``."""
    # What the wrapper of a builtin asks for is always given here.
    function = member.__wrapped__ if member.__code__ is BUILTIN_CODE else member
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, call)


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """As Triton's ``_patch_builtin``, which looks through all members of the module or class."""
    if package not in _builtins:
        PLAIN_BUILTINS(package, builder, scope)
        # Each change is an object, a name, and what the object had by that name.
        _builtins[package] = [(n, old) for o, n, old in scope._changes if o is package]
        return
    for name, member in _builtins[package]:
        interpreter._patch_attr(package, name, member, builder, scope)


def block(self: Any, element_ty: Any, shape: Any) -> None:
    """As ``block_type.__init__``."""
    sizes = shape.values if isinstance(shape, tl.core.tuple) else shape
    key = None
    if isinstance(sizes, (list, tuple)):
        sizes = [s.value if isinstance(s, tl.constexpr) else s for s in sizes]
        if set(map(type, sizes)) == {int}:
            key = (element_ty.name, *sizes)
    if key not in _blocks:
        PLAIN_BLOCK(self, element_ty, shape)  # which raises for a wrong shape
        if key is not None:
            _blocks[key] = dict(vars(self))
        return
    vars(self).update(_blocks[key])
    self.element_ty = element_ty


def tensor(self: Any, handle: Any, type: Any) -> None:
    """As ``tensor.__init__``."""
    if type.name not in _tensors:
        PLAIN_TENSOR(self, handle, type)
        _tensors[type.name] = dict(vars(self)) | {"handle": None}
        return
    vars(self).update(_tensors[type.name])
    self.handle, self.type, self.dtype = handle, type, type.scalar


def computation_type(a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, divides: bool) -> Any:
    """As the semantic's ``computation_type_impl``."""
    key = (a.name, a_is_scalar, b.name, b_is_scalar, divides)
    if key not in _computations:
        _computations[key] = PLAIN_COMPUTATION(a, a_is_scalar, b, b_is_scalar, divides)
    return _computations[key]


def constant(value: Any, dtype: Any) -> Any:
    """As the semantic's ``scalar_constant``."""
    # Outside of a launch the language is not the interpreter's, and zeros of uint32 are of int32.
    if not _replaced or dtype is None or type(value) not in (int, float, bool):
        return PLAIN_CONSTANT(value, dtype)
    key = (repr(value), dtype.name)  # 0.0 and -0.0 are equal, as 1 and True are
    if key not in _constants:
        made = PLAIN_CONSTANT(value, dtype)
        made.handle.data.flags.writeable = False  # what would change it for all raises
        _constants[key] = made
    kept = _constants[key]
    handle = interpreter.TensorHandle(kept.handle.data, kept.handle.dtype)
    return tl.core.tensor(handle, kept.type)


def operands(lhs: Any, rhs: Any, *rules: bool, **named: bool) -> tuple[Any, Any]:
    """As the semantic's ``binary_op_type_checking_impl``."""
    left, right = type(lhs) is tl.tensor, type(rhs) is tl.tensor
    if left and right:
        divides = named.get("div_or_mod", False) or rules[3:] == (True,)
        if lhs.dtype.name != rhs.dtype.name or divides or lhs.dtype.is_ptr():
            return PLAIN_OPERANDS(lhs, rhs, *rules, **named)
        if lhs.type.name == rhs.type.name:
            return lhs, rhs
        return broadcast(lhs, rhs)
    if left == right or not _replaced:
        return PLAIN_OPERANDS(lhs, rhs, *rules, **named)
    given, number = (lhs, rhs) if left else (rhs, lhs)
    # Equal numbers need not be the same: 0.0 and -0.0, 1 and True.
    key = (given.type.name, left, type(number), repr(number), rules, *named.items())
    if key in _beside:
        data, dtype, kind = _beside[key]
        made = tl.tensor(interpreter.TensorHandle(data, dtype), kind)
        return (given, made) if left else (made, given)
    both = PLAIN_OPERANDS(lhs, rhs, *rules, **named)
    kept, made = both if left else both[::-1]
    if kept is given and type(number) in (int, float, bool):
        made.handle.data.flags.writeable = False  # what would change it for all raises
        _beside[key] = (made.handle.data, made.handle.dtype, made.type)
    return both


def grown(value: Any, kind: Any) -> Any:
    """A tensor broadcast to a block type, or as it is for None."""
    if kind is None:
        return value
    builder = interpreter.interpreter_builder
    if value.type.is_block():
        return tl.tensor(builder.create_broadcast(value.handle, kind.shape), kind)
    return tl.tensor(builder.create_splat(kind, value.handle), kind)


def broadcast(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """As the semantic's ``broadcast_impl_value``."""
    key = (lhs.type.name, rhs.type.name)
    if key in _broadcasts:
        left, right = _broadcasts[key]
        return grown(lhs, left), grown(rhs, right)
    both = PLAIN_BROADCAST(lhs, rhs)
    ranks = {len(t.shape) for t in (lhs, rhs) if t.type.is_block()}
    if len(ranks) < 2:  # otherwise one of the blocks gets new axes first
        left, right = (
            None if new is old else new.type for new, old in zip(both, (lhs, rhs), strict=True)
        )
        _broadcasts[key] = left, right
    return both


def cast(value: Any, target: Any, rounding: str | None = None) -> Any:
    """As the semantic's ``cast``."""
    own, wanted = value.dtype, target.scalar
    if own.name == wanted.name:
        return value
    key = (value.type.name, target.name)
    if key not in _casts:
        wide = ("fp32", "fp64")
        plain = (own.is_int() or own.name in wide) and (
            (wanted.is_int() and not wanted.is_bool()) or wanted.name in wide
        )
        made = value.type.with_element_ty(wanted) if value.type.is_block() else target
        _casts[key] = made if plain else None
    kind = _casts[key]
    if kind is None or rounding is not None:
        return PLAIN_CAST(value, target, rounding)
    return tl.tensor(interpreter.interpreter_builder.cast_impl(value.handle, kind), kind)


def unwrap(value: Any) -> Any:
    """As ``_unwrap_if_constexpr``, which looks into lists and tuples."""
    return value if type(value) in _WHOLE else PLAIN_UNWRAP(value)


_SEMANTIC = interpreter.interpreter_semantic
# Where a function is, its name there, Triton's own, and the one here.
REPLACED: tuple[tuple[Any, str, Any, Any], ...] = (
    (interpreter, "_patch_lang", PLAIN_PATCH, patch_once),
    (interpreter, "_get_np_dtype", PLAIN_TYPE, numpy_type),
    (interpreter.interpreter_builder, "options", PLAIN_OPTIONS, unchecked(PLAIN_OPTIONS)),
    (interpreter, "_patch_attr", PLAIN_ATTRIBUTE, patch_attribute),
    (interpreter, "_patch_builtin", PLAIN_BUILTINS, patch_builtins),
    (tl.core.block_type, "__init__", PLAIN_BLOCK, block),
    (tl.core.tensor, "__init__", PLAIN_TENSOR, tensor),
    (_SEMANTIC, "computation_type_impl", PLAIN_COMPUTATION, computation_type),
    (_SEMANTIC, "scalar_constant", PLAIN_CONSTANT, constant),
    (_SEMANTIC, "binary_op_type_checking_impl", PLAIN_OPERANDS, operands),
    (_SEMANTIC, "broadcast_impl_value", PLAIN_BROADCAST, broadcast),
    (_SEMANTIC, "cast", PLAIN_CAST, cast),
    (tl.core, "_unwrap_if_constexpr", PLAIN_UNWRAP, unwrap),
)

for _where, _name, _, _quick in REPLACED:
    setattr(_where, _name, _quick)
