"""What is compiled is said on a terminal, once, and `tridrop warmup` compiles it ahead."""

import gc
import io
import json
import logging
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import imported_with

from tridrop import backends
from tridrop.backends.cpu import serving
from tridrop.backends.cpu.loops import compiling
from tridrop.commands import cli, warmup

pytestmark = pytest.mark.skipif(not serving.can_serve(), reason="numba does not serve here")

# Compiles one loop, the shortest there is.
PROGRAM = "import tridrop; tridrop.keep_mask(0, (2, 8), 0.5)"
NO_COMPILER = """
from numba.core import event
class Listener(event.Listener):
    def on_start(self, event): raise SystemExit(f"compiles {event.data['dispatcher']}")
    def on_end(self, event): pass
event.register("numba:compile", Listener())
"""


def environment(folder, **more):
    given = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return {**given, "NUMBA_CACHE_DIR": str(folder), **more}


def on_terminal(program, folder, **more):
    """What a program writes on standard error where that is a terminal."""
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-c", program]
        run = subprocess.Popen(command, stderr=slave, env=environment(folder, **more))
        os.close(slave)
        said = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux: nobody has the other end any more
                break
            if not piece:
                break
            said += piece
        assert run.wait() == 0, said
    finally:
        os.close(master)
    return said.decode()


def test_a_terminal_is_told_once(tmp_path):
    # One loop of a family by itself, then both of them ahead: what there is, is not made again.
    said = on_terminal(PROGRAM, tmp_path)
    assert said.count("tridrop compiles its loops for this processor") == 1
    assert "`tridrop warmup` compiles all of them ahead" in said
    assert re.search(r"  keep_rows: \d+ parts, \d+ s", said)
    assert said.endswith("\r\x1b[K")  # the line of progress is gone
    run = subprocess.run(
        [sys.executable, "-m", "tridrop", "warmup", "masks"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # that is no terminal, and the processes' own are none
    assert run.stdout.startswith("2 loops are compiled, in ")
    assert len(list(tmp_path.rglob("*.loop"))) == 2
    # From the disk nothing is compiled, and nothing is said.
    both = PROGRAM + "\ntridrop.attention_keep_mask(0, (1, 1, 2, 8), 0.5)"
    assert on_terminal(NO_COMPILER + both, tmp_path) == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_who_is_told(monkeypatch):
    terminal = Terminal()
    monkeypatch.delenv("PYTEST_VERSION", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert compiling.listening() is None  # a terminal that somebody else draws on
    monkeypatch.setattr(sys, "__stderr__", terminal)
    assert compiling.listening() is terminal
    logger = logging.getLogger("tridrop")
    with monkeypatch.context() as patch:
        patch.setenv("PYTEST_VERSION", "9")
        assert compiling.listening() is None
    for level, told in ((logging.DEBUG, True), (logging.INFO, True), (logging.WARNING, False)):
        with monkeypatch.context() as patch:
            patch.setattr(logger, "level", level)
            assert (compiling.listening() is terminal) is told
    with monkeypatch.context() as patch:
        patch.setattr(logging.root.manager, "disable", logging.INFO)
        assert compiling.listening() is None
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "__stderr__", stream)
        assert compiling.listening() is None


def test_the_families_are_all_loops():
    """Every loop is called, and no family says less or more than it has."""
    loops = vars(serving.kernels())
    called = set()
    mine = {name: loop for name, loop in loops.items() if callable(loop)}

    def watched(name):
        def call(*arguments):
            called.add(name)
            return mine[name](*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in mine:
            patch.setitem(loops, name, watched(name))
        for name, family in warmup.FAMILIES.items():
            before = len(called)
            assert len(list(family())) == warmup.loops_of(name)
            assert len(called) - before == (0 if name == "activations" else warmup.loops_of(name))
    assert called == set(mine)
    forms = {form for forms in serving.kernels().functions.values() for form in forms}
    assert len(forms) == warmup.loops_of("activations") + 1  # the identity needs no loop


COMPILED = """
import json, torch, tridrop
from numba.core import event

compiled = []


class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(event.data["dispatcher"])

    def on_end(self, event):
        pass


event.register("numba:compile", Listener())
x = torch.ones(2, 8, requires_grad=True)
for call in {calls}:
    exec(call)
    found = []
    for f in dict.fromkeys(compiled):
        file, name = f.py_func.__module__.split(".")[-1], f.py_func.__name__
        for signature, made in f.overloads.items():
            found.append([file, name, str(signature), type(made.library).__name__])
    print(json.dumps(found))
    compiled.clear()
"""


def compiled(*calls):
    """For each of a program's calls, (file, function, signature, sort of code) of all that it
    compiles."""
    program = COMPILED.format(calls=calls)
    run = subprocess.run(
        [sys.executable, "-c", program],
        # LLVM optimises nothing, by which half of the time goes, but no function comes or goes.
        env={**os.environ, "NUMBA_OPT": "0", "TRIDROP_CPU_CACHE": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [[tuple(entry) for entry in json.loads(line)] for line in run.stdout.splitlines()]


FILES = ("elementwise", "norm", "softmax", "activations")


def test_a_call_compiles_what_it_needs():
    """The first dropout: its kernel, without its backward, activations or other families. An
    activation: the loops over the form of it that is called, and nothing else."""
    first, more, known = compiled(
        "tridrop.dropout(x, 0.5)",
        "tridrop.activation_dropout(x, 0.5, activation='silu')",
        "tridrop.dropout_add(x, x, 0.1, bias=x[0], layer_scale=x[1])",
    )
    kernels = {(file, name) for file, name, _, code in first if code == "JITCodeLibrary"}
    kernels = {kernel for kernel in kernels if kernel[0] in FILES}
    assert kernels == {("elementwise", "forward")}
    assert {name for file, name, *_ in first if file == "activations"} == {"activate"}
    assert {file for file, *_ in more} == {"activations"}
    assert {name for *_, name, _, code in more if code == "JITCodeLibrary"} == {"silu"}
    assert known == []


def test_steps_are_compiled_once_and_make_no_machine_code():
    """What keeps the time to compile short, and shows in no result."""
    warm = "from tridrop.commands import warmup\n"
    (found,) = compiled(warm + "for family in warmup.FAMILIES.values(): list(family())")
    steps = [entry for entry in found if entry[3] == "_NoMachineCode"]
    assert len(steps) > 50
    assert not [entry for entry in steps if "Literal" in entry[2]]
    ours = {path.stem for path in Path(compiling.__file__).parent.glob("*.py")}
    others = {entry[:2] for entry in found if entry[0] in ours and entry not in steps}
    kernels = {
        ("mask", "keep_rows"), ("mask", "keep_scores"), ("products", "multiply"),
        *((file, name) for file in FILES[:3] for name in ("forward", "backward")),
    }  # fmt: skip
    assert {entry for entry in others if entry[0] != "activations"} == kernels
    assert len(others) == len(kernels) + warmup.loops_of("activations")


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_searched_for_while_a_loop_compiles(before):
    """Afterwards it is as before, also after an error."""
    states = []

    def loop(*arguments):
        states.append(gc.isenabled())
        raise RuntimeError

    first = serving._first_call("forward", loop)
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(RuntimeError):
            first()
        assert (states, gc.isenabled()) == ([False], before)
    finally:
        (gc.enable if was else gc.disable)()


def test_refusals(monkeypatch, capsys):
    assert cli.main(["warmup", "mask"]) == 2
    assert "'mask' is no family of ops; known: elementwise" in capsys.readouterr().err
    assert cli.main(["warmup", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
    monkeypatch.setenv("TRIDROP_CPU_CACHE", "0")
    assert cli.main(["warmup"]) == 2
    assert "compiled loops would not be kept" in capsys.readouterr().err
    monkeypatch.delenv("TRIDROP_CPU_CACHE")
    imported_with(monkeypatch, TRIDROP_CPU="torch")
    assert cli.main(["warmup"]) == 0
    assert "nothing to compile: the reference backend" in capsys.readouterr().out


def test_without_numba_a_named_backend_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(backends._state, "named", "cpu")
    monkeypatch.setattr(serving, "_has_numba", False)
    assert cli.main(["warmup"]) == 2
    assert "numba is not installed: pip install numba" in capsys.readouterr().err
    monkeypatch.setattr(backends._state, "named", "numba")
    assert cli.main(["warmup"]) == 2
    assert "known: triton, cpu, reference" in capsys.readouterr().err


FAMILIES_THAT_FAIL = """
import multiprocessing, os, sys, time
from pathlib import Path
from tridrop.commands import cli, warmup

method, folder, *options = sys.argv[1:]


def raises():
    yield
    raise OSError("no room")


def dies():
    os.write(2, b"LLVM ERROR: no memory\\n")
    os._exit(3)
    yield


def serves():
    yield
    Path(folder, "served").touch()
    yield


def waits():
    draft = Path(folder, "draft")
    draft.write_text(str(os.getpid()))
    draft.rename(Path(folder, "waits"))
    time.sleep(600)
    yield


warmup.FAMILIES.update(norms=raises, softmax=dies, masks=serves, elementwise=waits)
warmup._processes = lambda: multiprocessing.get_context(method)
if __name__ == "__main__":
    sys.exit(cli.main(["warmup", *options]))
"""


def warming(tmp_path, method, *options):
    """A program that warms these families up, with processes started in one of Python's ways."""
    program = tmp_path / "program.py"
    program.write_text(FAMILIES_THAT_FAIL)
    return subprocess.Popen(
        [sys.executable, str(program), method, str(tmp_path), *options],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


METHODS = [way for way in ("fork", "spawn") if way in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_is_said(tmp_path, method, jobs):
    """The words of a family that fails, a status, and no other family without its turn."""
    with warming(tmp_path, method, "norms", "softmax", "masks", f"--jobs={jobs}") as run:
        out, said = run.communicate(timeout=120)
    assert (run.returncode, out) == (1, "")
    first, second = sorted(said.split("tridrop warmup: ")[1:])
    assert first.startswith("norms: Traceback")
    assert first.endswith("OSError: no room\n\n")
    assert second == "softmax: LLVM ERROR: no memory\nits process ended with 3\n\n"
    assert (tmp_path / "served").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_stops_all_processes(tmp_path, method):
    with warming(tmp_path, method, "elementwise", "masks", "--jobs=2") as run:
        while not (tmp_path / "waits").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.002)  # while the other process is started
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        try:
            _, said = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == 130
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waits").read_text()), 0)
