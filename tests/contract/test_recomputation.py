"""What torch's checkpoints recompute has the masks of its forward, whatever blocks are open."""

import contextlib
import functools
import inspect
import threading
import warnings

import pytest
import torch
from hosts import DEVICE
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tridrop
from tridrop.contract import recomputation, seeds
from tridrop.distributed import batch_slice

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


class Part(nn.Module):
    """Numbered sites and, where ``counted``, a call by its number among them."""

    def __init__(self, counted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.first, self.second = tridrop.nn.Dropout(0.5), tridrop.nn.DropoutAdd(0.3)
        self.counted = counted
        tridrop.nn.number_sites(self)
        self.to(DEVICE)

    def forward(self, x):
        y = self.first(self.up(x).tanh())
        if self.counted:
            y = tridrop.dropout(y, 0.4)
        return self.second(self.down(y), x).sin()


def data():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def gradients(model, losses, around=None):
    """Those of the weights, after one backward for all losses, perhaps in a block."""
    model.zero_grad()
    total = sum(losses)
    with around or contextlib.nullcontext():
        total.backward()
    return [p.grad.clone() for p in model.parameters()]


def same(found, expected):
    """Other masks differ by far more than the rounding of products with other numbers of rows."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


AROUND = {
    "inside no block": contextlib.nullcontext,
    "inside another": lambda: tridrop.rng(99),
    "inside one with the seed of the first": lambda: tridrop.rng(1),
    "inside a slice": lambda: batch_slice(8, 4),
}


@KINDS
@pytest.mark.parametrize("counted", [False, True], ids=["sites", "counted"])
@pytest.mark.parametrize("around", AROUND)
def test_two_forwards_each_in_its_block_and_one_backward(reentrant, counted, around):
    model = Part(counted)

    def losses(run):
        for seed in (1, torch.tensor([2, 5], device=DEVICE)):
            with tridrop.rng(seed):
                # Before the checkpoint a call is counted, and behind it another.
                x = tridrop.dropout(data().requires_grad_(), 0.1)
                yield tridrop.dropout(run(run(x)), 0.2).square().sum()

    def run(x):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*called twice")
            return model(x)

    expected = gradients(model, list(losses(run)))
    recomputed = functools.partial(checkpoint, run, use_reentrant=reentrant)
    same(gradients(model, list(losses(recomputed)), AROUND[around]()), expected)


@KINDS
@pytest.mark.parametrize("around", AROUND)
def test_a_forward_outside_of_blocks_draws_again_what_it_drew(reentrant, around):
    model = Part(counted=True)

    def losses(run):
        torch.manual_seed(3)
        return [run(data().requires_grad_()).sum() for _ in range(2)]

    expected = gradients(model, losses(model))
    recomputed = functools.partial(checkpoint, model, use_reentrant=reentrant)
    same(gradients(model, losses(recomputed), AROUND[around]()), expected)


@KINDS
def test_other_calls_between_forward_and_backward_change_nothing(reentrant):
    """Calls that draw, a teacher in a block of its own, an ensemble: of other models."""
    model, teacher = Part(), Part()
    for preserve in (True, False):  # numbered sites do not need the generator

        def loss(run, preserve=preserve):
            with tridrop.rng(4):
                out = run(data().requires_grad_())
            tridrop.dropout(data(), 0.5)
            with tridrop.rng(5), torch.no_grad():
                target = teacher(data())
            tridrop.mc_predict(teacher, data(), samples=3, seed=1)
            return [(out - target).square().sum()]

        recomputed = functools.partial(
            checkpoint, model, use_reentrant=reentrant, preserve_rng_state=preserve
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(gradients(model, loss(recomputed)), gradients(model, loss(model)))


@KINDS
def test_slices_that_are_closed_before_backward(reentrant):
    """Summed micro-batches have the masks, and so the gradients, of the whole batch."""
    model, x = Part(), data()
    with tridrop.rng(6):
        expected = gradients(model, [model(x).square().sum()])
    losses = []
    for i in (0, 2):
        with tridrop.rng(6), batch_slice(i, 2):
            part = x[i : i + 2].clone().requires_grad_()
            losses.append(checkpoint(model, part, use_reentrant=reentrant).square().sum())
    same(gradients(model, losses), expected)


@KINDS
def test_masks_are_those_of_keep_mask(reentrant):
    drop = tridrop.nn.Dropout(0.5)
    drop.site = 3
    x = torch.rand(6, 40, device=DEVICE).requires_grad_()
    with tridrop.rng(11), batch_slice(12, 6):
        out = checkpoint(lambda x: drop(x).exp(), x, use_reentrant=reentrant)
    with tridrop.rng(12):
        out.sum().backward()
    seed = tridrop.fold_in(11, 3).to(DEVICE)
    keep = tridrop.keep_mask(seed, (6, 40), 0.5, shard=((18, 40), (12, 0)))
    torch.testing.assert_close(x.grad, torch.where(keep, 2 * (2 * x).exp(), 0.0))


@pytest.mark.parametrize("outer", [False, True], ids=["", "outer reentrant"])
@pytest.mark.parametrize("inner", [False, True], ids=["", "inner reentrant"])
def test_checkpoints_in_checkpoints_and_blocks_inside_them(outer, inner):
    models = nn.ModuleList(Part(counted=True) for _ in range(4))
    tridrop.nn.number_sites(models)

    def plain(function, x, use_reentrant):
        return function(x)

    def losses(recompute):
        def block(x):
            x = recompute(models[0], x, use_reentrant=inner)
            with tridrop.rng(21), batch_slice(4, 4):
                x = recompute(models[1], models[2](x), use_reentrant=inner)
            return tridrop.dropout(recompute(models[3], x, use_reentrant=inner), 0.3).tanh()

        for seed in (1, 2):
            with tridrop.rng(seed):
                yield recompute(block, data().requires_grad_(), use_reentrant=outer).sum()

    expected = gradients(models, list(losses(plain)))
    same(gradients(models, list(losses(checkpoint)), tridrop.rng(1)), expected)


@pytest.mark.parametrize("saved", ["matrix products", "arithmetic", "every second operator"])
@pytest.mark.parametrize("seed", [7, torch.tensor([7, 1])], ids=["int", "tensor"])
def test_selective_checkpointing(saved, seed):
    """The tables of a block, made inside the region, are made in the same order again."""
    model = Part(counted=True)
    seed = seed.to(DEVICE) if isinstance(seed, torch.Tensor) else seed
    count = 0

    def scaled(x):  # by the operators that make a table, too
        return (model(x * 1.5 + 0.1) * 0.5 + 1).square()

    def policy(ctx, op, *args, **kwargs):
        nonlocal count
        count += not ctx.is_recompute
        chosen = {
            "matrix products": op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default),
            # Not all: torch 2.11 saves nothing that is written to, as an int's seed tensor is.
            "arithmetic": any(n in str(op) for n in ("mul", "add", "stack", "arange", "tanh")),
            # By name: the same in the recomputation, which older torch asks for as well.
            "every second operator": len(str(op)) % 2 == 0,
        }[saved]
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    def losses(run):
        for part in (seed, 8):
            with tridrop.rng(part):
                x = data().requires_grad_()
                yield run(x).sum()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*called twice")
                    yield run(x).sum()

    expected = gradients(model, list(losses(scaled)))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    recomputed = functools.partial(checkpoint, scaled, use_reentrant=False, context_fn=contexts)
    same(gradients(model, list(losses(recomputed)), tridrop.rng(9)), expected)
    assert count > 20


@KINDS
def test_backward_twice(reentrant):
    model = Part(counted=True)
    with tridrop.rng(1):
        expected = gradients(model, [model(data()).sum()])
        x = data().requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*called twice")
            loss = checkpoint(model, x, use_reentrant=reentrant).sum()
    # Counted calls: this is the second forward in the block.
    with tridrop.rng(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*called twice")
        model(data())
        second = gradients(model, [model(data()).sum()])
    model.zero_grad()
    loss.backward(retain_graph=True)
    same([p.grad for p in model.parameters()], second)
    loss.backward()
    same([p.grad for p in model.parameters()], [2 * g for g in second])
    assert not torch.allclose(second[0], expected[0])


def test_what_is_unpacked_outside_of_backward():
    model = Part()
    with tridrop.rng(1):
        kept = model(data())
    with tridrop.rng(1):
        out = checkpoint(lambda x: model(x).exp(), data(), use_reentrant=False)
    with tridrop.rng(1):
        expected = torch.autograd.grad(kept.exp().sum(), model.up.weight)
    with tridrop.rng(2):
        assert torch.equal(out.grad_fn._saved_result, kept.exp())
    same(torch.autograd.grad(out.sum(), model.up.weight), expected)


@KINDS
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_recomputations_in_several_threads(reentrant, compiled):
    """As backward runs them for several devices: each has the blocks of its own forward."""
    model = part = Part(counted=True)
    if compiled:
        torch._dynamo.reset()
        part = torch.compile(model, backend="aot_eager")
    barrier, waiting = threading.Barrier(2, timeout=60), threading.local()

    def run(x):
        if getattr(waiting, "on", False):
            barrier.wait()
        out = part(x)
        if getattr(waiting, "on", False):
            barrier.wait()
        return out

    def grads(run):
        inputs = [data().requires_grad_() for _ in range(2)]
        losses = []
        for seed, x in enumerate(inputs):
            with tridrop.rng(seed), batch_slice(4 * seed, 4):
                losses.append(run(x).sum())
        return inputs, losses

    inputs, losses = grads(model)
    for loss in losses:
        loss.backward()
    expected = [x.grad for x in inputs]
    inputs, losses = grads(functools.partial(checkpoint, run, use_reentrant=reentrant))

    errors = []

    def backward(loss):
        waiting.on = True
        try:
            loss.backward()
        except torch_checkpoint.CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=backward, args=(loss,)) for loss in losses]
    with tridrop.rng(7):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # Compiled calls run eagerly here, and may keep another number of tensors than those of
            # the forward did, which the kind that is not reentrant looks at.
            assert compiled
            assert not reentrant
        else:
            same([x.grad for x in inputs], expected)
        assert recomputation.now() is recomputation._process is recomputation._state.shown
    assert not recomputation._recomputed


# ----------------------------------------------------------------------------------- the compiler


@pytest.mark.parametrize("seed", [3, torch.tensor([3, 1])], ids=["int", "tensor"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_compiled_checkpoint(where, seed):
    """fullgraph: torch 2.11 and later refuse what writes to the state of the process there."""
    model = Part()
    seed = seed.to(DEVICE) if isinstance(seed, torch.Tensor) else seed

    def run(x):
        return checkpoint(model, x, use_reentrant=False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x, seed):
        if where == "outside":
            return run(x)
        with tridrop.rng(seed):
            return run(x)

    def losses(function):
        for s in (seed, tridrop.fold_in(seed, 5) if isinstance(seed, torch.Tensor) else 4):
            with tridrop.rng(s) if where == "outside" else contextlib.nullcontext():
                yield function(data().requires_grad_(), s).sum()

    def plain(x, seed):
        if where == "outside":
            return model(x)
        with tridrop.rng(seed):
            return model(x)

    torch._dynamo.reset()
    expected = gradients(model, list(losses(plain)))
    same(gradients(model, list(losses(compiled)), tridrop.rng(9)), expected)


def test_a_compiled_checkpoint_with_counted_calls_breaks_its_graph():
    """A count is a state of the process. With fullgraph it raises, in the forward."""
    model = Part(counted=True)

    def run(x):
        return checkpoint(model, x, use_reentrant=False)

    def losses(function):
        for s in (1, 2):
            with tridrop.rng(s):
                yield function(data().requires_grad_()).sum()

    torch._dynamo.reset()
    expected = gradients(model, list(losses(model)))
    compiled = torch.compile(run, backend="aot_eager")
    same(gradients(model, list(losses(compiled)), tridrop.rng(9)), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"[sS]ide effect"):
        list(losses(torch.compile(run, backend="aot_eager", fullgraph=True)))


@KINDS
@pytest.mark.parametrize("counted", [False, True], ids=["sites", "counted"])
def test_compiled_calls_in_checkpoints_are_not_compiled_again(reentrant, counted):
    model = Part(counted)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)

    def losses(run):
        for seed in (1, 2, 3):
            with tridrop.rng(seed), batch_slice(4, 4):
                yield run(data().requires_grad_()).sum()

    expected = gradients(model, list(losses(model)))
    recomputed = functools.partial(checkpoint, compiled, use_reentrant=reentrant)
    same(gradients(model, list(losses(recomputed)), tridrop.rng(9)), expected)
    # In the reentrant kind once without gradients, and once, recomputed, with them.
    assert counter.frame_count == 1 + reentrant


@pytest.mark.parametrize("counted", [False, True], ids=["sites", "counted"])
def test_an_int_that_changes_is_not_compiled_in(counted):
    drop = tridrop.nn.Dropout(0.5)
    drop.site = None if counted else 3
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.ones(64, device=DEVICE)

    def step(x, seed):
        with tridrop.rng(seed):
            return drop(x)

    def backward(x, seed):
        x = x.clone().requires_grad_()
        with tridrop.rng(seed):
            drop(x).sum().backward()
        return x.grad

    for function, most in ((step, 2), (backward, 9)):
        torch._dynamo.reset()
        counter.frame_count = 0
        compiled = torch.compile(function, backend=counter)
        counts = []
        for seed in (5, 6, 7, 8, 1 << 40, 9, -3):
            assert torch.equal(compiled(x, seed), function(x, seed))
            counts.append(counter.frame_count)
        # The first int is taken for a constant, as torch takes every int, and the sign is looked at
        # nowhere.
        assert counts[1:] == [counts[1]] * 6, counts
        assert counts[1] <= most
    torch._dynamo.reset()
    counter.frame_count = 0
    compiled = torch.compile(drop, backend=counter)
    for seed in range(4):
        with tridrop.rng(seed):
            found = compiled(x)
        with tridrop.rng(seed):
            assert torch.equal(found, drop(x))
    assert counter.frame_count == 1


# --------------------------------------------------------------------------- other recomputations


class Foreign(torch.autograd.Function):
    """A checkpoint that is not torch's."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.function(x)
        return None, torch.autograd.grad(out, x, grad)[0]


def test_checkpoints_that_are_not_torchs(monkeypatch):
    model = Part()

    def loss(run, seed):
        x = data().requires_grad_()
        with tridrop.rng(seed):
            out = run(x)
        return x, out.sum()

    def foreign(x):
        return Foreign.apply(model, x)

    with tridrop.rng(1):
        x, y = data().requires_grad_(), data().requires_grad_()
        expected = torch.autograd.grad(model(x).sum(), x)
    with tridrop.rng(1):
        same(torch.autograd.grad(foreign(y).sum(), y), expected)
    # In another block, whose forwards had not these sites.
    y, out = loss(foreign, 1)
    with tridrop.rng(2), pytest.raises(RuntimeError, match="did not run in this block"):
        out.backward()
    with tridrop.rng(1):
        out = Foreign.apply(lambda x: tridrop.dropout(x, 0.5), y)
        with pytest.raises(RuntimeError, match="number_sites"):
            out.sum().backward()
    monkeypatch.setattr(seeds._state, "warned_of_others", False)
    _, out = loss(foreign, 1)
    with pytest.warns(UserWarning, match="by other means than torch.utils.checkpoint"):
        out.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(foreign, 1)[1].backward()


# ------------------------------------------------------------------------- torch's private places


def test_the_places_in_torch_that_are_wrapped_are_as_they_were():
    """If this fails torch has changed them, and no recomputation knows the blocks of its forward.

    recomputation.py is the only file to adapt."""
    frame, function = torch_checkpoint._CheckpointFrame, torch_checkpoint.CheckpointFunction
    assert frame.__init__.__module__ == function.forward.__module__ == "torch.utils.checkpoint"
    for wrapped, first in (
        (frame.__init__, ["self", "recompute_fn"]),
        (function.forward, ["ctx", "run_function", "preserve_rng_state", "args"]),
    ):
        assert wrapped.__code__.co_filename == recomputation.__file__
        names = list(inspect.signature(wrapped.__wrapped__).parameters)
        assert names[: len(first)] == first
    made = []
    for preserve in (True, False):
        x = torch.ones(2, requires_grad=True)
        for reentrant in (False, True):

            def run(x):
                made.append(recomputation.now().call)
                return x.exp()

            out = checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=preserve)
            assert made.pop() is None
            out.sum().backward()
            call = made.pop()
            assert isinstance(call, recomputation.Carried)
            assert call.restores is preserve
