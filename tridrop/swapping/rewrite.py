"""Plans which calls of a method become one op.

Nothing is moved: each call stays in its place, where the function of lazy.py with its name is
called instead. This file only decides which calls may hand on a value that is not computed yet: a
call may if its result has one user, if that user can take the op up, and if a dropout lies on the
path.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .flow import Flow

# The ops that draw a mask.
DROPS = ("dropout", "rate", "drop_path", "dropout_add", "within")
CAUGHT = ("within", "within:attention")  # called as they are; their inner calls are intercepted
_ADDS = ("add", "dropout_add")
# For each op, the ops whose results it can take up before they are computed.
_ABSORBS: dict[str, tuple[str, ...]] = {
    "dropout": (
        "linear",
        "activation",
        "norm",
        "softmax",
        "softmax_of",
        "cast",
        "scale",
        "call",
        "identity",
    ),
    "drop_path": ("linear", "dropout", "rate", "scale", "norm", "call", "identity"),
    "scale": ("linear", "dropout", "rate", "call", "identity"),
    "identity": ("linear", "dropout", "rate", "scale", "drop_path", "call", "identity"),
    "activation": ("linear",),
    "cast": ("softmax", "softmax_of"),
    "add": ("dropout", "rate", "scale", "drop_path", "call", "identity"),
    "norm": _ADDS,
    "return": ("linear", "dropout", "rate", "scale", "drop_path", "call", "identity"),
}
_ABSORBS["rate"] = _ABSORBS["dropout_add"] = _ABSORBS["dropout"]
COMPUTED = ("norm", "attention", *CAUGHT)  # return tensors, never values that wait
# Ops that drop as well, without a call of a dropout that could be fused.
_NOTED = ("attention", "within:attention", "interface", "other")
ATTENTION_PARTS = ("softmax", "dropout", "matmul")
_ACROSS = {"call", "scale", "drop_path", "return", "identity"}
_ATTENTION = {"softmax", "softmax_of", "cast"}


@dataclass(frozen=True)
class Levels:
    """The switches of :func:`tridrop.swap`: what it may do."""

    dropout: bool = True
    attention: bool = True
    inside: bool = True
    across: bool = True
    memory: bool = False


@dataclass(frozen=True, eq=False)
class Op:
    """A call (or sum) that the rewriter recognises; ``operands`` are the values it may take up."""

    name: str
    node: ast.expr
    operands: tuple[ast.expr, ...]
    rest: tuple[ast.expr, ...] = ()  # arguments that are passed as they are
    carries: bool = False  # for a "call": whether the value that it hands on contains a dropout
    method: str = "forward"  # for a "call": the method that is called
    reason: str = ""  # why it is left as it is


@dataclass(frozen=True, eq=False)
class Edge:
    """A value that ``producer`` may hand to ``consumer`` uncomputed."""

    producer: Op
    consumer: Op
    shared: bool = False  # whether the value has other users as well


@dataclass
class Place:
    """One call in the source of a method that drops."""

    op: Op
    line: int | None
    text: str
    parts: tuple[str, ...] = ()  # the ops that are one op with it; empty if it is left


@dataclass
class Plan:
    """What is to be changed in one method."""

    node: ast.FunctionDef
    flow: Flow
    ops: dict[ast.expr, Op]
    edges: list[Edge] = field(default_factory=list)
    emitted: set[Op] = field(default_factory=set)
    alone: set[Op] = field(default_factory=set)  # those emitted without a dropout near
    memory: bool = False
    waiting: set[int] = field(default_factory=set)  # definitions of sums with several users
    places: list[Place] = field(default_factory=list)
    drawn: list[Place] = field(
        default_factory=list
    )  # calls that draw random numbers and are no dropout
    writes: list[int] = field(default_factory=list)  # lines on which something changes in place
    calls: list[ast.Call] = field(default_factory=list)  # calls that may write in place

    def context(self, node: ast.AST) -> ast.AST | None:
        """The with statement around an expression."""
        while node in self.flow.parents and not isinstance(node, (ast.With, ast.AsyncWith)):
            node = self.flow.parents[node]
        return node if isinstance(node, (ast.With, ast.AsyncWith)) else None

    def into(self, op: Op) -> list[Edge]:
        return [e for e in self.edges if e.consumer is op]

    def out_of(self, op: Op) -> list[Edge]:
        return [e for e in self.edges if e.producer is op]


def returns(node: ast.FunctionDef) -> list[tuple[ast.expr, bool]]:
    """The first value of each return statement, and whether it stands in a tuple."""
    found = []
    stack: list[ast.AST] = list(node.body)
    while stack:
        n = stack.pop()
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(n, ast.Return) and n.value is not None:
            if isinstance(n.value, ast.Tuple) and n.value.elts:
                found.append((n.value.elts[0], True))
            else:
                found.append((n.value, False))
        stack.extend(ast.iter_child_nodes(n))
    return found


def plan(
    node: ast.FunctionDef,
    flow: Flow,
    classify: Callable[[ast.expr], Op | None],
    levels: Levels,
    bare: bool,
) -> Plan:
    """The plan for a method, or with ``bare`` for the form whose caller takes over its end."""
    ops = {n: op for n in ast.walk(node) if isinstance(n, ast.expr) and (op := classify(n))}
    made = Plan(node, flow, ops)
    nodes: list[Any] = list(ast.walk(node))
    made.writes = [n.lineno for n in nodes if _writes(n)]
    made.calls = [n for n in nodes if isinstance(n, ast.Call) and not _is_pure(n)]
    ends = [Op("return", e, (e,)) for e, _ in returns(node)] if bare else []
    edges = [e for op in (*ops.values(), *ends) for x in op.operands for e in _edges(made, op, x)]
    edges = [e for e in edges if _allowed(e, levels)]
    made.edges = edges
    # A path without a dropout is left as it is.
    made.edges = [e for e in edges if _useful(made, e)]
    taken = {e.consumer for e in made.edges if e.consumer.name == "norm"}
    made.edges = [e for e in made.edges if e.producer not in taken]
    for op in [op for op in ops.values() if op.name in _ADDS]:
        if op.name == "dropout_add" or made.into(op):
            _share(made, op, levels)
    for op in ops.values():
        on_a_path = any(op in (e.producer, e.consumer) for e in made.edges)
        plain = op.name in DROPS and levels.dropout
        fused = op.name in ("attention", "within:attention") and levels.attention
        if on_a_path or plain or fused:
            made.emitted.add(op)
    _note_places(made)
    return made


def _is_pure(call: ast.Call) -> bool:
    """Whether a call cannot write in place unseen: torch's functions show it (add_, out=)."""
    root = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(root, ast.Name) and root.id in ("torch", "nn", "F", "len", "isinstance")


def _writes(n: Any) -> bool:
    """Whether a node changes an object: x += y, x[i] = y, x.data = y, x.add_(y), f(x, out=y)."""
    if isinstance(n, ast.Call):
        name = n.func.attr if isinstance(n.func, ast.Attribute) else ""
        in_place = name.endswith("_") and not name.endswith("__")
        return in_place or any(k.arg in ("out", "inplace") for k in n.keywords)
    stored = isinstance(n, (ast.Subscript, ast.Attribute)) and isinstance(n.ctx, ast.Store)
    return stored or isinstance(n, ast.AugAssign)


def sources(made: Plan, x: ast.expr) -> list[tuple[Op, int | None]]:
    """The ops that an operand comes from, each with the definition of the variable in between, if
    there is one."""
    if x in made.ops:
        return [] if made.ops[x].name == "call:tuple" else [(made.ops[x], None)]
    flow = made.flow
    if not isinstance(x, ast.Name) or x.id in flow.escaped:
        return []
    found: list[tuple[Op, int | None]] = []
    for i in flow.reaching.get(x, ()):
        definition = flow.definitions[i]
        op = made.ops.get(definition.value) if definition.value is not None else None
        if op is not None and definition.index == (0 if op.name == "call:tuple" else None):
            found.append((op, i))
    return found


def _edges(made: Plan, consumer: Op, x: ast.expr) -> list[Edge]:
    found = []
    for op, definition in sources(made, x):
        name = "call" if op.name == "call:tuple" else op.name
        alone = definition is None or made.flow.uses(definition) == [x]
        if alone and name in _ABSORBS.get(consumer.name, ()) and _may_wait(made, op, consumer, x):
            found.append(Edge(op, consumer))
    return found


def _may_wait(made: Plan, op: Op, consumer: Op, x: ast.expr) -> bool:
    """Whether an op can be computed later, with its consumer, without any difference.

    It makes a difference if a with statement begins or ends in between (autocast, no_grad), if
    something is written in place in between, if an operand is passed in between to a call that may
    write to it, and if the two are in different iterations of a loop.
    """
    inside = made.context(op.node)
    if inside is not (None if consumer.name == "return" else made.context(consumer.node)):
        return False
    first, last = op.node.lineno, x.end_lineno or x.lineno
    if consumer.name != "return":
        last = consumer.node.end_lineno or last
    if first > last or any(first <= line <= last for line in made.writes):
        return False
    held = _with_copies(made.flow, _definitions_read(made, op))
    inside_op = set(ast.walk(op.node))
    for call in made.calls:
        between = first <= call.lineno <= last and call not in inside_op
        between = between and (
            call not in made.ops or made.ops[call].name in (*CAUGHT, "draw", "matrix")
        )
        if between and any(made.flow.reaching.get(n, set()) & held for n in _names(call)):
            return False
    return True


def _names(call: ast.Call) -> list[ast.Name]:
    """The variables in a call's arguments."""
    values = [*call.args, *(k.value for k in call.keywords)]
    return [n for value in values for n in ast.walk(value) if isinstance(n, ast.Name)]


def _definitions_read(made: Plan, op: Op, seen: frozenset[Op] = frozenset()) -> set[int]:
    """The definitions of the variables whose tensors an op reads when it is computed."""
    # Linear layers and calls have computed their product already; only the rest waits.
    if op in seen or op.name in ("linear", "call", "call:tuple"):
        return set()
    seen |= {op}
    found: set[int] = set()
    for x in (*op.operands, *(op.rest[:1] if op.name in ("softmax", "softmax_of") else ())):
        if x in made.ops:
            found |= _definitions_read(made, made.ops[x], seen)
            continue
        for name in (n for n in ast.walk(x) if isinstance(n, ast.Name)):
            found |= made.flow.reaching.get(name, set())
        for inner, _ in sources(made, x):
            found |= _definitions_read(made, inner, seen)
    return found


def _with_copies(flow: Flow, ids: set[int]) -> set[int]:
    """The definitions, and those of other names for the same values."""
    found = set(ids)
    for i, definition in enumerate(flow.definitions):
        if isinstance(definition.value, ast.Name) and definition.index is None:
            origin = flow.reaching.get(definition.value, set())
            if origin & ids:
                found.add(i)
            if i in ids:
                found |= origin
    return found


def _allowed(edge: Edge, levels: Levels) -> bool:
    names = {edge.producer.name.partition(":")[0], edge.consumer.name}
    if edge.shared or names & _ACROSS:
        return levels.across
    return levels.attention if names & _ATTENTION else levels.inside


def _useful(made: Plan, edge: Edge) -> bool:
    if carries(made, edge.producer, set()):
        return True
    return edge.producer.name not in _ADDS and _leads(made, edge, set())


def carries(made: Plan, op: Op, seen: set[Op]) -> bool:
    """Whether the value that an op hands on contains a dropout."""
    if op.name in DROPS or op.carries:
        return True
    if op in seen:
        return False
    return any(carries(made, e.producer, seen | {op}) for e in made.into(op))


def _leads(made: Plan, edge: Edge, seen: set[Edge]) -> bool:
    """Whether the value that is handed on reaches a dropout, or the caller."""
    if edge.consumer.name in DROPS or edge.consumer.name == "return":
        return True
    if edge in seen:
        return False
    return any(_leads(made, e, seen | {edge}) for e in made.out_of(edge.consumer))


def _share(made: Plan, op: Op, levels: Levels) -> None:
    """Let a sum wait for the norm that follows it, where the sum has other users too."""
    if made.out_of(op):
        return
    flow = made.flow
    start = [i for i, d in enumerate(flow.definitions) if d.value is op.node and d.index is None]
    found, todo, users = set(start), list(start), []
    while todo:
        for use in flow.uses(todo.pop()):
            if use.id in flow.escaped or isinstance(use.ctx, ast.Store):
                return
            copies = [
                i for i, d in enumerate(flow.definitions) if d.value is use and d.index is None
            ]
            todo += [i for i in copies if i not in found]
            found.update(copies)
            parent = flow.parents[use]
            user = made.ops.get(parent) if isinstance(parent, ast.expr) else None
            norm = user is not None and user.name == "norm" and not made.into(user)
            if user is not None and norm and _may_wait(made, op, user, use):
                users.append(Edge(op, user, shared=True))
    users = [e for e in users if _allowed(e, levels)]
    if users:
        made.waiting |= found
        made.edges += users


def _note_places(made: Plan) -> None:
    drops = [op for op in made.ops.values() if op.name in (*DROPS, *_NOTED)]
    drops.sort(key=_at)
    for op in drops:
        text = ast.unparse(op.node)
        parts = _parts(made, op) if op in made.emitted else ()
        made.places.append(Place(op, op.node.lineno, text, parts))
    drawn = sorted((op for op in made.ops.values() if op.name == "draw"), key=_at)
    made.drawn = [Place(op, op.node.lineno, ast.unparse(op.node)) for op in drawn]


def _at(op: Op) -> tuple[int, int, int]:
    """The position of an op in the source, to sort by."""
    return op.node.lineno, op.node.end_lineno or 0, op.node.end_col_offset or 0


_PARTS_OF_OP = {
    "rate": ("dropout",),
    "within": ("dropout",),
    "dropout_add": ("dropout", "add"),
    "attention": ATTENTION_PARTS,
    "within:attention": ATTENTION_PARTS,
}


def taken_up(made: Plan, op: Op) -> list[Op]:
    """The ops that an op takes up, in the order of computation."""
    found: list[Op] = []
    todo = [e.producer for e in made.into(op)]
    while todo:
        producer = todo.pop()
        found.insert(0, producer)
        todo += [e.producer for e in made.into(producer) if producer.name not in _ADDS]
    return found


def _parts(made: Plan, op: Op) -> tuple[str, ...]:
    """The names of the ops that are one op with ``op``, in the order of computation."""
    names = [producer.name.partition(":")[0] for producer in taken_up(made, op)]
    before = ["softmax" if name == "softmax_of" else name for name in names]
    after: list[str] = []
    at = op
    while out := made.out_of(at):
        at = out[0].consumer
        after.append(at.name)
    parts = _PARTS_OF_OP.get(op.name, (op.name,))
    return tuple(p for p in (*before, *parts, *after) if p not in ("cast", "identity"))
