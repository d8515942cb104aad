"""The operator library that torch sees as torch.ops.tridrop.*

An operator is a schema, a function for the shapes of its results, and a call of a backend; it does
no arithmetic. Operators are opaque, so that torch.compile, export and the autograd engine treat a
call as one node, with the same random bits everywhere. Derivatives are autograd functions that call
the operators.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import backends
from ..base import memory
from ..base.memory import PLAIN
from ..base.torch_private import forward_mode, is_legacy_batched, is_wrapped, trace_state, watched
from ..spec.elementwise import check_probability
from ..spec.operands import Prepared

_library = torch.library.Library("tridrop", "DEF")
_O = TypeVar("_O")
_NAMES = re.compile(r"(\w+)(?=[,)])")  # the names of a schema's arguments

_is_exporting = torch.compiler.is_exporting


def composes(seed: Tensor | None) -> bool:
    """Whether a call that torch observes must consist of torch's own operators.

    Forward-mode derivatives need them. So does an exported or traced graph that runs without
    tridrop; there a call without a seed, which draws nothing, consists of them.
    """
    if forward_mode():
        return True
    return seed is None and (_is_exporting() or trace_state() is not None)


def plain(t: Tensor) -> bool:
    """Whether a tensor is nothing but its data: not meta, wrapped, lazily negated or a subclass."""
    return type(t) in PLAIN and not (
        # legacy batched tensors come from torch.autograd.grad(is_grads_batched=True)
        t.is_meta or t.is_neg() or is_wrapped(t) or is_legacy_batched(t)
    )


def unobserved(arguments: Iterable[Any]) -> bool:
    """Whether nothing but the backend must see a call with these arguments.

    In that case torch's dispatcher and the bookkeeping of autograd functions do not change the
    result, and only take time: on a CPU as much as a small op itself.
    """
    return not (watched() or any(isinstance(a, Tensor) and not plain(a) for a in arguments))


def define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:
    """Define an operator by its schema, its function for all devices, and its shape function.

    Returns a function that calls the operator, or, where torch need not observe the call, the
    operator's function directly.
    """
    name = schema.split("(")[0]
    names = _NAMES.findall(schema.partition("->")[0])
    # The strides of results depend on those of operands, so a compiler must not change the latter.
    _library.define(schema, tags=(*tags, torch.Tag.needs_exact_strides))

    def checked(*arguments: Any) -> Any:
        return function(*memory.all_whole(arguments, names))

    _library.impl(name, checked, "CompositeExplicitAutograd")

    def shapes(*arguments: Any) -> Any:
        _refuse_onnx(name)
        return fake(*arguments)

    torch.library.register_fake(f"tridrop::{name}", shapes, lib=_library)
    operator = getattr(torch.ops.tridrop, name).default

    def call(*arguments: Any) -> Any:
        if unobserved(arguments):
            return checked(*arguments)
        if trace_state() is not None:
            _refuse_onnx(name)
        return operator(*arguments)

    return call


def _refuse_onnx(name: str) -> None:
    """Raise where an operator would become part of an ONNX graph."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        raise RuntimeError(
            f"tridrop::{name} cannot be exported to ONNX, which has no operator that draws "
            "tridrop's masks: export the model in evaluation, after model.eval(), where it is made "
            "of standard operators. To export a training graph with torch's dropout, call "
            "tridrop.unswap(model) first"
        )


def each_seed(name: str, function: Callable[..., Tensor]) -> None:
    """Give an operator whose first argument is a seed a vmap rule: one call per seed."""

    def rule(info: Any, in_dims: Sequence[int | None], seed: Tensor, *rest: Any) -> Any:
        assert in_dims[0] is not None
        return torch.stack([function(s, *rest) for s in seed.unbind(in_dims[0])]), 0

    torch.library.register_vmap(f"tridrop::{name}", rule, lib=_library)


def prepared(
    family: str,
    shape: Sequence[int],
    options: Any,
    backend: str,
    operands: _O,
    wanted: Sequence[Any] = (),
) -> tuple[Prepared, _O]:
    """A backend's op for a call, and the operands with p read: see ``backends.prepare``.

    ValueError where something is dropped and there is no seed, which kernels would read somewhere.
    """
    p, options = read_rate(operands.p, options)  # type: ignore[attr-defined]
    operands = operands._replace(p=p)  # type: ignore[attr-defined]
    _check_seed(family, operands, (p, options.p, getattr(options, "drop_path", 0.0)))
    return backends.prepare(backend, family, tuple(shape), options, operands, wanted), operands


def _check_seed(family: str, operands: Any, rates: tuple[Any, ...]) -> None:
    drops = any(rate is not None and (isinstance(rate, Tensor) or rate > 0) for rate in rates)
    absent = [name for name in ("seed", "seeds") if getattr(operands, name, 0) is None]
    if drops and absent:
        raise ValueError(
            f"the {family} op drops something, but its {absent[0]} is None: give a seed tensor, "
            "two int64 numbers per mask"
        )


def read_rate(p_tensor: Tensor | None, options: _O) -> tuple[Tensor | None, _O]:
    """Turn a tensor p on the CPU into a float in the options, checked as any other p."""
    if p_tensor is None or p_tensor.device.type != "cpu":
        return p_tensor, options
    p = float(p_tensor)
    check_probability(p)
    return None, dataclasses.replace(options, p=p)  # type: ignore[type-var]


class Known(NamedTuple):
    """A call that has been checked before, for later calls that differ from it in data alone."""

    packed: tuple[Any, ...]  # the options in the form that operators take
    prepared: Prepared  # the backend's op
    draws: bool  # whether the call needs a seed
    # needs_input_grad -> the attributes that backward needs on ctx, besides saved tensors
    noted: dict[tuple[bool, ...], dict[str, Any]]


def filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The results, with an empty tensor for each None, which an operator cannot return."""
    return tuple(like.new_empty(0) if t is None else t for t in results)
