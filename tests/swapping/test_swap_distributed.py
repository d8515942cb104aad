"""Swapped models on several processes: DDP and FSDP2, around a swapped model and swapped inside."""

import pytest
import torch
import torch.distributed as dist
import transformers
from swap_families import batch, make
from swap_helpers import classes_of, swapped_outcome
from torch import nn

import tridrop

WORLD = 2


def share(inputs: dict, rank: int) -> dict:
    """One sample for each rank."""
    return {key: value[rank : rank + 1] for key, value in inputs.items()}


def step_of_rank(model: nn.Module, inputs: dict, rank: int):
    """Each rank drops under a number of its own."""
    return swapped_outcome(model, share(inputs, rank), seed=100 + rank)[0]


def average() -> dict[str, torch.Tensor]:
    """The gradients of one process that sees all ranks' samples."""
    model, inputs = make("BERT"), batch("BERT")
    tridrop.swap(model)
    steps = [step_of_rank(model, inputs, rank) for rank in range(WORLD)]
    return {n: sum(s.gradients[n] for s in steps) / WORLD for n in steps[0].gradients}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, of all ranks where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            full = getattr(gradient, "full_tensor", None)
            found[name.removeprefix("module.")] = gradient if full is None else full()
    return found


def assert_near(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def run_rank(rank: int, rendezvous: str, expected: dict) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    try:
        for scenario in SCENARIOS:
            try:
                scenario(rank, expected)
            except Exception as error:
                raise AssertionError(f"{scenario.__name__}: {error}") from error
    finally:
        dist.destroy_process_group()


def one_step(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    inputs = share(batch("BERT"), rank)
    model.zero_grad()
    with tridrop.rng(tridrop.fold_in(100 + rank, 0)):
        model(**inputs).loss.backward()
    return whole(model)


def ddp_around_swapped(rank: int, expected: dict) -> None:
    model = make("BERT")
    tridrop.swap(model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert_near(one_step(wrapped, rank), expected)


def swapped_inside_ddp(rank: int, expected: dict) -> None:
    model = make("BERT")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    tridrop.swap(wrapped)
    assert_near(one_step(wrapped, rank), expected)
    tridrop.unswap(wrapped)
    assert classes_of(model) == classes_of(make("BERT"))


def shard(model: nn.Module) -> nn.Module:
    for layer in model.bert.encoder.layer:
        dist.fsdp.fully_shard(layer)
    return dist.fsdp.fully_shard(model)


def fsdp_around_swapped(rank: int, expected: dict) -> None:
    model = make("BERT")
    tridrop.swap(model)
    assert_near(one_step(shard(model), rank), expected)


def fsdp_around_layers_that_keep_less(rank: int, expected: dict) -> None:
    """A layer's input is made again after its own norm's parameters have been freed."""
    model = make("BERT")
    tridrop.swap(model, memory=True)
    assert_near(one_step(shard(model), rank), expected)


def swapped_inside_fsdp(rank: int, expected: dict) -> None:
    model = shard(make("BERT"))
    report = tridrop.swap(model)
    assert report.counts()["left"] == 0
    assert_near(one_step(model, rank), expected)
    tridrop.swap(model)
    assert_near(one_step(model, rank), expected)


def unswapped_inside_fsdp(rank: int, expected: dict) -> None:
    """Of BERT the modules that are sharded are not those that were rewritten."""
    model = make("BERT")
    tridrop.swap(model)
    shard(model)
    tridrop.unswap(model)
    assert not any("_tridrop_base" in vars(kind) for kind in classes_of(model))
    model(**share(batch("BERT"), rank)).loss.backward()


def sharded_rewritten_modules(rank: int, expected: dict) -> None:
    """Their classes are fully_shard's now: unswap says what to do, and does nothing."""
    model = make("GPT-2")
    tridrop.swap(model)
    for block in model.transformer.h:
        dist.fsdp.fully_shard(block)
    before = classes_of(model)
    with pytest.raises(RuntimeError, match="fully_shard"):
        tridrop.unswap(model)
    assert classes_of(model) == before
    whole_model = make("GPT-2")
    tridrop.swap(whole_model)
    inputs = batch("GPT-2")  # the same on each rank, under the same seed
    plain = swapped_outcome(whole_model, inputs, seed=100)[0]
    with tridrop.rng(tridrop.fold_in(100, 0)):
        model(**inputs).loss.backward()
    found = whole(model)
    assert_near(
        {n: g for n, g in found.items() if ".h." in n},
        {n: g for n, g in plain.gradients.items() if ".h." in n},
    )


SCENARIOS = [
    ddp_around_swapped,
    swapped_inside_ddp,
    fsdp_around_swapped,
    fsdp_around_layers_that_keep_less,
    swapped_inside_fsdp,
    unswapped_inside_fsdp,
    sharded_rewritten_modules,
]


def test_distributed_gradients_are_those_of_one_process(tmp_path):
    """DDP and FSDP2 on two processes, around and inside a swap; all in one start of them."""
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(run_rank, (rendezvous, average()), nprocs=WORLD)
