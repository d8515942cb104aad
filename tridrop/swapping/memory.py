"""What was found about a class, kept by the class itself, so that it goes when the class does.

What is read of a class holds it: its methods, and the subclass that takes its place. A table of
classes, also one with weak keys, would keep them all for as long as the process lives; a class that
holds what holds it is a cycle, which the garbage collector frees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Rewritten
    from .classes import Children, Text
    from .kinds import Kind
    from .present import Holds


class Memory:
    """What was found about one class."""

    def __init__(self, of: type) -> None:
        self.of = of
        self.kind: Kind | None = None
        self.texts: dict[Children, Text] = {}
        self.rewritten: tuple[Holds, Rewritten | None] | None = None

    def __reduce__(self) -> Any:
        """A class that is pickled by value, as cloudpickle does, goes without."""
        return type(None), ()


def recall(kind: type) -> Memory | None:
    """What is kept of a class itself, not of one that it inherits from; also in compiled code."""
    found: Memory | None = getattr(kind, "_tridrop_memory", None)
    return found if found is not None and found.of is kind else None


def memory_of(kind: type) -> Memory:
    """The same, made where there is none."""
    found = recall(kind)
    if found is None:
        found = Memory(kind)
        type.__setattr__(kind, "_tridrop_memory", found)  # past what a metaclass makes of it
    return found
