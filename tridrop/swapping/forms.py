"""Recognises the modules of libraries by the form of their forward.

The normal form of a function is its syntax tree without the names of variables, annotations and the
docstring. Comparing forms also finds the attributes that a forward reads, whatever their names are.
A class whose forward is decorated or has another form, for instance in a new version of its
library, is not recognised, and is left as it is.
"""

from __future__ import annotations

import ast
import copy
import functools
import textwrap
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from . import source
from .present import At, Holds


@dataclass(frozen=True)
class Kind:
    """What the modules of a class are, and the names of their attributes."""

    name: str
    names: dict[str, str] = field(default_factory=dict)  # role -> attribute
    zero_centered: bool = False
    eps: float | None = None  # its value, if it is a constant and no attribute
    typed_by_weight: bool = False  # whether a half-precision result has the weight's dtype
    # Whether the class still has the forward that was read, and torch the functions it calls.
    holds: Holds = field(default=lambda: False, compare=False)
    # The attributes that, when set, make a module compute in another way.
    flags: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        flags = tuple(self.names[role] for role in ("fast", "inplace") if role in self.names)
        object.__setattr__(self, "flags", flags)

    def get(self, module: nn.Module, role: str) -> Any:
        """The value of a role's attribute of a module; None if this kind has no such role."""
        name = self.names.get(role)
        return None if name is None else getattr(module, name)


LAYER_NORM = Kind("layer_norm", {"weight": "weight", "bias": "bias", "eps": "eps"})

# The forwards that are recognised. Here self.eps, for instance, is a role: it matches an attribute
# of any name. A helper function must in turn have one of the forms in _HELPERS.
_FORMS: list[tuple[Kind, str]] = [
    (
        Kind("rms_norm"),
        """
        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            square = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(square + self.eps)
            return self.weight * x.to(dtype)
        """,
    ),
    (
        Kind("rms_norm"),
        """
        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            square = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(square + self.eps)
            return (self.weight * x).to(dtype)
        """,
    ),
    (
        Kind("rms_norm", typed_by_weight=True),
        """
        def forward(self, x):
            square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(square + self.eps)
            if self.weight.dtype in [torch.float16, torch.bfloat16]:
                x = x.to(self.weight.dtype)
            return self.weight * x
        """,
    ),
    (
        Kind("rms_norm", zero_centered=True),
        """
        def forward(self, x):
            out = self.root_mean_square(x.float())
            out = out * (1.0 + self.weight.float())
            return out.type_as(x)
        """,
    ),
    (
        LAYER_NORM,
        """
        def forward(self, x):
            if self.fast:
                x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            else:
                x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x
        """,
    ),
    (
        Kind("layer_norm", eps=1e-5),
        """
        def forward(self, x):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        """,
    ),
    (
        Kind("linear"),  # transformers' Conv1D, whose weight is transposed
        """
        def forward(self, x):
            shape = x.size()[:-1] + (self.width,)
            x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.transposed)
            x = x.view(shape)
            return x
        """,
    ),
    (
        Kind("layer_scale"),
        """
        def forward(self, x):
            return x * self.scale
        """,
    ),
    (
        Kind("layer_scale"),
        """
        def forward(self, x):
            return self.scale * x
        """,
    ),
    (
        Kind("layer_scale"),
        """
        def forward(self, x):
            return x.mul_(self.scale) if self.inplace else x * self.scale
        """,
    ),
    (
        Kind("drop_path"),
        """
        def forward(self, x):
            if self.p == 0.0 or not self.training:
                return x
            keep = 1 - self.p
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            mask = torch.rand(shape, dtype=x.dtype, device=x.device)
            mask = torch.floor(mask + keep)
            return x.div(keep) * mask
        """,
    ),
    (
        Kind("drop_path"),
        """
        def forward(self, x):
            return drop_path(x, self.p, self.training)
        """,
    ),
    (
        Kind("drop_path"),
        """
        def forward(self, x):
            return drop_path(x, self.p, self.training, self.scale_by_keep)
        """,
    ),
]

_HELPERS: dict[str, list[str]] = {
    "root_mean_square": [
        """
        def _norm(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        """
    ],
    "drop_path": [
        """
        def drop_path(x, p=0.0, training=False):
            if p == 0.0 or not training:
                return x
            keep = 1 - p
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            mask = keep + torch.rand(shape, dtype=x.dtype, device=x.device)
            mask.floor_()
            out = x.div(keep) * mask
            return out
        """,
        """
        def drop_path(x, p=0.0, training=False, scale_by_keep=True):
            if p == 0.0 or not training:
                return x
            keep = 1 - p
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            mask = x.new_empty(shape).bernoulli_(keep)
            if keep > 0.0 and scale_by_keep:
                mask.div_(keep)
            return x * mask
        """,
    ],
}


def by_form(cls: type) -> tuple[Kind | None, tuple[At, ...]]:
    """The kind of the modules of a class, or None; and where the functions are that were read."""
    read = [At(cls, "forward")]
    try:
        function: Any = cls.forward  # type: ignore[attr-defined]
        form, attributes, called = _normal(source.parse(function))
    except source.Unreadable:
        return None, tuple(read)
    for found, wanted, roles in _forms():
        if form != wanted:
            continue
        names = dict(zip(roles, attributes, strict=True))
        helpers = {role: At(cls, names[role]) for role in roles if role in _HELPERS}
        helpers |= {n: At(function.__globals__, n) for n in called if n in _HELPERS}
        read += helpers.values()
        inner = [_match_helper(name, at.now()) for name, at in helpers.items()]
        if None in inner:
            continue
        for more in inner:
            names |= more or {}
        return replace(found, names={**found.names, **names}), tuple(read)
    return None, tuple(read)


def _match_helper(name: str, helper: Any) -> dict[str, str] | None:
    """The roles of a helper's attributes; None if it has none of the forms above."""
    try:
        form, attributes, _ = _normal(source.parse(helper))
    except source.Unreadable:
        return None
    for text in _HELPERS[name]:
        wanted, roles, _ = _normal(_template(text))
        if form == wanted:
            return dict(zip(roles, attributes, strict=True))
    return None


@functools.cache
def _forms() -> list[tuple[Kind, str, list[str]]]:
    return [(kind, *_normal(_template(text))[:2]) for kind, text in _FORMS]


def _template(text: str) -> ast.FunctionDef:
    node = ast.parse(textwrap.dedent(text)).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


_SPELLINGS = {"nn.functional": "F", "torch.nn.functional": "F"}


def _normal(node: ast.FunctionDef) -> tuple[str, list[str], set[str]]:
    """The normal form of a function, the attributes of self that it reads, and what it calls."""
    body = node.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        body = body[1:]
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    defaults = [ast.unparse(d) for d in node.args.defaults]
    normaliser = _Normaliser(arguments, body)
    text = "\n".join(ast.dump(normaliser.visit(copy.deepcopy(s))) for s in body)
    return f"{len(arguments)} {defaults} {text}", list(normaliser.attributes), normaliser.called


class _Normaliser(ast.NodeTransformer):
    """Renames variables and attributes of self to numbers, in the order in which they appear."""

    def __init__(self, arguments: list[str], body: list[ast.stmt]) -> None:
        self.owner = arguments[0] if arguments and arguments[0] == "self" else None
        self.variables = {name: f"v{i}" for i, name in enumerate(arguments)}
        self.local = set(arguments)
        for statement in body:
            for n in ast.walk(statement):
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                    self.local.add(n.id)
        self.attributes: dict[str, str] = {}
        self.called: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if ast.unparse(node) in _SPELLINGS:
            return ast.Name(_SPELLINGS[ast.unparse(node)], ast.Load())
        self.generic_visit(node)
        owned = isinstance(node.value, ast.Name) and node.value.id == "v0" and self.owner
        if owned and node.attr != "training":
            node.attr = self.attributes.setdefault(node.attr, f"a{len(self.attributes)}")
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self.local:
            node.id = self.variables.setdefault(node.id, f"v{len(self.variables)}")
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if isinstance(node.func, ast.Name) and node.func.id not in self.local:
            self.called.add(node.func.id)
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        if node.value is None:
            return node
        return ast.Assign(targets=[node.target], value=node.value)


_DROPOUT_ADD = """
    def dropout_add(x, residual, p, training):
        out = F.dropout(x, p=p, training=training)
        out = residual + out
        return out
"""


# The functions found to be such a helper, with their code: compiled code cannot read source.
ADDERS: dict[FunctionType, CodeType] = {}


def is_dropout_add(function: Any) -> bool:
    """Whether a function is the helper of Bloom and Falcon: residual + dropout(x, p, training)."""
    if not isinstance(function, FunctionType):
        return False
    try:
        same = _normal(source.parse(function)) == _normal(_template(_DROPOUT_ADD))
    except source.Unreadable:
        return False
    if same:
        ADDERS[function] = function.__code__
    return same
