"""Compiled loops on disk: in a folder of the user's own, and no fault of a disk ends a call.

numba's public settings (``cache=True``, ``NUMBA_CACHE_DIR``, ``NUMBA_CACHE_LOCATOR_CLASSES``) say
where files lie, the last two for all of a process. They leave three things as they are: a damaged
file or a full disk raises out of the call; a function is renewed when its own file changes, not
when one does whose functions it calls; and an index and the data that it names are two files, which
two processes that save at a time can leave unmatched. So the cache of a dispatcher is a subclass of
the one that ``cache=True`` makes: keys, and what is kept of a compiled function, are numba's; the
place, the stamp and the file are written here. A file says what it is, and is replaced whole.
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

# All that the loops are compiled from; a test follows their imports.
SOURCES = (
    "backends/cpu/loops/activations.py",
    "backends/cpu/loops/elementwise.py",
    "backends/cpu/loops/mask.py",
    "backends/cpu/loops/norm.py",
    "backends/cpu/loops/softmax.py",
    "backends/cpu/loops/steps.py",
    "backends/cpu/loops/storage.py",
    "contract/mask.py",
)

_MAGIC = b"tridrop's loops, 1\n"
_DIGEST = hashlib.sha256().digest_size

_told: set[str] = set()


def _tell(what: str, message: str) -> None:
    """Warn, once in a process for each kind of fault: there are as many files as loops."""
    if what not in _told:
        _told.add(what)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def stamp() -> bytes:
    """A digest of what compiled code depends on beside its key, which names the processor.

    The sources are read when the first loop is defined, not when it is saved: a file may be edited
    while a process runs that has imported it.
    """
    found = hashlib.sha256()
    versions = numba.__version__, llvmlite.__version__, numpy.__version__
    found.update(repr((versions, platform.python_version())).encode())
    for name in SOURCES:
        data = pkgutil.get_data("tridrop", name)  # also from an archive
        found.update(hashlib.sha256(data or b"").digest())
    return found.digest()


def folder() -> Path:
    """Where the files lie: in ``NUMBA_CACHE_DIR``, or in the user's folder for caches."""
    root = Path(config.CACHE_DIR or AppDirs("numba", appauthor=False).user_cache_dir)
    return root / (f"tridrop-{os.geteuid()}" if hasattr(os, "geteuid") else "tridrop")


def make(place: Path) -> None:
    """Make the folder, for its owner alone.

    Raises OSError where that cannot be, and where others own it or may write to it: what is loaded
    from there is run.
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
    """What numba keeps of a compiled function, without its search for a place."""

    def __init__(self, function: Any) -> None:
        self._lineno = function.__code__.co_firstlineno
        # What numba warns with of a function that cannot be kept.
        self._locator = SimpleNamespace(_py_file=function.__code__.co_filename)


class LoopCache(FunctionCache):  # type: ignore[misc]
    """The compiled forms of one loop on disk, a file each."""

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

    def path_of(self, key: tuple[Any, ...]) -> Path:
        """The file for a signature and a processor, the same for all versions of the sources."""
        home = os.path.dirname(os.path.abspath(__file__))  # other installations have other files
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
        except Exception as error:  # whatever pickle and LLVM raise for what is not theirs
            _tell(
                "file",
                f"tridrop's cache of compiled loops has a damaged file, {path} "
                f"({type(error).__name__}: {error}): the loop is compiled anew, and the file "
                "replaced",
            )
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the compiled form for a signature."""
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
    """What a file keeps, or None where it is out of date. Raises ValueError where it is damaged."""
    head = len(_MAGIC)
    made, digest = data[head : head + _DIGEST], data[head + _DIGEST : head + 2 * _DIGEST]
    content = data[head + 2 * _DIGEST :]
    if not data.startswith(_MAGIC) or hashlib.sha256(content).digest() != digest:
        raise ValueError(f"it is no file of tridrop's, or not a whole one: {len(data)} bytes")
    if made != stamp():
        return None
    found, payload = pickle.loads(content)
    return payload if found == key else None
