"""torch.vmap over the elementwise and norm ops: each sample has the mask of a call of its own."""

import pytest
import torch

import tridrop
from tridrop.ops import Fused, FusedNorm

N, B, T, C = 3, 2, 5, 12
SHARD = tridrop.Shard((4, 9, 40), (1, 2, 13))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def norm_(**options):
    def call(x, residual):
        return tridrop.dropout_add_layer_norm(
            x, residual, torch.ones(C), None, 0.4, seed=5, **options
        )

    return call


CALLS = {
    "dropout": lambda x, r: tridrop.dropout(x, 0.4, seed=5),
    "noise_shape": lambda x, r: tridrop.dropout(x, 0.4, noise_shape=(None, 1, None), seed=5),
    "shared columns": lambda x, r: tridrop.dropout(x, 0.4, noise_shape=(None, None, 1), seed=5),
    "shard": lambda x, r: tridrop.dropout(x, 0.4, shard=SHARD, seed=5),
    "tensor p": lambda x, r: tridrop.dropout(x, torch.tensor(0.4), seed=5),
    "add": lambda x, r: tridrop.dropout_add(x, r, 0.4, bias=torch.ones(C), seed=5),
    "drop_path": lambda x, r: tridrop.dropout_add(x, r, 0.4, drop_path=0.5, seed=5),
    "gated": lambda x, r: tridrop.activation_dropout(x, 0.4, activation="swiglu", seed=5),
    "vector": lambda x, r: tridrop.dropout(x[0, 0], 0.4, seed=5),
    "number": lambda x, r: tridrop.dropout(x[0, 0, 0], 0.4, seed=5),
    "norm": norm_(),
    "norm, stream": norm_(prenorm=True),
    "norm, drop_path": norm_(drop_path=0.5),
    "norm first": lambda x, r: tridrop.rms_norm_dropout(x, None, 0.4, residual=r, seed=5),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
ONE_CALL = set(CALLS) - {"drop_path", "norm, drop_path", "number"}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@calls
@pytest.mark.parametrize("dims", [(0, None), (1, 0), (None, 2), (3, 3)], ids=str)
def test_each_sample_is_a_call_of_its_own(call, dims):
    def operand(dim):
        x = draw(N, B, T, C)
        return x[0] if dim is None else x.movedim(0, dim)

    x, residual = operand(dims[0]), operand(dims[1])
    found = torch.vmap(call, dims)(x, residual)
    for i in range(N):
        row = [t if d is None else t.select(d, i) for t, d in zip((x, residual), dims, strict=True)]
        expected = call(*row)
        for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("name", CALLS)
def test_samples_of_one_seed_are_one_call(name, monkeypatch):
    calls = []

    def counting(forward):
        def counted(*args):
            calls.append(forward)
            return forward(*args)

        return staticmethod(counted)

    for function in (Fused, FusedNorm):
        monkeypatch.setattr(function, "forward", counting(function.forward))
    torch.vmap(CALLS[name])(draw(N, B, T, C), draw(N, B, T, C))
    assert len(calls) == (1 if name in ONE_CALL else N)


def test_samples_with_seeds_of_their_own():
    seeds = torch.stack([tridrop.fold_in(3, i) for i in range(N)])
    x = draw(B, C)
    found = torch.vmap(lambda seed: tridrop.dropout(x, 0.5, seed=seed))(seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(found[i], tridrop.dropout(x, 0.5, seed=seed))


@calls
def test_gradients_a_sample(call):
    def loss(x, r):
        out = call(x, r)
        return as_tuple(out)[0].square().sum()

    x, residual = draw(N, B, T, C), draw(N, B, T, C)
    found = torch.vmap(torch.func.grad(loss))(x, residual)
    whole = torch.func.grad(lambda x: torch.vmap(loss)(x, residual).sum())(x)
    for i in range(N):
        expected = torch.func.grad(loss)(x[i], residual[i])
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(whole[i], expected)
