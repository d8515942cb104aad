"""Which calls of a planned method have to do with tensors that backward makes again.

A norm, an activation and a gated product give such tensors, and linear layers would keep them. All
of them are told so, wherever they stand: no dropout need be near.
"""

from __future__ import annotations

import ast

from .rewrite import Op, Plan, sources

# "matrix" is a linear layer that has no bias to hand on, or is of some other library.
REMADE = ("norm", "activation", "product", "linear", "matrix")


def remake(made: Plan) -> None:
    """Add what swap(memory=True) does to a method's plan."""
    made.memory = True
    for n in ast.walk(made.node):
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult):
            factors = (n.left, n.right)
            if any(op.name == "activation" for x in factors for op, _ in sources(made, x)):
                made.ops[n] = Op("product", n, factors)
    made.apart = {op for op in made.ops.values() if op.name in REMADE} - made.emitted
    made.emitted |= made.apart
