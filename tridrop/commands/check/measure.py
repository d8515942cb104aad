"""The checks of a case, and their limits.

The limit of accuracy is the same everywhere. Compared with the eager composition in fp64 under the
same masks, the op's error may be at most twice that of eager PyTorch in the op's dtype, plus a
floor: one rounding to the dtype and eight fp32 roundings of the largest value.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ..saved import kept_by, storage_bytes
from .case import Case, Inputs, unmasked
from .invariants import MAX_Z, Invariant, Trial

SEED_BYTES = 16


@dataclass(frozen=True)
class Result:
    """One check of one case. If it was not run, ``passed`` is None and ``detail`` says why."""

    case: str
    op: str
    dtype: str
    backend: str
    check: str
    passed: bool | None
    value: float
    limit: float
    detail: str = ""


def error(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, computed in fp64; infinite if there is a NaN."""
    if found.shape != expected.shape:
        return math.inf
    if found.numel() == 0:
        return 0.0
    difference = (found.double() - expected.double()).abs()
    return float(torch.nan_to_num(difference, nan=math.inf).max())


def tolerance(eager: Tensor, expected: Tensor) -> float:
    """The error that an op may have: twice eager's own, plus the floor."""
    rounding = torch.finfo(eager.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps / 2
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return 2 * error(eager, expected) + rounding * largest


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that elements which a kernel fails to write are seen.

    torch does this in its deterministic mode, by
    ``torch.utils.deterministic.fill_uninitialized_memory``. The idea is from the tests of
    flash-linear-attention.
    """
    fills: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fills.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")  # other warnings of this mode
        torch.use_deterministic_algorithms(True, warn_only=True)
        fills.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            fills.fill_uninitialized_memory = before[2]


def run_with_gradients(
    function: Callable[[Inputs], Tensor], inputs: Inputs, grad: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of ``function`` and the gradient of every input, NaN if an input gets none.

    If ``grad`` is None, the incoming gradient is ones.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(leaves)
    incoming = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), incoming, allow_unused=True)
    gradients = {
        name: torch.full_like(leaf, math.nan) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return out.detach(), gradients


def saved_bytes(function: Callable[[Inputs], Tensor], inputs: Inputs, main: str = "x") -> int:
    """The bytes that autograd keeps for backward. Each storage counts once; parameters, which are
    all vectors except ``main``, do not count."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    parameters = [t for name, t in leaves.items() if t.dim() == 1 and name != main]
    _, kept = kept_by(lambda: function(leaves))
    return storage_bytes(kept, without=parameters)


class Check:
    """All checks of one case in one dtype on one backend."""

    def __init__(
        self, case: Case, dtype: torch.dtype, backend: str, device: str, seeds: int
    ) -> None:
        self.case, self.dtype, self.backend, self.device = case, dtype, backend, device
        self.seeds = seeds
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        self.inputs = case.inputs(dtype, device, self.generator)
        self.seed = (1 << 40) + 7  # needs both words of the key

    def _fused(self, inputs: Inputs, seed: int | None = None, training: bool = True) -> Tensor:
        with backends.backend(self.backend):
            return self.case.call(
                inputs, self.seed if seed is None else seed, self.case.p, training
            )

    def _masks(self, seed: int | None = None) -> dict[str, Tensor]:
        # Always the reference, never the kernels that are being checked.
        with backends.backend("reference"):
            return self.case.masks(self.seed if seed is None else seed, self.device)

    def _wide(self) -> Inputs:
        return {name: t.double() for name, t in self.inputs.items()}

    def _result(self, check: str, value: float, limit: float, detail: str = "") -> Result:
        dtype = str(self.dtype).removeprefix("torch.")
        return Result(
            self.case.name,
            self.case.op,
            dtype,
            self.backend,
            check,
            value <= limit,
            value,
            limit,
            detail,
        )

    def accuracy(self) -> Iterator[Result]:
        """The error of the value, and of the gradient of every operand."""
        drop = self.case.drop_with(self._masks())
        grad = torch.randn(self.case.shape, dtype=torch.float64, generator=self.generator)
        grad = grad.to(self.device, self._output_dtype())

        def eager(inputs: Inputs) -> Tensor:
            return self.case.eager(inputs, drop)

        expected, expected_grads = run_with_gradients(eager, self._wide(), grad)
        plain, plain_grads = run_with_gradients(eager, self.inputs, grad)
        with poisoned():
            found, found_grads = run_with_gradients(self._fused, self.inputs, grad)
        plain = plain.to(self._output_dtype())
        detail = "" if found.dtype == plain.dtype else f"dtype {found.dtype}, not {plain.dtype}"
        value = math.inf if detail else error(found, expected)
        yield self._result("value", value, tolerance(plain, expected), detail)
        for name, gradient in found_grads.items():
            want, eagers = expected_grads[name], plain_grads[name]
            yield self._result(f"grad {name}", error(gradient, want), tolerance(eagers, want))

    def _output_dtype(self) -> torch.dtype:
        like = self.inputs.get(self.case.out_like)
        return self.dtype if like is None else like.dtype

    def same_without_dropout(self) -> Iterator[Result]:
        """Eval mode and p = 0 give the same bits, within the limit of accuracy."""
        found = self._fused(self.inputs, training=False)
        with backends.backend(self.backend):
            zero = self.case.call(self.inputs, None, 0.0, True)
        expected = self.case.without_dropout(self._wide())
        plain = self.case.without_dropout(self.inputs).to(found.dtype)
        value = error(found, expected) if torch.equal(found, zero) else math.inf
        yield self._result("p = 0", value, tolerance(plain, expected))

    def masks_agree(self) -> Iterator[Result]:
        """Counts elements on which forward, backward and the exported mask do not agree."""
        if self.case.gaussian:
            yield self._result("masks", float(self._noise_differs()), 0.0)
            return
        # Positive operands keep every derivative and activation away from zero, so that a zero
        # means a drop. With a constant incoming gradient only backward's mask makes zeros.
        inputs = {name: t.abs() + 0.5 for name, t in self.inputs.items()}
        if "residual" in inputs:
            inputs["residual"] = torch.zeros_like(inputs["residual"])
        out, grads = run_with_gradients(self._probe, inputs, None)
        keep = torch.ones(self.case.mask_shape, dtype=torch.bool, device=self.device)
        for mask in self._masks().values():
            keep &= mask
        if self.case.visible is not None:
            keep &= self.case.visible(self.device)
        wrong = int(((out != 0) != keep).sum())
        if self.case.backward_shows_mask:
            grad = grads[self.case.main]
            for part in grad.split(keep.shape[-1], -1) if keep.dim() else (grad,):
                wrong += int(((part != 0) != keep).sum())  # both halves of a gated input
        yield self._result("masks", float(wrong), 0.0)

    def _noise_differs(self) -> int:
        """Counts elements whose noise differs between forward and backward, for inputs of ones."""
        ones = {name: torch.ones_like(t) for name, t in self.inputs.items()}
        out, grads = run_with_gradients(self._fused, ones, None)
        return int((out != grads[self.case.main]).sum())

    def _probe(self, inputs: Inputs) -> Tensor:
        if self.case.probe is None:
            return self._fused(inputs)
        with backends.backend(self.backend):
            return self.case.probe(inputs, self.seed)

    def saves_no_mask(self) -> Iterator[Result]:
        """The bytes kept for backward beyond those of eager PyTorch without dropout."""
        main = self.case.main
        kept = saved_bytes(self._fused, self.inputs, main)
        plain = saved_bytes(lambda inputs: self.case.eager(inputs, unmasked), self.inputs, main)
        detail = f"{kept} bytes, eager without dropout {plain}"
        limit = SEED_BYTES + self.case.saved_extra
        limit += sum(self.inputs[name].nbytes for name in self.case.kept)
        yield self._result("saved", float(kept - plain), float(limit), detail)

    def expectation(self) -> Iterator[Result]:
        """The z-score of the mean over many seeds.

        If an op is linear in its masks, its expected value is the op without dropout, and the mean
        is compared with that; otherwise with the mean of eager PyTorch under random masks of its
        own. The results are projected on the branch itself, the direction in which a wrong scale or
        rate shows.
        """
        wide = self._wide()
        plain = self.case.eager(wide, unmasked)
        linear = self.case.linear
        direction = plain - wide["residual"] if linear and "residual" in wide else plain

        def mean_and_variance(outcomes: Iterator[Tensor]) -> tuple[float, float]:
            samples = torch.stack([((o.double() - plain) * direction).sum() for o in outcomes])
            return float(samples.mean()), float(samples.var()) / self.seeds

        mean, variance = mean_and_variance(self._fused(self.inputs, s) for s in range(self.seeds))
        if not linear:
            drop = self.case.eager_dropout(self.generator)
            other = mean_and_variance(self.case.eager(wide, drop) for _ in range(self.seeds))
            mean, variance = mean - other[0], variance + other[1]
        z = abs(mean) / max(math.sqrt(variance), 1e-300)
        detail = f"{self.seeds} seeds, {plain.numel()} elements"
        yield self._result("expectation |z|", math.inf if math.isnan(z) else z, MAX_Z, detail)


def check_case(
    case: Case, dtype: torch.dtype, backend: str, device: str, seeds: int = 64
) -> list[Result]:
    """Run every check of a case that can be run; see :func:`why_values_cannot_be_compared`."""
    check = Check(case, dtype, backend, device, seeds)
    results: list[Result] = []
    reason = why_values_cannot_be_compared(dtype, backend)
    for method in (
        check.accuracy,
        check.same_without_dropout,
        check.masks_agree,
        check.saves_no_mask,
        check.expectation,
    ):
        left_out = method != check.saves_no_mask
        if method == check.masks_agree:
            left_out = case.multiplies  # its masks are read off products
        if reason is not None and left_out:
            name = method.__name__.replace("_", " ")
            label = str(dtype).removeprefix("torch.")
            results.append(Result(case.name, case.op, label, backend, name, None, 0.0, 0.0, reason))
        else:
            results.extend(method())
    return results


def check_invariant(
    row: Invariant, dtype: torch.dtype, backend: str, device: str, seeds: int = 64
) -> list[Result]:
    """Measure the invariants that a row states."""
    label = str(dtype).removeprefix("torch.")
    reason = why_values_cannot_be_compared(dtype, backend)
    if reason is not None:
        return [Result(row.name, row.op, label, backend, "invariant", None, 0.0, 0.0, reason)]
    with backends.backend(backend):
        return [
            Result(
                row.name, row.op, label, backend, f"invariant {f.check}",
                f.value <= f.limit, f.value, f.limit, f.detail,
            )
            for f in row.measure(Trial(dtype, device, seeds))
        ]  # fmt: skip


def why_values_cannot_be_compared(dtype: torch.dtype, backend: str) -> str | None:
    """Why only masks and memory can be checked; None if everything can."""
    if backend == "triton" and dtype == torch.bfloat16:
        module = backends.load("triton")
        if module.interpreting():  # type: ignore[attr-defined]
            return "Triton's interpreter truncates bf16 stores, and multiplies no bf16 matrices"
    return None
