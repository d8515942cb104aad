"""Tensors that torch's ops save for backward, and that backward makes again instead.

A recipe is kept in the place of such a tensor: a function, and its sources, which are tensors that
are kept for other reasons anyway. A dropped weight is drawn again from the weight; the input of a
linear layer is computed again from the tensors that its activation or norm keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from ..base.memory import PLAIN, as_saved, facts_of
from ..base.torch_private import (
    forward_mode,
    saved_tensor_hooks,
    step_aside,
    transformation,
)

_CHECKPOINTS = "torch.utils.checkpoint"  # the module of the hooks of non-reentrant checkpoints

# tensor -> its recipe, as long as the tensor lives. An attribute would be saved and copied with it.
_recipes: Any = WeakTensorKeyDictionary()


class _Maker:
    """Makes a tensor again, once for all saved views of it, and keeps it while views are waiting.

    It holds none of the sources: they live as long as the saved views that refer to them.
    """

    __slots__ = ("backend", "device", "made", "make", "waiting")

    def __init__(self, make: Callable[..., Tensor], device: torch.device) -> None:
        self.make, self.device = make, device.type
        self.backend = backends.name_for(device)
        self.waiting = 0  # views that a graph has saved and that backward has not taken yet
        self.made: Tensor | None = None

    def take(self, sources: Callable[[], tuple[Any, ...]]) -> Tensor:
        """The tensor for one waiting view; it is made for the first and kept for the others."""
        made = self.made
        if made is None:
            # It runs on the forward's backend, and without autocast: a recipe names its dtypes.
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(backends.in_this_thread(self.backend))
                if self.device != "meta" and torch.is_autocast_enabled(self.device):
                    stack.enter_context(torch.autocast(self.device, enabled=False))
                made = self.make(*sources()).contiguous()
        self.waiting -= 1
        self.made = made if self.waiting > 0 else None
        return made

    def borrow(self, *sources: Tensor | None) -> Tensor:
        """The tensor for another recipe that is computed from it; kept only for waiting views."""
        made = self.make(*sources) if self.made is None else self.made
        self.made = made if self.waiting > 0 else None
        return made


class Recipe:
    """How a tensor is made again: ``make(*sources)``.

    ``names`` are the names of the sources in messages, and ``what`` says there what is made from
    them. A source that was changed in place before backward is an error, as a tensor that autograd
    saves would be. If the tensor is made from one with a recipe of its own, ``of``, the last
    sources are those of ``of``, and changes count from when ``of`` was made.
    """

    __slots__ = (
        "casts", "facts", "maker", "names", "place", "sources", "version", "versions", "what",
    )  # fmt: skip

    def __init__(
        self,
        make: Callable[..., Tensor],
        sources: Sequence[Tensor | None],
        names: Sequence[str],
        what: str = "a tensor is made again in backward",
        of: Recipe | None = None,
    ) -> None:
        # Detached tensors share memory and version counter with the originals, but hold no graph.
        self.sources = tuple(None if t is None else t.detach() for t in sources)
        device = next(t.device for t in self.sources if t is not None)
        self.maker = _Maker(make, device)
        versions = [None if t is None else t._version for t in self.sources]
        if of is not None:
            versions[len(versions) - len(of.versions) :] = of.versions
        self.versions: tuple[int | None, ...] = tuple(versions)
        self.names = tuple(names)
        self.facts = facts_of(names, self.sources)
        self.what = what
        self.version = 0  # the version counter of the tensor that has this recipe
        self.place = 0  # that tensor's address
        self.casts: dict[torch.dtype, Recipe] = {}

    def cast(self, dtype: torch.dtype) -> Recipe:
        """The recipe of the same tensor in another dtype; all callers share one per dtype."""
        found = self.casts.get(dtype)
        if found is None:
            make = self.maker.make
            found = Recipe(lambda *s: make(*s).to(dtype), self.sources, self.names, self.what, self)
            self.casts[dtype] = found
        return found

    def kept(self) -> tuple[Any, ...]:
        """The sources; RuntimeError if one was changed in place since its forward."""
        for facts in self.facts:
            t = self.sources[facts.place]
            assert t is not None
            if t._version != self.versions[facts.place]:
                raise RuntimeError(
                    f"{self.what}, from {facts.name}, which was changed in place since its forward "
                    f"(version {self.versions[facts.place]}, now {t._version}): call backward "
                    "before optimizer.step(), and write to no tensor that backward needs"
                )
        return _checked(self.sources, self.facts)


def _checked(sources: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
    found = list(sources)
    for facts in saved:
        found[facts.place] = as_saved(found[facts.place], facts)
    return tuple(found)


def possible() -> bool:
    """Whether hooks on saved tensors can be used here.

    They cannot under torch.compile, whose partitioner decides what a compiled graph saves, nor
    under torch.func, which takes no hooks; and they have no use where nothing is saved.
    """
    return not (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or transformation() is not None
        or forward_mode()
    )


def recipes_allowed() -> bool:
    """Whether tensors can have recipes here: not inside a checkpoint either.

    A checkpoint computes its forward once more, from tensors that its hooks return: these are other
    objects, without recipes. But it must save the same tensors in the same order both times.
    """
    if not possible():
        return False
    around = saved_tensor_hooks(False)
    return around is None or getattr(around[0], "__module__", None) != _CHECKPOINTS


def attach(value: Tensor, make_recipe: Callable[[], Recipe]) -> Tensor:
    """``value``, with a recipe where it has a gradient and its storage holds nothing else.

    :func:`recipe_of` returns the recipe to callers of linear layers. A tensor without a gradient
    gets none: no op would keep its sources for backward.
    """
    if (
        recipes_allowed()
        and value.requires_grad
        and type(value) is Tensor
        and value.is_contiguous()
        and not value.storage_offset()
        and value.numel()
        and value.untyped_storage().nbytes() == value.nbytes
    ):
        made = make_recipe()
        made.version, made.place = value._version, value.data_ptr()
        _recipes[value] = made
    return value


def recipe_of(x: Any) -> Recipe | None:
    """The recipe of a tensor; None where it has none that is valid.

    A recipe is no longer valid once the tensor was written to, or its ``.data`` replaced. Writes
    into ``.data`` cannot be detected.
    """
    if not recipes_allowed() or type(x) not in PLAIN:
        return None
    found: Recipe | None = _recipes.get(x)
    if found is None or found.version != x._version or found.place != x.data_ptr():
        return None
    return found


@contextmanager
def remade(values: Sequence[tuple[Tensor, Recipe]]) -> Iterator[None]:
    """Inside the block, torch saves the recipes of these values instead of the values.

    All other tensors, and the sources of the recipes, go to the hooks around the block, such as
    those of a checkpoint.
    """
    if not possible():
        yield
        return
    recipes = {v.untyped_storage()._cdata: (recipe, v.dtype, v._version) for v, recipe in values}
    around = saved_tensor_hooks(False)

    def recipe_for(t: Tensor) -> Recipe | None:
        """The recipe of a view of one of the values, if the value was not written to since."""
        if type(t) not in PLAIN or t.layout is not torch.strided or not t.numel():
            return None
        recipe, dtype, version = recipes.get(t.untyped_storage()._cdata, (None, None, None))
        same = t.dtype == dtype and t._version == version
        return recipe if same and not t.is_neg() and not t.is_conj() else None

    def pack(t: Tensor) -> Any:
        recipe = recipe_for(t)
        if recipe is None:
            return None, t if around is None else around[0](t), None
        view = t.shape, t.stride(), t.storage_offset()
        if around is None:
            recipe.maker.waiting += 1
            return recipe.maker, recipe.kept, view
        # The sources are packed for each view, since a checkpoint unpacks what it packed only once.
        packed = [None if s is None else around[0](s) for s in recipe.sources]
        recipe.maker.waiting += 1
        facts, unpack = recipe.facts, around[1]

        def sources() -> tuple[Any, ...]:
            return _checked([None if p is None else unpack(p) for p in packed], facts)

        return recipe.maker, sources, view

    def unpack(packed: Any) -> Tensor:
        maker, content, view = packed
        if maker is not None:
            made: Tensor = maker.take(content)
            return made.as_strided(*view)
        found: Tensor = content if around is None else around[1](content)
        return found

    with ExitStack() as stack:
        # Saved tensors keep both functions alive, which must not keep the sources alive.
        stack.callback(recipes.clear)
        try:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            stack.callback(step_aside(pack, around))
        except RuntimeError:
            recipes.clear()  # such hooks are disabled here, so torch saves the value itself
        yield
