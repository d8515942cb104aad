"""What torch takes is taken, what it refuses is refused in words: rates, modes, nested tensors."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tridrop

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Q = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.arange(3)
A, B = torch.ones(2, 4), torch.ones(5, 2)

# (rate, training) -> a result that is not that of p = 0
CALLS = {
    "dropout": lambda p, t: tridrop.dropout(X, p, t, seed=1),
    "dropout1d": lambda p, t: tridrop.dropout1d(X, p, t, seed=1),
    "dropout2d": lambda p, t: tridrop.dropout2d(Q, p, t, seed=1),
    "dropout3d": lambda p, t: tridrop.dropout3d(Q, p, t, seed=1),
    "alpha_dropout": lambda p, t: tridrop.alpha_dropout(X, p, t, seed=1),
    "feature_alpha_dropout": lambda p, t: tridrop.feature_alpha_dropout(X, p, t, seed=1),
    "gaussian_dropout": lambda p, t: tridrop.gaussian_dropout(X, p, t, seed=1),
    "activation_dropout": lambda p, t: tridrop.activation_dropout(
        X, p, t, activation="gelu", seed=1
    ),
    "dropout_add": lambda p, t: tridrop.dropout_add(X, X, p, t, drop_path=p, seed=1),
    "dropout_add_layer_norm": lambda p, t: tridrop.dropout_add_layer_norm(
        X, X, None, None, p, t, drop_path=p, seed=2
    ),
    "dropout_add_rms_norm": lambda p, t: tridrop.dropout_add_rms_norm(
        X, X, None, None, p, t, seed=1
    ),
    "layer_norm_dropout": lambda p, t: tridrop.layer_norm_dropout(X, None, None, p, t, seed=1),
    "rms_norm_dropout": lambda p, t: tridrop.rms_norm_dropout(X, None, p, t, seed=1),
    "softmax_dropout": lambda p, t: tridrop.softmax_dropout(X, p, t, seed=1),
    "lora_delta": lambda p, t: tridrop.lora_delta(X, A, B, p, t, seed=1),
    "dropconnect_linear": lambda p, t: tridrop.dropconnect_linear(X, A, None, p, t, seed=1),
    "embedding_dropout": lambda p, t: tridrop.embedding_dropout(WORDS, X, p, t, seed=1),
    "word_dropout": lambda p, t: tridrop.word_dropout(WORDS, p, t, token=7, seed=1),
    "locked_dropout": lambda p, t: tridrop.locked_dropout(Q[0], p, t, seed=1),
    "stochastic_depth": lambda p, t: tridrop.stochastic_depth(Q, p, "row", t, seed=2),
    "head_dropout": lambda p, t: tridrop.head_dropout(Q, p, t, seed=1),
    "head_dropout, kept": lambda p, t: tridrop.head_dropout(Q, p, t, rescale="kept", seed=1),
    "drop_block2d": lambda p, t: tridrop.drop_block2d(Q, p, 3, training=t, seed=1),
    "patch_dropout": lambda p, t: tridrop.patch_dropout(Q[0], p, t, seed=1),
    "drop_path_subset": lambda p, t: tridrop.drop_path_subset(X, torch.exp, p, t, seed=1),
    "layer_drop": lambda p, t: torch.tensor(tridrop.layer_drop([1, 2, 3], p, t, seed=1)),
}


@pytest.mark.filterwarnings("ignore:dropout3d is for", "ignore:.*dropout3d")
@pytest.mark.parametrize("name", CALLS)
def test_numpys_numbers_are_rates(name):
    expected, evaluated = CALLS[name](0.5, True), CALLS[name](0.5, False)
    assert expected.shape != evaluated.shape or not torch.equal(expected, evaluated)
    for kind in (np.float16, np.float32, np.float64):
        for _ in range(2):
            assert torch.equal(CALLS[name](kind(0.5), True), expected)
    with pytest.raises(ValueError, match="must lie in"):
        CALLS[name](np.float32(1.5), True)
    for wrong in (np.array(0.5), np.True_, "0.5"):
        with pytest.raises(TypeError, match="give a number in"):
            CALLS[name](wrong, True)


@pytest.mark.filterwarnings("ignore:dropout3d is for", "ignore:.*dropout3d")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_training_is_a_bool(name, known):
    """As torch has it, also where the same call with a bool has been met."""
    if known:
        CALLS[name](0.5, True), CALLS[name](0.5, False)
    for wrong in ("no", 1, 0, None, np.True_, torch.tensor(True)):
        with pytest.raises(TypeError, match=r"training is .*; give True or False"):
            CALLS[name](0.5, wrong)


def test_attention_and_models_take_numpys_numbers():
    expected = tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5, seed=1)
    found = tridrop.scaled_dot_product_attention(Q, Q, Q, dropout_p=np.float32(0.5), seed=1)
    assert torch.equal(found, expected)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, np.float32(0.5), batch_first=True)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    other.self_attn.dropout = 0.5
    report = tridrop.swap(model)
    tridrop.swap(other)
    assert [site.p for site in report.sites] == [0.5] * 4
    x = torch.randn(2, 3, 8)
    with tridrop.rng(3):
        found = model(x)
    with tridrop.rng(3):
        assert torch.equal(found, other(x))


# --------------------------------------------------------------------------- nested tensors

SAMPLES = [(3, 5), (4, 0, 2), (1,)]
LAYOUTS = [torch.strided, torch.jagged]


def nested(lengths, layout, width=8):
    generator = torch.Generator().manual_seed(sum(lengths))
    samples = [torch.randn(n, width, generator=generator) for n in lengths]
    return torch.nested.nested_tensor(samples, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_dropout_of_nested_tensors(layout):
    x = nested((3, 5), layout)
    assert tridrop.dropout(x, 0.5, False) is x
    assert tridrop.dropout(x, 0.0) is x
    layer = tridrop.nn.Dropout(0.5)
    assert layer.eval()(x) is x
    layer.train()
    refused = (
        layer,
        lambda x: tridrop.dropout(x, 0.5),
        lambda x: tridrop.dropout2d(x, 0.5),
        lambda x: tridrop.gaussian_dropout(x, 0.5),
        lambda x: tridrop.dropout_add(x, x, 0.5),
        lambda x: tridrop.activation_dropout(x, 0.5, activation="relu"),
    )
    for call in refused:
        with pytest.raises(TypeError, match="is a nested tensor"):
            call(x)
    swapped = nn.Dropout(0.5)
    tridrop.swap(swapped)
    torch.manual_seed(3)
    found = swapped(x)  # torch's, as docs/swap.md says
    torch.manual_seed(3)
    expected = nn.functional.dropout(x, 0.5)
    assert all(map(torch.equal, found.unbind(), expected.unbind()))
    assert all(map(torch.equal, swapped.eval()(x).unbind(), x.unbind()))


@pytest.mark.parametrize("lengths", SAMPLES, ids=str)
@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_swapped_attention_takes_nested_tensors_where_torch_does(lengths):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, 0.3, batch_first=True).eval()
    swapped = copy.deepcopy(model)
    tridrop.swap(swapped)
    x = nested(lengths, torch.strided)
    for average in (True, False):
        with torch.no_grad():
            out, weights = model(x, x, x, average_attn_weights=average)
            found, its = swapped(x, x, x, average_attn_weights=average)
        torch.testing.assert_close(its, weights)
        for a, b in zip(found.unbind(), out.unbind(), strict=True):
            torch.testing.assert_close(a, b)
        assert swapped(x, x, x, need_weights=False)[1] is None


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_attention_of_nested_tensors_is_that_of_padded_ones(layout):
    """In training and across two tensors, where torch refuses them."""
    torch.manual_seed(0)
    model = tridrop.nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
    query, key = nested((3, 1), layout), nested((2, 5), layout)
    padded = [torch.nested.to_padded_tensor(t, 0.0) for t in (query, key)]
    ended = torch.tensor([[False] * 2 + [True] * 3, [False] * 5])
    with tridrop.rng(3):
        out, _ = model(query, key, key)
    with tridrop.rng(3):
        expected, _ = model(padded[0], padded[1], padded[1], key_padding_mask=ended)
    for a, b, n in zip(out.unbind(), expected, (3, 1), strict=True):
        torch.testing.assert_close(a, b[:n])
    sum(sample.sum() for sample in out.unbind()).backward()
    assert model.in_proj_weight.grad.count_nonzero() > 0


@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_nested_tensors_that_do_not_fit():
    model = tridrop.nn.MultiheadAttention(8, 2, batch_first=True)
    x, y = nested((3, 5), torch.strided), nested((2, 5), torch.strided)
    with pytest.raises(TypeError, match="make all three nested"):
        model(x, torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="give each key a value"):
        model(x, x, y)
    other = nested((3, 5, 1), torch.strided)
    with pytest.raises(ValueError, match="query has 2 samples and key has 3"):
        model(x, other, other)
    with pytest.raises(ValueError, match="take neither attn_mask"):
        model(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="batch_first=True"):
        tridrop.nn.MultiheadAttention(8, 2)(x, x, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*nested tensor")
def test_empty_nested_tensors(training):
    torch.manual_seed(0)
    layers = [
        tridrop.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ]
    tridrop.swap(layers[1])
    empty = torch.nested.nested_tensor([], dtype=torch.float32)
    for layer in (*layers, nn.TransformerEncoder(layers[0], 2)):
        layer.train(training)
        with pytest.raises(ValueError, match="nested tensor without samples"):
            layer(empty)
        for lengths in ((0, 0), (0, 2)):
            out = layer(nested(lengths, torch.strided))
            assert [t.shape for t in out.unbind()] == [(n, 8) for n in lengths]


# ------------------------------------------------------------------------------ dtypes of masks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_other_float_dtypes(dtype, need_weights):
    """torch refuses most; here they are what the same mask in fp32 is."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
    tridrop.swap(model)
    x, mask = torch.randn(2, 5, 8), torch.randn(5, 5).to(dtype)
    mask[0, 2:], padding = -torch.inf, torch.zeros(2, 5, dtype=dtype)
    padding[1, 4:] = -torch.inf

    def run(mask, padding):
        with tridrop.rng(3), warnings.catch_warnings():
            warnings.simplefilter("error")
            return model(
                x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights
            )[0]

    found = run(mask, padding)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, run(mask.float(), padding.float()))
    scores = Q[..., :5]
    torch.testing.assert_close(
        tridrop.softmax_dropout(scores, 0.5, mask=mask, seed=1),
        tridrop.softmax_dropout(scores, 0.5, mask=mask.float(), seed=1),
    )


@pytest.mark.parametrize("name", ["in_proj_bias", "out_proj.bias"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_bias_of_another_dtype(name, need_weights):
    """torch adds it or raises by the road that a matrix product takes."""
    model = nn.MultiheadAttention(8, 2, 0.3, batch_first=True).double()
    bias = model.get_parameter(name)
    bias.data = bias.data.half()
    tridrop.swap(model)
    x = torch.randn(2, 5, 8).double()
    with pytest.raises(TypeError, match=f"{name} has dtype torch.float16 and the weights"):
        model(x, x, x, need_weights=need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        model.float()
        bias.data = bias.data.half()
        model(x.float(), x.float(), x.float(), need_weights=need_weights)
