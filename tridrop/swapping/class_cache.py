"""What was found about a class, kept as an attribute of that class, so that both go together.

What is read from a class refers to it: its methods, and the subclass that takes its place. A table
of classes, even one with weak keys, would therefore keep all of them alive as long as the process
lives. A class that refers to itself through its own attribute is a cycle, which the garbage
collector frees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Rewritten
    from .classes import Children, Text
    from .kinds import Kind
    from .present import Holds


class ClassCache:
    """What was found about one class."""

    def __init__(self, of: type) -> None:
        self.of = of
        self.kind: Kind | None = None
        self.texts: dict[Children, Text] = {}
        self.rewritten: tuple[Holds, Rewritten | None] | None = None

    def __reduce__(self) -> Any:
        """cloudpickle pickles some classes by value: those leave their cache behind."""
        return type(None), ()


def cached(cls: type) -> ClassCache | None:
    """The cache of a class itself, not of a base class. torch.compile can trace this."""
    found: ClassCache | None = getattr(cls, "_tridrop_class_cache", None)
    return found if found is not None and found.of is cls else None


def cache_of(cls: type) -> ClassCache:
    """The cache of a class, which is made if there is none yet."""
    found = cached(cls)
    if found is None:
        found = ClassCache(cls)
        # type.__setattr__ bypasses a metaclass with a __setattr__ of its own.
        type.__setattr__(cls, "_tridrop_class_cache", found)
    return found
