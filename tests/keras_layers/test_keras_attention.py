"""tridrop.keras.MultiHeadAttention: Keras' results under the exported mask."""

import numpy as np
import pytest
import torch
from keras_shared import keras, tridrop

P = 0.25
SHAPES = {
    "one axis": ((2, 5, 8), (2, 7, 8), None),
    "the second of two": ((2, 3, 5, 8), (2, 3, 5, 8), (2,)),
    "the first of two": ((2, 3, 5, 8), (2, 3, 5, 8), (1,)),
    "both": ((2, 3, 4, 8), (2, 3, 4, 8), (1, 2)),
}


def expected(layer, query, value, seed, **options):
    """By Keras' own layer, with the exported mask for its dropout."""
    theirs = keras.layers.MultiHeadAttention.from_config(layer.get_config())
    theirs(query, value)
    theirs.set_weights(layer.get_weights())

    class Masked(keras.layers.Layer):
        supports_masking = True

        def call(self, scores, training=False):
            rank = len(theirs._attention_axes)
            queries, keys = scores.shape[-2 * rank : -rank], scores.shape[-rank:]
            heads = scores.shape[-2 * rank - 1]
            flat = (-1, heads, int(np.prod(queries)), int(np.prod(keys)))
            shape = scores.reshape(flat).shape
            mask = tridrop.attention_keep_mask(seed, shape, P).reshape(scores.shape)
            return torch.where(mask, scores / (1 - P), 0)

    del theirs._dropout_layer
    theirs._tracker.unlock()
    theirs._dropout_layer = Masked()
    return theirs(query, value, return_attention_scores=True, training=True, **options)


def made(query, value, axes=None, **options):
    layer = tridrop.keras.MultiHeadAttention(
        2, 4, value_dim=3, dropout=P, seed=9, attention_axes=axes, **options
    )
    layer(query, value)
    return layer


# Keras' causal mask is of the first axis alone.
CASES = [(shapes, "plain") for shapes in SHAPES] + [(shapes, "mask") for shapes in SHAPES]
CASES += [(s, m) for s in ("one axis", "the first of two") for m in ("causal", "both")]


@pytest.mark.parametrize(("shapes", "masked"), CASES)
def test_it_is_keras_attention_under_the_exported_mask(shapes, masked):
    first, second, axes = SHAPES[shapes]
    keras.utils.set_random_seed(0)  # torch's generator, and the layer's weights
    query, value = torch.randn(first, requires_grad=True), torch.randn(second, requires_grad=True)
    layer = made(query, value, axes)
    options = {"use_causal_mask": masked in ("causal", "both")}
    if masked in ("mask", "both"):
        sizes = [first[i] for i in axes or (1,)] + [second[i] for i in axes or (1,)]
        mask = torch.rand(2, *sizes) < 0.7
        mask[0, 0] = False  # a query with nothing to attend to
        options["attention_mask"] = mask
        if shapes in ("the first of two", "the second of two"):
            options["attention_mask"] = mask[:, None]
    for call in range(2):
        seed = tridrop.fold_in(9, call)
        out = layer(query, value, training=True, **options)
        wanted, scores = expected(layer, query, value, seed, **options)
        torch.testing.assert_close(out, wanted)
        grads = torch.autograd.grad(out.square().sum(), (query, value))
        for grad, other in zip(grads, torch.autograd.grad(wanted.square().sum(), (query, value)),
                               strict=True):  # fmt: skip
            torch.testing.assert_close(grad, other)
        layer._dropout_layer.seed_generator.state.assign([9, call])
        again, returned = layer(
            query, value, training=True, return_attention_scores=True, **options
        )
        torch.testing.assert_close(again, out)
        torch.testing.assert_close(returned, scores)  # before dropout, as Keras has it


def test_evaluation_is_keras_own():
    query = torch.randn(2, 5, 8)
    layer = made(query, query)
    theirs = keras.layers.MultiHeadAttention.from_config(layer.get_config())
    theirs(query, query)
    theirs.set_weights(layer.get_weights())
    for options in ({}, {"use_causal_mask": True}, {"return_attention_scores": True}):
        ours, other = layer(query, query, **options), theirs(query, query, **options)
        for a, b in zip(*([x] if torch.is_tensor(x) else x for x in (ours, other)), strict=True):
            assert torch.equal(a, b)


def test_padding_masks_of_keras_and_wide_heads():
    tokens = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
    x = keras.layers.Embedding(9, 8, mask_zero=True)(tokens)
    layer = tridrop.keras.MultiHeadAttention(2, 4, dropout=P, seed=9)
    first = layer(x, x, training=True)
    x[0, 3] = 99  # nobody attends to it
    x._keras_mask = torch.tensor(tokens != 0)
    layer._dropout_layer.seed_generator.state.assign([9, 0])
    assert torch.equal(first[0, :3], layer(x, x, training=True)[0, :3])
    wide = tridrop.keras.MultiHeadAttention(1, 300, dropout=P, seed=9)
    out, scores = wide(x, x, training=True, return_attention_scores=True)
    wide._dropout_layer.seed_generator.state.assign([9, 0])
    torch.testing.assert_close(wide(x, x, training=True), out)
    assert scores.shape == (2, 1, 4, 4)


def test_bfloat16_and_no_dropout():
    x = torch.randn(2, 5, 8)
    layer = tridrop.keras.MultiHeadAttention(2, 4, dropout=P, dtype="mixed_bfloat16")
    assert layer(x, x, training=True).dtype == torch.bfloat16
    plain = tridrop.keras.MultiHeadAttention(2, 4)
    assert torch.equal(plain(x, x, training=True), plain(x, x))
