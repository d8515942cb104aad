"""Runs a function once a module of another package has been imported."""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run ``action`` after the module ``name`` has been imported; now, if it already is.

    Importing tridrop must not import heavy packages that the program may never use, and the two
    must work in either order of imports. So a finder is put first into sys.meta_path. It lets the
    other finders find the module, runs ``action`` after the module's own code, and removes itself.
    A program that never imports ``name`` pays one string comparison per import.

    If ``action`` raises an ImportError, because the other package lacks something, this becomes a
    warning: the user imported that package, and may not need tridrop in it.

    >>> when_imported("math", lambda: print("math is there"))
    math is there
    """
    if name in sys.modules:
        _run(action)
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def _run(action: Callable[[], None]) -> None:
    try:
        action()
    except ImportError as error:
        warnings.warn(f"tridrop did not register itself: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def finish(self) -> None:
        if self in sys.meta_path:  # it is gone if two threads raced, or the module is reloaded
            sys.meta_path.remove(self)
            _run(self.action)


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then notifies ``finder``; the module keeps its loader."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> object:  # get_source, get_data and others
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.finish()
