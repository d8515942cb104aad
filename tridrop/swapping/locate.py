"""Finds the site of a report that a stack of Python calls is in."""

from __future__ import annotations

import linecache
import os
import random
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import classes, kinds
from .classes import Work
from .hidden import hidden_roots, with_hidden
from .kinds import base_of
from .rewrite import Levels
from .survey import Survey, dropped_by
from .wording import Plans

if TYPE_CHECKING:
    from .report import Site

# A draw is never attributed to a line in one of these files.
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = (_OURS, os.path.dirname(torch.__file__) + os.sep, random.__file__)
_Found = tuple[nn.Module, int]  # a module, and the number of a site in one of its methods


class Locator:
    """Maps running code to the sites of a report.

    A site that is a call in a method is found by the current instruction of a frame, if its call
    ends where the site does, or by the module that the site calls. A site that is a whole module is
    found by that module.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], levels: Levels) -> None:
        works: dict[nn.Module, Work] = {}
        for root in (model, *hidden_roots(model).values()):
            survey = Survey(root, levels)  # for all modules; the plans of rewritten ones replace it
            works |= {module: survey.work(module) for module in survey.recipes}
            works |= Plans(root, levels).works
        modules = with_hidden(model)
        self.sites = sites
        self.names = {module: name for name, module in reversed(modules.items())}
        self.places: dict[_Found, int] = {}  # (module, number of a place in it) -> site
        # For each file, the places by the position where their call ends, which is unique, and by
        # their lines.
        self.ends: dict[str, dict[tuple[int, int], list[_Found]]] = {}
        self.lines: dict[str, list[tuple[int, int, _Found]]] = {}
        self.called: dict[nn.Module, list[_Found]] = {}  # module -> the places that call it
        self.whole: dict[nn.Module, list[int]] = {}
        self.positions: dict[CodeType, list[Any]] = {}  # the positions of instructions
        left = dict.fromkeys(range(len(sites)))
        of_name: dict[str, list[int]] = {}
        for i, site in enumerate(sites):
            of_name.setdefault(site.module, []).append(i)
        for name, module in modules.items():
            work = works.get(module)
            for n, (method, place) in enumerate((*work.places, *work.drawn) if work else ()):
                text = (place.line, place.text)
                same = (i for i in of_name.get(name, ()) if _text(sites[i]) == text and i in left)
                number = next(same, None)
                if number is not None and place.line is not None:
                    del left[number]
                    self._add(module, n, method, place.op, number)
                elif number is not None:
                    self.places[module, n] = number
        for i in left:
            if sites[i].module in modules:
                self.whole.setdefault(modules[sites[i].module], []).append(i)

    def _add(self, module: nn.Module, n: int, method: str, op: Any, i: int) -> None:
        self.places[module, n] = i
        for child in dropped_by(module, op):
            self.called.setdefault(child, []).append((module, i))
        base = base_of(module)
        if classes.is_sequence(base):
            return  # its method was made up from its children, and is in no file
        function = classes.text_of(base).methods[method].function
        file, node = function.__code__.co_filename, op.node
        ends = self.ends.setdefault(file, {})
        ends.setdefault((node.end_lineno, node.end_col_offset), []).append((module, i))
        self.lines.setdefault(file, []).append((node.lineno, node.end_lineno, (module, i)))

    # --------------------------------------------------------------------------- finding the site

    def owner(self, frame: FrameType) -> nn.Module | None:
        """The module whose method runs in a frame, or an inner function of that method."""
        code = frame.f_code
        names = code.co_varnames[:1] if code.co_argcount else ()
        for name in (*names, *(("self",) if "self" in code.co_freevars else ())):
            found = frame.f_locals.get(name)
            if isinstance(found, nn.Module) and found in self.names:
                return found
        return None

    def site(self, frame: FrameType | None, line: int | None = None) -> int | None:
        """The site that a stack of calls is in, searched from the innermost; None if in no site.

        ``line`` is the line of the call in the innermost frame, if that is already past the call.
        """
        inner: list[nn.Module] = []
        here: list[_Found] = []  # of inner functions that do not name the module
        while frame is not None:
            owner = self.owner(frame)
            if owner is None:
                here += self._here(frame, line)
            else:
                found = next((i for module, i in here if module is owner), None)
                if found is None:
                    found = self._match(owner, frame, line, inner)
                if found is not None:
                    return found
                inner.append(owner)
            frame, line = frame.f_back, None
        for module in inner:  # not called at a place that is a site
            places = [i for _, i in self.called.get(module, ())]
            if module in self.whole or len(places) == 1:
                return [*self.whole.get(module, ()), *places][0]
        return None

    def _match(
        self, owner: nn.Module, frame: FrameType, line: int | None, inner: list[nn.Module]
    ) -> int | None:
        found = [i for module, i in self._here(frame, line) if module is owner]
        if found:
            return found[0]
        found = [
            i for child in inner for module, i in self.called.get(child, ()) if module is owner
        ]
        if found:
            return found[0]
        whole = self.whole.get(owner, []) if owner not in self.called else []
        of_method = (i for i in whole if self.sites[i].code == frame.f_code.co_name)
        return next(of_method, whole[0] if whole else None)

    def _here(self, frame: FrameType, line: int | None = None) -> list[_Found]:
        """The places whose call a frame is executing."""
        file = frame.f_code.co_filename
        if file not in self.ends:
            return []
        if line is None and sys.version_info >= (3, 11):
            code = frame.f_code
            if code not in self.positions:
                self.positions[code] = list(code.co_positions())
            _, end, _, column = self.positions[code][frame.f_lasti // 2]
            return self.ends[file].get((end or 0, column or 0), [])
        line = frame.f_lineno if line is None else line
        around = [(b - a, n, found) for n, (a, b, found) in enumerate(self.lines[file])
                  if a <= line <= b]  # fmt: skip
        return [found for _, _, found in sorted(around, key=lambda x: x[:2])]

    def reach(self, frame: FrameType, reached: set[int]) -> None:
        """Note the places whose call a frame is executing."""
        if frame.f_code.co_filename not in self.ends:
            return
        here = self._here(frame)
        if here:
            owner = next((m for f in _out(frame) if (m := self.owner(f)) is not None), None)
            reached.update(i for module, i in here if module is owner)

    def entered(self, frame: FrameType, reached: set[int]) -> None:
        """Note the sites that are reached by calling a module."""
        owner = self.owner(frame)
        if owner is None:
            return
        if owner not in self.called:
            reached.update(self.whole.get(owner, ()))
        places = self.called.get(owner, ())
        if len(places) == 1 and classes.is_sequence(base_of(places[0][0])):
            reached.add(places[0][1])

    def own_site(self, module: nn.Module) -> int | None:
        """The site that a module is itself."""
        whole = self.whole.get(module)
        return whole[0] if whole else None

    def is_called(self, site: int) -> bool:
        """Whether a site is a module which is also called at a place that is another site."""
        return any(site in self.whole.get(module, ()) for module in self.called)

    def of_place(self, owner: nn.Module, place: int | None) -> int | None:
        """The site of a place in a rewritten forward; without a place, of ``owner``."""
        return self.own_site(owner) if place is None else self.places.get((owner, place))

    def drops_samples(self, site: int) -> bool:
        """Whether a site is a drop path."""
        module = next((m for m, sites in self.whole.items() if site in sites), None)
        children = [child for child, places in self.called.items() if site in dict(places).values()]
        found = [kinds.kind_of(m) for m in (module, *children) if m is not None]
        return any(kind is not None and kind.name == "drop_path" for kind in found)

    # ----------------------------------------------------------------------------- for the report

    @staticmethod
    def is_library(frame: FrameType) -> bool:
        """Whether a frame runs code of torch or tridrop."""
        return frame.f_code.co_filename.startswith((*_LIBRARIES, "<"))

    def where(self, frame: FrameType, line: int | None = None) -> tuple[str, str, str]:
        """The innermost module's name, the file and line, and the source of that line."""
        module = next((m for f in _out(frame) if (m := self.owner(f)) is not None), None)
        name = "" if module is None else self.names[module]
        for at in _out(frame):
            if not self.is_library(at):
                number = at.f_lineno if at is not frame or line is None else line
                file = at.f_code.co_filename
                return name, f"{file}:{number}", linecache.getline(file, number).strip()
        return name, f"{frame.f_code.co_filename}:{frame.f_lineno}", ""


def _out(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _text(site: Site) -> tuple[int | None, str]:
    return site.line, site.code
