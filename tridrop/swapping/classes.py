"""Makes subclasses with rewritten methods, which take the place of a module's own class.

Setting ``module.__class__`` keeps the object: its parameters, hooks, state_dict, place in the model
and isinstance checks. The subclass has the same name, since libraries look classes up by name. A
swapped module pickles as its original class and the recipe for swapping it again.
"""

from __future__ import annotations

import ast
import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from . import adapters, draws, emission, kinds, lazy, rewrite, source
from .class_cache import cache_of
from .draws import mentions_dropout
from .encoders import closing
from .flow import Unfollowed, analyse
from .modules import drop_path_forward
from .present import At, Holds, guarded, holds, is_function, is_original
from .recognise import (
    Classifier,
    Labels,
    Method,
    Tail,
    calls,
    label_of,
    path_of,
    resolve,
    self_of,
)
from .remade_plan import join, remake
from .rewrite import Levels, Op, Place, Plan


@dataclass
class Text:
    """The source of a class: the methods that its forward uses, and the unreadable ones."""

    methods: dict[str, Method] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)  # method -> reason
    holds: Holds = lambda: True  # whether these are still the methods that run
    # What was made from it.
    works: dict[Recipe, Work] = field(default_factory=dict)
    classes: dict[Recipe, type] = field(default_factory=dict)

    def caught(self, cls: type, name: str) -> bool:
        """Whether an unread method drops, so that its calls are intercepted."""
        reason = self.unread.get(name, "overridden")  # overridden methods are left alone
        return not reason.startswith("overridden") and mentions_dropout(getattr(cls, name, None))


Children = tuple[str, ...]  # the names in a torch.nn.Sequential, whose forward they determine


def text_of(cls: type, children: Children = ()) -> Text:
    """The readable methods of a class: forward, and the methods of the class that it calls."""
    texts = cache_of(cls).texts
    found = texts.get(children)
    if found is None or not found.holds():
        found = texts[children] = _unrolled(cls, children) if children else _read(cls)
    return found


def children_of(module: nn.Module, base: type) -> Children:
    """The names of the children of a torch.nn.Sequential; empty for other modules."""
    return tuple(module._modules) if is_sequence(base) else ()


def is_sequence(base: Any) -> bool:
    """Whether a class's forward is that of torch.nn.Sequential."""
    return bool(base.forward is _SEQUENTIAL) and is_original(nn.Sequential, "forward")


_SEQUENTIAL = nn.Sequential.forward


def _unrolled(cls: type, children: Children) -> Text:
    """The forward of a torch.nn.Sequential, written out: it calls one child after the other."""
    lines = ["def forward(self, input):"]
    lines.append(f"  if tuple(self._modules) != {children!r}: return _forward(self, input)")
    lines += ["  input = self._(input)"] * len(children)
    node: Any = ast.parse("\n".join([*lines, "  return input"])).body[0]
    for name, statement in zip(children, node.body[1:-1], strict=True):
        statement.value.func.attr = name
    function: Any = nn.Sequential.forward
    method = Method("forward", function, lambda f: f, node, analyse(node), decorated=False)
    return Text({"forward": method}, holds=holds(At(cls, "forward")))


def _owner(cls: type, name: str) -> type | None:
    return next((c for c in cls.__mro__ if name in c.__dict__), None)


def _read(cls: type) -> Text:
    text = Text()
    home = _owner(cls, "forward")
    todo = ["forward"]
    named = {"forward"}
    while todo:
        name = todo.pop(0)
        owner = _owner(cls, name)
        assert owner is not None
        assert home is not None
        overrides = cls.__mro__.index(owner) < cls.__mro__.index(home)
        if overrides and home.__module__.startswith("torch."):
            # A user's subclass of one of torch's layers replaces a part of its forward.
            text.unread[name] = f"overridden in {owner.__name__}"
            continue
        try:
            function, rewrap = source.unwrap(owner.__dict__[name])
            node = source.parse(function)
            flow = analyse(node)
        except source.Unreadable as error:
            text.unread[name] = str(error)
            continue
        except Unfollowed:
            text.unread[name] = "it has a statement that the analysis does not support"
            continue
        arguments = node.args.posonlyargs + node.args.args
        owners = [d for d in flow.definitions if arguments and d.name == arguments[0].arg]
        if len(owners) != 1:
            text.unread[name] = "it has no self, or assigns to it"
            continue
        decorated = not source.hands_on(owner.__dict__[name])
        text.methods[name] = Method(name, function, rewrap, node, flow, decorated)
        for called in calls(node, arguments[0].arg):
            if "." not in called:
                named.add(called)
            plain = "." not in called and is_function(getattr(cls, called, None))
            if plain and called not in text.methods and called not in (*todo, *text.unread):
                todo.append(called)
    places = [At(cls, name) for name in sorted(named)]
    text.holds = holds(*(at for at in places if at.is_missing() or is_function(at.now())))
    return text


def labels_of(module: nn.Module, base: type, tails: Callable[[nn.Module], Tail | None]) -> Labels:
    """What each attribute is that the methods of ``base`` call, on this instance."""
    labels: Labels = {}
    text = text_of(base, children_of(module, base))
    for method in text.methods.values():
        for path in calls(method.node, self_of(method.node)):
            found = resolve(module, path)
            label = label_of(draws.function_at(module, path) if found is None else found, tails)
            if text.caught(base, path):
                label = "within"
            if label is not None:
                labels[path] = label
        labels |= _tables(module, method)
    return labels


def _tables(module: nn.Module, method: Method) -> Labels:
    """How the functions draw that a method takes from a list or dict of its module."""
    found: Labels = {}
    for n in ast.walk(method.node):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript):
            path = path_of(n.func.value, self_of(method.node))
            table = resolve(module, path) if path else None
            values = table.values() if isinstance(table, dict) else table
            if isinstance(values, (list, tuple, type({}.values()))):
                labels = {draws.within(f) for f in values} - {None}
                if labels:
                    found[f"{path}[]"] = max(map(str, labels))
    return found


@dataclass(frozen=True)
class Recipe:
    """All that a swapped class is made from, besides the original class."""

    levels: Levels
    labels: tuple[tuple[str, str], ...]
    bare: bool = False  # whether a caller takes over the end of forward
    children: Children = ()


@dataclass
class Work:
    """The plans for a class's methods, and for the forms whose callers take over the end."""

    plans: dict[str, Plan] = field(default_factory=dict)
    bare: dict[str, Plan] = field(default_factory=dict)
    places: list[tuple[str, Place]] = field(default_factory=list)
    drawn: list[tuple[str, Place]] = field(default_factory=list)  # draws without a number
    lora: adapters.Rewritten | None = None  # the forward of a layer with adapters
    classifiers: list[Classifier] = field(default_factory=list)

    def holds(self) -> bool:
        """Whether the names in the source still refer to the same objects."""
        return all(classifier.holds() for classifier in self.classifiers)

    def changes(self) -> bool:
        """Whether there is anything to rewrite."""
        whole = self.lora is not None or bool(self.places and not self.plans)
        return whole or bool(self.bare) or any(plan.emitted for plan in self.plans.values())


def work_of(base: type, recipe: Recipe) -> Work:
    """The plans for a class with a recipe."""
    text = text_of(base, recipe.children)
    found = text.works.get(recipe)
    if found is None or not found.holds():
        found = text.works[recipe] = _plan(base, recipe)
        text.classes.pop(recipe, None)
    return found


def tail_of(base: type, recipe: Recipe, name: str = "forward") -> Tail | None:
    """What a method would hand on to a caller that takes over its end, if the levels allow it."""
    method = text_of(base, recipe.children).methods.get(name)
    if method is None or method.decorated or not recipe.levels.across:
        return None
    made = _plan_method(method, recipe, {}, True, Work())
    ends = [e for e in made.edges if e.consumer.name == "return"]
    shapes = {in_tuple for _, in_tuple in rewrite.returns(method.node)}
    if not ends or len(shapes) != 1:
        return None
    carries = any(rewrite.carries(made, e.producer, set()) for e in ends)
    return Tail(carries, shapes.pop())


def _plan_method(
    method: Method, recipe: Recipe, tails: dict[str, Tail], bare: bool, work: Work
) -> Plan:
    classify = Classifier(method, dict(recipe.labels), tails)
    work.classifiers.append(classify)
    made = rewrite.plan(method.node, method.flow, classify, recipe.levels, bare)
    if recipe.levels.memory:
        remake(made)
    else:
        join(made)
    return made


def _plan(base: type, recipe: Recipe) -> Work:
    work = Work()
    methods = text_of(base, recipe.children).methods
    if recipe.levels.inside and adapters.rewritten(base) is not None:
        work.lora = adapters.rewritten(base)
        return work
    if recipe.levels.dropout and text_of(base, recipe.children).caught(base, "forward"):
        op = Op("within", ast.Name("forward"), ())
        work.places.append(("forward", Place(op, None, "forward", ("dropout",))))
        return work
    tails = {
        name: tail
        for name in methods
        if name != "forward" and (tail := tail_of(base, recipe, name)) is not None
    }
    for name, method in methods.items():
        made = work.plans[name] = _plan_method(method, recipe, tails, False, work)
        taken = {op.method for op in made.emitted if op.method in tails}
        for called in taken:
            work.bare[called] = _plan_method(methods[called], recipe, tails, True, work)
    if recipe.bare and "forward" in methods:
        work.bare["forward"] = _plan_method(methods["forward"], recipe, tails, True, work)
    for name in methods:
        made = work.bare.get(name, work.plans[name])
        work.places += [(name, place) for place in made.places]
        work.drawn += [(name, place) for place in made.drawn]
    return work


def swapped_class(base: type, recipe: Recipe) -> type:
    """The class that takes the place of ``base``."""
    work_of(base, recipe)  # discards what was made from it if the source has changed
    made = text_of(base, recipe.children).classes
    if recipe not in made:
        made[recipe] = _make(base, recipe)
    return made[recipe]


def _make(base: type, recipe: Recipe) -> type:
    work, methods = work_of(base, recipe), text_of(base, recipe.children).methods
    first = 0
    new: dict[str, Any] = {}
    kind = kinds.kind_of_type(base)
    drops_samples = kind is not None and kind.name == "drop_path"
    if drops_samples:
        methods = {}
    if work.places and not work.plans:
        new["forward"] = _caught_forward(base)
    if work.lora is not None:
        new["forward"] = guarded(At(base, "forward"), work.lora.forward)
        new["_tridrop_casts"] = holds(At(base, "_cast_input_dtype"))
    for name, method in methods.items():
        if name not in work.plans:
            continue
        if work.plans[name].emitted:
            built = _build(method, work.plans[name], first)
            new[name] = guarded(At(base, name), method.rewrap(built))
        if name in work.bare:
            built = _build(method, work.bare[name], first)
            new[f"_tridrop_{name}"] = guarded(At(base, name), method.rewrap(built))
        first += len(work.plans[name].places)
    forward = methods.get("forward")
    in_tuple = forward is not None and any(shape for _, shape in rewrite.returns(forward.node))
    namespace = {
        **new,
        **closing(base),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _setstate,
        "_tridrop_base": base,
        "_tridrop_recipe": recipe,
        "_tridrop_tuple": in_tuple,
    }
    made: type = type(base)(base.__name__, (base,), namespace)
    kinds.kind_of_type(made)
    if drops_samples:
        made.forward = drop_path_forward(made, base)  # type: ignore[attr-defined]
    return made


def _caught_forward(base: Any) -> FunctionType:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return lazy.within(self, 0, base.forward, self, *args, **kwargs)

    return functools.wraps(base.forward)(forward)  # type: ignore[return-value]


_NAMES = {"_tridrop": lazy, "_forward": nn.Sequential.forward}


def _build(method: Method, made: Plan, first: int) -> FunctionType:
    return source.build(method.function, emission.emit(made, first), _NAMES)


def _swapped(module: nn.Module) -> Any:
    """The swapped class of a module, which is its class or a base of its class."""
    return next(c for c in type(module).__mro__ if "_tridrop_base" in c.__dict__)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    cls = _swapped(self)
    found = super(cls, self).__reduce_ex__(protocol)
    if found[0] is not copyreg.__newobj__ or found[1] != (cls,):  # type: ignore[attr-defined]
        return found
    return (restore, (cls._tridrop_base, cls._tridrop_recipe), *found[2:])


def restore(base: type, recipe: Recipe) -> nn.Module:
    """An empty module of a swapped class; unpickling and deepcopy call this."""
    cls: Any = swapped_class(base, recipe)
    made: nn.Module = cls.__new__(cls)
    return made


def _setstate(self: nn.Module, state: Any) -> None:
    super(_swapped(self), self).__setstate__(state)
    kinds.read_kinds(self.modules())  # compiled code looks kinds up and cannot read source


def is_swapped(module: nn.Module) -> bool:
    """Whether a module's class is one that was made here."""
    return "_tridrop_base" in type(module).__dict__
