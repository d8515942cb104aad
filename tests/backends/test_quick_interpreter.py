"""What the tests spare Triton's interpreter changes no result."""

import pytest
import torch
import triton.language as tl
from hosts import DEVICE

import tridrop
from tridrop.backends.triton import launch

if not launch.interpreting():
    pytest.skip("the kernels are compiled", allow_module_level=True)

import quick_interpreter
from triton.runtime import interpreter

NAMES = [n for kind in ("SINT", "UINT", "FP") for n in getattr(tl.dtype, f"{kind}_TYPES")]


@pytest.mark.parametrize("name", NAMES)
def test_the_types_are_those_of_the_interpreter(name):
    own = tl.dtype(name)
    for given in (own, tl.pointer_type(own), tl.block_type(own, [4]),
                  tl.block_type(tl.pointer_type(own), [2, 4])):  # fmt: skip
        for _ in range(2):
            assert interpreter._get_np_dtype(given) is quick_interpreter.PLAIN_TYPE(given)


def test_an_unknown_type_raises_as_before():
    with pytest.raises(KeyError):
        interpreter._get_np_dtype(tl.void)


def results(op):
    """A norm's kernel calls functions of Triton's own library and of several files."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 40, generator=generator).to(DEVICE).requires_grad_()
    with tridrop.backend("triton"):
        if op == "norm":
            out = tridrop.dropout_add_layer_norm(x, x, None, None, 0.3, seed=5)
        else:
            q = x.view(1, 1, 9, 40)
            out = tridrop.scaled_dot_product_attention(q, q, q, dropout_p=0.3, seed=5)
        return out, *torch.autograd.grad(out.square().sum(), x)


@pytest.mark.parametrize("op", ["norm", "attention"])
def test_the_results_are_those_of_the_plain_interpreter(monkeypatch, op):
    found = results(op)
    monkeypatch.setattr(interpreter, "_patch_lang", quick_interpreter.PLAIN_PATCH)
    monkeypatch.setattr(interpreter, "_get_np_dtype", quick_interpreter.PLAIN_TYPE)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick_interpreter.PLAIN_OPTIONS)
    for quick, plain in zip(found, results(op), strict=True):
        assert torch.equal(quick, plain)
        assert plain.abs().max() > 0


def test_a_launch_replaces_the_language_once_and_puts_it_back(monkeypatch):
    plain, made = quick_interpreter.PLAIN_PATCH, []
    load, add = tl.load, tl.tensor.__add__

    def counted(function):
        made.append(function)
        assert tl.load is load or len(made) > 1
        return plain(function)

    monkeypatch.setattr(quick_interpreter, "PLAIN_PATCH", counted)
    x = torch.ones(3, 5000, device=DEVICE)
    with tridrop.backend("triton"):
        tridrop.dropout(x, 0.5, seed=1)
        assert 1 <= len(made) <= 2  # the second time for the module that Triton's library sees
        assert not quick_interpreter._replaced
        assert (tl.load, tl.tensor.__add__) == (load, add)
        once = len(made)
        tridrop.dropout(x, 0.5, seed=1)
    assert len(made) == 2 * once


def test_a_launch_that_fails_puts_the_language_back(monkeypatch):
    load = tl.load

    def broken(self, *_):
        raise RuntimeError("no memory to read")

    with monkeypatch.context() as patched, tridrop.backend("triton"):
        patched.setattr(type(interpreter.interpreter_builder), "create_masked_load", broken)
        with pytest.raises(interpreter.InterpreterError, match="no memory to read"):
            tridrop.dropout(torch.ones(9, device=DEVICE), 0.5, seed=1)
    assert tl.load is load
    assert not quick_interpreter._replaced


def test_checks_of_the_debug_mode_stay_there():
    options = quick_interpreter.PLAIN_OPTIONS
    assert not options.debug
    assert options.sanitize_overflow
    assert not quick_interpreter.unchecked(options).sanitize_overflow
    debug = type(options)(debug=True)
    assert quick_interpreter.unchecked(debug) is debug
