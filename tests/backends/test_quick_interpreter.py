"""What the tests spare Triton's interpreter changes no result."""

import numpy as np
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

SEMANTIC = interpreter.interpreter_semantic
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


def made(cls, init, *given):
    """An instance that ``init`` made: what it has, or what it raised."""
    instance = cls.__new__(cls)
    try:
        init(instance, *given)
    except (TypeError, ValueError, AssertionError) as e:
        return type(e), str(e)
    return cls, {name: repr(value) for name, value in vars(instance).items()}


SHAPES = [[4], [1, 4], tl.core.tuple([2, 4]), tl.core.tuple([tl.constexpr(8), tl.constexpr(2)]),
          tl.constexpr([4]), [], [3], [1.0], [True], [tl.constexpr(1.0)], [1 << 21], 4]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_types_and_their_tensors_are_those_of_the_interpreter(shape):
    own, other = tl.dtype("fp32"), tl.pointer_type(tl.dtype("int8"))
    for element in (own, other, own, other):
        plain = made(tl.block_type, quick_interpreter.PLAIN_BLOCK, element, shape)
        assert made(tl.block_type, tl.block_type.__init__, element, shape) == plain
        if plain[0] is tl.block_type:
            block = tl.block_type(element, shape)
            assert block.element_ty is element
            for handle in ("one", "another"):
                given = (tl.tensor, quick_interpreter.PLAIN_TENSOR, handle, block)
                assert made(tl.tensor, tl.tensor.__init__, handle, block) == made(*given)
    for handle in ("one", "another"):
        plain = made(tl.tensor, quick_interpreter.PLAIN_TENSOR, handle, own)
        assert made(tl.tensor, tl.tensor.__init__, handle, own) == plain


def answer(function, *given):
    try:
        return function(*given)
    except Exception as e:
        return type(e), str(e)


@pytest.mark.parametrize("name", NAMES)
def test_types_of_operands_are_those_of_the_interpreter(name):
    for other in NAMES:
        for rest in ((False, False), (True, False), (False, True), (True, True)):
            for divides in (False, True):
                given = (tl.dtype(name), rest[0], tl.dtype(other), rest[1], divides)
                plain = answer(quick_interpreter.PLAIN_COMPUTATION, *given)
                for _ in range(2):
                    assert answer(SEMANTIC.computation_type_impl, *given) == plain


@pytest.fixture
def launched():
    """The language is replaced as in a launch of a kernel, which sees ``tl`` as this file does."""
    scope = interpreter._patch_lang(answer)
    yield
    scope.restore()


def assert_same_tensors(found, plain, given=()):
    """A tensor or a pair, of which some may be the given ones; or what was raised instead."""
    if isinstance(plain, tl.tensor):
        found, plain = (found,), (plain,)
    if not isinstance(plain[0], tl.tensor):
        assert found == plain
        return
    assert [t.type for t in found] == [t.type for t in plain]
    for quick, slow in zip(found, plain, strict=True):
        assert quick.dtype == slow.dtype
        assert quick.handle.dtype == slow.handle.dtype
        assert quick.handle.data.shape == slow.handle.data.shape
        assert quick.handle.data.dtype == slow.handle.data.dtype
        assert quick.handle.data.tobytes() == slow.handle.data.tobytes()
        assert [quick is one for one in given] == [slow is one for one in given]
        assert not quick.handle.attr


def assert_kept_for_all(number):
    """Its memory cannot be changed, and its attributes are this caller's."""
    assert not number.handle.attr
    with pytest.raises(ValueError, match="read-only"):
        number.handle.data[0] = 0
    number.handle.set_attr("one caller's", 1)


def tensors(own):
    """Of an element type: a scalar and blocks of one and two dimensions."""
    shapes = ((1,), (4,), (2, 4), (2, 1), (1, 1))
    made = []
    for shape in shapes:
        numbers = 1.25 * np.arange(1, 1 + np.prod(shape)).reshape(shape)
        data = numbers.astype(interpreter._get_np_dtype(own))
        kind = tl.block_type(own, list(shape)) if made else own
        made.append(tl.tensor(interpreter.TensorHandle(data, own), kind))
    return made


def test_constants_from_outside_of_a_launch_are_not_kept():
    SEMANTIC.scalar_constant(0, tl.uint64)  # there it would be of int64
    scope = interpreter._patch_lang(answer)
    try:
        assert SEMANTIC.scalar_constant(0, tl.uint64).handle.data.dtype == np.uint64
    finally:
        scope.restore()


@pytest.mark.usefixtures("launched")
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of 1 << 31 in fp16
@pytest.mark.parametrize("name", ["int1", "int32", "uint32", "int64", "fp16", "fp32", "fp64"])
def test_constants_are_those_of_the_interpreter(name):
    numbers = (0, 1, True, False, 1.0, -0.0, 0.0, -0.0, 2.5, float("nan"), float("inf"), 1 << 31)
    for value in numbers:
        plain = answer(quick_interpreter.PLAIN_CONSTANT, value, tl.dtype(name))
        for _ in range(2):
            found = answer(SEMANTIC.scalar_constant, value, tl.dtype(name))
            assert_same_tensors(found, plain)
            if isinstance(plain, tl.tensor):
                assert_kept_for_all(found)
    with pytest.raises(ValueError, match="dtype must be specified"):
        SEMANTIC.scalar_constant(1, None)


# numpy has no arithmetic of the types of 8 bits.
COMPUTED = [n for n in NAMES if not n.startswith("fp8")]
RULES = [(), (True, True), (False, False, False), (False, False, True, True)]


@pytest.mark.usefixtures("launched")
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of 1 << 40 in fp16
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("name", [*COMPUTED, "pointer"])
def test_operands_are_those_of_the_interpreter(name, rules):
    own = tl.pointer_type(tl.float32) if name == "pointer" else tl.dtype(name)
    made = tensors(own)
    for lhs in made:
        for other in (*made, 1, True, -1, 1 << 40, 2.5, 0.0, -0.0):
            for pair in ((lhs, other), (other, lhs), (lhs, other), (other, lhs)):
                plain = answer(quick_interpreter.PLAIN_OPERANDS, *pair, *rules)
                found = answer(SEMANTIC.binary_op_type_checking_impl, *pair, *rules)
                assert_same_tensors(found, plain, pair)


@pytest.mark.usefixtures("launched")
def test_a_number_beside_a_tensor_cannot_be_changed_for_the_next():
    block = tensors(tl.float32)[2]
    for _ in range(2):
        _, number = SEMANTIC.binary_op_type_checking_impl(block, 2.5)
        assert_kept_for_all(number)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("name", NAMES)
def test_conversions_are_those_of_the_interpreter(name):
    for value in tensors(tl.dtype(name)):
        for other in NAMES:
            for target in (tl.dtype(other), tl.block_type(tl.dtype(other), [8])):
                for rounding in (None, "rtne", "rtz", "up", None):
                    given = (value, target, rounding)
                    plain = answer(quick_interpreter.PLAIN_CAST, *given)
                    found = answer(SEMANTIC.cast, *given)
                    assert_same_tensors(found, plain, (value,))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("name", ["int1", "uint32", "fp16", "bf16", "fp32"])
def test_broadcast_tensors_are_those_of_the_interpreter(name):
    wrong = tl.tensor(tensors(tl.float32)[1].handle, tl.block_type(tl.float32, [8]))
    for lhs in tensors(tl.dtype(name)):
        for rhs in (*tensors(tl.float32), *tensors(tl.dtype(name)), wrong):
            for pair in ((lhs, rhs), (rhs, lhs), (lhs, rhs)):
                plain = answer(quick_interpreter.PLAIN_BROADCAST, *pair)
                found = answer(SEMANTIC.broadcast_impl_value, *pair)
                assert_same_tensors(found, plain, pair)


def test_constants_of_the_language_are_unwrapped_as_by_the_interpreter():
    one = tl.constexpr(1)
    tensor = tensors(tl.float32)[0]
    for value in (one, 1, 1.0, True, None, "a", tensor, tl.float32, [one, 2], (one, 2),
                  tl.core.tuple([one, tensor]), {"a": one}, slice(one)):  # fmt: skip
        plain = quick_interpreter.PLAIN_UNWRAP(value)
        found = tl.core._unwrap_if_constexpr(value)
        assert (type(found), repr(found)) == (type(plain), repr(plain))
        assert (found is value) == (plain is value)


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
    for where, name, plain, _ in quick_interpreter.REPLACED:
        monkeypatch.setattr(where, name, plain)
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
