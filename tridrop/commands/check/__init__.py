"""The correctness harness behind ``tridrop check``, usable from tests as well.

>>> from tridrop.commands import check
>>> results = check.run(ops=["dropout"], dtypes=[torch.float32], backends=["reference"], seeds=16)
>>> all(result.passed for result in results)
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ... import backends as _backends
from . import (
    attention_cases,
    cases,
    family_cases,
    product_cases,
    recurrent_cases,
    structured_cases,
)
from .case import Case
from .invariants import Invariant
from .measure import Result, check_case, check_invariant

# fp64 is not among them: it is what these are compared with, and gradcheck tests the ops in it.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

CASES: Sequence[Case] = (
    *cases.CASES,
    *attention_cases.CASES,
    *family_cases.CASES,
    *product_cases.CASES,
    *structured_cases.CASES,
    *recurrent_cases.CASES,
)
INVARIANTS: Sequence[Invariant] = (
    *family_cases.INVARIANTS,
    *structured_cases.INVARIANTS,
    *recurrent_cases.INVARIANTS,
)
_ROWS: Sequence[Case | Invariant] = (*CASES, *INVARIANTS)
OPS = tuple(sorted({row.op for row in _ROWS}))

__all__ = [
    "CASES",
    "DTYPES",
    "INVARIANTS",
    "OPS",
    "Case",
    "Invariant",
    "Result",
    "available",
    "check_case",
    "check_invariant",
    "run",
]


def available(device: str) -> dict[str, str | None]:
    """Each backend, with the reason why it cannot run on ``device``, or None."""
    reasons: dict[str, str | None] = {}
    for name in _backends.NAMES:
        try:
            module = _backends.load(name)
        except ImportError as error:
            reasons[name] = str(error)
        else:
            reasons[name] = module.why_not(torch.device(device), [torch.float32])
    return reasons


def run(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] | None = None,
    device: str | None = None,
    seeds: int = 64,
    on_start: Callable[[int], None] | None = None,
    on_case: Callable[[Case | Invariant, torch.dtype, str], None] | None = None,
    on_results: Callable[[list[Result]], None] | None = None,
) -> list[Result]:
    """Check every row of the tables and return a :class:`Result` for each check.

    Args:
        ops: names of public functions; None for all.
        dtypes: None for float32, float16 and bfloat16.
        backends: None for all that can run on the device.
        device: None for "cuda" if there is a GPU, else "cpu".
        seeds: the number of seeds over which the expected value is taken.
        on_start: called with the number of (row, dtype, backend) triples.
        on_case: called before each triple.
        on_results: called after each triple with its results.

    Raises:
        ValueError: an op or backend does not exist.
        RuntimeError, ImportError: a backend that was named cannot run on the device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"op {op!r} has no cases; known: {', '.join(OPS)}")
    names = list(backends) if backends else [n for n, why in available(device).items() if not why]
    for name in names:
        reason = _backends.load(name).why_not(torch.device(device), [torch.float32])
        if reason is not None:
            raise RuntimeError(reason)
    triples = [
        (row, dtype, name)
        for name in names
        for dtype in dtypes or DTYPES.values()
        for row in _ROWS
        if not ops or row.op in ops
    ]
    if on_start is not None:
        on_start(len(triples))
    results: list[Result] = []
    for row, dtype, name in triples:
        if on_case is not None:
            on_case(row, dtype, name)
        if isinstance(row, Invariant):
            found = list(check_invariant(row, dtype, name, device, seeds))
        else:
            found = list(check_case(row, dtype, name, device, seeds))
        results.extend(found)
        if on_results is not None:
            on_results(found)
    return results
