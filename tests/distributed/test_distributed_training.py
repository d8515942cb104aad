"""Training on four processes: every wrapper against one process with the same global batch."""

import copy
import tempfile
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes
from swap_families import make
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint as recompute

import tridrop
from tridrop.distributed import batch_slice, mesh_seed, number_microbatches
from tridrop.ops import attention, elementwise, norm
from tridrop.spec.attention import AttentionInputs
from tridrop.spec.operands import Elementwise, Norm

WORLD, STEPS, SAMPLES = 4, 20, 4
MESHES = {}


def mesh():
    if not MESHES:
        MESHES[0] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return MESHES[0]


def words(step):
    """A global batch, with padding; every sample has as many labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 20, (SAMPLES, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def train(model, steps=STEPS, part=slice(None), group=None, checkpointing=False):
    """The losses of the steps, of the whole batch, and the last gradients."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    losses = []
    for step in range(steps):
        inputs = {k: v[part] for k, v in words(step).items()}
        count = len(inputs["input_ids"])
        optimizer.zero_grad()
        origin = part.start or 0
        with tridrop.rng(tridrop.fold_in(77, step)), batch_slice(origin, count):
            more = {} if "Bert" in type(model).__name__ else {"use_cache": False}
            loss = model(**inputs, **more).loss
            loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    losses = torch.stack(losses)
    if group is not None:
        dist.all_reduce(losses, group=group)
        losses /= dist.get_world_size(group)
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return losses, {n: g for n, g in gradients.items() if g is not None}


def swapped(name):
    model = make(name)
    tridrop.swap(model)
    return model


EXPECTED = {}


def one_process(name):
    if name not in EXPECTED:
        EXPECTED[name] = train(swapped(name))
    return EXPECTED[name]


def assert_equal(found, expected):
    losses, gradients = found
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, wanted in expected[1].items():
        ours = gradients[name]
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(
            ours, wanted, rtol=1e-3, atol=1e-4 * largest, msg=lambda t, name=name: f"{name}: {t}"
        )


# -------------------------------------------------------------------------------- data parallelism


def ddp_masks_and_gradients_of_one_process():
    rank = dist.get_rank()
    model = swapped("BERT")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found = train(wrapped, STEPS, slice(rank, rank + 1), dist.group.WORLD)
    assert_equal(found, one_process("BERT"))


def masks_of_a_slice_are_rows_of_the_whole():
    rank = dist.get_rank()
    x = torch.ones(SAMPLES, 6, 10)
    whole = tridrop.keep_mask(tridrop.fold_in(3, 0), x.shape, 0.5)
    layer = nn.Sequential(nn.Linear(1, 1), tridrop.nn.Dropout())
    layer = nn.parallel.DistributedDataParallel(layer)
    tridrop.nn.number_sites(layer)
    with tridrop.rng(3), batch_slice(rank, 1):
        out = layer.module[1](x[rank : rank + 1])
    assert torch.equal(out[0] != 0, whole[rank])


def fsdp2_with_checkpointing():
    rank = dist.get_rank()
    for name in ("BERT", "GPT-2"):
        model = swapped(name)
        layers = model.bert.encoder.layer if name == "BERT" else model.transformer.h
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        found = train(model, STEPS, slice(rank, rank + 1), dist.group.WORLD, checkpointing=True)
        assert_equal(found, one_process(name))


# ------------------------------------------------------------------ tensor and sequence parallelism


def local_input(layout):
    return PrepareModuleInput(
        input_layouts=layout, desired_input_layouts=Replicate(), use_local_output=True
    )


def spread_output():
    return PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
    )


def bert_plan():
    columns = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    rows = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    plan = {"bert.embeddings": spread_output(), "cls": local_input(Shard(1))}
    for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                 "intermediate.dense"):  # fmt: skip
        plan[f"bert.encoder.layer.*.{name}"] = columns
    for name in ("attention.output.dense", "output.dense"):
        plan[f"bert.encoder.layer.*.{name}"] = rows
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        plan[f"bert.encoder.layer.*.{name}"] = SequenceParallel()
    return plan


class ParallelConv1D(ParallelStyle):
    """GPT-2's linear layers, whose weight is [in, out]: columns or rows of it for each process."""

    def __init__(self, weight, bias, given, result):
        super().__init__()
        self.weight, self.bias, self.given, self.result = weight, bias, given, result

    def _apply(self, module, mesh):
        def spread(name, module, mesh):
            for n, p in list(module.named_parameters()):
                place = self.weight if n == "weight" else self.bias
                part = nn.Parameter(torch.distributed.tensor.distribute_tensor(p, mesh, [place]))
                module.register_parameter(n, part)

        return distribute_module(
            module,
            mesh,
            spread,
            lambda module, inputs, mesh: inputs[0].redistribute(placements=[self.given]),
            lambda module, output, mesh: output.redistribute(placements=[self.result]),
        )


def gpt2_plan():
    # q, k and v are one matrix in GPT-2, so their columns are not those of heads: whole again.
    return {
        "transformer.drop": spread_output(),
        "transformer.h.*.ln_1": SequenceParallel(),
        "transformer.h.*.ln_2": SequenceParallel(),
        "transformer.ln_f": SequenceParallel(),
        "transformer.h.*.attn.c_attn": ParallelConv1D(Shard(1), Shard(0), Replicate(), Replicate()),
        "transformer.h.*.attn.c_proj": ParallelConv1D(Shard(0), Replicate(), Shard(2), Shard(1)),
        "transformer.h.*.mlp.c_fc": ParallelConv1D(Shard(1), Shard(0), Replicate(), Shard(2)),
        "transformer.h.*.mlp.c_proj": ParallelConv1D(Shard(0), Replicate(), Shard(2), Shard(1)),
        "lm_head": local_input(Shard(1)),
    }


PLANS = {"BERT": bert_plan, "GPT-2": gpt2_plan}


def recorded(model, part=slice(None)):
    """The masks of a step: the exported ones, for what each kernel was told, by their seeds.

    Of each: the mask of the piece, and where it begins in the whole.
    """
    found = {}

    def note(seed, shape, p, whole, origin, export):
        origin = tuple(origin) or (0,) * len(shape)
        where = tridrop.Shard(tuple(whole) or tuple(shape), origin)
        found.setdefault(tuple(seed.tolist()), []).append(
            (export(seed, shape, p, shard=where), origin)
        )

    def rows(forward, operands, packed):
        def call(*arguments):
            width = len(operands._fields)
            given, options = operands(*arguments[:width]), packed(*arguments[width:])
            if given.seed is not None:
                where = options.global_shape, options.origin
                note(given.seed, given.x.shape, options.p, *where, tridrop.keep_mask)
            return forward(*arguments)

        return call

    def scores(*arguments):
        width = len(AttentionInputs._fields)
        given = AttentionInputs(*arguments[:width])
        options = attention.PackedAttention(*arguments[width:])
        if given.seed is not None:
            shape, origin = (*given.query.shape[:3], given.key.shape[2]), options.origin
            whole = [n + o for n, o in zip(shape, origin, strict=True)]
            note(given.seed, shape, options.p, whole, origin, tridrop.attention_keep_mask)
        return attend(*arguments)

    attend = attention.attention_forward
    of_rows = rows(elementwise.forward, Elementwise, elementwise.Packed)
    of_norms = rows(norm.norm_forward, Norm, norm.PackedNorm)
    with (
        mock.patch.object(elementwise, "forward", of_rows),
        mock.patch.object(norm, "norm_forward", of_norms),
        mock.patch.object(attention, "attention_forward", scores),
    ):
        train(model, 1, part)
    return found


def masks_of_swapped_models_bit_by_bit():
    """Under TP, SP and FSDP2: the pieces are those of one process, and together they are whole."""
    dp = mesh().get_coordinate()[0]
    for name, plan in PLANS.items():
        expected = recorded(swapped(name))
        model = swapped(name)
        parallelize_module(model, mesh()["tp"], plan())
        fully_shard(model, mesh=mesh()["dp"])
        found = recorded(model, slice(2 * dp, 2 * dp + 2))
        assert found.keys() == expected.keys()
        assert len(expected) == 7
        for seed, ((mask, origin),) in found.items():
            ((whole, _),) = expected[seed]
            at = tuple(slice(o, o + n) for o, n in zip(origin, mask.shape, strict=True))
            assert torch.equal(mask, whole[at])
            seen = torch.zeros_like(whole, dtype=torch.int32)
            seen[at] = 1
            dist.all_reduce(seen)
            assert seen.min() >= 1


def tensor_and_sequence_parallelism():
    """The same samples in all processes of "tp"; FSDP2 over "dp", whose ranks have two each."""
    dp = mesh().get_coordinate()[0]
    for name, plan in PLANS.items():
        model = swapped(name)
        parallelize_module(model, mesh()["tp"], plan())
        fully_shard(model, mesh=mesh()["dp"])
        part = slice(2 * dp, 2 * dp + 2)
        found = train(model, STEPS, part, mesh().get_group("dp"))
        assert_equal(found, one_process(name))


def tensor_parallelism_swapped_afterwards():
    """The plan first, then the swap; no sequence parallelism, and no data parallelism."""
    model = make("BERT")
    columns, rows = ColwiseParallel(use_local_output=False), RowwiseParallel()
    plan = {}
    for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                 "intermediate.dense"):  # fmt: skip
        plan[f"bert.encoder.layer.*.{name}"] = columns
    for name in ("attention.output.dense", "output.dense"):
        plan[f"bert.encoder.layer.*.{name}"] = rows
    parallelize_module(model, mesh()["tp"], plan)
    tridrop.swap(model)
    assert_equal(train(model), one_process("BERT"))


def modules_of_ours_in_a_plan():
    """A feed-forward part of tridrop's modules, its norm on pieces of the sequence."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.act = tridrop.nn.ActivationDropout("gelu", 0.3)
            self.norm = tridrop.nn.DropoutAddLayerNorm(8, 0.2)

        def forward(self, x):
            return self.norm(self.down(self.act(self.up(x))), x)

    torch.manual_seed(0)
    whole = Block()
    parts = copy.deepcopy(whole)
    for model in (whole, parts):
        tridrop.nn.number_sites(model)
    tp = mesh()["tp"]
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(parts, tp, plan)
    distribute_module(parts.norm, tp)  # its parameters whole; without hooks, it stays fused
    x = torch.randn(2, 6, 8)
    for step in range(3):
        with tridrop.rng(tridrop.fold_in(9, step)):
            expected = whole(x)
            expected.square().sum().backward()
        with tridrop.rng(tridrop.fold_in(9, step)):
            found = parts(torch.distributed.tensor.distribute_tensor(x, tp, [Shard(1)]))
            found.square().sum().backward()
        torch.testing.assert_close(found.full_tensor(), expected)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda t, n=name: f"{n} {t}")


# ----------------------------------------------------------------------- pipelines, checkpoints


def layers():
    """Four encoder layers, swapped while they are whole."""
    torch.manual_seed(0)
    made = [nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True) for _ in range(WORLD)]
    model = nn.Sequential(*made)
    tridrop.swap(model)
    return model.train()


class Recomputed(nn.Module):
    """A layer whose activations are made again in backward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return recompute(self.layer, x, use_reentrant=False)


def square(out, target):
    return (out - target).square().mean()


def pipelines_equal_one_process():
    """A stage a process, a microbatch a sample, in two orders, and with activations made again."""
    rank = dist.get_rank()
    x, target = torch.randn(2, SAMPLES, 6, 8)
    whole = layers()
    with tridrop.rng(13):
        expected = square(whole(x), target)
        expected.backward()
    orders = (
        (ScheduleGPipe, nn.Sequential),
        (Schedule1F1B, nn.Sequential),
        (Schedule1F1B, Recomputed),
    )
    for schedule, wrapped in orders:
        part = layers()[rank]
        given, made = (torch.empty(1, 6, 8, requires_grad=g) for g in (rank > 0, True))
        shapes = {"input_args": (given,), "output_args": (made,)}
        stage = PipelineStage(wrapped(part), rank, WORLD, torch.device("cpu"), **shapes)
        number_microbatches(stage, size=1)
        run = schedule(stage, n_microbatches=SAMPLES, loss_fn=square)
        losses = []
        given = (x,) if rank == 0 else ()
        last = {"target": target, "losses": losses} if rank == WORLD - 1 else {}
        with tridrop.rng(13):
            run.step(*given, **last)
        if losses:
            torch.testing.assert_close(torch.stack(losses).mean(), expected)
        for p, q in zip(part.parameters(), whole[rank].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def a_resumed_run_draws_what_the_unbroken_one_would():
    """Weights in FSDP2, the base seed, the step and a schedule, by torch.distributed.checkpoint."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    x = torch.randn(SAMPLES, 8)

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), tridrop.nn.Dropout(0.5), nn.Linear(8, 8))
        tridrop.nn.number_sites(model)
        schedule = tridrop.DropoutSchedule(model, tridrop.schedules.Linear(0.6, 0.2, steps=6))
        fully_shard(model)
        return model, schedule, torch.optim.SGD(model.parameters(), lr=0.1)

    def go(model, schedule, optimizer, seed, first, last):
        losses = []
        rank = dist.get_rank()
        for step in range(first, last):
            optimizer.zero_grad()
            with tridrop.rng(tridrop.fold_in(seed, step)), batch_slice(rank, 1):
                loss = model(x[rank : rank + 1]).square().mean()
                loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    torch.manual_seed(dist.get_rank())
    seed = mesh_seed(mesh())
    run = start()
    go(*run, seed, 0, 3)
    model, schedule, _ = run
    state = {"model": model.state_dict(), "schedule": schedule, "seed": seed, "step": 3}
    checkpoint.save(state, checkpoint_id=folder[0])
    unbroken = go(*run, seed, 3, 6)

    model, schedule, optimizer = start()
    state = {"model": model.state_dict(), "schedule": schedule, "seed": torch.zeros_like(seed)}
    state["step"] = 0
    checkpoint.load(state, checkpoint_id=folder[0])
    model.load_state_dict(state["model"])
    resumed = go(model, schedule, optimizer, state["seed"], state["step"], 6)
    assert torch.equal(resumed, unbroken)


CHECKS = [
    ddp_masks_and_gradients_of_one_process,
    masks_of_a_slice_are_rows_of_the_whole,
    fsdp2_with_checkpointing,
    masks_of_swapped_models_bit_by_bit,
    tensor_and_sequence_parallelism,
    tensor_parallelism_swapped_afterwards,
    modules_of_ours_in_a_plan,
    pipelines_equal_one_process,
    a_resumed_run_draws_what_the_unbroken_one_would,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("ranks"), WORLD, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_four_processes(found, check):
    assert not found[check.__name__], found[check.__name__]
