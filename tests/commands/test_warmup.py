"""What is compiled is said on a terminal, once, and `tridrop warmup` compiles it ahead."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

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
        for family in warmup.FAMILIES.values():
            before = len(called)
            assert len(list(family())) == warmup.LOOPS == len(called) - before
    assert called == set(mine)


def test_refusals(monkeypatch, capsys):
    assert cli.main(["warmup", "mask"]) == 2
    assert "'mask' is no family of ops; known: elementwise" in capsys.readouterr().err
    assert cli.main(["warmup", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1" in capsys.readouterr().err
    monkeypatch.setenv("TRIDROP_CPU_CACHE", "0")
    assert cli.main(["warmup"]) == 2
    assert "compiled loops would not be kept" in capsys.readouterr().err
    monkeypatch.delenv("TRIDROP_CPU_CACHE")
    monkeypatch.setenv("TRIDROP_CPU", "torch")
    assert cli.main(["warmup"]) == 0
    assert "nothing to compile: the reference backend" in capsys.readouterr().out


def test_what_fails_is_said(monkeypatch, capsys):
    """A process that cannot compile: its own words, and a status."""
    monkeypatch.setattr(warmup.sys, "executable", "/bin/false")
    assert cli.main(["warmup", "masks"]) == 1
    assert "tridrop warmup: masks: " in capsys.readouterr().err
