"""tridrop inspect: reading machine code, limits, and the budgets of dropout + add on sm_90."""

import _thread
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import tridrop
from tridrop import backends
from tridrop.commands import cli, inspection
from tridrop.commands.inspection import devices, machine_code, report, rows
from tridrop.contract.mask import PHILOX_M0, PHILOX_M1
from tridrop.spec.attention import SPECIALIZE

ROOT = Path(__file__).parents[2]
PINNED = f"triton=={triton.__version__}" in (ROOT / "constraints.txt").read_text()

# A loop of 40 instructions behind a wait of two, as cuobjdump lays such things out.
SASS_LOOP = "\n".join(
    f"        /*{0x100 + 16 * i:04x}*/   LOP3.LUT R{i}, R1, R2, RZ, 0xc0, !PT ;  /* 0x0 */"
    for i in range(36)
)
SASS = f"""
Resource usage:
 Function some_kernel:
  REG:56 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:632
        Function : some_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e220000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR10][R2.64] ; /* 0x0000000a02047981 */
        /*0020*/                   LDG.E.64 R8, desc[UR10][R2.64] ;  /* 0x0000000a02087981 */
        /*0030*/              @!P0 LDG.E.U16 R9, desc[UR10][R2.64] ; /* 0x0000000a02087981 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ; /* 0x0 */
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R8 ; /* 0x0 */
        /*0060*/              @!P0 BRA 0x50 ;                        /* 0x0 */
        /*00f0*/                   NOP ;                             /* 0x0 */
{SASS_LOOP}
        /*0340*/                   IMAD.WIDE.U32 R4, R5, -0x2daee0ad, RZ ; /* 0x0 */
        /*0350*/                   IMAD.HI.U32 R4, R5, -0x326172a9, RZ ;   /* 0x0 */
        /*0360*/                   IMAD.WIDE.U32 R4, R5, 0x10, RZ ;        /* 0x0 */
        /*0370*/                   MUFU.EX2 R4, R5 ;                 /* 0x0 */
        /*0380*/               @P1 BRA 0x100 ;                       /* 0x0 */
        /*0390*/                   STG.E.128 desc[UR10][R2.64], R4 ; /* 0x0 */
        /*03a0*/                   STL [R1+0x4], R4 ;                /* 0x0 */
        /*03b0*/                   EXIT ;                            /* 0x0 */
        /*03c0*/              @!P0 BRA 0x100 ;                       /* 0x0 */
        /*03d0*/                   BRA 0x3d0 ;                       /* 0x0 */
"""

AMD_LOOP = "\n".join(f"\tv_xor_b32_e32 v{i}, s4, v1" for i in range(36))
AMD = f"""
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
some_kernel:                            ; @some_kernel
; %bb.0:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	s_mov_b32 s9, 0xd2511f53
	s_mov_b32 s10, 0xcd9e8d57 ; a comment
	s_waitcnt lgkmcnt(0)
	buffer_load_dwordx4 v[4:7], v12, s[4:7], 0 offen
	global_load_ushort v1, v2, s[4:5]
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
{AMD_LOOP}
	v_mad_u64_u32 v[12:13], s[0:1], v8, s9, 0
	v_mul_hi_u32 v3, v8, s10
	v_mad_u64_u32 v[12:13], s[0:1], v8, s11, 0
	v_exp_f32_e32 v1, v1
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	buffer_store_dwordx2 v[4:5], v12, s[4:7], 0 offen
	s_endpgm
.Lfunc_end0:
	v_this_is_no_code v0
	.sgpr_spill_count: 3
    .vgpr_count:     38
    .vgpr_spill_count: 2
"""


def test_sass_is_read():
    code = machine_code.parse(SASS)
    assert (code.registers, code.spill_bytes, code.amd) == (56, 24, False)
    # neither the padding counts, nor as a loop the one that waits or what stands behind the end
    assert len(code.body) == 53
    assert [len(loop) for loop in code.loops] == [41]
    assert code.main == code.loops[0]
    assert machine_code.widths(code.body, "load", False) == {"128": 2, "64": 1, "16": 1}
    assert machine_code.widths(code.body, "store", False) == {"128": 1}
    assert machine_code.count(code.body, "LDL", "STL") == 1
    assert machine_code.units(code.main, False) == {
        "issue": 41, "multiply": 3, "logic": 36, "special": 1,
    }  # fmt: skip
    assert machine_code.philox_rounds(code) == 1


def test_amds_assembly_is_read():
    code = machine_code.parse(AMD)
    # a vector register that spills is four bytes; scalar ones do not go to memory
    assert (code.registers, code.spill_bytes, code.amd) == (38, 8, True)
    assert [len(loop) for loop in code.loops] == [41]
    assert not any(i.op == "v_this_is_no_code" for i in code.body)
    assert machine_code.widths(code.body, "load", True) == {"128": 1, "16": 1}
    assert machine_code.widths(code.body, "store", True) == {"64": 1}
    assert machine_code.units(code.main, True) == {"issue": 40, "multiply": 3, "special": 1}
    assert machine_code.philox_rounds(code) == 1


def test_the_main_loop_is_the_shortest_that_multiplies_matrices():
    def loop(op, n):
        return [machine_code.Instruction(op, "")] * n

    plain, product, bounded = loop("FADD", 40), loop("HGMMA.64x128", 50), loop("UTCHMMA", 60)
    code = machine_code.Code(loop("NOP", 99), [plain, bounded, product], 1, 0)
    assert code.main is product
    assert machine_code.Code(bounded, [plain], 1, 0).main is plain
    assert machine_code.Code(bounded, [], 1, 0).main is bounded


@pytest.mark.parametrize("missing", ["STACK", "REG", "/*"])
def test_text_that_is_not_sass_is_refused(missing):
    with pytest.raises(ValueError, match="cuobjdump"):
        machine_code.parse(SASS.replace(missing, "-"))


@pytest.mark.parametrize("missing", [".vgpr_spill_count", ".vgpr_count"])
def test_assembly_without_its_resources_is_refused(missing):
    with pytest.raises(ValueError, match="assembly"):
        machine_code.parse(AMD.replace(missing, "-"))


def test_the_multipliers_are_philoxs():
    assert machine_code.MULTIPLIERS == (PHILOX_M0, PHILOX_M1)


def test_the_largest_time_is_the_limit():
    (a100,) = devices.of("sm_80")
    times = a100.times({"issue": 128, "multiply": 64}, 2.039, 312.0)
    cycle = 1e12 / (a100.clock * a100.processors)
    assert times == pytest.approx(
        {"bandwidth": 1, "issue": cycle, "multiply": cycle, "tensor": 1}, rel=1e-6
    )
    for device in devices.DEVICES:
        assert device.source
        # One clock for both limits: that of the rate of matrix products which the vendors publish.
        # Hopper and Blackwell state their rate of fp32 at another, 8 % higher.
        assert device.products == {"sm_90": 4096, "sm_100": 8192}.get(device.arch, 2048)
        rate = device.products * device.clock * device.processors
        assert rate == pytest.approx(device.tensor, rel=0.003), device.name


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "found"),
    [
        # of the CUDA occupancy calculator's table for 9.0: 65,536 registers, 2048 threads, 228 KiB
        ("sm_90", 255, 229376, 256, 1),
        ("sm_90", 255, 0, 128, 2),
        ("sm_90", 254, 57856, 128, 2),
        ("sm_90", 128, 65536, 256, 2),
        ("sm_90", 32, 0, 128, 16),
        ("sm_90", 32, 0, 32, 32),
        ("sm_90", 16, 116 << 10, 128, 1),
        ("sm_90", 16, 228 << 10, 128, 0),
        ("sm_80", 255, 0, 256, 1),
        # two waves a SIMD unit of 256 vector registers, eight programs of a wave
        ("gfx942", 256, 0, 64, 8),
        ("gfx942", 512, 0, 256, 1),
        ("gfx942", 60, 32768, 256, 2),
    ],
)
def test_programs_of_a_processor(arch, registers, shared, threads, found):
    assert devices.programs(arch, registers, shared, threads) == found


def body(*lines):
    return [machine_code.Instruction(*line.split(" ", 1)) for line in lines]


QK = ("HGMMA.64x128 R24, gdesc[UR16], RZ", "HGMMA.64x128 R24, gdesc[UR16], R24, gsb0")
PV = ("HGMMA.64x128 R88, R152, gdesc[UR16], R88", "HGMMA.64x128 R88, R4, gdesc[UR16], R88, gsb0")
PHILOX = "IMAD.WIDE.U32 R4, R5, -0x2daee0ad, RZ"
LOADS = ("LDGDEPBAR ", "DEPBAR.LE SB0, 0x2")


def test_what_no_product_hides_is_counted():
    wait, work = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FMUL R1, R2, R3"
    turn = body(work, PHILOX, *QK, PHILOX, wait, work, PHILOX, work, *PV, work, PHILOX, *LOADS)
    # what stands before the first product is in the shadow of the turn before
    assert machine_code.exposed(turn) == (3, 1, 2)
    assert machine_code.pending_loads(turn) == 2
    # a wait that leaves a group under way exposes nothing, one at the end exposes the next turn
    later = body(work, *QK, *PV, "WARPGROUP.DEPBAR.LE gsb0, 0x1", work, PHILOX, wait, work)
    assert machine_code.exposed(later) == (2, 0, 2)
    # each product waited for by itself
    alone = body(*(line for k in range(4) for line in (QK[1], wait, work)))
    assert machine_code.exposed(alone) == (4, 0, 4)
    assert machine_code.exposed(body("HMMA.16816 R1, R2", work)) is None
    assert machine_code.pending_loads(body(work, "DEPBAR.LE SB0, 0x0")) is None


def test_every_kernel_is_in_the_table():
    here = Path(backends.__file__).parent / "triton"
    kernels = {
        line.split("def ")[1].split("(")[0]
        for path in here.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    # What is committed was compiled from the whole table.
    records = json.loads(committed().read_text())
    assert {r["kernel"] for r in records} == kernels
    assert {r["op"] for r in records} == set(rows.OPS)
    assert {r["arch"] for r in records} == set(inspection.ARCHS)


def committed() -> Path:
    return sorted((ROOT / "benchmarks" / "results").glob("inspect-*.json"))[-1]


def test_the_committed_figures_are_the_documentations():
    assert committed().name in (ROOT / "docs" / "performance.md").read_text()
    for path in committed().parent.glob("inspect*.png"):
        assert path.stat().st_size < 200_000, path
    for path in committed().parent.glob("inspect*.json"):  # compact: what a record takes
        assert path.stat().st_size < 760 * len(json.loads(path.read_text())), path


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The command itself, where TRITON_INTERPRET may be set: one op, one architecture."""
    folder = tmp_path_factory.mktemp("inspect")
    path, plot = folder / "inspect.json", folder / "inspect.png"
    command = [sys.executable, "-m", "tridrop", "inspect", "--op", "dropout_add"]
    options = ["--arch", "sm_90", "--dtype", "bf16", "--json", str(path), "--plot", str(plot)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "dropout_add bias backward" in run.stdout
    assert "H100: bandwidth" in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text())


SCHEMA = {
    "op": str, "variant": str, "direction": str, "kernel": str, "arch": str, "dtype": str,
    "p_positive": bool, "method": str, "instructions_per_element": float, "counted": str,
    "elements_per_thread": int, "registers": int, "spill_bytes": int, "shared_bytes": int,
    "programs": int, "products": dict | None, "loads_pending": int | None, "loads": dict,
    "stores": dict, "philox_rounds": float, "philox_called": float,
    "bytes_per_element": float, "units": dict, "limits": list, "tridrop": str, "triton": str,
}  # fmt: skip


def test_records_have_the_fields_that_are_promised(found):
    for record in (*found, *json.loads(committed().read_text())):
        assert record.keys() == SCHEMA.keys()
        for name, kind in SCHEMA.items():
            assert isinstance(record[name], kind), name
        assert record["limits"]
        for limit in record["limits"]:
            times = limit["ps"]
            assert times[limit["limit"]] == max(times.values())


def pick(records, variant, direction, method):
    (record,) = (
        r for r in records
        if (r["variant"], r["direction"], r["method"]) == (variant, direction, method)
    )  # fmt: skip
    return record


BUDGETS = {  # SASS instructions an element on sm_90 in bf16, whole program
    ("", "forward", "tridrop"): 14.8,
    ("", "backward", "tridrop"): 13.6,
    ("", "forward", "none"): 5.4,
    ("", "backward", "none"): 2.9,
    ("bias", "forward", "tridrop"): 17.7,
    ("bias", "backward", "tridrop"): 13.0,
}


@pytest.mark.parametrize("case", BUDGETS, ids=" ".join)
def test_dropout_add_stays_within_its_budget(found, case):
    record = pick(found, *case)
    # Other versions of Triton than the pinned one schedule a few instructions more or fewer.
    slack = 1.0 if PINNED else 1.1
    assert record["instructions_per_element"] <= BUDGETS[case] * slack
    assert record["spill_bytes"] == 0
    assert set(record["stores"]) == {"128"}
    # the 8-byte loads are the seed's
    assert set(record["loads"]) <= {"128", "64"}
    if not record["variant"]:
        assert record["counted"] == "program"
        assert record["shared_bytes"] == 0
    elif record["direction"] == "backward":
        # the sums of the bias gradient cross the warps once; with a mask it is no more
        plain = pick(found, "bias", "backward", "none")
        assert record["shared_bytes"] == plain["shared_bytes"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ten_rounds_serve_eight_elements(found, direction):
    fused, naive = (pick(found, "", direction, m) for m in ("tridrop", "naive"))
    assert fused["philox_called"] == 1.25
    # The first rounds of a thread's calls share products: less than is called, but not much less.
    assert 1.0 <= fused["philox_rounds"] <= 1.25
    assert naive["philox_called"] == 10
    assert 7 <= naive["philox_rounds"] <= 10
    assert naive["instructions_per_element"] > 3 * fused["instructions_per_element"]


def test_unrolled_loops_count_a_turn(found):
    plain, dropped = (pick(found, "bias", "backward", m) for m in ("none", "tridrop"))
    assert plain["counted"] == dropped["counted"] == "loop"
    assert plain["instructions_per_element"] < 0.5 * dropped["instructions_per_element"]


def test_memory_is_counted_once(found):
    assert pick(found, "", "forward", "tridrop")["bytes_per_element"] == 6
    assert pick(found, "", "backward", "tridrop")["bytes_per_element"] == 4


@pytest.mark.parametrize(
    ("option", "known"), [("op", "dropout_add"), ("arch", "sm_90"), ("dtype", "bf16")]
)
def test_unknown_names_are_answered_with_the_known(capsys, option, known):
    assert cli.main(["inspect", f"--{option}", "dropout_sub"]) == 2
    error = capsys.readouterr().err
    assert f"{option} 'dropout_sub' is not known" in error
    assert known in error


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_has_triton", False)
    assert cli.main(["inspect", "--op", "dropout_add"]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_without_matplotlib_a_plot_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["inspect", "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install 'tridrop[demo]'" in capsys.readouterr().err


def test_the_kernels_are_the_ordinary_ones_that_the_switches_do_not_change(monkeypatch):
    given = {}
    monkeypatch.setattr(inspection.subprocess, "Popen", lambda *_, **more: given.update(more))
    for name in ("TRITON_INTERPRET", SPECIALIZE):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRIDROP_OTHER", "1")
    inspection._start()
    assert "TRIDROP_OTHER" in given["env"]
    assert {"TRITON_INTERPRET", SPECIALIZE}.isdisjoint(given["env"])


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    row = rows.Row("dropout", "unknown to the worker", "forward", torch.add)
    monkeypatch.setattr(inspection, "TABLE", {row.name: row})
    with pytest.raises(RuntimeError, match=r"\(dropout unknown to .* none\) did not compile"):
        inspection.run(["dropout"], ["sm_90"], jobs=1)


def test_the_yardstick_is_no_op():
    assert "naive" not in vars(backends.load("triton"))
    package = Path(tridrop.__file__).parent
    mentioned = {
        path.name
        for path in package.rglob("*.py")
        if "yardstick" in path.read_text() and path.parent != package / "commands" / "inspection"
    }
    assert mentioned == {"compile.py", "yardstick.py"}


def test_an_interrupt_keeps_what_was_compiled(monkeypatch, capsys, tmp_path):
    ask, calls = inspection._ask, iter(range(99))

    def stop(worker, task):
        found = ask(worker, task)
        if next(calls) == 1:
            _thread.interrupt_main()
        return found

    monkeypatch.setattr(inspection, "_ask", stop)
    path = tmp_path / "found.json"
    command = ["inspect", "--op", "dropout_add", "--arch", "sm_90", "--jobs", "1"]
    assert cli.main([*command, "--json", str(path)]) == 130
    kept = json.loads(path.read_text())
    assert kept
    said = capsys.readouterr()
    assert f"tridrop inspect: interrupted: {len(kept)} kernels are kept\n" in said.err
    assert "Traceback" not in said.err
    assert "kernel\tarch\tdtype\tinstructions\tregisters" in said.out


def test_what_all_processes_warn_of_is_said_once(capsys):
    said = set()
    program = "import sys; print('the same', file=sys.stderr); print(sys.argv[1], file=sys.stderr)"
    for word in ("one", "two"):
        command = [sys.executable, "-c", program, word]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
            inspection._relay(worker, said)
    assert capsys.readouterr().err == "the same\none\ntwo\n"
