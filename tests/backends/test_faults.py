"""What a disk does to the cache of compiled loops never ends a call, and never gives a wrong loop.

Most of it is tried on one small function, which compiles in a moment, with the cache of the loops:
a new dispatcher of it is to the cache what a new process is.
"""

import errno
import os
import pathlib
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fault_helpers import add_many, add_one

import tridrop
from tridrop.backends.cpu import serving

if not serving.can_serve():
    pytest.skip("needs numba", allow_module_level=True)

from numba import njit
from numba.core import config
from numba.core.errors import NumbaWarning

from tridrop.backends.cpu.loops import cache as loop_cache

ROOT = Path(tridrop.__file__).resolve().parent


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder for the cache, in which nothing was told yet."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(loop_cache, "_told", set())
    return loop_cache.folder()


def fresh():
    """The small function as a new process has it."""
    made = njit(add_one)
    made._cache = loop_cache.LoopCache(add_one)
    return made


def loaded(made):
    return sum(made.stats.cache_hits.values())


def only(place):
    (path,) = place.iterdir()
    return path


def run_warned(*messages):
    """Call the function in two new "processes": the result, and these warnings, once each."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        both = fresh(), fresh()
        assert [made(1) for made in both] == [2, 2]
    found = [str(w.message) for w in told]
    assert len(found) == len(messages), found
    for message, text in zip(messages, found, strict=True):
        assert re.search(message, text), text
    assert all(w.category is RuntimeWarning for w in told)
    return both


def test_a_second_process_compiles_nothing(place):
    first, second = run_warned()
    assert (loaded(first), loaded(second)) == (0, 1)
    assert only(place).name.startswith("fault_helpers.add_one-")
    assert place.stat().st_mode & 0o777 == 0o700


def test_what_numba_cannot_keep_is_not_kept(place):
    made = njit(add_many)
    made._cache = loop_cache.LoopCache(add_many)
    with pytest.warns(NumbaWarning, match="Cannot cache compiled function"):
        assert made(1) == 2
    assert list(place.iterdir()) == []


# ---------------------------------------------------------------------------------- damaged files

HEAD = len(loop_cache._MAGIC)
DAMAGES = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "cut in its head": lambda data: data[: HEAD + 3],
    "random": lambda data: bytes(i * i % 251 for i in range(len(data))),
    "with a wrong bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "longer": lambda data: data + b"more",
    "somebody else's": lambda data: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_of_once_and_replaced(place, damage):
    run_warned()
    path = only(place)
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    first, second = run_warned("damaged file, .*compiled anew, and the file replaced")
    assert (loaded(first), loaded(second)) == (0, 1)
    assert only(place) == path
    assert path.read_bytes()[:HEAD] == good[:HEAD]


def test_what_cannot_be_unpickled_is_damaged(place, monkeypatch):
    """A whole file, which another program of these versions has written otherwise."""
    run_warned()

    def fail(data):
        raise EOFError("Ran out of input")

    with monkeypatch.context() as patch:
        patch.setattr(loop_cache.pickle, "loads", fail)
        first, second = run_warned("damaged file, .*EOFError: Ran out of input")
    assert (loaded(first), loaded(second)) == (0, 0)
    assert [loaded(made) for made in run_warned()] == [1, 1]


def test_a_folder_in_the_place_of_a_file(place):
    run_warned()
    path = only(place)
    path.unlink()
    path.mkdir()
    run_warned("cannot keep compiled loops")


# ------------------------------------------------------------------------------ disks and folders


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["writing", "moving", "making the folder"])
def test_a_full_disk(place, monkeypatch, when):
    def half(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        full()

    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(pathlib.Path, "write_bytes", half)
        elif when == "moving":
            patch.setattr(os, "replace", full)
        else:
            patch.setattr(os, "mkdir", full)
        run_warned("cannot keep compiled loops in .*No space left.*NUMBA_CACHE_DIR")
        assert not place.exists() or list(place.iterdir()) == []  # no drafts
    run_warned()  # there is space again


def test_a_disk_that_fills_while_a_damaged_file_is_replaced(place, monkeypatch):
    run_warned()
    only(place).write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        run_warned("damaged file", "No space left")
    assert only(place).read_bytes() == b""


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to(place, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", fail)
        run_warned("cannot keep compiled loops")
    run_warned()
    monkeypatch.setattr(os, "mkdir", fail)
    assert [loaded(made) for made in run_warned()] == [1, 1]  # what is there can be read


def test_a_file_in_the_place_of_the_folder(place, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    run_warned("cannot keep compiled loops")


def test_what_is_there_is_loaded_from_a_disk_that_is_full(place, monkeypatch):
    run_warned()
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert [loaded(made) for made in run_warned()] == [1, 1]


needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")


@needs_owners
def test_a_folder_of_somebody_else_is_refused(place, monkeypatch):
    run_warned()
    path, mine = only(place), os.geteuid()
    monkeypatch.setattr(loop_cache, "folder", lambda: place)
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    before = path.read_bytes()
    first, second = run_warned(f"belongs to another user, number {mine}")
    assert (loaded(first), loaded(second)) == (0, 0)
    assert path.read_bytes() == before


@needs_owners
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(place, mode):
    run_warned()
    place.chmod(mode)
    first, second = run_warned(f"others may write to it, its mode is {mode:o}")
    assert (loaded(first), loaded(second)) == (0, 0)


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    if sys.platform == "linux":
        assert loop_cache.folder() == tmp_path / "home" / "numba" / f"tridrop-{os.geteuid()}"
    assert ROOT not in loop_cache.folder().parents
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "named"))
    assert loop_cache.folder().parent == tmp_path / "named"


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's folders are Linux's")
def test_without_a_home_nothing_is_put_into_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.chdir(tmp_path)
    run_warned("no home folder")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize("name", loop_cache.SOURCES)
def test_every_source_is_in_the_stamp(name, monkeypatch):
    before, read = loop_cache.stamp(), pkgutil.get_data

    def edited(package, resource):
        data = read(package, resource)
        assert data
        return data.replace(b"0", b"1", 1) if resource == name else data

    monkeypatch.setattr(pkgutil, "get_data", edited)
    assert loop_cache.stamp.__wrapped__() != before


def test_all_that_loops_are_made_of_is_among_the_sources():
    """Their files' imports, but for this cache; mask.py has numbers for them, and takes none of
    those that it checks arguments with."""
    loops = ROOT / "backends" / "cpu" / "loops"
    kernels = re.compile(r"^@(kernel|summing_kernel|multiplying)$", re.M)
    found = {path for path in loops.glob("*.py") if kernels.search(path.read_text())}
    todo = sorted(found)
    while todo:
        path = todo.pop()
        imported = re.findall(r"^from (\.+)([\w.]*) import \(?\s*(\w+)", path.read_text(), re.M)
        for dots, name in ((dots, module or name) for dots, module, name in imported):
            file = path.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py")
            if file.parent != ROOT / "base" and file != loops / "cache.py" and file not in found:
                found.add(file)
                todo.append(file)
    assert {path.relative_to(ROOT).as_posix() for path in found} == set(loop_cache.SOURCES)


@pytest.mark.parametrize("of", ["numba", "llvmlite", "numpy"])
def test_versions_are_in_the_stamp(of, monkeypatch):
    before = loop_cache.stamp()
    monkeypatch.setattr(getattr(loop_cache, of), "__version__", "0")
    assert loop_cache.stamp.__wrapped__() != before


def test_what_is_out_of_date_is_replaced_without_a_word(place, monkeypatch):
    run_warned()
    path = only(place)
    monkeypatch.setattr(loop_cache, "stamp", lambda: b"1" * loop_cache._DIGEST)
    first, second = run_warned()
    assert (loaded(first), loaded(second)) == (0, 1)
    assert only(place) == path


def test_another_processor_has_another_file(place, monkeypatch):
    """Its name, and the features by their names: both are of numba's own key."""
    made = fresh()
    made(1)
    (signature,) = made.signatures
    codegen = made.targetctx.codegen()
    paths = set()
    for name, features in (("a", "+x"), ("b", "+x"), ("a", "-x"), ("a", "+x,+y")):
        monkeypatch.setattr(codegen, "_get_host_cpu_name", lambda name=name: name)
        monkeypatch.setattr(codegen, "_tm_features", features)
        paths.add(made._cache.path_of(made._cache._index_key(signature, codegen)))
    assert len(paths) == 4
    assert made._cache.load_overload(signature, made.targetctx) is None


def test_another_signature_has_another_file(place):
    first = fresh()
    assert (first(1), first(1.5)) == (2, 2.5)
    assert len(list(place.iterdir())) == 2
    second = fresh()
    assert (second(1.5), second(1)) == (2.5, 2)
    assert loaded(second) == 2


# ---------------------------------------------------------------------------------- two processes

MANY = """
import warnings
warnings.simplefilter("error")
from numba import njit
from tridrop.backends.cpu.loops import cache as loop_cache
from fault_helpers import add_one

for i in range(20):
    made = njit(add_one)
    made._cache = loop_cache.LoopCache(add_one)
    assert made(1) == 2
    if i % 2:
        for path in loop_cache.folder().glob("[!.]*.loop"):  # drafts begin with a dot
            path.unlink(missing_ok=True)
"""


def python(text, *paths, **environment):
    """A program, with these folders before others on its path, as a process."""
    path = os.pathsep.join(map(str, (*paths, Path(__file__).parents[1])))
    here = paths[0]  # the working folder comes before all others
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=pipe, stderr=pipe, text=True, env=environment, cwd=here
    )


def output(process):
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    return out, error


def test_processes_that_load_and_save_at_a_time(tmp_path):
    folder = str(tmp_path / "shared")
    processes = [python(MANY, ROOT.parent, NUMBA_CACHE_DIR=folder) for _ in range(3)]
    for process in processes:
        assert output(process) == ("", "")
    left = list(only(Path(folder)).iterdir())
    assert len(left) < 2
    assert all(path.suffix == ".loop" for path in left)


# ----------------------------------------------------------------------------- the loops themselves

LOOP = """
import torch
from tridrop.backends.cpu import masks
from tridrop.backends.cpu.loops import mask as loops
from tridrop.contract import mask

seed = torch.tensor([3, 1])
found = masks.keep_mask(seed, (2, 40), 1 << 31)
assert torch.equal(found, mask.keep_mask(seed, (2, 40), 1 << 31))
print(sum(loops.keep_rows.stats.cache_hits.values()), found.int().flatten().tolist())
"""


def test_an_edited_file_that_a_loop_only_imports_is_not_served_from_the_cache(tmp_path):
    """The smallest loop of a copy of the package, whose generator gets a round less."""
    package = tmp_path / "copy" / "tridrop"
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "loops"

    def run():
        out, error = output(python(LOOP, package.parent, NUMBA_CACHE_DIR=str(folder)))
        hits, _, bits = out.partition(" ")
        return int(hits), bits, error

    hits, before, _ = run()
    assert hits == 0
    assert run() == (1, before, "")
    path = package / "contract" / "mask.py"
    text = path.read_text()
    assert text.count("PHILOX_ROUNDS = 10\n") == 1
    path.write_text(text.replace("PHILOX_ROUNDS = 10\n", "PHILOX_ROUNDS = 9\n"))
    hits, after, error = run()
    assert (hits, error) == (0, "")
    assert after != before
    # And the file, which is of the right loop now, cut short on a disk that is full.
    loop = only(only(folder))
    loop.write_bytes(loop.read_bytes()[:1000])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
    if sys.platform != "win32":
        process = python(limit + LOOP, package.parent, NUMBA_CACHE_DIR=str(folder))
        out, error = output(process)
        assert out == f"0 {after}"
        assert "damaged file" in error
        assert "cannot keep compiled loops" in error
        assert error.count("RuntimeWarning") == 2


def test_an_unknown_version_of_numba_compiles_in_its_own_way(tmp_path):
    """Its pipeline is not taken apart, and the loop makes the mask of the contract all the same."""
    newer = "import numba\nnumba.version_info = numba.version_info._replace(minor=999)\n"
    asked = "from tridrop.backends.cpu.loops import decorators\nprint(sorted(decorators._INNER))\n"
    process = python(newer + LOOP + asked, ROOT.parent, NUMBA_CACHE_DIR=str(tmp_path))
    assert "['error_model', 'no_cfunc_wrapper', 'no_cpython_wrapper']" in output(process)[0]
