"""Each activation of the spec has its entry in every table, and a table without one says so."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import tridrop
from tridrop.backends.cpu import serving
from tridrop.backends.reference import elementwise
from tridrop.commands.check.cases import EAGER_FUNCTIONS
from tridrop.spec import elementwise as spec
from tridrop.swapping import kinds

FUNCTIONS = sorted({function for function, _ in spec.ACTIVATIONS.values()})
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_numba = pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")


def test_the_tables_in_torch_have_the_functions_of_the_spec():
    assert sorted(elementwise.FUNCTIONS) == FUNCTIONS
    assert sorted(EAGER_FUNCTIONS) == FUNCTIONS


@needs_triton
def test_the_kernels_have_a_forward_and_a_backward_of_each():
    from tridrop.backends.triton import activations

    assert sorted(activations.FUNCTIONS) == FUNCTIONS
    pairs = activations.FUNCTIONS.values()
    assert len({f.__name__ for pair in pairs for f in pair}) == 2 * len(FUNCTIONS)


@needs_numba
def test_the_loops_have_each_in_full_and_short_precision():
    from tridrop.backends.cpu.loops import activations

    assert sorted(activations.FUNCTIONS) == FUNCTIONS
    assert list(activations.FORMS) == list(activations.FUNCTIONS)
    for name, (full, short) in activations.FORMS.items():
        assert (full is not short) == elementwise.FUNCTIONS[name].curved, name
    forms = {form for pair in activations.FORMS.values() for form in pair}
    assert len({form.name for form in forms}) == len(forms)  # each has a file of its own on disk
    assert {form.name for form in forms if form.address == 0} == {"none"}


def test_an_activation_without_an_entry_names_the_table():
    short = dict.fromkeys(n for n in FUNCTIONS if n != "silu")
    with pytest.raises(NotImplementedError, match=r"silu, and here has no entry.*CONTRIBUTING"):
        spec.check_functions(short, "here")
    with pytest.raises(NotImplementedError, match=r"here has .* swish, and spec.ACTIVATIONS has"):
        spec.check_functions({**dict.fromkeys(FUNCTIONS), "swish": None}, "here")


@needs_numba
def test_a_function_that_the_loops_lack_is_no_other_function(monkeypatch):
    loops = serving.kernels()
    without = {name: f for name, f in loops.functions.items() if name != "silu"}
    monkeypatch.setattr(loops, "functions", without)
    with pytest.raises(NotImplementedError, match=r"silu, and .*/loops/activations.FUNCTIONS"):
        tridrop.activation_dropout(torch.ones(3, 17), 0.25, activation="silu", seed=1)


def test_what_users_read_names_the_table():
    """And, for example, what is in it; the error of a wrong name lists all."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    row = next(line for line in readme.splitlines() if "`activation_dropout(" in line)
    doc = tridrop.activation_dropout.__doc__
    file = "tridrop/spec/elementwise.py"
    assert Path(spec.__file__).as_posix().endswith(file)
    for text, table in ((row, f"[`ACTIVATIONS`]({file})"), (doc, f"{spec.__name__}.ACTIVATIONS")):
        assert table in text
        examples = re.findall(r'"(\w+)"', text)
        assert len(examples) > 1
        assert set(examples) <= set(spec.ACTIVATIONS)
    with pytest.raises(ValueError, match=", ".join(spec.ACTIVATIONS)):
        tridrop.activation_dropout(torch.ones(2), activation="swish")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_are_derivatives(name):
    u = torch.linspace(-6, 6, 1000, dtype=torch.float64, requires_grad=True)
    function = elementwise.FUNCTIONS[name]
    (slope,) = torch.autograd.grad(function.value(u).sum(), u)
    torch.testing.assert_close(function.slope(u), slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(function.torchs(u), function.value(u), rtol=0, atol=0)
    if function.backward is not None:
        grad = torch.randn_like(u)
        torch.testing.assert_close(function.backward(grad, u), grad * slope)


class Block(torch.nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc, self.act, self.dropout = torch.nn.Linear(8, 24), act, torch.nn.Dropout(0.25)

    def forward(self, x):
        return self.dropout(self.act(self.fc(x)))


@pytest.mark.parametrize("kind", kinds._ACTIVATIONS)
def test_modules_of_transformers_are_swapped(kind):
    activations = pytest.importorskip("transformers.activations")
    if not hasattr(activations, kind):
        pytest.skip(f"this transformers has no {kind}")
    model = Block(getattr(activations, kind)())
    x = torch.randn(5, 8)
    hidden = model.act(model.fc(x)).detach()
    (site,) = tridrop.swap(model).sites
    assert "activation" in site.parts
    with tridrop.rng(3):
        out = model(x)
    torch.testing.assert_close(out, torch.where(out != 0, hidden / 0.75, 0.0))
    assert (out == 0).any()
