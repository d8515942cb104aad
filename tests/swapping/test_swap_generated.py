"""tridrop.swap of generated forwards: eager's numbers, where eager has any."""

import contextlib
import linecache
import textwrap

import pytest
import swap_twin
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_forwards import E, N, Parts
from swap_twin import draw, fill, hold

import tridrop

ONE = swap_twin.SWITCHES[:1]
VALUES = st.sampled_from(["x", "y", "z"])
EXPRESSIONS = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("self.{}({})".format, st.sampled_from(
            ["linear", "other", "act", "norm", "norm2", "drop", "drop2", "drop3", "inplace"]
        ), inner),
        st.builds("{} * {}".format, VALUES, inner),
        st.builds("F.dropout({}, self.rate, self.training)".format, inner),
        st.builds("F.gelu({})".format, inner),
    ),
    max_leaves=4,
)  # fmt: skip
SIMPLE = st.one_of(
    st.builds("{} = {}".format, VALUES, EXPRESSIONS),
    st.builds("{} = {}".format, VALUES, EXPRESSIONS),
    st.builds("{} += {}".format, VALUES, EXPRESSIONS),
    st.builds("{}.mul_(0.5)".format, VALUES),
    st.builds("{}, {} = {}, {}".format, VALUES, VALUES, EXPRESSIONS, EXPRESSIONS),
)


def indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


BLOCK = st.lists(SIMPLE, min_size=1, max_size=3).map(indented)
STATEMENTS = st.one_of(
    SIMPLE,
    SIMPLE,
    st.builds("if {}.sum() > 0:\n{}\nelse:\n{}".format, VALUES, BLOCK, BLOCK),
    st.builds("for i in range(2):\n{}".format, BLOCK),
    st.builds("for i in range(3):\n    if i == 1:\n        continue\n{}".format, BLOCK),
    st.builds("while z.sum() > 0:\n{}\n    break\nelse:\n{}".format, BLOCK, BLOCK),
    st.builds("try:\n{}\n    x.missing\nexcept AttributeError:\n{}".format, BLOCK, BLOCK),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(STATEMENTS, min_size=1, max_size=5), st.lists(EXPRESSIONS, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_generated_forwards(statements, results):
    """Whatever the forward: eager's numbers, where eager has any."""
    returned = f"return {' + '.join(results)}"
    body = indented(["x, y, z = x * 1, x * 2, x * 3", *statements, returned])
    text = f"def forward(self, x):\n{body}\n"
    name = f"<generated {abs(hash(text))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    names = {"F": F}
    exec(compile(text, name, "exec"), names)
    model = fill(type("Generated", (Parts,), {"forward": names["forward"]})(), 0.1)
    ours = swap_twin.clone(model)
    report = tridrop.swap(ours)
    with swap_twin.logged() as log, contextlib.suppress(RuntimeError):
        swap_twin.outcome(ours.train(), (draw(N, E),))
    try:
        with swap_twin.replayed(log, report, model):
            swap_twin.outcome(model.train(), (draw(N, E),))
        for twin in (swap_twin.quiet(model).train(), model.eval()):
            swap_twin.outcome(twin, (draw(N, E),))
    except RuntimeError:  # of a gradient of what was changed in place
        return
    hold(model, draw(N, E), switches=ONE)
