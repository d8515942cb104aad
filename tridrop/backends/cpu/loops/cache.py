"""Compiled loops on disk, in a folder that belongs to the user; a disk error never ends a call.

numba's public settings (``cache=True``, ``NUMBA_CACHE_DIR``, ``NUMBA_CACHE_LOCATOR_CLASSES``) say
where files lie, the last two for the whole process. With them three problems remain. A damaged file
or a full disk raises out of the call. A function is compiled again when its own file changes, but
not when a file changes whose functions it calls. And an index and the data that it names are two
files, which two processes that save at the same time can leave unmatched. So the cache of a loop is
a subclass of the one that ``cache=True`` makes. Its keys, and what it stores of a compiled
function, are numba's; the folder, the stamp of the sources and the format of the files are defined
here. A file begins with what it is, and is replaced as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import pkgutil
import platform
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite
import numba
import numpy
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

from ....base.files import replacing

# All files that the loops are compiled from; a test follows their imports.
SOURCES = (
    "backends/cpu/loops/activations.py",
    "backends/cpu/loops/decorators.py",
    "backends/cpu/loops/elementwise.py",
    "backends/cpu/loops/kernels.py",
    "backends/cpu/loops/mask.py",
    "backends/cpu/loops/memory.py",
    "backends/cpu/loops/norm.py",
    "backends/cpu/loops/operands.py",
    "backends/cpu/loops/products.py",
    "backends/cpu/loops/scores.py",
    "backends/cpu/loops/softmax.py",
    "backends/cpu/loops/steps.py",
    "backends/cpu/loops/storage.py",
    "backends/cpu/torch_library.py",
    "contract/mask.py",
)

_MAGIC = b"tridrop's loops, 1\n"
_DIGEST = hashlib.sha256().digest_size

_told: set[str] = set()


def _tell(what: str, message: str) -> None:
    """Warn of a fault, once per process, although each loop has a file of its own."""
    if what not in _told:
        _told.add(what)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def stamp() -> bytes:
    """A digest of what compiled code depends on besides its key, which names the processor.

    The sources are read when the first loop is defined and not when one is saved, because a file
    may be edited after a running process has imported it.
    """
    found = hashlib.sha256()
    versions = numba.__version__, llvmlite.__version__, numpy.__version__
    found.update(repr((versions, platform.python_version())).encode())
    for name in SOURCES:
        data = pkgutil.get_data("tridrop", name)  # also from an archive
        found.update(hashlib.sha256(data or b"").digest())
    return found.digest()


def folder() -> Path:
    """The folder of the files: in ``NUMBA_CACHE_DIR``, or in the user's cache folder."""
    root = Path(config.CACHE_DIR or AppDirs("numba", appauthor=False).user_cache_dir)
    return root / (f"tridrop-{os.geteuid()}" if hasattr(os, "geteuid") else "tridrop")


def make(place: Path) -> None:
    """Make the folder, for its owner alone.

    Raises OSError if it cannot be made, and if another user owns it or may write to it, because
    the code that is loaded from it is run.
    """
    if not (config.CACHE_DIR or place.is_absolute()):
        raise FileNotFoundError("the user has no home folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "geteuid"):
        about = place.stat()
        if about.st_uid != os.geteuid():
            raise PermissionError(f"it belongs to another user, number {about.st_uid}")
        if about.st_mode & 0o022:
            raise PermissionError(f"others may write to it, its mode is {about.st_mode & 0o777:o}")


class _Kept(CompileResultCacheImpl):  # type: ignore[misc]
    """What numba stores of a compiled function, without numba's search for a folder."""

    def __init__(self, function: Any) -> None:
        self._lineno = function.__code__.co_firstlineno
        # numba names this file when it warns of a function that cannot be stored.
        self._locator = SimpleNamespace(_py_file=function.__code__.co_filename)


class LoopCache(FunctionCache):  # type: ignore[misc]
    """The compiled forms of one loop on disk, one file per signature and processor."""

    def __init__(self, function: Any) -> None:
        stamp()
        self._py_func, self._name, self._impl = function, repr(function), _Kept(function)
        self._cache_path = str(folder())
        self.enable()

    def flush(self) -> None:
        for path in Path(self._cache_path).glob(f"{self._stem()}-*.loop"):
            path.unlink(missing_ok=True)

    def _stem(self) -> str:
        return f"{self._py_func.__module__.rpartition('.')[2]}.{self._py_func.__name__}"

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        """What a file is for. numba's own key also has the values that a function closes over, and
        a compiled function among them has another number in each process; the stamp covers them."""
        return sig, codegen.magic_tuple(), self._stem()

    def path_of(self, key: tuple[Any, ...]) -> Path:
        """The file for a signature and a processor; all versions of the sources share it."""
        home = os.path.dirname(os.path.abspath(__file__))  # each installation has its own files
        name = repr((home, platform.python_version_tuple()[:2], *key[:2])).encode()
        return Path(
            self._cache_path, f"{self._stem()}-{hashlib.sha256(name).hexdigest()[:20]}.loop"
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled form for a signature, or None."""
        if not self._enabled:
            return None
        target_context.refresh()
        key = self._index_key(sig, target_context.codegen())
        path = self.path_of(key)
        try:
            make(path.parent)
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell_of_place(error)
            self.disable()
            return None
        try:
            found = _payload(data, key)
            return None if found is None else self._impl.rebuild(target_context, found)
        except Exception as error:  # pickle and LLVM raise all sorts of errors for a damaged file
            _tell(
                "file",
                f"tridrop's cache of compiled loops has a damaged file, {path} "
                f"({type(error).__name__}: {error}): the loop is compiled anew, and the file "
                "replaced",
            )
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the compiled form for a signature."""
        if not self._enabled or not self._impl.check_cachable(data):
            return
        key = self._index_key(sig, data.codegen)
        content = dumps((key, self._impl.reduce(data)))
        path = self.path_of(key)
        try:
            make(path.parent)
            with replacing(path) as draft:
                draft.write_bytes(_MAGIC + stamp() + hashlib.sha256(content).digest() + content)
        except OSError as error:
            self._tell_of_place(error)

    def _tell_of_place(self, error: OSError) -> None:
        _tell(
            "place",
            f"tridrop cannot keep compiled loops in {self._cache_path} ({error}): they are "
            "compiled in memory, again in every process. NUMBA_CACHE_DIR names another folder; "
            "TRIDROP_CPU_CACHE=0 does without, and without this warning",
        )


def _payload(data: bytes, key: tuple[Any, ...]) -> Any:
    """The content of a file; None if it is out of date, ValueError if it is damaged."""
    head = len(_MAGIC)
    made, digest = data[head : head + _DIGEST], data[head + _DIGEST : head + 2 * _DIGEST]
    content = data[head + 2 * _DIGEST :]
    if not data.startswith(_MAGIC) or hashlib.sha256(content).digest() != digest:
        raise ValueError(f"it is no file of tridrop's, or not a whole one: {len(data)} bytes")
    if made != stamp():
        return None
    found, payload = pickle.loads(content)
    return payload if found == key else None
