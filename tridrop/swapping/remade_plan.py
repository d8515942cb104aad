"""Adds calls without a dropout near to the plan of a method, most of them for swap(memory=True).

Norms, activations and gated products give tensors that backward can recompute, and linear layers
would keep these. Calls of all of them are exchanged for the functions of remade_calls.py, whether
or not a dropout is near.
"""

from __future__ import annotations

import ast

from .rewrite import Op, Plan, sources

# "matrix" is a linear layer without a bias, or one of another library.
REMADE = ("norm", "activation", "product", "linear", "matrix")


def remake(made: Plan) -> None:
    """Extend a plan by the calls that matter for memory=True."""
    made.memory = True
    for n in ast.walk(made.node):
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult):
            factors = (n.left, n.right)
            if any(op.name == "activation" for x in factors for op, _ in sources(made, x)):
                made.ops[n] = Op("product", n, factors)
    made.alone = {op for op in made.ops.values() if op.name in REMADE} - made.emitted
    made.emitted |= made.alone


def join(made: Plan) -> None:
    """Extend a plan that has a fused call by the activations of the method, without memory=True."""
    if made.emitted:
        made.alone = {op for op in made.ops.values() if op.name == "activation"} - made.emitted
        made.emitted |= made.alone
