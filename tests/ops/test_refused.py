"""What no op takes is refused by its name, also where a right call of the same shape is known."""

import sys
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tridrop
from tridrop.backends.cpu import serving
from tridrop.functional import known

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
Q = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(1))
META = torch.tensor(0.5, device="meta")


class One(IntEnum):
    ONE = 1


@pytest.fixture(params=["cpu", "reference"])
def way(request):
    if request.param == "cpu" and not serving._has_numba:
        pytest.skip("numba is not installed")
    with tridrop.backend(request.param):
        yield request.param


# --------------------------------------------------------------------------------------- windows

BEYOND = (1 << 35, sys.maxsize, 1 << 63, 1 << 200)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_window_beyond_all_keys_is_none(way, p):
    def attend(window, **options):
        query = Q.clone().requires_grad_()
        out = tridrop.scaled_dot_product_attention(
            query, Q, Q, dropout_p=p, window=window, seed=1, **options
        )
        return out.detach(), torch.autograd.grad(out.sum(), query)[0]

    for options in ({}, {"is_causal": True}, {"shard": ((1, 2, 20, 30), (0, 0, 9, 14))}):
        expected = attend(None, **options)
        assert expected[0].abs().sum() > 0
        for size in BEYOND:
            for window in (size, (size, None), (None, size), (size, size)):
                for found, wanted in zip(attend(window, **options), expected, strict=True):
                    assert torch.equal(found, wanted)
            left = attend((1, size), **options)
            for found, wanted in zip(left, attend((1, None), **options), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
def test_a_window_beyond_all_keys_is_none_in_triton():
    with tridrop.backend("triton"):
        expected = tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, seed=1)
        for size in BEYOND:
            found = tridrop.scaled_dot_product_attention(
                Q, Q, Q, dropout_p=0.5, window=size, seed=1
            )
            assert torch.equal(found, expected)


def test_lengths_of_packed_sequences_have_a_bound():
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    for name in ("max_seqlen_q", "max_seqlen_k"):
        with pytest.raises(ValueError, match=f"{name} = {1 << 63}; give"):
            tridrop.scaled_dot_product_attention(Q, Q, Q, **options, **{name: 1 << 63})


# --------------------------------------------------------------------------------------- devices

RATES = {
    "dropout": lambda p: tridrop.dropout(X, p),
    "dropout_add": lambda p: tridrop.dropout_add(X, X, p),
    "alpha_dropout": lambda p: tridrop.alpha_dropout(X, p, True),
    "gaussian_dropout": lambda p: tridrop.gaussian_dropout(X, p),
    "dropout_add_layer_norm": lambda p: tridrop.dropout_add_layer_norm(X, None, None, None, p),
    "rms_norm_dropout": lambda p: tridrop.rms_norm_dropout(X, None, p),
    "softmax_dropout": lambda p: tridrop.softmax_dropout(X, p),
    "attention": lambda p: tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=p),
    "keep_mask": lambda p: tridrop.keep_mask(1, (2, 3), p),
    "attention_keep_mask": lambda p: tridrop.attention_keep_mask(1, (1, 1, 2, 3), p),
    "lora_delta": lambda p: tridrop.lora_delta(X, torch.ones(2, 8), torch.ones(3, 2), p),
    "dropconnect_linear": lambda p: tridrop.dropconnect_linear(X, torch.ones(2, 8), None, p),
    "embedding_dropout": lambda p: tridrop.embedding_dropout(torch.arange(3), X, p),
    "word_dropout": lambda p: tridrop.word_dropout(torch.arange(3), p, token=1),
    "locked_dropout": lambda p: tridrop.locked_dropout(X, p),
    "head_dropout": lambda p: tridrop.head_dropout(X, p),
    "stochastic_depth": lambda p: tridrop.stochastic_depth(X, p, "row"),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_on_another_device_is_refused(way, name):
    with pytest.raises(ValueError, match=r"p is on meta but the data is on cpu"):
        RATES[name](META)
    RATES[name](torch.tensor(0.5))
    with pytest.raises(TypeError, match="p has the layout"):
        RATES[name](torch.tensor(0.5).to_sparse())


@pytest.mark.parametrize("name", ["grad", "out", "lse", "query", "key", "value"])
def test_backward_of_a_block_looks_at_every_tensor(name):
    out, lse = tridrop.scaled_dot_product_attention(Q, Q, Q, return_lse=True)
    given = {"grad": Q, "out": out, "lse": lse, "query": Q, "key": Q, "value": Q}
    tridrop.scaled_dot_product_attention_backward(**given, seed=1)
    other = torch.empty_like(given[name], device="meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu) but query is on"):
        tridrop.scaled_dot_product_attention_backward(**(given | {name: other}), seed=1)
    for wrong in (None, 3, [1.0], given[name].int(), given[name].to_sparse()):
        with pytest.raises(TypeError, match=name):
            tridrop.scaled_dot_product_attention_backward(**(given | {name: wrong}), seed=1)


@pytest.mark.parametrize("batch", [0, 2])
def test_backward_of_a_block_does_not_broadcast_the_query(batch):
    """Over the batch of the keys: the results, and so out and lse, have that batch."""
    one, others = Q[:1], Q[:1].repeat(batch, 1, 1, 1)
    out, lse = tridrop.scaled_dot_product_attention(one, one, one, return_lse=True)
    with pytest.raises(ValueError, match=f"the results have a batch of {batch}"):
        tridrop.scaled_dot_product_attention_backward(one, out, lse, one, others, others, seed=1)


# --------------------------------------------------------------------------------------- numbers

EPS = {
    "dropout_add_layer_norm": lambda e: tridrop.dropout_add_layer_norm(X, None, None, None, eps=e),
    "rms_norm_dropout": lambda e: tridrop.rms_norm_dropout(X, None, eps=e),
    "drop_block2d": lambda e: tridrop.drop_block2d(Q, 0.5, 3, eps=e),
    "drop_block3d": lambda e: tridrop.drop_block3d(Q[None], 0.5, 1, eps=e),
}


@pytest.mark.parametrize("name", EPS)
def test_eps_is_a_finite_number(name):
    for wrong in (float("inf"), float("nan"), -1.0, 1 << 2000):
        with pytest.raises(ValueError, match=r"eps = .*; it must be"):
            EPS[name](wrong)
    for wrong in (1j, "1e-5", [1e-5], True, torch.tensor(1e-5), np.complex64(1)):
        with pytest.raises(TypeError, match=r"eps is .*; give a number"):
            EPS[name](wrong)
    EPS[name](np.float64(1e-5))


FLAGS = {
    "prenorm": lambda f: tridrop.dropout_add_layer_norm(X, None, None, None, prenorm=f),
    "residual_in_fp32": lambda f: tridrop.dropout_add_rms_norm(X, X, None, residual_in_fp32=f),
    "zero_centered_weight": lambda f: tridrop.rms_norm_dropout(X, X[0], zero_centered_weight=f),
    "is_causal": lambda f: tridrop.softmax_dropout(X, is_causal=f),
    "return_softmax": lambda f: tridrop.softmax_dropout(X, return_softmax=f),
    "enable_gqa": lambda f: tridrop.scaled_dot_product_attention(Q, Q, Q, enable_gqa=f),
    "return_lse": lambda f: tridrop.scaled_dot_product_attention(Q, Q, Q, return_lse=f),
    "batch_first": lambda f: tridrop.locked_dropout(X, batch_first=f),
    "ordered": lambda f: tridrop.patch_dropout(X, num_prefix_tokens=0, ordered=f),
    "inplace": lambda f: tridrop.drop_block2d(Q.clone(), 0.5, 3, f),
    "shared_mask": lambda f: tridrop.lora_deltas(
        X, [torch.ones(2, 8)], [torch.ones(3, 2)], shared_mask=f
    ),
    "elementwise_affine": lambda f: tridrop.nn.DropoutAddLayerNorm(8, elementwise_affine=f),
    "scale_by_keep": lambda f: tridrop.nn.DropPath(0.5, f),
    "dry_run": lambda f: tridrop.swap(nn.Dropout(0.5), dry_run=f),
    "vectorize": lambda f: tridrop.mc_predict(
        nn.Sequential(nn.Dropout(0.5)), X, samples=1, vectorize=f
    ),
}
LOOK_ALIKES = (Fraction(0), Fraction(1), 0, 1, 0.0, np.True_, One.ONE, None, "yes", [1], {},
               torch.tensor(True), torch.ones(2), np.array([0, 1]))  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false_whatever_was_called_before(name):
    for first in (False, True):
        for wrong in LOOK_ALIKES:
            with pytest.raises(TypeError, match=rf"{name} is .*; give True or False"):
                FLAGS[name](wrong)
            FLAGS[name](first)
    for right in (False, True):
        FLAGS[name](right)


def test_what_equals_an_option_is_not_that_option():
    """In a new process, so to say: nothing is known, and the wrong call comes first."""

    def norm(flag):
        return tridrop.dropout_add_layer_norm(X, X, X[0], None, zero_centered_weight=flag, seed=1)

    known._known.clear()
    expected = norm(False)
    for wrong in (Fraction(0), 0, 0.0):
        known._known.clear()
        with pytest.raises(TypeError, match="zero_centered_weight is"):
            norm(wrong)
        for _ in range(2):
            assert torch.equal(norm(False), expected)
        with pytest.raises(TypeError, match="zero_centered_weight is"):
            norm(wrong)


def test_subclasses_of_int_are_plain_numbers_to_the_loops():
    """A loop is compiled for the types it is given: an IntEnum would be another, or none."""
    expected = tridrop.dropout(X[:1], shard=((1, 8), (0, 0)), seed=1)
    found = tridrop.dropout(X[:1], shard=((One.ONE, 8), (0, 0)), seed=One.ONE)
    assert torch.equal(found, expected)
    mask = tridrop.keep_mask(One.ONE, (One.ONE, 8), 0.5)
    assert torch.equal(mask, tridrop.keep_mask(1, (1, 8), 0.5))
    found = tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, window=One.ONE, seed=1)
    expected = tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, window=1, seed=1)
    assert torch.equal(found, expected)
    with pytest.raises(TypeError, match="window"):
        tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, window=(True, 1), seed=1)
    for _ in range(2):
        tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, window=[1, 1], seed=1)


WORDS = {
    "activation": lambda w: tridrop.activation_dropout(X, activation=w),
    "mode": lambda w: tridrop.stochastic_depth(X, 0.5, w),
    "rescale": lambda w: tridrop.head_dropout(X, rescale=w),
    "domain": lambda w: tridrop.keep_mask(1, (2, 3), 0.5, domain=w),
    "output": lambda w: tridrop.mc_predict(nn.Dropout(0.5), X, output=w),
    "data_format": lambda w: tridrop.nn.SpatialDropout1D(0.5, w),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_are_words(name):
    with pytest.raises(ValueError, match=f"{name} = 'other'; known"):
        WORDS[name]("other")
    for wrong in (3, [], {}, np.array(["a", "b"]), torch.ones(2)):
        with pytest.raises(TypeError, match=f"{name} is .*; give"):
            WORDS[name](wrong)


# --------------------------------------------------------------------------------------- tensors

ODD = {
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1, :3]]),
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "a word": lambda t: "x",
    "nothing": lambda t: None,
}
CALLS = {
    "x": lambda t: tridrop.dropout(t, 0.5, seed=1),
    "x of an activation": lambda t: tridrop.activation_dropout(t, 0.0, activation="relu"),
    "residual": lambda t: tridrop.dropout_add(X, t, 0.5, seed=1),
    "x of a norm": lambda t: tridrop.rms_norm_dropout(t, None, 0.5, seed=1),
    "scores": lambda t: tridrop.softmax_dropout(t, 0.5, seed=1),
    "x of tokens": lambda t: tridrop.patch_dropout(t, 0.5, num_prefix_tokens=0, seed=1),
    "A": lambda t: tridrop.lora_delta(X, t, torch.ones(2, 3), seed=1),
    "weight": lambda t: tridrop.dropconnect_linear(X, t, seed=1),
    "input of a module": lambda t: tridrop.nn.Dropout(0.5)(t),
    "x of a module": lambda t: tridrop.nn.DropPath(0.5)(t),
    "input of maps": lambda t: tridrop.nn.SpatialDropout1D(0.5)(X[None] if t is X else t),
    "input of a cell": lambda t: tridrop.nn.VariationalCell(nn.GRUCell(8, 4), 0.5)(t),
    "query": lambda t: tridrop.nn.MultiheadAttention(8, 2)(t, X, X),
    "src": lambda t: tridrop.nn.TransformerEncoderLayer(8, 2, 16)(t),
}


@pytest.mark.filterwarnings("ignore:.*Sparse CSR", "ignore:.*nested", "ignore:.*quantiz")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_in_plain_memory_is_refused(name, kind):
    odd = ODD[kind](X)
    torchs = name in ("query", "src")  # layers that compute on nested tensors, and torch's checks
    for _ in range(2):
        if torchs:
            with pytest.raises((TypeError, ValueError, AssertionError, RuntimeError)):
                CALLS[name](odd)
        else:
            with pytest.raises(TypeError, match=r"(tensor|layout|quantised|Tensor|dtype)"):
                CALLS[name](odd)
        CALLS[name](X)  # is known from now on
    with tridrop.rng(1), pytest.raises((TypeError, ValueError, AssertionError, RuntimeError)):
        CALLS[name](odd)


@pytest.mark.parametrize("name", ["query", "src"])
def test_layers_name_what_is_no_tensor(name):
    for wrong in (None, 3, "x", [1.0], X.numpy()):
        with pytest.raises(TypeError, match=f"{name} is of type"):
            CALLS[name](wrong)


@pytest.mark.parametrize("wrong", [None, 3, "x", X, nn.Linear])
def test_what_is_no_module_is_refused(wrong):
    for call in (
        tridrop.swap, tridrop.unswap, tridrop.nn.number_sites, tridrop.nn.remove_weight_drop,
        lambda m: tridrop.nn.weight_drop(m, "weight"), lambda m: tridrop.mc_predict(m, X),
        lambda m: tridrop.DropoutSchedule(m, abs),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
            call(wrong)


def test_a_seed_that_is_negated_lazily_is_what_it_says(way):
    seed = torch.tensor([7, 3])
    lazily = torch._neg_view(-seed)
    for _ in range(2):
        assert torch.equal(tridrop.dropout(X, seed=lazily), tridrop.dropout(X, seed=seed))
        assert torch.equal(
            tridrop.keep_mask(lazily, (3, 8), 0.5), tridrop.keep_mask(seed, (3, 8), 0.5)
        )
    with pytest.raises(TypeError, match="seed has the layout"):
        tridrop.dropout(X, seed=seed.to_sparse())


@pytest.mark.parametrize("wide", ["x", "residual", "weight", "norm_bias", "bias", "layer_scale"])
def test_gradients_of_one_operand_in_fp64(way, wide):
    """Also of one that backward does not keep, beside results in fp32."""
    names = ("x", "residual", "weight", "norm_bias", "bias", "layer_scale")
    shapes = {"x": (3, 8), "residual": (3, 8)}
    drawn = {n: torch.randn(shapes.get(n, (8,)), dtype=torch.float64) for n in names}

    def gradients(dtypes, **options):
        given = {n: t.to(dtypes.get(n, torch.float32)).requires_grad_() for n, t in drawn.items()}
        bias, scale = given.pop("bias"), given.pop("layer_scale")
        out = tridrop.dropout_add_layer_norm(
            *given.values(), 0.5, bias=bias, layer_scale=scale, seed=1, **options
        )
        grads = torch.autograd.grad(out.double().sum(), [*given.values(), bias, scale])
        for t, grad in zip([*given.values(), bias, scale], grads, strict=True):
            assert grad.dtype == t.dtype
        return grads

    exact = gradients(dict.fromkeys(names, torch.float64))
    for options in ({}, {"residual_in_fp32": True, "out_dtype": torch.float32}):
        for found, wanted in zip(gradients({wide: torch.float64}, **options), exact, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", ["x", "residual", "bias", "layer_scale"])
def test_gradients_of_one_operand_in_fp64_of_dropout_add(way, wide):
    drawn = {"x": X, "residual": X + 1, "bias": X[0], "layer_scale": X[1]}
    given = {n: (t.double() if n == wide else t.clone()).requires_grad_() for n, t in drawn.items()}
    x, residual = given.pop("x"), given.pop("residual")
    out = tridrop.dropout_add(x, residual, 0.5, **given, seed=1)
    for t, grad in zip(
        (x, residual, *given.values()),
        torch.autograd.grad(out.sum(), (x, residual, *given.values())),
        strict=True,
    ):
        assert grad.dtype == t.dtype
        assert grad.isfinite().all()


# ----------------------------------------------------------------------------- operators by name


class Recorder(TorchDispatchMode):
    """The calls of tridrop's operators, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "tridrop":
            self.calls[operator._opname] = operator, args
        return operator(*args, **(kwargs or {}))


FAMILIES = {
    "elementwise": lambda x: tridrop.dropout(x, 0.5, seed=1),
    "norm": lambda x: tridrop.rms_norm_dropout(x, x[0].detach(), p=0.5, seed=1),
    "softmax": lambda x: tridrop.softmax_dropout(x, 0.5, seed=1),
    "attention": lambda x: tridrop.scaled_dot_product_attention(
        *[x[None, None]] * 3, dropout_p=0.5, seed=1
    ),
    "product": lambda x: tridrop.lora_delta(x, x[:2].detach(), x[:, :2].detach(), p=0.5, seed=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_operator_that_drops_has_a_seed(way, family):
    """Called by name, as from an exported program that somebody edited."""
    x = X.clone().requires_grad_()
    with Recorder() as recorder:
        FAMILIES[family](x).sum().backward()
    found = {n: c for n, c in recorder.calls.items() if n.endswith(("forward", "backward"))}
    assert len(found) == 2
    for operator, args in found.values():
        names = [argument.name for argument in operator._schema.arguments]
        (place,) = (i for i, name in enumerate(names) if name in ("seed", "seeds"))
        operator(*args)
        with pytest.raises(ValueError, match=r"seeds? is None: give a seed tensor"):
            operator(*args[:place], None, *args[place + 1 :])
