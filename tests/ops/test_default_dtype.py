"""torch.set_default_dtype changes what a model is made of, and nothing in an op."""

import copy
from contextlib import contextmanager

import pytest
import torch
from hosts import DEVICE

import tridrop
from tridrop.backends.cpu import serving
from tridrop.commands import check
from tridrop.functional import known

DEFAULTS = [torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def calls_of_their_own(monkeypatch):
    monkeypatch.setattr(known, "_known", {})


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors_of(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (tuple, list)):
        return [t for part in found for t in tensors_of(part)]
    return []


def equal(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def same_everywhere(run):
    """``run()`` gives tensors, bit for bit the same under every default dtype."""
    expected = tensors_of(run())
    assert expected
    for dtype in DEFAULTS:
        known._known.clear()
        with default_dtype(dtype):
            found = tensors_of(run())
        assert equal(found, expected), dtype


def run_case(case, inputs, p):
    """The result of a row and the gradients of all its operands, and its masks."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = case.call(leaves, 5, p, True)
    results = tensors_of(out)
    grads = torch.autograd.grad(results[0].float().sum(), list(leaves.values()), allow_unused=True)
    masks = case.masks(5, DEVICE).values() if case.rates else ()
    return [*results, *(g for g in grads if g is not None), *masks]


PLAIN = ["cpu", "reference"] if serving.can_serve() and DEVICE == "cpu" else ["reference"]


@pytest.mark.parametrize("case", check.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((name, torch.bfloat16) for name in PLAIN), ("triton", torch.float32)],
    ids=[*PLAIN, "triton"],
)
def test_every_case(case, backend, dtype):
    inputs = case.inputs(dtype, DEVICE, torch.Generator().manual_seed(1))
    with tridrop.backend(backend):
        same_everywhere(lambda: run_case(case, inputs, case.p))


X = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def rate(x, value=0.3):
    """A rate in a tensor, of a dtype that the caller has chosen."""
    return torch.tensor(value, dtype=torch.float32, device=x.device)


CALLS = {
    "dropout": lambda x: tridrop.dropout(x, rate(x), seed=1),
    "activation_dropout": lambda x: tridrop.activation_dropout(
        x, rate(x), activation="geglu", seed=1
    ),
    "dropout_add": lambda x: tridrop.dropout_add(x, x, rate(x), drop_path=0.2, seed=1),
    "alpha_dropout": lambda x: tridrop.alpha_dropout(x, rate(x), True, seed=1),
    "feature_alpha_dropout": lambda x: tridrop.feature_alpha_dropout(x, 0.3, True, seed=1),
    "gaussian_dropout": lambda x: tridrop.gaussian_dropout(x, 0.3, seed=1),
    "gaussian_dropout, p a tensor": lambda x: tridrop.gaussian_dropout(x, rate(x), seed=1),
    "dropout1d": lambda x: tridrop.dropout1d(x[0], 0.3, seed=1),
    "dropout2d": lambda x: tridrop.dropout2d(x, 0.3, seed=1),
    "dropout3d": lambda x: tridrop.dropout3d(x, 0.3, seed=1),
    "drop_block2d": lambda x: tridrop.drop_block2d(x, 0.3, 3, seed=1),
    "drop_block3d": lambda x: tridrop.drop_block3d(x[None], 0.3, 3, seed=1),
    "head_dropout": lambda x: tridrop.head_dropout(x, 0.3, rescale="kept", seed=1),
    "head_dropout, one of three": lambda x: tridrop.head_dropout(
        x[:, :3], 0.3, rescale="kept", seed=4
    ),
    "patch_dropout": lambda x: tridrop.patch_dropout(x, 0.3, seed=1),
    "stochastic_depth": lambda x: tridrop.stochastic_depth(x, 0.3, "row", seed=1),
    "drop_path_subset": lambda x: tridrop.drop_path_subset(x, torch.exp, 0.3, seed=1),
    "locked_dropout": lambda x: tridrop.locked_dropout(x[0], rate(x), seed=1),
    "embedding_dropout": lambda x: tridrop.embedding_dropout(
        torch.arange(4, device=x.device), x[0, 0], 0.3, seed=1
    ),
    "dropconnect_linear": lambda x: tridrop.dropconnect_linear(x, x[0, 0], None, 0.3, seed=1),
    "layer_norm_dropout": lambda x: tridrop.layer_norm_dropout(x, None, None, rate(x), seed=1),
    "rms_norm_dropout": lambda x: tridrop.rms_norm_dropout(x, None, rate(x), seed=1),
    "lora_deltas": lambda x: tridrop.lora_deltas(
        x, (x[0, 0],) * 2, (x[0, 1],) * 2, 0.3, seed=(1, 2)
    ),
    "dropout_add_layer_norm": lambda x: tridrop.dropout_add_layer_norm(
        x, x, None, None, rate(x), seed=1
    ),
    "dropout_add_rms_norm": lambda x: tridrop.dropout_add_rms_norm(
        x, x, None, None, rate(x), seed=1
    ),
    "softmax_dropout": lambda x: tridrop.softmax_dropout(x, rate(x), seed=1),
    "scaled_dot_product_attention": lambda x: tridrop.scaled_dot_product_attention(
        x, x, x, dropout_p=rate(x), seed=1
    ),
    "lora_delta": lambda x: tridrop.lora_delta(x, x[0, 0], x[0, 1], rate(x), seed=1),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", PLAIN)
def test_every_function_and_rates_in_tensors(name, backend):
    def run():
        x = X.clone().requires_grad_()
        out = CALLS[name](x)
        (grad,) = torch.autograd.grad(tensors_of(out)[0].float().square().sum(), x)
        return out, grad

    with tridrop.backend(backend):
        same_everywhere(run)


def test_masks_and_noise():
    same_everywhere(lambda: tridrop.keep_mask(1, (5, 40), 0.3))
    same_everywhere(lambda: tridrop.attention_keep_mask(1, (1, 2, 8, 8), 0.3))
    same_everywhere(lambda: tridrop.kept_indices(1, (5, 40), 7))
    same_everywhere(lambda: tridrop.normal_noise(1, (5, 40)))
    with default_dtype(torch.float64):
        assert tridrop.normal_noise(1, (5, 40)).dtype == torch.float32
        assert tridrop.new_seed("cpu").dtype == torch.int64
        tridrop.dropout(torch.ones(3), 0.5)  # draws a seed


def models():
    torch.manual_seed(0)
    layer = tridrop.nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True)
    yield "TransformerEncoderLayer", layer, torch.randn(3, 5, 16)
    yield (
        "weight_drop",
        tridrop.nn.weight_drop(torch.nn.Linear(16, 8), "weight", 0.3),
        torch.ones(3, 16),
    )
    rnn = tridrop.nn.VariationalRNN(
        torch.nn.LSTM(16, 8, batch_first=True), input_dropout=0.2, recurrent_dropout=0.2
    )
    yield "VariationalRNN", rnn, torch.randn(3, 5, 16)


@pytest.mark.parametrize("which", range(3))
def test_modules_made_before(which):
    _, model, x = list(models())[which]
    model.train()

    def run():
        again = copy.deepcopy(model)
        with tridrop.rng(3):
            out = again(x)
        tensors_of(out)[0].sum().backward()
        return out, [p.grad for p in again.parameters() if p.grad is not None]

    same_everywhere(run)


def test_monte_carlo():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), tridrop.nn.Dropout(0.3), torch.nn.Linear(8, 3)
    )
    x = torch.randn(5, 8)

    def run():
        found = tridrop.mc_predict(model, x, samples=6, seed=1)
        return [found.mean, found.spread]

    same_everywhere(run)
