"""Tensors that any op of torch saves for backward, and that are not kept: they are made again.

What is kept in their place is a rule: a function, and the tensors that it takes, which are kept for
other reasons anyway. A dropped weight is drawn again from the weight, the input of a linear layer
computed again from what its activation or norm keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from ..base.memory import PLAIN, given, still
from ..base.torch_private import forward_mode, saved_tensor_hooks, transformation

_CHECKPOINTS = "torch.utils.checkpoint"  # where the hooks of those that do not re-enter come from

# Of tensors, while they live. An attribute of theirs would be saved and copied with them.
_rules: Any = WeakTensorKeyDictionary()


class _Again:
    """What all who wait for one tensor share: how it is made, and the tensor while others wait.

    It holds nothing that the rule takes: what has been saved decides how long that lives.
    """

    __slots__ = ("backend", "device", "made", "make", "waiting")

    def __init__(self, make: Callable[..., Tensor], device: torch.device) -> None:
        self.make, self.device = make, device.type
        self.backend = backends.choose(device)
        self.waiting = 0  # views that a graph has saved and backward has not asked for
        self.made: Tensor | None = None

    def tensor(self, sources: Callable[[], tuple[Any, ...]]) -> Tensor:
        """The tensor, made once for all that wait for it."""
        made = self.made
        if made is None:
            # By the backend of the forward, and as outside of autocast: a rule says its dtypes.
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(backends.in_this_thread(self.backend))
                if self.device != "meta" and torch.is_autocast_enabled(self.device):
                    stack.enter_context(torch.autocast(self.device, enabled=False))
                made = self.make(*sources()).contiguous()
        self.waiting -= 1
        self.made = made if self.waiting > 0 else None
        return made

    def lent(self, *sources: Tensor | None) -> Tensor:
        """The tensor for a rule that takes it on its way; kept where others wait for it."""
        made = self.make(*sources) if self.made is None else self.made
        self.made = made if self.waiting > 0 else None
        return made


class Remade:
    """A rule: ``make(*sources)`` is the tensor again.

    ``names`` are those of the sources in messages; ``what`` says there what is made of them. A
    source that is changed in place before backward is an error, as it is of what autograd saves:
    also one of another rule, ``of``, whose sources are the last ones here, since that was made.
    """

    __slots__ = (
        "again", "casts", "given", "names", "place", "sources", "version", "versions", "what",
    )  # fmt: skip

    def __init__(
        self,
        make: Callable[..., Tensor],
        sources: Sequence[Tensor | None],
        names: Sequence[str],
        what: str = "a tensor that backward makes again",
        of: Remade | None = None,
    ) -> None:
        # Detached, they share memory and version with the tensors, and hold no graph.
        self.sources = tuple(None if t is None else t.detach() for t in sources)
        device = next(t.device for t in self.sources if t is not None)
        self.again = _Again(make, device)
        versions = [None if t is None else t._version for t in self.sources]
        if of is not None:
            versions[len(versions) - len(of.versions) :] = of.versions
        self.versions: tuple[int | None, ...] = tuple(versions)
        self.names = tuple(names)
        self.given = given(names, self.sources)
        self.what = what
        self.version = 0  # of the value that has this rule
        self.place = 0  # in memory, of that value
        self.casts: dict[torch.dtype, Remade] = {}

    def cast(self, dtype: torch.dtype) -> Remade:
        """The rule of the same tensor in another dtype, one for all who want that."""
        found = self.casts.get(dtype)
        if found is None:
            make = self.again.make
            found = Remade(lambda *s: make(*s).to(dtype), self.sources, self.names, self.what, self)
            self.casts[dtype] = found
        return found

    def kept(self) -> tuple[Any, ...]:
        """The sources, where nobody has written to them since."""
        for then in self.given:
            t = self.sources[then.place]
            assert t is not None
            if t._version != self.versions[then.place]:
                raise RuntimeError(
                    f"{self.what}, of {then.name}, which was changed in place since its forward "
                    f"(version {self.versions[then.place]}, now {t._version}): call backward "
                    "before optimizer.step(), and write to no tensor that backward needs"
                )
        return _checked(self.sources, self.given)


def _checked(sources: Sequence[Any], then: Sequence[Any]) -> tuple[Any, ...]:
    found = list(sources)
    for each in then:
        found[each.place] = still(found[each.place], each)
    return tuple(found)


def possible() -> bool:
    """Whether hooks can be put around what is saved here.

    Not under torch.compile, whose partitioner chooses what a compiled graph saves, nor under
    torch.func, which takes no hooks; nor where nothing is saved.
    """
    return not (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or transformation() is not None
        or forward_mode()
    )


def rules() -> bool:
    """Whether tensors have rules here: not inside of a checkpoint's hooks either.

    It computes a forward once more, from tensors that came through the hooks around it and so are
    others, without a rule; and it must save what the forward saved, in the same order.
    """
    if not possible():
        return False
    around = saved_tensor_hooks(False)
    return around is None or getattr(around[0], "__module__", None) != _CHECKPOINTS


def attach(value: Tensor, rule: Callable[[], Remade]) -> Tensor:
    """``value``, which remembers its rule where it has a gradient, and lies in memory as made.

    Those who call linear layers ask for it by :func:`rule_of`. A tensor without a gradient would
    be kept by nobody but the layer, and what it is made of by nobody at all.
    """
    if (
        rules()
        and value.requires_grad
        and type(value) is Tensor
        and value.is_contiguous()
        and not value.storage_offset()
        and value.numel()
        and value.untyped_storage().nbytes() == value.nbytes
    ):
        made = rule()
        made.version, made.place = value._version, value.data_ptr()
        _rules[value] = made
    return value


def rule_of(x: Any) -> Remade | None:
    """The rule of a tensor that has one; None where none serves.

    None does where somebody has written to the tensor since, or replaced its ``.data``. What is
    written into ``.data`` nobody can see.
    """
    if not rules() or type(x) not in PLAIN:
        return None
    found: Remade | None = _rules.get(x)
    if found is None or found.version != x._version or found.place != x.data_ptr():
        return None
    return found


@contextmanager
def remade(values: Sequence[tuple[Tensor, Remade]]) -> Iterator[None]:
    """Inside, what torch saves of these values is their rules and not the numbers.

    Other tensors, and what the rules take, go to the hooks around, such as those of a checkpoint.
    """
    if not possible():
        yield
        return
    known = {v.untyped_storage()._cdata: (rule, v.dtype, v._version) for v, rule in values}
    around = saved_tensor_hooks(False)

    def rule_for(t: Tensor) -> Remade | None:
        """The rule of a view of one of the values, as that was when the call began."""
        if type(t) not in PLAIN or t.layout is not torch.strided or not t.numel():
            return None
        rule, dtype, version = known.get(t.untyped_storage()._cdata, (None, None, None))
        same = t.dtype == dtype and t._version == version
        return rule if same and not t.is_neg() and not t.is_conj() else None

    def pack(t: Tensor) -> Any:
        rule = rule_for(t)
        if rule is None:
            return None, t if around is None else around[0](t), None
        view = t.shape, t.stride(), t.storage_offset()
        if around is None:
            rule.again.waiting += 1
            return rule.again, rule.kept, view
        # Each who waits packs them anew: a checkpoint gives what it packed back once.
        packed = [None if s is None else around[0](s) for s in rule.sources]
        rule.again.waiting += 1
        then, unpack = rule.given, around[1]

        def sources() -> tuple[Any, ...]:
            return _checked([None if p is None else unpack(p) for p in packed], then)

        return rule.again, sources, view

    def unpack(packed: Any) -> Tensor:
        again, what, view = packed
        if again is not None:
            made: Tensor = again.tensor(what)
            return made.as_strided(*view)
        found: Tensor = what if around is None else around[1](what)
        return found

    with ExitStack() as stack:
        stack.callback(known.clear)  # what was saved holds both functions, and is to hold no source
        try:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        except RuntimeError:
            known.clear()  # somebody disabled such hooks: then torch saves the value itself
        yield
