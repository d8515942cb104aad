"""tridrop bench: what it times and how, what it computes from times, and what it refuses to say."""

import csv
import functools
import itertools
import json
import math
import sys
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from figures import inside
from hosts import imported_with

import tridrop
from tridrop.commands import bench, check, cli
from tridrop.commands.bench import (
    gate,
    machine,
    models,
    op_report,
    options,
    packed,
    plots,
    probes,
    providers,
    records,
    report,
    rows,
    step_report,
    steps,
    timing,
)
from tridrop.commands.bench.timing import BACKWARD, BOTH, COPY, FORWARD

SMALL = {"sizes": ["16x24"], "rounds": 3, "modes": ["both"], "dtypes": ["fp32"]}
COMPILE = torch.compile
QUICK = ["--size", "16x24", "--rounds", "3", "--mode", "both", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def on_a_cpu_without_caches(monkeypatch):
    """Few operands, so that the tests are fast; and no GPU where there is one."""
    monkeypatch.setattr(machine, "_cpu_cache", lambda: 2**12)
    monkeypatch.setattr(gate, "SEEDS", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    imported_with(monkeypatch)


@pytest.fixture
def compiled_quickly(monkeypatch):
    """torch.compile without its code generator, which takes seconds a graph."""
    quickly = functools.partial(COMPILE, backend="aot_eager")
    monkeypatch.setattr(providers.torch, "compile", quickly)


def run(**changes):
    return bench.run(bench.Options.of("cpu", **SMALL | changes))


# ------------------------------------------------------------------------------ what is timed


def test_every_op_has_a_usual_row_and_every_usual_row_exists():
    sizes = rows.Attention(64, 32, [16], [16])
    found = rows.table(rows.OPS, [(16, 24)], sizes)
    assert {row.label for row in found} == set(rows.USUAL)
    assert {row.op for row in found} == set(rows.OPS)
    quick = rows.table(rows.OPS, [(16, 24)], sizes, first=True)
    assert [row.op for row in quick] == list(rows.OPS)
    every = rows.table(rows.OPS, [(16, 24)], sizes, every=True)
    assert {row.label for row in found} < {row.label for row in every}


@pytest.mark.parametrize(
    "row",
    rows.table(rows.OPS, [(16, 24)], rows.Attention(64, 32, [16], [16]), every=True),
    ids=lambda row: row.label,
)
def test_rows_at_another_size_are_the_same_rows(row):
    """The value under the exported mask, as tridrop check has it, and p, shape and results."""
    case = row.checked(0.25)
    assert case.p == 0.25
    assert case.shape == row.shape
    assert rows.label(case) == row.label
    results = list(check.measure.Check(case, torch.float32, "reference", "cpu", 8).accuracy())
    assert all(r.passed for r in results)
    timed = row.sized(0.25)
    inputs = timed.inputs(torch.float32, "cpu", torch.Generator().manual_seed(0))
    outs = timing.results(timed.call(inputs, 1, 0.25, True))
    eager = timing.results(timed.eager(inputs, providers.torch_dropout(timed)))
    assert len(outs) == (2 if timed.joins else 1)
    assert [o.shape for o in outs] == [e.shape for e in eager]
    for provider in providers.of(timed):
        if provider.name in (providers.EAGER, providers.BY_HAND, providers.TRIDROP, "sdpa-math"):
            free = timing.results(provider.make(row.sized(0.0))(inputs))
            expected = timing.results(row.sized(0.0).eager(inputs, check.case.unmasked))
            torch.testing.assert_close(free, expected)


USUAL = rows.table(rows.OPS, [(16, 24)], rows.Attention(64, 32, [16], [16]))


@pytest.mark.parametrize("row", USUAL, ids=lambda row: row.label)
def test_every_usual_row_is_one_graph_for_torch_compile(row, compiled_quickly):
    torch._dynamo.reset()
    case = row.sized(0.1)
    (provider,) = (p for p in providers.of(case) if p.name == providers.COMPILED)
    inputs = case.inputs(torch.float32, "cpu", torch.Generator().manual_seed(0))
    operands = timing.Operands(inputs)
    outs = timing.results(provider.make(case)(operands.leaves))
    assert all(g is not None for g in operands.backward(outs))


def test_eager_draws_shared_masks_as_models_do():
    case = next(c for c in check.CASES if c.noise_shape == (None, 1, None) and c.at is not None)
    case = case.at((2, 40, 50), 0.5)
    found = providers.torch_dropout(case)("elements", torch.ones(2, 40, 50))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert set(found.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("size", [256, 4096])
def test_operands_exceed_twice_the_cache_and_take_turns(size):
    cache = 10_000
    rotation = timing.Rotation({"x": torch.randn(size // 4)}, cache)
    assert sum(s.leaves["x"].nbytes for s in rotation.sets) > 2 * cache
    assert 1 <= rotation.calls <= timing.MOST_CALLS
    taken = list(itertools.chain(*(rotation.take(3) for _ in range(len(rotation.sets)))))
    assert [taken.count(s) for s in rotation.sets] == [3] * len(rotation.sets)
    assert len({s.leaves["x"].data_ptr() for s in rotation.sets}) == len(rotation.sets)
    for operands in rotation.sets[:3]:
        x = operands.leaves["x"]
        assert x.std() > 0.3
        (grad,) = operands.grads([x * 2])
        assert grad.std() > 0.3
        assert operands.grads([x * 3])[0] is grad
    copy = timing.Copy({FORWARD: size}, "cpu", cache)
    pairs = list(itertools.islice(copy._cycles[FORWARD], 2 * cache // size + 1))
    assert sum(a.nbytes + b.nbytes for a, b in pairs) > 2 * cache
    assert all(thunk().std() > 0 for thunk in copy.thunks(FORWARD))


def test_modes_time_what_they_say():
    log = []

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            log.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            log.append("backward")
            return grad * 2

    rotation = timing.Rotation({"x": torch.randn(8)}, 0)
    subject = timing.Subject("a", 0.1, lambda inputs: Traced.apply(inputs["x"]), rotation)
    for mode, before, timed in (
        (FORWARD, [], ["forward"]),
        (BACKWARD, ["forward"], ["backward"]),
        (BOTH, [], ["forward", "backward"]),
    ):
        thunks = subject.thunks(mode)
        assert log == before
        log.clear()
        thunks[0]()
        assert log == timed
        log.clear()
    assert all(s.leaves["x"].grad is None for s in rotation.sets)


def test_turns_rotate_and_stop_at_the_budget():
    order = []

    class Slow:
        def seconds(self, calls, host):
            order.append(calls[0]())
            return 1.0

    def subject(name):
        return timing.Subject(name, 0.0, lambda _: name, timing.Rotation({"x": torch.ones(1)}, 0))

    found = timing.rounds(Slow(), [subject("a"), subject("b")], [FORWARD], 4, {}, 1e9)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(samples) for samples in found.values()] == [4, 4]
    found = timing.rounds(Slow(), [subject("a")], [FORWARD], 50, {}, 0.0)
    assert [len(samples) for samples in found.values()] == [timing.LEAST_ROUNDS]


def test_bytes_are_the_least_that_must_move():
    n = 16 * 24 * 4

    def moved(name, shape=(2, 8, 24)):
        case = next(c for c in check.CASES if rows.label(c) == name and c.at is not None)
        case = case.at(shape, 0.1, apart=True)
        inputs = case.inputs(torch.float32, "cpu", torch.Generator().manual_seed(0))
        found = probes.moved_bytes(
            lambda inputs: case.call(inputs, None, case.p, True), timing.Operands(inputs)
        )
        assert found[BOTH] == found[FORWARD] + found[BACKWARD]
        return found

    found = moved("dropout_add: plain")
    seed = check.measure.SEED_BYTES
    # x, residual and the result; then the gradients of the result, which is the residual's, and x
    assert found == {FORWARD: 3 * n + seed, BACKWARD: 2 * n + seed, BOTH: 5 * n + 2 * seed}
    found = moved("activation_dropout: gelu")
    assert found[FORWARD] == 2 * n + seed
    assert found[BACKWARD] == 3 * n + seed  # x is read again
    norm = moved("dropout_add_layer_norm: weight, norm_bias, bias")
    # the stream is written and read again; vectors and two numbers a row come on top
    assert 4 * n < norm[FORWARD] < 4.5 * n
    assert 4 * n < norm[BACKWARD] < 4.5 * n


def test_launches_on_a_cpu_are_the_outermost_operators():
    found = machine.Machine("cpu").launches(
        lambda: torch.nn.functional.linear(*[torch.ones(2, 2)] * 2)
    )
    assert found == 2  # ones is one of them


# ------------------------------------------------------------------- what follows from times

ABOUT = records.About(
    "dropout_add", "dropout_add: plain", (2, 8, 24), "fp32", "a machine",
    {FORWARD: 4_000_000, BACKWARD: 2_000_000, BOTH: 6_000_000}, 3e9, gate.PASSED,
    frozenset({"tridrop"}),
)  # fmt: skip
SECONDS = {
    ("eager", 0.1): 4.0, ("eager", 0.0): 2.0, ("torch.compile", 0.1): 3.0, ("tridrop", 0.1): 1.1,
    ("tridrop", 0.0): 1.0, (COPY, 0.0): 0.5,
}  # fmt: skip


def made(**changes):
    about = replace(ABOUT, **changes)
    samples = {
        (*who, mode): [s * 1e-3 * f for f in (1, 0.5, 2, 1, 1)]
        for who, s in SECONDS.items()
        for mode in timing.MODES
    }
    probe = records.Probe(100, None, {FORWARD: 5e-6}, {FORWARD: 2})
    reasons = {("sdpa-flash", 0.1): "no kernel"}
    return records.make(about, timing.MODES, samples, dict.fromkeys(SECONDS, probe), reasons)


def pick(found, provider, mode=FORWARD, p=0.1):
    (record,) = (r for r in found if (r.provider, r.mode, r.p) == (provider, mode, p))
    return record


def test_records_hold_rates_shares_and_costs():
    found = made()
    ours = pick(found, "tridrop")
    assert (ours.median_ms, ours.q20_ms, ours.q80_ms, ours.rounds) == (1.1, 0.99, 1.32, 5)
    assert ours.shape == "2x8x24"
    assert ours.gb_per_s == pytest.approx(4e6 / 1.1e-3 / 1e9, rel=1e-4)
    assert ours.copy_gb_per_s == pytest.approx(8.0)
    assert ours.copy_fraction == pytest.approx(0.5 / 1.1, rel=1e-4)
    assert ours.speedup_over_eager == pytest.approx(4 / 1.1, rel=1e-4)
    assert ours.speedup_over_compile == pytest.approx(3 / 1.1, rel=1e-4)
    assert ours.dropout_cost == pytest.approx(0.1)
    assert (ours.saved_bytes, ours.host_us, ours.launches) == (100, 5.0, 2)
    assert pick(found, "eager").dropout_cost == pytest.approx(1.0)
    assert pick(found, "eager").speedup_over_eager is None
    assert pick(found, "torch.compile").dropout_cost is None  # it was not timed at p = 0
    assert pick(found, "tridrop", p=0.0).speedup_over_eager == pytest.approx(2.0)
    assert pick(found, "tridrop", p=0.0).speedup_over_compile is None
    assert pick(found, COPY, p=0.0).copy_fraction == 1
    for mode, work in ((FORWARD, 1.0), (BACKWARD, 2.5), (BOTH, 3.5)):
        assert pick(found, "tridrop", mode).tflops == pytest.approx(
            work * 3e9 / 1.1e-3 / 1e12, 1e-4
        )
    assert all(r.tflops is None for r in made(flops=0.0))


def test_a_provider_that_cannot_run_leaves_its_reason():
    found = [r for r in made() if r.why_not]
    assert [(r.provider, r.mode) for r in found] == [("sdpa-flash", m) for m in timing.MODES]
    assert all(r.median_ms is None for r in found)
    assert op_report.reasons(found) == ["sdpa-flash, dropout_add, p = 0.1: no kernel"]
    assert op_report.failures(found) == []


def test_a_failed_check_takes_tridrops_speedups_alone():
    found = made(check="failed value: 3 > 2")
    for r in found:
        if r.provider == "tridrop":
            assert r.speedup_over_eager is r.speedup_over_compile is None
            assert r.check == "failed value: 3 > 2"
    assert pick(found, "torch.compile").speedup_over_eager == pytest.approx(4 / 3, rel=1e-4)
    (failure,) = op_report.failures(found)
    assert "its check failed value: 3 > 2" in failure


def test_attentions_work_is_counted_as_in_the_papers():
    sizes = rows.Attention(64, 32, [16], [8])
    plain, causal = rows.table(["scaled_dot_product_attention"], [], sizes)
    assert plain.shape == causal.shape == (4, 4, 16, 8)
    assert plain.flops == 4 * 4 * 4 * 16 * 16 * 8 == 2 * causal.flops


def test_lists_of_names_add_up(tmp_path):
    args = cli.parser().parse_args(
        ["bench", "--op", "dropout", "--op", "dropout_add,softmax_dropout", "--length", "8,16"]
    )
    assert args.op == ["dropout", "dropout_add", "softmax_dropout"]
    assert args.length == [8, 16]


def test_large_scores_are_checked_for_one_head(monkeypatch):
    row = rows.table(["scaled_dot_product_attention"], [], rows.Attention(64, 32, [16], [8]))[0]
    assert row.checked(0.1).mask_shape == (4, 4, 16, 16)
    monkeypatch.setattr(rows, "MOST_SCORES", 1000)
    assert row.checked(0.1).mask_shape == (1, 1, 16, 16)


# ------------------------------------------------------------------------------- end to end


def test_records_of_a_run_agree_with_the_stopwatch(monkeypatch):
    monkeypatch.setattr(machine.Machine, "seconds", lambda self, calls, host: 0.002)
    found = run(ops=["dropout_add"], providers=["eager", "tridrop"])
    assert {r.case for r in found} == {n for n in rows.USUAL if n.startswith("dropout_add: ")}
    for r in found:
        assert r.median_ms == r.q20_ms == r.q80_ms == 2.0
        assert r.copy_fraction == 1.0
        assert r.gb_per_s == pytest.approx(r.bytes / 2e-3 / 1e9, rel=1e-4)
        assert r.shape == "8x2x24"
        if r.provider == "tridrop":
            assert r.check == gate.PASSED
            assert r.speedup_over_eager == 1.0
        if r.provider != COPY:
            assert r.host_us > 0
            assert r.launches > 0
            assert r.dropout_cost == (0.0 if r.p else None)
    (ours,) = (
        r for r in found if r.case == "dropout_add: plain" and r.provider == "tridrop" and r.p
    )
    assert ours.saved_bytes == check.measure.SEED_BYTES


def test_the_command_writes_records_a_table_and_plots(tmp_path, capsys, compiled_quickly):
    ops = "dropout_add,scaled_dot_product_attention"
    arguments = ["bench", "--device", "cpu", "--quick", "--op", ops, *QUICK, "--out", str(tmp_path)]
    arguments += ["--provider", "eager,torch.compile,sdpa-flash,sdpa-math,tridrop", "--label", "a"]
    assert cli.main([*arguments, "--length", "32", "--head-dim", "16", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "dropout_add: plain" in out
    assert "not run: sdpa-flash" in out
    written = sorted(tmp_path.iterdir())
    names = [path.name for path in written]
    (stem,) = {name[:20] for name in names}
    assert stem == f"bench-cpu-{stem[10:]}"
    assert [name[20:] for name in names] == ["-a-attention.png", "-a.csv", "-a.json", "-a.png"]
    for path in (written[0], written[3]):
        assert path.read_bytes().startswith(b"\x89PNG")
    content = json.loads(written[2].read_text())
    assert content["about"]["versions"]["torch"] == metadata.version("torch")
    assert tridrop.__version__ in content["about"]["versions"]["tridrop"]
    assert {"device", "backend", "threads", "cache_bytes", "date"} <= content["about"].keys()
    with written[1].open() as file:
        assert len(list(csv.DictReader(file))) == len(content["records"])
    for r in content["records"]:
        assert tuple(r) == tuple(f.name for f in fields(records.Record))
        if r["why_not"]:
            assert r["provider"] == "sdpa-flash"
            assert r["p"] == 0.1  # without dropout it runs on a CPU
            assert "dropout" in r["why_not"]
        else:
            assert 0 < r["q20_ms"] <= r["median_ms"] <= r["q80_ms"]
            assert math.isfinite(r["copy_fraction"])
            attends = r["op"] == "scaled_dot_product_attention" and r["provider"] != COPY
            assert (r["tflops"] is not None) == attends
    ours = [r for r in content["records"] if r["provider"] == "tridrop" and r["p"]]
    assert all(r["speedup_over_eager"] and r["speedup_over_compile"] for r in ours)


def test_a_legend_lies_in_its_figure():
    """Also that of one op, whose figure is narrow and has every provider."""
    names = [f.name for f in fields(records.Record)]
    blank = dict.fromkeys(names)
    about = {"op": "dropout_add", "case": "dropout_add: plain", "shape": "8x8", "dtype": "fp32"}
    given = {"mode": BOTH, "p": 0.1, "bytes": 1 << 20, "gb_per_s": 1.0, "why_not": ""}
    found = [
        records.Record(**{**blank, **about, **given, "provider": name}) for name in plots.COLOURS
    ]
    for count in (1, 2, 5):
        more = [replace(r, case=f"{r.case} {i}") for r in found for i in range(count)]
        inside(plots._figure(more, plots._mib, plots._speed, ("MiB", "GB/s"), ""))


def test_an_interrupt_keeps_what_was_timed(monkeypatch, tmp_path, capsys):
    row_run = sys.modules["tridrop.commands.bench.run"]._RowRun
    records_of, calls = row_run.records, iter(range(9))

    def stop(self, gate):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return records_of(self, gate)

    monkeypatch.setattr(row_run, "records", stop)
    arguments = ["bench", "--device", "cpu", "--quick", "--op", "dropout_add,dropout", *QUICK]
    arguments += ["--provider", "eager,tridrop", "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    said = capsys.readouterr()
    assert said.err == "tridrop bench: interrupted: what was timed is kept\n"
    assert "case\tshape\tdtype" in said.out
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["records"]
    assert list(tmp_path.glob("*.png"))
    assert cli.main(arguments) == 0  # the counter is past it

    def at_once(self, gate):
        raise KeyboardInterrupt

    monkeypatch.setattr(row_run, "records", at_once)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was timed yet\n")


def test_a_broken_op_gets_no_speedup_and_fails_the_command(monkeypatch, tmp_path, capsys):
    right = tridrop.functional.dropout_add
    monkeypatch.setattr(tridrop.functional, "dropout_add", lambda *a, **k: right(*a, **k) * 1.01)
    arguments = ["bench", "--device", "cpu", "--quick", "--op", "dropout_add", *QUICK]
    arguments += ["--provider", "eager,tridrop", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "no speed-up is given" in out
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    ours = [r for r in content["records"] if r["provider"] == "tridrop"]
    assert ours
    for r in ours:
        assert r["speedup_over_eager"] is None
        assert "failed value" in r["check"]


def test_an_op_that_raises_fails_the_command(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(tridrop.functional, "dropout_add", broken)
    found = gate.Gate(machine.Machine("cpu"))
    row = rows.table(["dropout_add"], [(16, 24)], rows.Attention(64, 32, [16], [16]))[0]
    assert found.verdict(row, torch.float32, 0.1) == "raised RuntimeError: out of luck"


def test_a_check_that_was_not_made_is_no_passed_one():
    result = check.Result("case", "op", "bfloat16", "triton", "value", None, 0.0, 0.0, "cannot")
    assert gate.describe([result]) == "failed value: cannot"
    assert gate.describe([replace(result, passed=True)]) == gate.PASSED


# --------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("op", "dropout_sub", "dropout_add"),
        ("dtype", "fp8", "bf16"),
        ("mode", "sideways", "backward"),
        ("provider", "jax", "torch.compile"),
        ("device", "tpu", "cuda, cpu"),
    ],
)
def test_unknown_names_are_answered_with_the_known(capsys, tmp_path, option, value, known):
    assert cli.main(["bench", f"--{option}", value, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{option} '{value}' is not known" in error
    assert known in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "12"], "give ROWSxCOLS"),
        (["--size", "0x4"], "give ROWSxCOLS"),
        (["--p", "0"], "give one between 0 and 1"),
        (["--p", "1"], "give one between 0 and 1"),
        (["--rounds", "0"], "give 1 or more"),
        (["--threads", "0"], "give 1 or more"),
        (["--length", "100000"], "give one from 1 to"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_what_cannot_be_is_refused(capsys, tmp_path, arguments, message):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_triton_on_a_cpu_is_not_timed(monkeypatch):
    imported_with(monkeypatch, TRIDROP_BACKEND="triton")
    with pytest.raises(RuntimeError, match="interpreter"):
        run(ops=["dropout_add"])


def test_in_a_clone_results_have_a_folder():
    assert Path(__file__).parents[2] / "benchmarks" / "results" == report.CLONE


def test_outside_a_clone_the_folder_must_be_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "CLONE", tmp_path / "nowhere")
    assert cli.main(["bench", "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err


def test_without_matplotlib_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "pip install 'tridrop[demo]'" in capsys.readouterr().err


def test_every_device_has_defaults():
    for device, quick in options.DEFAULTS:
        found = bench.Options.of(device, quick=quick)
        ops = options.QUICK_OPS if quick else rows.OPS
        assert {row.op for row in found.rows} == set(ops)
        assert set(found.modes) == set(timing.MODES)
    assert {row.op for row in bench.Options.of("cpu", ops=["all"], quick=True).rows} == set(
        rows.OPS
    )


def test_packed_sequences_are_timed_beside_padded_ones(monkeypatch):
    monkeypatch.setattr(machine.Machine, "seconds", lambda self, calls, host: 0.002)
    chosen = bench.Options.of(
        "cpu", ops=["scaled_dot_product_attention"], dtypes=["fp32"], modes=["both"], rounds=1,
        head_dims=[64], providers=[providers.PACKED, providers.PADDED],
    )  # fmt: skip
    found = bench.run(replace(chosen, rows=[], packed=[(24, 2, 8)]))
    assert {(r.provider, r.p) for r in found} == {
        (providers.PACKED, 0.1), (providers.PACKED, 0.0), (providers.PADDED, 0.1),
        (providers.PADDED, 0.0), (COPY, 0.0),
    }  # fmt: skip
    for r in found:
        assert r.check == ("" if r.provider == COPY else gate.PASSED)
        assert r.case.endswith("16 packed sequences")
        assert r.median_ms == 2.0


def test_packed_sequences_with_another_mask_fail(monkeypatch):
    sequences = packed.Sequences.of(24, 2, 8, False, "cpu")
    inputs = sequences.packed_inputs(torch.float32)
    assert packed.verdict(sequences, inputs, 0.3) == gate.PASSED
    right = packed.Sequences.calls

    def reseeded(self):
        calls = right(self)
        return calls | {providers.PACKED: lambda i, seed, p: right(self)[providers.PACKED](i, 7, p)}

    monkeypatch.setattr(packed.Sequences, "calls", reseeded)
    assert packed.verdict(sequences, inputs, 0.3).startswith("failed value")


def test_an_op_that_cannot_run_leaves_the_others_times(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tridrop.functional, "dropout", broken)
    found = run(ops=["dropout"], providers=["eager", "tridrop"])
    assert {r.provider: r.why_not for r in found} == {
        "eager": "", "tridrop": "RuntimeError: out of luck",
    }  # fmt: skip
    assert all(r.bytes is None for r in found)
    assert "raised RuntimeError: out of luck" in op_report.failures(found)[0]


# ------------------------------------------------------------------------------ whole models


STEPS = ["bench", "--device", "cpu", "--quick", "--rounds", "2"]


def test_every_architecture_is_trained_and_swapped(monkeypatch):
    """The stopwatch says 3 s where something is dropped and 2 s where not: dropout costs half."""
    monkeypatch.setattr(
        machine.Machine, "wall_seconds",
        lambda self, calls: (calls[0](), 3.0 if calls[0].__self__.p else 2.0)[1],
    )  # fmt: skip
    chosen = steps.StepOptions.of("cpu", rounds=2, quick=True, providers=["eager", "tridrop"])
    found = bench.run_steps(chosen)
    assert [(r.model, r.provider, r.p) for r in found] == [
        (model, provider, p)
        for model in ("gpt2", "bert", "vit")
        for provider in ("eager", "tridrop")
        for p in (0.0, 0.1)
    ]
    for r in found:
        assert r.check == gate.PASSED
        assert r.why_not == ""
        assert (r.rounds, r.median_ms) == (2, 3000.0 if r.p else 2000.0)
        assert r.dropout_cost == (0.5 if r.p else None)
        assert r.speedup_over_eager == (1.0 if r.provider == "tridrop" else None)
        assert r.parameters > 100_000
        assert r.peak_bytes is None
    kept = {(r.model, r.provider, r.p): r.saved_bytes for r in found}
    for model in chosen.names:
        # Without dropout as much as eager, and less where eager's GELU is written out in Python, as
        # GPT-2's is; with dropout less, and only the seeds more than without.
        ours, eagers = kept[model, "tridrop", 0.0], kept[model, "eager", 0.0]
        assert ours < 0.8 * eagers if model == "gpt2" else ours == eagers
        assert kept[model, "tridrop", 0.1] < kept[model, "eager", 0.1]
        assert 0 < kept[model, "tridrop", 0.1] - kept[model, "tridrop", 0.0] < 1000
    assert step_report.failures(found) == []
    assert len(step_report.headlines(found)) == 3
    assert "eager +50.0%, tridrop +50.0%" in step_report.headlines(found)[0]


def test_the_command_times_steps(tmp_path, capsys):
    arguments = [*STEPS, "--steps", "bert", "--provider", "eager,tridrop", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "BERT, cost of dropout: eager" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:16] + name[26:] for name in names] == [
        f"bench-steps-cpu-.{kind}" for kind in ("csv", "json", "png")
    ]
    content = json.loads((tmp_path / names[1]).read_text())
    for r in content["records"]:
        assert tuple(r) == tuple(f.name for f in fields(steps.StepRecord))
        assert 0 < r["q20_ms"] <= r["median_ms"] <= r["q80_ms"]


def test_a_model_that_computes_something_else_fails(monkeypatch, tmp_path, capsys):
    right = steps.Trainee.loss

    def shifted(self, batch):
        return right(self, batch) * (1.1 if self.sites else 1.0)

    monkeypatch.setattr(steps.Trainee, "loss", shifted)
    arguments = [*STEPS, "--steps", "vit", "--provider", "eager,tridrop", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "failed: loss at p = 0 is" in capsys.readouterr().out
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    for r in content["records"]:
        assert r["speedup_over_eager"] is None


def test_a_swap_that_finds_nothing_fails(monkeypatch):
    class Nothing:
        def counts(self):
            return {"fused": 0, "swapped": 0, "left": 9}

    monkeypatch.setattr(steps.tridrop, "swap", lambda model, memory: Nothing())
    chosen = steps.StepOptions.of("cpu", ["vit"], rounds=1, quick=True, providers=["tridrop"])
    found = bench.run_steps(chosen)
    assert {r.check for r in found} == {"failed: tridrop.swap fused nothing"}


def test_a_compiler_that_fails_leaves_its_reason(monkeypatch):
    def failing(model, **options):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(steps.torch, "compile", failing)
    chosen = steps.StepOptions.of("cpu", ["vit"], rounds=1, quick=True)
    found = bench.run_steps(chosen)
    reasons = {r.provider: r.why_not for r in found if r.why_not}
    assert reasons == dict.fromkeys([steps.COMPILED, steps.BOTH], "RuntimeError: no compiler")
    assert step_report.failures(found) == []
    assert len(step_report.reasons(found)) == 4


def test_without_transformers_steps_say_what_to_install(monkeypatch, capsys, tmp_path):
    def missing(name):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(models.importlib, "import_module", missing)
    assert cli.main([*STEPS, "--steps", "vit", "--out", str(tmp_path)]) == 2
    assert "pip install 'tridrop[hf]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "llama"], "model 'llama' is not known; known: gpt2, bert, vit"),
        (["--steps", "vit", "--provider", "sdpa-math"], "known: eager, torch.compile, tridrop"),
        (["--steps", "vit", "--dtype", "bf16,fp32"], "give only one for steps"),
        (["--steps", "vit", "--model-size", "huge"], "known: full, tiny"),
        (["--steps", "vit", "--batch", "0"], "give 1 or more"),
        (["--steps", "vit", "--p", "1"], "give one between 0 and 1"),
        (["--steps", "vit", "--op", "dropout"], "give only one of them"),
        (["--op", "dropout", "--batch", "3"], "--batch needs --steps"),
    ],
)
def test_steps_that_cannot_be_are_refused(capsys, tmp_path, arguments, message):
    assert cli.main(["bench", "--device", "cpu", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_full_sizes_are_the_published_ones():
    chosen = steps.StepOptions.of("cuda", ["gpt2"])
    assert chosen.sizes["gpt2"] == models.ARCHITECTURES["gpt2"].full
    assert (chosen.dtype, steps.StepOptions.of("cpu").dtype) == ("bf16", "fp32")
    with torch.device("meta"):
        counts = {
            name: sum(t.numel() for t in a.build(a.full, 0.1).parameters()) / 1e6
            for name, a in models.ARCHITECTURES.items()
        }
    assert counts == pytest.approx({"gpt2": 124.4, "bert": 109.5, "vit": 86.6}, rel=0.01)
