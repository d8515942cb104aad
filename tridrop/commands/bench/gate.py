"""No speed-up without a passed check: on this device, in this dtype, at the size that is timed."""

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
    """Checks rows, each small case once."""

    def __init__(self, machine: Machine) -> None:
        self._device, self._backend = machine.device, machine.backend
        self._small: dict[tuple[str, torch.dtype], list[Result]] = {}

    def verdict(self, row: Row, dtype: torch.dtype, p: float) -> str:
        """ "passed", or the checks that failed.

        All checks of ``tridrop check`` on the row of the table, and values and gradients at the
        size that is timed, by the same rule of accuracy under the exported mask.
        """
        try:
            # What a broken kernel raises can be anything; it is a failure as any other.
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
    """ "passed", or what did not pass and by how much."""
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
    """What an error says, in a line that fits a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
