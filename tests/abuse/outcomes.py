"""What a call came to, and whose error it is."""

from __future__ import annotations

import dataclasses
import linecache
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# The rows of the table, and whether one is a fault.
KINDS = {
    "ok": False,
    "ValueError": False,
    "TypeError": False,
    "NotImplementedError": False,
    "torch's own error": False,
    "as torch's module": False,
    "as torch's attention": False,  # docs/design.md, "Limits of 16-bit attention"
    "refused by Triton": False,
    "not finite, and Triton differs": False,  # docs/design.md: its kernels do not mend such rows
    "another error of ours": True,
    "the two ways differ": True,
    "only one way raises": True,
    "slow": True,
    "a right call differs afterwards": True,
    "hang": True,
    "crash": True,
}
CLEAR = (ValueError, TypeError, NotImplementedError)


@dataclasses.dataclass
class Outcome:
    """One way of one call: its results and gradients, or its error."""

    kind: str
    error: str = ""
    results: list[Any] = dataclasses.field(default_factory=list)


def of_error(error: BaseException) -> Outcome:
    """The outcome of a call that raised."""
    name = type(error).__name__
    message = f"{name}: {error}".split("\n")[0][:300]
    for clear in CLEAR:
        # Not of subclasses, such as UnicodeError, that nobody means.
        if type(error) is clear:
            return Outcome(clear.__name__, f"{message} [{_place(error)}]")
    kind = "torch's own error" if _is_torchs(error) else "another error of ours"
    return Outcome(kind, f"{message} [{_place(error)}]")


def _innermost(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _place(error: BaseException) -> str:
    last = _innermost(error.__traceback__)
    if last is None:
        return "?"
    return "/".join(last.tb_frame.f_code.co_filename.split("/")[-3:]) + f":{last.tb_lineno}"


def _is_torchs(error: BaseException) -> bool:
    """Whether torch has raised: in its Python, or in its C++ where that was called by ours.

    What Python itself raises in our code (AttributeError, KeyError, OverflowError), and what numba
    and NumPy do, is ours.
    """
    last = _innermost(error.__traceback__)
    if last is None:
        return True
    file = last.tb_frame.f_code.co_filename
    if "/site-packages/torch/" in file:
        return True
    if error.__cause__ is not None:  # said again, with what to do
        return _is_torchs(error.__cause__)
    line = linecache.getline(file, last.tb_lineno).strip()
    if "/tridrop/" not in file or line.startswith(("raise", "assert")):
        return "/abuse/" in file
    of_torch = type(error) in (RuntimeError, IndexError) or isinstance(
        error, torch.OutOfMemoryError
    )
    return of_torch and type(error).__module__ in ("builtins", "torch")


def flat(value: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors and other values of a result, in order."""
    if isinstance(value, Tensor) or depth > 4:
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from flat(part, depth + 1)
    elif isinstance(value, dict):
        for part in value.values():
            yield from flat(part, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name), depth + 1)
    else:
        yield value


# Both ways round once; sums are made in another order.
_TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.bfloat16: 1.7e-2,
    torch.float16: 2.1e-3,
}


def difference(a: Any, b: Any, finite: bool = False) -> str | None:
    """How two results of one question differ; None where they agree.

    With ``finite``, numbers that are not finite in one of them are left out.
    """
    if isinstance(a, Tensor) != isinstance(b, Tensor):
        return f"{type(a).__name__} and {type(b).__name__}"
    if not isinstance(a, Tensor):
        return None
    if (
        a.dtype != b.dtype
        or a.layout != b.layout
        or a.device != b.device
        or a.is_nested != b.is_nested
    ):
        return f"{a.dtype}, {a.layout}, {a.device} and {b.dtype}, {b.layout}, {b.device}"
    if a.is_nested or a.is_meta or a.is_quantized:
        return None
    if tuple(a.shape) != tuple(b.shape):
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = (t if t.layout == torch.strided else t.to_dense() for t in (a, b))
    a, b = (t.detach().as_subclass(Tensor) for t in (a, b))
    if a.is_complex():  # two NaN are the same result in each part
        a, b = (torch.view_as_real(t.resolve_conj()) for t in (a, b))
    if not a.is_floating_point():
        return None if torch.equal(a, b) else "other numbers"
    tolerance = _TOLERANCES.get(a.dtype, 0.1)
    x, y = a.double(), b.double()
    if finite:
        both = x.isfinite() & y.isfinite()
        x, y = x[both], y[both]
    if not torch.equal(x.isnan(), y.isnan()):
        return f"NaN {int(x.isnan().sum())} and {int(y.isnan().sum())} of {x.numel()} times"
    infinite = x.isinf() | y.isinf()
    if not torch.equal(x[infinite], y[infinite]):
        return f"infinities: {int(x.isinf().sum())} and {int(y.isinf().sum())} of {x.numel()}"
    x, y = (t[t.isfinite() & ~infinite] for t in (x, y))
    if not x.numel():
        return None
    bound = tolerance * max(1.0, float(x.abs().max()))
    apart = float((x - y).abs().max())
    return None if apart <= bound and not math.isnan(apart) else f"numbers differ by {apart:.3g}"


def refused(outcome: Outcome) -> bool:
    """Whether a backend said, as Triton does of fp64, which other one serves such a call."""
    return "use tridrop.backend('reference')" in outcome.error


def disagreement(
    first: Outcome, second: Outcome, against: str = "reference"
) -> tuple[str, str] | None:
    """(kind, how) where the two ways of a call do not agree."""
    if (first.kind == "ok") != (second.kind == "ok"):
        if refused(second):
            return "refused by Triton", second.error
        which = "the loops raise" if second.kind == "ok" else "the other way raises"
        return "only one way raises", f"{which}: {first.error or second.error}"
    if first.kind != "ok":
        return None
    if len(first.results) != len(second.results):
        return "the two ways differ", f"{len(first.results)} and {len(second.results)} results"
    notes = []
    for number, (a, b) in enumerate(zip(first.results, second.results, strict=True)):
        how = difference(a, b)
        if how is None:
            continue
        if against != "triton" or difference(a, b, finite=True) is not None:
            return "the two ways differ", f"result {number}: {how}"
        notes.append(f"result {number}: {how}")
    return ("not finite, and Triton differs", notes[0]) if notes else None
