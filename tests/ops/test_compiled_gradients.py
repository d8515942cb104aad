"""Compiled, every public op has the gradients that it has in eager mode under the same seed.

Dynamo of torch 2.11 gives no gradient, and says nothing, where an autograd function's forward
returns what a `.to` (or `.contiguous`, `.float`) gave back as it was.
"""

import pytest
import torch
import torch.distributed as dist
from hosts import DEVICE
from ring import RingAttention

import tridrop
from tridrop import functional
from tridrop.commands import check
from tridrop.functional.rows import drop_rows

# What returns masks, numbers, indices, words or gradients, none of which has a gradient.
WITHOUT = {
    "attention_keep_mask", "keep_mask", "kept_indices", "normal_noise",
    "scaled_dot_product_attention_backward", "word_dropout",
}  # fmt: skip
# A row of the table of cases for each op that it has.
ROWS = {case.op: case for case in reversed(check.CASES)}


def rate(p):
    return torch.tensor(p, dtype=torch.float64, device=DEVICE)


def numbers(*values):
    return torch.tensor(values, device=DEVICE)


def layers(x, seed):
    for layer in tridrop.layer_drop([torch.sin, torch.cos, torch.exp], 0.5, seed=seed):
        x = layer(x)
    return x


# Calls of x, [3, 2, 5, 6], and a seed: what no row of the table does.
CALLS = {
    "drop_block2d": lambda x, s: tridrop.drop_block2d(x, 0.4, 3, seed=s),
    "drop_block2d in place": lambda x, s: tridrop.drop_block2d(2 * x, 0.4, 3, True, seed=s),
    "drop_block3d": lambda x, s: tridrop.drop_block3d(x.transpose(0, 1)[None], 0.4, 3, seed=s),
    "head_dropout by count": lambda x, s: tridrop.head_dropout(x, 0.5, rescale="kept", seed=s),
    "head_dropout by count of tokens": lambda x, s: tridrop.head_dropout(
        x, 0.5, dim=2, rescale="kept", seed=s
    ),
    "drop_path_subset": lambda x, s: tridrop.drop_path_subset(x, torch.square, 0.4, seed=s),
    "patch_dropout": lambda x, s: tridrop.patch_dropout(x.flatten(1, 2), 0.4, seed=s),
    "layer_drop": layers,
    "stochastic_depth of the batch": lambda x, s: tridrop.stochastic_depth(
        x, 0.05, "batch", seed=s
    ),
    "locked_dropout by batch": lambda x, s: tridrop.locked_dropout(
        x[..., 0], 0.4, batch_first=True, seed=s
    ),
    # What locked_dropout does of packed sequences, which Dynamo does not trace.
    "rows": lambda x, s: drop_rows(x[:, 0], numbers([0, 1, 2, 1, 0]).expand(3, 5), 0.4, 3, 6, s),
    "rows at a rate": lambda x, s: drop_rows(x[0, 0], numbers(0, 1, 2, 1, 0), rate(0.4), 3, 6, s),
    "embedding_dropout at a rate": lambda x, s: tridrop.embedding_dropout(
        numbers([0, 2, 1], [1, 1, 0]), x[:, 0, 0], rate(0.4), seed=s
    ),
    "norm_linear": lambda x, s: tridrop.norm_linear(x, x[0, 0]),
    "dropout at a rate": lambda x, s: tridrop.dropout(x, rate(0.4), seed=s),
    "dropconnect_linear at a rate": lambda x, s: tridrop.dropconnect_linear(
        x, x[0, 0], p=rate(0.4), seed=s
    ),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def a_compiler_of_its_own():
    torch._dynamo.reset()


def compare(call, tensors, fullgraph=True):
    """The result and the gradients of ``call(*tensors, seed)`` are those of eager mode."""
    seed = tridrop.fold_in(5, 3).to(DEVICE)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=fullgraph)
    outcomes = []
    for function in (compiled, call):
        given = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*given, seed)
        grads = torch.autograd.grad(out.float().square().sum(), given)
        outcomes.append((out.detach(), *grads))
    for found, expected in zip(*outcomes, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@dtypes
@pytest.mark.parametrize("op", ROWS)
def test_of_the_table_of_cases(op, dtype):
    case = ROWS[op]
    tensors = case.inputs(dtype, DEVICE, torch.Generator().manual_seed(0))
    names = list(tensors)

    def call(*given):
        *values, seed = given
        return case.call(dict(zip(names, values, strict=True)), seed, case.p, True)

    compare(call, list(tensors.values()))


@dtypes
@pytest.mark.parametrize("name", CALLS)
def test_of_calls_without_a_row(name, dtype):
    x = torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    # Which layers run, the host must know, and so a graph ends there.
    compare(CALLS[name], [x], fullgraph=name != "layer_drop")


def test_no_op_is_left_out():
    ops = set(ROWS) | {name.split()[0] for name in CALLS} & set(functional.__all__)
    assert ops | WITHOUT == set(functional.__all__)
    assert not ops & WITHOUT


@dtypes
def test_of_ring_attention(dtype, tmp_path):
    """The listing of docs/distributed.md, in a ring of one process."""
    init = f"file://{tmp_path / 'ring'}"
    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        qkv = torch.randn(3, 1, 4, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        compare(lambda *given: RingAttention.apply(*given[:3], 0.1, True, given[3], group), qkv)
    finally:
        dist.destroy_process_group()
