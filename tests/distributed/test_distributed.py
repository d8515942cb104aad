"""Ops on four processes: values, masks and gradients of one process."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import PATIENCE, outcomes
from test_distributed_attention import heads_instead_of_queries, ring
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import tridrop
from tridrop.distributed.dtensor import _Ordered, _pieces
from tridrop.distributed.layouts import Layout

WORLD = 4
# Of tensors [3, 6, 10] on a mesh of 4 and on one of 2 x 2: even, uneven and empty shards.
SHAPE = (3, 6, 10)
ONE = [(Replicate(),), (Shard(0),), (Shard(1),), (Shard(-1),)]
TWO = [
    (Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(1), Shard(1)), (Shard(2), Shard(0)),
    (Replicate(), Shard(2)), (Shard(1), Replicate()),
]  # fmt: skip
MESHES = {}


def mesh_of(count: int):
    """The mesh of one or of two dimensions, made once."""
    if count not in MESHES:
        shape, names = ((4,), ("tp",)) if count == 1 else ((2, 2), ("dp", "tp"))
        MESHES[count] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return MESHES[count]


def spread(t, placements):
    """A leaf that is spread, of a tensor that is the same everywhere."""
    mesh = mesh_of(len(placements))
    return distribute_tensor(t.detach().clone(), mesh, placements).requires_grad_(t.requires_grad)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def vector_places(placements):
    """Vectors are whole, but where the last dimension is cut."""
    return [Shard(0) if p in (Shard(-1), Shard(2)) else Replicate() for p in placements]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compare(op, operands, places, equal=True):
    """op(**operands) on DTensors against plain tensors; ``places`` by operand's name."""
    plain = {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in operands.items()}
    parts = {k: spread(t, places[k]) for k, t in operands.items()}
    expected, found = op(**plain), op(**parts)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum((e * torch.linspace(-1, 1, e.numel()).view_as(e)).sum() for e in expected)
    loss.backward()
    for f, e in zip(found, expected, strict=True):
        assert isinstance(f, DTensor)
        assert f.shape == e.shape
        ours = whole(f.detach())
        assert torch.equal(ours == 0, e.detach() == 0)
        assert not equal or torch.equal(ours, e.detach())
        close(ours, e.detach())
    weights = [torch.linspace(-1, 1, e.numel()).view_as(e) for e in expected]
    grads = [spread(w, f.placements) if not any(p.is_partial() for p in f.placements)
             else spread(w, [Replicate() if p.is_partial() else p for p in f.placements])
             for w, f in zip(weights, found, strict=True)]  # fmt: skip
    torch.autograd.backward(found, grads)
    for name, t in plain.items():
        if t.requires_grad:
            assert parts[name].grad.shape == t.shape, name
            close(whole(parts[name].grad), t.grad)


def tensors(*names, shape=SHAPE):
    torch.manual_seed(5)
    sizes = {"x": shape, "residual": shape}
    return {n: torch.randn(sizes.get(n, shape[-1:])).requires_grad_() for n in names}


def every_place(names, last=True):
    for placements in [*ONE, *TWO]:
        cuts_last = any(p in (Shard(-1), Shard(2)) for p in placements)
        if cuts_last and not last:
            continue
        vectors = vector_places(placements)
        yield {n: placements if n in ("x", "residual") else vectors for n in names}


# ------------------------------------------------------------------------------------- the checks


def pieces_are_those_of_torch():
    for placements in [*ONE, *TWO]:
        mesh = mesh_of(len(placements))
        names = ("a", "b", "c")
        cuts = tuple(names[p.dim] if p.is_shard() else None for p in placements)
        layout = Layout(None, {}, None, (), {}, tuple)
        for shape in (SHAPE, (1, 2, 16), (5, 7, 9)):
            ours = _pieces(mesh, cuts, dict(zip(names, shape, strict=True)), layout)
            sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
            assert tuple(ours[n].size for n in names) == tuple(sizes)
            if all(sizes):
                assert tuple(ours[n].start for n in names) == tuple(starts)


def elementwise_ops_equal_one_process():
    def dropout(x):
        return tridrop.dropout(x, 0.4, seed=3)

    def shared(x):
        return tridrop.dropout(x, 0.4, noise_shape=(None, 1, None), seed=3)

    def add(x, residual, bias, layer_scale):
        return tridrop.dropout_add(
            x, residual, 0.3, bias=bias, layer_scale=layer_scale, activation="gelu",
            drop_path=0.3, seed=3,
        )  # fmt: skip

    def activation(x, bias):
        return tridrop.activation_dropout(x, 0.3, activation="relu", bias=bias, seed=9)

    def alpha(x):
        return tridrop.alpha_dropout(x, 0.3, True, seed=4)

    def gaussian(x):
        return tridrop.gaussian_dropout(x, 0.3, seed=4)

    for op in (dropout, shared, add, activation, alpha, gaussian):
        names = op.__code__.co_varnames[: op.__code__.co_argcount]
        for places in every_place(names):
            compare(op, tensors(*names), places)


def masks_are_pieces_of_the_exported_one():
    keep = tridrop.keep_mask(3, SHAPE, 0.4)
    for placements in [*ONE, *TWO]:
        out = tridrop.dropout(spread(torch.ones(SHAPE), placements), 0.4, seed=3)
        assert out.placements == spread(torch.ones(SHAPE), placements).placements
        assert torch.equal(whole(out) != 0, keep)


def gated_activations_equal_one_process():
    def op(x, residual, bias):
        return tridrop.dropout_add(x, residual, 0.3, activation="swiglu", bias=bias, seed=3)

    given = tensors("residual", shape=(3, 6, 5)) | tensors("x", "bias")
    for places in every_place(("x", "residual", "bias"), last=False):
        compare(op, given, places, equal=False)


def gates_equal_one_process():
    def op(x, residual, gate):
        return tridrop.dropout_add(x, residual, 0.3, gate=gate, drop_path=0.3, seed=3)

    given = tensors("x", "residual") | {"gate": torch.randn(3, 10).requires_grad_()}
    cut = {Shard(0): Shard(0), Shard(-1): Shard(1), Shard(2): Shard(1)}
    for places in every_place(("x", "residual")):
        gate = [cut.get(p, Replicate()) for p in places["x"]]
        compare(op, given, {**places, "gate": gate})
    spreads = {**given, "gate": torch.randn(3, 1, 10).requires_grad_()}
    rows = (Shard(0),)
    compare(op, spreads, {"x": rows, "residual": rows, "gate": rows})


def norms_equal_one_process():
    def layer(x, residual, weight, norm_bias, bias, layer_scale):
        return tridrop.dropout_add_layer_norm(
            x, residual, weight, norm_bias, 0.3, bias=bias, layer_scale=layer_scale,
            drop_path=0.2, prenorm=True, seed=3,
        )  # fmt: skip

    def rms(x, residual, weight):
        return tridrop.dropout_add_rms_norm(x, residual, weight, p=0.3, seed=3)

    def first(x, residual, weight, norm_bias):
        return tridrop.layer_norm_dropout(x, weight, norm_bias, 0.3, residual=residual, seed=3)

    for op in (layer, rms, first):
        names = op.__code__.co_varnames[: op.__code__.co_argcount]
        for places in every_place(names, last=False):
            compare(op, tensors(*names), places, equal=False)


def softmax_equals_one_process():
    torch.manual_seed(6)
    scores = torch.randn(3, 6, 5, 9).requires_grad_()
    bias = torch.randn(6, 1, 9).requires_grad_()

    def causal(scores, mask):
        return tridrop.softmax_dropout(scores, 0.3, mask=mask, is_causal=True, seed=2)

    def both(scores, mask):
        return tridrop.softmax_dropout(scores, 0.3, mask=mask, return_softmax=True, seed=2)

    for op in (causal, both):
        for placements in [(Shard(0),), (Shard(1),), (Shard(2),), (Shard(1), Shard(2))]:
            mask = [Shard(0) if p == Shard(1) else Replicate() for p in placements]
            places = {"scores": placements, "mask": mask}
            compare(op, {"scores": scores, "mask": bias}, places, equal=False)


def attention_equals_one_process():
    torch.manual_seed(6)
    full = {n: torch.randn(3, 4, 9, 9).requires_grad_() for n in ("query", "key")}
    full["value"] = torch.eye(9).expand(3, 4, 9, 9).clone().requires_grad_()

    def op(query, key, value, **more):
        return tridrop.scaled_dot_product_attention(
            query, key, value, dropout_p=0.3, is_causal=True, return_lse=True, seed=2, **more
        )

    rows = [(Replicate(),), (Shard(0),), (Shard(1),), (Shard(0), Shard(1)), (Shard(1), Shard(1))]
    for placements in rows:
        compare(op, full, dict.fromkeys(full, placements), equal=False)
    for placements in [(Shard(2),), (Shard(0), Shard(2))]:  # queries alone
        keys = [Replicate() if p == Shard(2) else p for p in placements]
        places = {"query": placements, "key": keys, "value": keys}
        compare(op, full, places, equal=False)
    # Grouped queries, one shared key head, sinks and masks, which may be plain.
    for heads in (2, 1):
        few = full | {n: t.detach()[:, :heads].clone().requires_grad_() for n, t in full.items()
                      if n != "query"}  # fmt: skip
        few["sinks"] = torch.randn(4).requires_grad_()
        kept = torch.arange(9).expand(3, 9) < torch.tensor([[9], [7], [4]])

        def grouped(query, key, value, sinks, kept=kept):
            bias = torch.linspace(0, 1, 4).view(4, 1, 1)
            return tridrop.scaled_dot_product_attention(
                query, key, value, bias, 0.3, enable_gqa=True, key_mask=kept, sinks=sinks,
                window=(4, 2), seed=2,
            )  # fmt: skip

        for placements in [(Replicate(), Shard(1)), (Shard(0), Shard(1)), (Shard(2), Shard(0))]:
            follow = (Shard(0), Shard(1)) if heads > 1 else (Shard(0),)
            keys = [p if p in follow else Replicate() for p in placements]
            sinks = [Shard(0) if p == Shard(1) else Replicate() for p in placements]
            places = {"query": placements, "key": keys, "value": keys, "sinks": sinks}
            compare(grouped, few, places, equal=False)


def packed_sequences_are_cut_by_heads():
    torch.manual_seed(6)
    given = {n: torch.randn(1, 4, 12, 6).requires_grad_() for n in ("query", "key", "value")}
    offsets = torch.tensor([0, 5, 11], dtype=torch.int32)

    def op(query, key, value):
        return tridrop.scaled_dot_product_attention(
            query, key, value, None, torch.tensor(0.3), True, cu_seqlens_q=offsets,
            cu_seqlens_k=offsets, seed=2,
        )  # fmt: skip

    for placements in [(Shard(1),), (Replicate(), Shard(1))]:
        compare(op, given, dict.fromkeys(given, placements), equal=False)
    tokens = {n: spread(t.detach(), [Shard(2)]) for n, t in given.items()}
    with pytest.raises(ValueError, match="only heads can be cut"):
        op(**tokens)


def adapters_equal_one_process():
    """LoRA: x cut by rows, or by columns with A, when the product is a sum over processes."""
    torch.manual_seed(4)
    # Even rows: torch itself cannot flatten others for the second product.
    sizes = {"x": (4, 8, 10), "base_out": (4, 8, 7), "A": (2, 10), "B": (7, 2)}
    given = {n: torch.randn(s).requires_grad_() for n, s in sizes.items()}

    def delta(x, A, B):
        return tridrop.lora_delta(x, A, B, 0.3, scaling=2.0, seed=3)

    def linear(x, base_out, A, B):
        return tridrop.lora_linear(x, base_out, A, B, 0.3, scaling=2.0, seed=3)

    for op in (delta, linear):
        names = op.__code__.co_varnames[: op.__code__.co_argcount]
        for placements in [(Shard(0),), (Shard(1),), (Shard(2),), (Shard(2), Shard(1))]:
            places = {n: [Replicate()] * len(placements) for n in names}
            places["x"] = placements
            places["A"] = [Shard(1) if p == Shard(2) else Replicate() for p in placements]
            rows = [Replicate() if p == Shard(2) else p for p in placements]
            places["base_out"] = rows
            operands = {n: given[n] for n in names}
            if not torch_multiplies([p for p in rows if p == Shard(1)]):
                with pytest.raises(RuntimeError, match="flatten"):
                    compare(op, operands, places, equal=False)
            else:
                compare(op, operands, places, equal=False)


def torch_multiplies(placements):
    """Whether torch's linear layers take rows that are cut so: those of 2.11 refuse dimension 1."""
    if not placements:
        return True
    x = distribute_tensor(torch.ones(4, 8, 2), mesh_of(1), placements)
    weight = distribute_tensor(torch.ones(7, 2), mesh_of(1), [Replicate()])
    try:
        torch.nn.functional.linear(x, weight)
    except RuntimeError as error:
        return "flatten" not in str(error)
    return True


def sums_that_are_still_partial():
    mesh = mesh_of(1)
    parts = torch.randn(4, *SHAPE)
    rank = dist.get_rank()
    x = DTensor.from_local(parts[rank], mesh, [Partial()])
    out = tridrop.dropout(x, 0.4, seed=3)
    assert out.placements == (Partial(),)
    keep = tridrop.keep_mask(3, SHAPE, 0.4)
    close(whole(out), torch.where(keep, parts.sum(0), 0) / 0.6)
    gain = spread(torch.randn(10).requires_grad_(), [Replicate()])
    residual = DTensor.from_local(parts[rank] + 1, mesh, [Partial()])
    out = tridrop.dropout_add(x, residual, 0.4, layer_scale=gain, seed=3)
    total = parts.sum(0) / 0.6
    close(whole(out), torch.where(keep, total, 0) * whole(gain) + parts.sum(0) + 4)
    out.redistribute(placements=[Replicate()]).to_local().sum().backward()
    close(whole(gain.grad), torch.where(keep, total, 0).sum((0, 1)))


def whole_operands_are_cut_without_sending():
    x, residual = spread(torch.randn(SHAPE), [Shard(2)]), spread(torch.randn(SHAPE), [Replicate()])
    out = tridrop.dropout_add(x, residual, 0.4, seed=3)
    assert out.placements == (Shard(2),)
    expected = tridrop.dropout_add(whole(x), whole(residual), 0.4, seed=3)
    assert torch.equal(whole(out), expected)


def placements_that_cannot_work_say_what_to_do():
    x = spread(torch.randn(SHAPE), [Shard(2)])
    row = spread(torch.randn(SHAPE), [Shard(1)])
    weight = spread(torch.ones(10), [Replicate()])
    part = DTensor.from_local(torch.randn(SHAPE), mesh_of(1), [Partial()])
    q = spread(torch.randn(4, 4, 8, 4), [Shard(2)])
    again = r"redistribute\(placements=\[Replicate\(\)\]\)"
    with pytest.raises(ValueError, match=rf"last dimension whole: use x\.{again}"):
        tridrop.dropout_add_layer_norm(x, None, weight, None, 0.1)
    with pytest.raises(ValueError, match=rf"residual.*cuts another dimension.*{again}"):
        tridrop.dropout_add(x, row, 0.1)
    with pytest.raises(ValueError, match="the mesh's 'tp', but swiglu needs both halves"):
        tridrop.activation_dropout(x, 0.1, activation="swiglu")
    with pytest.raises(ValueError, match=rf"not linear in it: sum it first, with x\.{again}"):
        tridrop.activation_dropout(part, 0.1, activation="relu")
    with pytest.raises(ValueError, match="a whole operand would be added once per process"):
        tridrop.dropout_add(part, spread(torch.randn(SHAPE), [Replicate()]), 0.1)
    with pytest.raises(ValueError, match=rf"ring over blocks of keys.*use key\.{again}"):
        tridrop.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="needs all keys"):
        tridrop.softmax_dropout(spread(torch.randn(2, 2, 4, 8), [Shard(3)]), 0.1)
    with pytest.raises(ValueError, match="only the first of several batch"):
        tridrop.softmax_dropout(spread(torch.randn(2, 4, 2, 4, 8), [Shard(1)]), 0.1)
    with pytest.raises(TypeError, match="residual is a plain tensor and x is a DTensor"):
        tridrop.dropout_add(x, torch.randn(SHAPE), 0.1)
    grouped = [spread(torch.randn(2, n, 4, 4), [Shard(1)]) for n in (6, 3, 3)]
    with pytest.raises(ValueError, match="whole groups: repeat the key heads"):
        tridrop.scaled_dot_product_attention(*grouped, dropout_p=0.1, enable_gqa=True)
    other = distribute_tensor(torch.randn(SHAPE), mesh_of(2), [Replicate(), Shard(2)])
    with pytest.raises(ValueError, match="both are on one mesh"):
        tridrop.dropout_add(x, other, 0.1)


def shards_of_larger_tensors():
    """A DTensor that is itself a piece: of a shard, and of a slice of the batch."""
    keep = tridrop.keep_mask(3, (8, 6, 10), 0.4)
    x = spread(torch.ones(SHAPE), [Shard(1)])
    where = tridrop.Shard((8, 6, 10), (3, 0, 0))
    out = tridrop.dropout(x, 0.4, shard=where, seed=3)
    assert torch.equal(whole(out) != 0, keep[3:6])
    with tridrop.distributed.batch_slice(origin=3, size=3):
        out = tridrop.dropout(x, 0.4, seed=3)
    assert torch.equal(whole(out) != 0, keep[3:6])


# ------------------------------------------------------------------------------------------ seeds


def differs():
    """The generators of the processes differ, and so do the seeds that they draw."""
    torch.manual_seed(dist.get_rank())


def drawn_by_the_first():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    seed = tridrop.new_seed()
    torch.set_rng_state(state)
    return seed


def a_drawn_seed_is_one_for_the_mesh():
    for count in (1, 2):
        seed = drawn_by_the_first()
        differs()
        x = spread(torch.ones(4, 64), [Shard(0)] * count)
        out = tridrop.dropout(x, 0.5)
        assert torch.equal(whole(out) != 0, tridrop.keep_mask(seed, (4, 64), 0.5))
        differs()
        assert torch.equal(tridrop.distributed.mesh_seed(mesh_of(count)), seed)
    differs()
    scores = spread(torch.zeros(4, 2, 2, 8), [Shard(0)])
    out = tridrop.softmax_dropout(scores, 0.5)
    seed = drawn_by_the_first()
    assert torch.equal(whole(out) != 0, tridrop.attention_keep_mask(seed, (4, 2, 2, 8), 0.5))


def dimensions_of_a_mesh_share_or_fold():
    mesh, rank = mesh_of(2), dist.get_rank()
    seed = tridrop.distributed.mesh_seed
    assert torch.equal(seed(mesh, seed=5), torch.tensor([5, 0]))
    assert torch.equal(seed(mesh, fold="dp", seed=5), tridrop.fold_in(5, rank // 2))
    assert torch.equal(seed(mesh, fold=1, seed=5), tridrop.fold_in(5, rank % 2))
    assert torch.equal(seed(mesh, fold=("tp", "dp"), seed=5), tridrop.fold_in(5, rank))
    with pytest.raises(ValueError, match=r"the mesh has the dimensions \['dp', 'tp'\]"):
        seed(mesh, fold="pp")


def ranks_are_folded_into_rng():
    rank, x = dist.get_rank(), torch.ones(64)
    tp = mesh_of(2)["tp"]
    ways = {True: rank, 7: 7, dist.group.WORLD: rank, mesh_of(2): rank, tp: rank % 2}
    for way, number in ways.items():
        for base in (3, tridrop.fold_in(3, 4)):
            with tridrop.rng(base, fold_rank=way):
                out = tridrop.dropout(x, 0.5)
            with tridrop.rng(tridrop.fold_in(base, number)):
                assert torch.equal(out, tridrop.dropout(x, 0.5))
    for way in (None, False):
        with tridrop.rng(3, fold_rank=way):
            out = tridrop.dropout(x, 0.5)
        with tridrop.rng(3):
            assert torch.equal(out, tridrop.dropout(x, 0.5))
    with pytest.raises(TypeError, match="fold_rank is 'dp'"), tridrop.rng(3, fold_rank="dp"):
        pass


def unequal_seeds_end_with_an_error():
    x = spread(torch.ones(4, 64), [Shard(0)])
    rank = dist.get_rank()
    tridrop.distributed.check_seed(5)
    tridrop.distributed.check_seed(5, mesh_of(2))
    with pytest.raises(RuntimeError, match="4 different seeds among 4 processes"):
        tridrop.distributed.check_seed(rank, mesh_of(2))
    with tridrop.distributed.checking():
        tridrop.dropout(x, 0.5, seed=3)
        with pytest.raises(RuntimeError, match="2 different seeds among 4 processes that share"):
            tridrop.dropout(x, 0.5, seed=rank // 2)
        with tridrop.distributed.checking(False):
            tridrop.dropout(x, 0.5, seed=rank)


class Tracker:
    """Megatron-LM's tracker of random states, in short: a state of its own for sharded regions."""

    def __init__(self, seed):
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.state = torch.get_rng_state()
        torch.set_rng_state(before)

    @contextmanager
    def fork(self):
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


def trackers_of_random_states_keep_working():
    """Plain local tensors: replicated regions agree, sharded ones differ or are one device's."""

    def gathered(mask):
        found = [torch.empty_like(mask) for _ in range(WORLD)]
        dist.all_gather(found, mask)
        return found

    torch.manual_seed(11)  # the same everywhere
    tracker = Tracker(2718 + dist.get_rank())
    x = torch.ones(4, 64)
    replicated = gathered(tridrop.dropout(x, 0.5))
    assert all(torch.equal(replicated[0], m) for m in replicated)
    with tracker.fork():
        sharded = gathered(tridrop.dropout(x, 0.5))
    assert all(not torch.equal(sharded[0], m) for m in sharded[1:])
    seed = tridrop.new_seed()
    where = tridrop.Shard((4, 64 * WORLD), (0, 64 * dist.get_rank()))
    pieces = gathered(tridrop.dropout(x, 0.5, shard=where, seed=seed))
    expected = tridrop.keep_mask(seed, (4, 64 * WORLD), 0.5)
    assert torch.equal(torch.cat(pieces, 1) != 0, expected)


# ----------------------------------------------------------------------------------------- compile


def compiled_calls_are_those_of_eager():
    def feed_forward(x, residual, bias, seed):
        out = tridrop.dropout_add(x, residual, 0.4, bias=bias, activation="gelu", seed=seed)
        return tridrop.dropout_add_rms_norm(out, residual, None, p=0.2, seed=seed)

    compiled = torch.compile(feed_forward, backend="aot_eager", fullgraph=True)
    seed, shape = torch.tensor([3, 0]), (3, 6, 10)
    for placements in [(Shard(0), Shard(1))]:
        given = tensors("x", "residual", "bias", shape=shape)
        vectors = [Replicate()] * len(placements)
        found = []
        for function in (feed_forward, compiled):
            parts = {n: spread(t, vectors if n == "bias" else placements) for n, t in given.items()}
            out = function(**parts, seed=seed)
            out.square().sum().backward()
            found.append([out, *(t.grad for t in parts.values())])
        for eager, ours in zip(*found, strict=True):
            close(whole(ours), whole(eager))

    def attend(q):
        return tridrop.scaled_dot_product_attention(q, q, q, None, 0.3, True, seed=seed)

    q = spread(torch.randn(2, 4, 8, 8), [Shard(1)])
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    close(whole(compiled(q)), whole(attend(q)))
    drawn = drawn_by_the_first()
    differs()
    compiled = torch.compile(lambda x: tridrop.dropout(x, 0.5), backend="aot_eager", fullgraph=True)
    out = compiled(spread(torch.ones(4, 64), [Shard(0)]))
    assert torch.equal(whole(out) != 0, tridrop.keep_mask(drawn, (4, 64), 0.5))
    torch._dynamo.reset()


def a_process_that_is_gone_ends_with_an_error():
    """Last: it takes one out of the group."""
    if dist.get_rank() == WORLD - 1:
        dist.destroy_process_group()
        return
    with pytest.raises(RuntimeError):
        tridrop.distributed.check_seed(5)


CHECKS = [
    pieces_are_those_of_torch,
    elementwise_ops_equal_one_process,
    masks_are_pieces_of_the_exported_one,
    gated_activations_equal_one_process,
    gates_equal_one_process,
    norms_equal_one_process,
    softmax_equals_one_process,
    attention_equals_one_process,
    packed_sequences_are_cut_by_heads,
    adapters_equal_one_process,
    sums_that_are_still_partial,
    whole_operands_are_cut_without_sending,
    placements_that_cannot_work_say_what_to_do,
    shards_of_larger_tensors,
    a_drawn_seed_is_one_for_the_mesh,
    dimensions_of_a_mesh_share_or_fold,
    ranks_are_folded_into_rng,
    unequal_seeds_end_with_an_error,
    trackers_of_random_states_keep_working,
    compiled_calls_are_those_of_eager,
    ring,
    heads_instead_of_queries,
    a_process_that_is_gone_ends_with_an_error,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("ranks"), WORLD, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_four_processes(found, check):
    assert not found[check.__name__], found[check.__name__]


def _one_of_two(rank, folder):
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, PATIENCE, 2, rank)
    tridrop.distributed.check_seed(5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        tridrop.distributed.check_seed(5)
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)  # gloo's own end may abort where a peer is gone


@pytest.mark.parametrize(
    ("shape", "given", "order", "expected"),
    [
        ((1, 3, 10), (60, 10, 1), (0, 1, 2), (30, 10, 1)),  # a shard of one index
        ((2, 1, 10), (10, 40, 1), (0, 1, 2), (10, 10, 1)),
        ((3, 2, 1), (2, 1, 7), (0, 1, 2), (2, 1, 1)),
        ((0, 3, 10), (1, 2, 3), (0, 1, 2), (30, 10, 1)),
        ((2, 3, 4), (12, 4, 1), (0, 1, 2), (12, 4, 1)),
        ((2, 3, 4), (12, 1, 3), (0, 1, 2), (12, 4, 1)),  # another order: copied
        ((2, 3, 4), (12, 4, 1), (1, 0, 2), (4, 8, 1)),
        ((2, 1, 4), (4, 4, 1), (1, 0, 2), (4, 8, 1)),
        ((), (), (), ()),
    ],
)
def test_the_strides_of_a_gradient_do_not_depend_on_the_shard(shape, given, order, expected):
    """With torch 2.11 processes whose strides differ wait for each other in different calls."""
    x = torch.randn(shape, requires_grad=True)
    weights = torch.empty_strided(shape, given).normal_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: t):
        out = _Ordered.apply(x * 1.0, order)
    assert torch.equal(out, x)
    seen = []
    inner = x * 1.0
    inner.register_hook(lambda grad: seen.append(grad.stride()))
    _Ordered.apply(inner, order).backward(weights)
    assert seen == [expected]
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_the_check_of_seeds_on(value, on):
    program = "from tridrop.distributed import agreement; print(agreement._check)"
    environment = os.environ | {"TRIDROP_CHECK_SEEDS": value}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(on)]


def test_a_process_that_is_killed_ends_the_others_with_an_error(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=180)
    assert [process.exitcode for process in both] == [0, -signal.SIGKILL]
    assert (tmp_path / "error").read_text()


def test_the_page_of_the_docs_runs_under_torchrun(tmp_path):
    """Two processes; test_docs.py runs it in one."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    example = tmp_path / "example.py"
    example.write_text(
        "".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(example)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("use x.redistribute") == 2
