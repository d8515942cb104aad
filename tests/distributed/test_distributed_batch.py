"""Slices of a batch, in one process: masks are rows of the masks of the whole."""

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import nn

import tridrop
from tridrop.distributed import batch_slice, number_microbatches

P, SEED = 0.4, 9


def kept(out):
    return out.detach() != 0


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
def test_rows_of_the_whole_mask(backend):
    device = DEVICE if backend == "triton" else "cpu"
    seed = tridrop.fold_in(SEED, 0).to(device)
    whole = tridrop.keep_mask(seed, (6, 3, 10), P)
    x = torch.ones(2, 3, 10, device=device)
    with tridrop.backend(backend), batch_slice(4, 2):
        assert torch.equal(kept(tridrop.dropout(x, P, seed=seed)), whole[4:])
        # Flattened tokens, k rows a sample.
        assert torch.equal(kept(tridrop.dropout(x.flatten(0, 1), P, seed=seed)),
                           whole[4:].flatten(0, 1))  # fmt: skip
        # One row for all samples.
        assert torch.equal(kept(tridrop.dropout(x[:1], P, seed=seed)), whole[:1])
        # A shard of its own says all.
        where = tridrop.Shard((6, 3, 10), (1, 0, 0))
        assert torch.equal(kept(tridrop.dropout(x, P, shard=where, seed=seed)), whole[1:3])
        gated = torch.ones(2, 3, 20, device=device)
        out = tridrop.activation_dropout(gated, P, activation="reglu", seed=seed)
        assert torch.equal(kept(out), whole[4:])
        with batch_slice(0, 1):  # the innermost counts; every first dimension is a multiple of 1
            assert torch.equal(kept(tridrop.dropout(x, P, seed=seed)), whole[:2])
    assert torch.equal(kept(tridrop.dropout(x, P, seed=seed)), whole[:2])


def test_samples_of_drop_path_and_of_attention():
    x = torch.ones(2, 3, 10)
    paths = tridrop.keep_mask(SEED, (6, 3, 10), 0.5, domain="drop_path")
    with batch_slice(4, 2):
        out = tridrop.dropout_add(x, torch.zeros_like(x), 0.0, drop_path=0.5, seed=SEED)
    assert torch.equal(kept(out), paths[4:])
    probabilities = tridrop.attention_keep_mask(SEED, (6, 2, 5, 5), P)
    q, v = torch.zeros(2, 2, 5, 4), torch.eye(5).expand(2, 2, 5, 5)
    with batch_slice(4, 2):
        out = tridrop.scaled_dot_product_attention(q, q, v, None, P, seed=SEED)
        assert torch.equal(kept(out), probabilities[4:])
        out = tridrop.softmax_dropout(torch.zeros(2, 2, 5, 5), P, seed=SEED)
        assert torch.equal(kept(out), probabilities[4:])


def test_backward_and_compiled_calls_have_the_same_rows():
    whole = tridrop.keep_mask(SEED, (6, 16), P)
    drop = torch.compile(tridrop.dropout, backend="aot_eager", fullgraph=True)
    for origin in (0, 2, 4):
        x = torch.ones(2, 16, requires_grad=True)
        with batch_slice(origin, 2):
            drop(x, P, seed=tridrop.fold_in(SEED, 0)).sum().backward()
        assert torch.equal(kept(x.grad), whole[origin : origin + 2])
    torch._dynamo.reset()


def test_one_site_may_serve_every_slice():
    model = nn.Sequential(tridrop.nn.Dropout(P))
    tridrop.nn.number_sites(model)
    x = torch.ones(6, 10)
    with tridrop.rng(SEED):
        whole = model(x)
    with tridrop.rng(SEED):
        parts = []
        for origin in (4, 0, 2):  # in any order, and no warning
            with batch_slice(origin, 2):
                parts.append(model(x[:2]))
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)


class Lora(nn.Module):
    def forward(self, x):
        eye = torch.eye(10)
        return tridrop.lora_delta(x, eye, eye, P, True, scaling=1.0, seed=SEED)


def test_adapters_too():
    whole = tridrop.keep_mask(SEED, (6, 10), P)
    with batch_slice(4, 2):
        assert torch.equal(kept(Lora()(torch.ones(2, 10))), whole[4:])


def test_samples_that_come_second_and_weights_that_are_none():
    whole = tridrop.keep_mask(SEED, (6, 8), P)
    x = torch.ones(5, 2, 8)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 8), torch.ones(3, 8)], enforce_sorted=False)
    weight = torch.ones(6, 8)
    with batch_slice(4, 2):
        out = tridrop.locked_dropout(x, P, seed=SEED)
        assert torch.equal(kept(out), whole[4:].expand(5, 2, 8))
        out = tridrop.locked_dropout(x.transpose(0, 1), P, batch_first=True, seed=SEED)
        assert torch.equal(kept(out), whole[4:, None].expand(2, 5, 8))
        data, _ = nn.utils.rnn.pad_packed_sequence(
            tridrop.locked_dropout(packed, P, seed=SEED), batch_first=True
        )
        assert torch.equal(kept(data[0, :2]), whole[4].expand(2, 8))
        assert torch.equal(kept(data[1]), whole[5].expand(3, 8))
        words = tridrop.word_dropout(torch.ones(2, 8, dtype=torch.int64), P, token=0, seed=SEED)
        assert torch.equal(words == 1, whole[4:])
        for backend in (PLAIN, "triton"):
            eye = torch.eye(8, device=DEVICE)
            with tridrop.backend(backend):
                out = tridrop.dropconnect_linear(eye, weight.to(DEVICE), p=P, seed=SEED)
            assert torch.equal(kept(out).cpu(), whole.T)
        table = tridrop.embedding_dropout(torch.arange(6), weight, P, seed=SEED)
        words = tridrop.keep_mask(SEED, (6, 1), P)
        assert torch.equal(kept(table), words.expand(6, 8))


def test_what_has_no_place_in_a_batch_raises():
    x = torch.ones(4, 6, 8)
    calls = [
        lambda: tridrop.drop_path_subset(x, torch.ones_like, 0.5),
        lambda: tridrop.patch_dropout(x, 0.5),
        lambda: tridrop.head_dropout(x, 0.5, rescale="kept"),
        lambda: tridrop.drop_block2d(x[None], 0.5, 3),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="would give another result"), batch_slice(4, 4):
            call()
    with pytest.raises(ValueError, match="3 indices in its first dimension"), batch_slice(2, 2):
        tridrop.dropout(torch.ones(3, 8), P)


def test_bad_slices_say_what_to_give():
    for origin, size, error in ((-1, 2, ValueError), (0, 0, ValueError), (0.0, 2, TypeError)):
        with pytest.raises(error, match="give"), batch_slice(origin, size):
            pass
    with pytest.raises(TypeError, match="give a PipelineStage"):
        number_microbatches(nn.Linear(1, 1), size=2)
