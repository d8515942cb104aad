"""Checks a row before it is timed, on the same device, in the same dtype and at the same size.

A row whose check fails is reported without a speed-up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..check import check_case
from ..check.measure import Check, Result
from .machine import Machine
from .rows import Row

PASSED = "passed"
SEEDS = 16


class Gate:
    """Checks rows. The check at the row's own small size is made once per dtype."""

    def __init__(self, machine: Machine) -> None:
        self._device, self._backend = machine.device, machine.backend
        self._small: dict[tuple[str, torch.dtype], list[Result]] = {}

    def verdict(self, row: Row, dtype: torch.dtype, p: float) -> str:
        """ "passed", or the checks that failed.

        It makes all checks of ``tridrop check`` on the row as it stands in the table, and compares
        values and gradients at the timed size, with the same limits under the exported mask.
        """
        try:
            # A broken kernel can raise anything, which counts as a failed check.
            results = [*self._at_its_size(row, dtype), *self._at_size(row, dtype, p)]
        except Exception as error:
            return f"raised {type(error).__name__}: {first_line(error)}"
        return describe(results)

    def _at_its_size(self, row: Row, dtype: torch.dtype) -> list[Result]:
        key = (row.case.name, dtype)
        if key not in self._small:
            case, backend = row.case, self._backend
            self._small[key] = check_case(case, dtype, backend, self._device, SEEDS)
        return self._small[key]

    def _at_size(self, row: Row, dtype: torch.dtype, p: float) -> list[Result]:
        check = Check(row.checked(p), dtype, self._backend, self._device, SEEDS)
        return list(check.accuracy())


def describe(results: Sequence[Result]) -> str:
    """ "passed", or which checks failed, and by how much."""
    bad = [r for r in results if not r.passed]
    if not bad:
        return PASSED
    return "failed " + "; ".join(
        f"{r.check}: {r.detail}"
        if r.passed is None
        else f"{r.check}: {r.value:.3g} > {r.limit:.3g}"
        for r in bad
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to fit a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
