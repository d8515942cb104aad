"""The harness passes what is right, and fails what is broken."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hosts import DEVICE, PLAIN
from rich.console import Console

import tridrop
from tridrop.backends.triton import elementwise as kernels
from tridrop.backends.triton import launch
from tridrop.commands import check, cli
from tridrop.commands.check import report
from tridrop.functional import elementwise, known
from tridrop.spec.operands import WithOptions


def everywhere(table):
    return [
        pytest.param(row, dtype, backend, id=f"{backend}-{name}-{row.name}")
        for backend in (PLAIN, "triton")
        for name, dtype in check.DTYPES.items()
        for row in table
    ]


@pytest.mark.parametrize(("case", "dtype", "backend"), everywhere(check.CASES))
def test_every_case_holds(case, dtype, backend):
    results = check.check_case(case, dtype, backend, DEVICE, seeds=24)
    assert [r for r in results if r.passed is False] == []
    ran = {r.check for r in results if r.passed}
    # Triton's interpreter cannot multiply matrices of bf16, from which attention's mask is read.
    blind = case.multiplies and backend == "triton" and dtype == torch.bfloat16
    assert ({"saved"} if blind and DEVICE == "cpu" else {"masks", "saved"}) <= ran
    if backend != "triton" or dtype != torch.bfloat16 or DEVICE == "cuda":
        operands = {f"grad {name}" for name in case.shapes if name != "out"}
        assert ran == {"value", "p = 0", "masks", "saved", "expectation |z|"} | operands


@pytest.mark.parametrize(("row", "dtype", "backend"), everywhere(check.INVARIANTS))
def test_every_invariant_holds(row, dtype, backend):
    results = check.check_invariant(row, dtype, backend, DEVICE, seeds=24)
    assert [r for r in results if r.passed is False] == []
    blind = backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu"
    assert all(r.passed is None for r in results) if blind else len(results) >= 2


# ------------------------------------------------------------------- what is broken is found


def failures(backend: str, op: str = "dropout_add", rows: int = 4) -> set[str]:
    """The checks that fail in an op's first cases, of which four have every operand but a gate."""
    given = (torch.float32, backend, DEVICE, 32)
    cases = [row for row in check.CASES if row.op == op][:rows]
    results = [r for row in cases for r in check.check_case(row, *given)]
    for row in check.INVARIANTS:
        results += check.check_invariant(row, *given) if row.op == op else []
    assert results
    return {r.check for r in results if r.passed is False}


@pytest.fixture(autouse=True)
def calls_of_their_own(monkeypatch):
    """What is known of calls is of the code that they met."""
    monkeypatch.setattr(known, "_known", {})


def options_become(monkeypatch, wrong):
    """Every call has options of the class ``wrong``."""
    rated, unpack = elementwise.rated, tridrop.ops.elementwise.unpack

    def known_options(*given):
        options, *others = rated(*given)
        return wrong(**vars(options)), *others

    monkeypatch.setattr(elementwise, "rated", known_options)
    monkeypatch.setattr(tridrop.ops.elementwise, "unpack", lambda *a: wrong(**vars(unpack(*a))))


def test_a_wrong_scale_fails(monkeypatch):
    """1 / (1 - p) of a rate that was rounded to 1/256, in the host code of either backend."""

    class Rounded(tridrop.spec.elementwise.Options):
        def scales(self):
            return tuple(1 / (1 - round(r * 256) / 256) for r in (self.p, self.drop_path))

    options_become(monkeypatch, Rounded)
    for backend in (PLAIN, "triton"):
        assert {"value", "grad x"} <= failures(backend)


def test_a_large_error_of_the_scale_shows_in_the_expectation(monkeypatch):
    class Unscaled(tridrop.spec.elementwise.Options):
        def scales(self):
            return 1.0, 1.0

    options_become(monkeypatch, Unscaled)
    for backend in (PLAIN, "triton"):
        assert "expectation |z|" in failures(backend)


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_wrong_moments_fail(monkeypatch, backend):
    """Alpha dropout with dropout's scale, Gaussian noise of a tenth more."""
    right = tridrop.contract.noise.scale

    def wrong(kind, threshold):
        return right("mask" if kind == "alpha" else kind, threshold) * (
            1.1 if kind == "gaussian" else 1
        )

    monkeypatch.setattr(tridrop.contract.noise, "scale", wrong)
    monkeypatch.setattr(launch, "plan", launch.plan.__wrapped__)  # plans keep their scales
    assert "invariant variance |z|" in failures(backend, "alpha_dropout")
    assert "invariant variance |z|" in failures(backend, "gaussian_dropout")


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_maps_that_are_not_dropped_whole_fail(monkeypatch, backend):
    plain = tridrop.functional.family._feature_shape
    monkeypatch.setattr(
        tridrop.functional.family, "_feature_shape", lambda x: (*plain(x)[:-1], None)
    )
    assert {"invariant shared", "masks"} <= failures(backend, "dropout2d")


def backward_becomes(monkeypatch, backend, wrong):
    """The elementwise family's gradients are ``wrong``, which is given the right ``prepare``."""
    module = tridrop.backends.load(backend)
    right = module.prepare

    def prepare(family, shape, options, operands, wanted):
        op = right(family, shape, options, operands, wanted)
        if family != "elementwise":
            return op
        return WithOptions(
            lambda given, _: op.forward(given),
            lambda given, _, dtypes: wrong(right, tuple(given.grad.shape), options, given, dtypes),
            options,
        )

    monkeypatch.setattr(module, "prepare", prepare)


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_a_mask_shifted_in_backward_fails(monkeypatch, backend):
    def shifted(right, shape, options, operands, dtypes):
        whole = tuple(n + 1 for n in shape)
        at = (0,) * (len(shape) - 1) + (1,)
        options = dataclasses.replace(options, shard=tridrop.Shard(whole, at))
        return right("elementwise", shape, options, operands, dtypes).backward(operands, dtypes)

    backward_becomes(monkeypatch, backend, shifted)
    assert {"grad x", "grad bias", "masks"} <= failures(backend)


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_a_bias_gradient_from_the_unmasked_gradient_fails(monkeypatch, backend):
    def unmasked(right, shape, options, operands, dtypes):
        op = right("elementwise", shape, options, operands, dtypes)
        dx, dbias, dlayer_scale = op.backward(operands, dtypes)
        if dbias is not None and not options.gated:
            dbias = operands.grad.flatten(0, -2).sum(0).to(dbias.dtype)
        return dx, dbias, dlayer_scale

    backward_becomes(monkeypatch, backend, unmasked)
    found = failures(backend)
    assert "grad bias" in found
    assert "value" not in found


interpreted = pytest.mark.skipif(
    not launch.interpreting(), reason="a compiled Triton kernel keeps the functions it was built of"
)


@triton.jit
def _rule_of_a_wrong_kernel(operands, threshold, scale, path_scale, MASK, PATH):
    key, threshold, factor = kernels.PLAIN_RULE(operands, threshold, scale, path_scale, MASK, PATH)
    return key, threshold, factor * 1.01


@triton.jit
def _keep_of_a_wrong_kernel(row, group, origin, rule, path_threshold, MAYBE_ZERO, MASK, PATH):
    # a grid axis missing from the counter: every row block has the mask of the first
    return kernels.PLAIN_KEEP(
        row * 0 + tl.arange(0, row.shape[0]), group, origin, rule, path_threshold, MAYBE_ZERO,
        MASK, PATH,
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize(
    ("plain", "name", "wrong", "found"),
    [
        ("PLAIN_RULE", "load_criterion", _rule_of_a_wrong_kernel, {"value", "grad x"}),
        ("PLAIN_KEEP", "keep_tile", _keep_of_a_wrong_kernel, {"value", "masks"}),
    ],
)
def test_a_broken_kernel_fails(monkeypatch, plain, name, wrong, found):
    monkeypatch.setattr(kernels, plain, getattr(kernels, name), raising=False)
    monkeypatch.setattr(kernels, name, wrong)
    assert found <= failures("triton", "dropout", rows=1)


def test_a_stored_mask_fails(monkeypatch):
    right = tridrop.ops.Fused.setup_context

    def hoarding(ctx, inputs, output):
        right(ctx, inputs, output)
        ctx.save_for_backward(*ctx.to_save[:4], output != 0)

    monkeypatch.setattr(tridrop.ops.Fused, "setup_context", staticmethod(hoarding))
    case = check.CASES[0]
    results = tridrop.commands.check.measure.Check(case, torch.float32, "reference", DEVICE, 8)
    assert not next(results.saves_no_mask()).passed


# ----------------------------------------------------------------------------------- command


def test_command_prints_a_table_and_succeeds(capsys):
    options = ["--op", "dropout", "--dtype", "float32", "--backend", "reference", "--seeds", "16"]
    assert cli.main(["check", *options]) == 0
    assert "checks passed" in capsys.readouterr().out


def test_what_goes_into_a_pipe_is_a_line_a_row(capsys):
    options = ["--op", "dropout", "--dtype", "float32", "--backend", "reference", "--seeds", "8"]
    assert cli.main(["check", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines[0].split("\t")
    assert head[:3] == ["case", "dtype", "backend"]
    cases = [row for row in check.CASES + check.INVARIANTS if row.op == "dropout"]
    for line, row in zip(lines[1:], cases, strict=False):
        cells = line.split("\t")
        assert cells[0] == row.name
        assert cells[1:3] == ["float32", "reference"]
        assert len(cells) == len(head)
        assert cells[-1] == "ok"
    assert "below 0 means fewer" in lines[len(cases) + 1]


def test_a_table_of_80_columns_cuts_nothing():
    results = list(check.run(["dropout_add"], None, ["reference"], DEVICE, 8))
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(results, "reference"))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("bf16", "value", "dient", "masks", "saved", "tation", "result", "below 0"):
        assert word in shown
    assert len(shown.splitlines()) < 4 * len({(r.case, r.dtype) for r in results})


def test_an_interrupt_keeps_what_was_checked(monkeypatch, capsys):
    right, calls = check.check_case, iter(range(9))

    def stop(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(check, "check_case", stop)
    options = ["--op", "dropout", "--dtype", "float32", "--backend", "reference", "--seeds", "8"]
    assert cli.main(["check", *options]) == 130
    said = capsys.readouterr()
    assert re.fullmatch(r"tridrop check: interrupted after 2 of \d+ rows\n", said.err)
    assert said.out.count("\tok") == 2
    assert "checks passed" in said.out


def test_an_interrupt_of_any_command_is_one_line(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tridrop.commands.info.main", stop)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "tridrop info: interrupted\n"


def test_an_interrupt_before_the_command_is_known_is_one_line(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", stop)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "tridrop: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize(
    ("command", "status"),
    [(["info"], 141), (["demo", "--experiment=masks", "--quick"], 1)],  # 1 is rich's
)
def test_a_reader_that_stops_is_no_error(tmp_path, command, status):
    """As in `tridrop info | head -1`, where Python would print a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-m", "tridrop", *command],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert (run.returncode, run.stderr) == (status, "")


def test_command_prints_json(capsys):
    options = ["--op", "dropout", "--dtype", "float16", "--backend", "reference", "--seeds", "16"]
    assert cli.main(["check", *options, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["dtype"] for r in records} == {"float16"}
    assert all(r["passed"] for r in records)


def test_command_fails_with_status_1(monkeypatch, capsys):
    families = tridrop.backends.reference.FAMILIES
    right = families["elementwise"]
    wrong = right._replace(forward=lambda *a: right.forward(*a) * 1.001)
    monkeypatch.setitem(families, "elementwise", wrong)
    options = ["--op", "dropout", "--dtype", "float32", "--backend", "reference", "--seeds", "16"]
    assert cli.main(["check", *options]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_unknown_op_raises():
    with pytest.raises(ValueError, match="known: activation_dropout"):
        check.run(ops=["conv"])


def test_info_prints_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for expected in (torch.__version__, "backend reference: available", "backend triton"):
        assert expected in out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_memory_that_nobody_wrote_fails(monkeypatch, backend):
    """Of a result, and of a gradient, whose last element is left as it was handed out."""

    def unwritten(t):
        made = torch.empty_like(t)
        made.flatten()[:-1] = t.flatten()[:-1]
        return made

    module = tridrop.backends.load(backend)
    right = module.prepare

    def prepare(family, shape, options, operands, wanted):
        op = right(family, shape, options, operands, wanted)

        def backward(given, _, dtypes):
            return tuple(None if t is None else unwritten(t) for t in op.backward(given, dtypes))

        return WithOptions(lambda given, _: unwritten(op.forward(given)), backward, options)

    monkeypatch.setattr(module, "prepare", prepare)
    found = failures(backend)
    assert {"value", "grad x", "grad bias"} <= found
    assert not torch.are_deterministic_algorithms_enabled()
