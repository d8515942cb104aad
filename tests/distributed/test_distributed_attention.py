"""Attention over blocks of keys, in a ring and by heads: exactly that of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts import PLAIN
from ring import RingAttention, combine
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tridrop

WORLD = 4


def operands(batch=2, heads=4, length=16, width=16):
    """Values that are rows of the identity: the result is then the dropped probabilities."""
    generator = torch.Generator().manual_seed(8)
    q, k = (torch.randn(batch, heads, length, 8, generator=generator) for _ in range(2))
    v = torch.eye(length, width).expand(batch, heads, -1, -1).contiguous()
    return [t.requires_grad_() for t in (q, k, v)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def one_process(is_causal, p=0.3):
    q, k, v = operands()
    out = tridrop.scaled_dot_product_attention(q, k, v, None, p, is_causal, seed=5)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    out.backward(weights)
    return out.detach(), weights, [t.grad for t in (q, k, v)]


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_combine_to_the_whole(backend, is_causal):
    """Blocks of uneven lengths, forward and backward, with a float mask and shared key heads."""
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    q, k, v = (t.detach().to(device) for t in operands(batch=1, heads=2, length=40, width=8))
    k, v = k[:, :1].contiguous(), torch.randn_like(v[:, :1])
    bias = torch.linspace(-2, 2, 40, device=device).expand(40, 40)
    more = {"enable_gqa": True, "seed": 5, "window": (30, 20)}
    grad = torch.linspace(-1, 1, q.numel(), device=device).view_as(q)
    with tridrop.backend(backend):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        whole, its_lse = tridrop.scaled_dot_product_attention(
            *leaves, bias, 0.3, is_causal, return_lse=True, **more
        )
        whole.backward(grad)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:-1], -torch.inf, device=device)
        blocks = [(slice(a, b), tridrop.Shard((1, 2, 40, 40), (0, 0, 0, a)))
                  for a, b in ((0, 13), (13, 33), (33, 40))]  # fmt: skip
        for at, shard in blocks:
            part = tridrop.scaled_dot_product_attention(
                q, k[:, :, at], v[:, :, at], bias[:, at], 0.3, is_causal, return_lse=True,
                shard=shard, **more,
            )  # fmt: skip
            out, lse = combine(out, lse, *part)
        close(out, whole.detach())
        close(lse, its_lse.detach())
        found = [torch.zeros_like(t) for t in (q, k, v)]
        for at, shard in blocks:
            dq, dk, dv = tridrop.scaled_dot_product_attention_backward(
                grad, out, lse, q, k[:, :, at], v[:, :, at], bias[:, at], 0.3, is_causal,
                shard=shard, **more,
            )  # fmt: skip
            found[0] += dq
            found[1][:, :, at] += dk
            found[2][:, :, at] += dv
    for ours, leaf in zip(found, leaves, strict=True):
        close(ours, leaf.grad)


def test_a_block_without_keys_to_see_adds_nothing():
    q, k, v = (t.detach() for t in operands())
    shard = tridrop.Shard((2, 4, 16, 32), (0, 0, 0, 16))
    out, lse = tridrop.scaled_dot_product_attention(
        q, k, v, None, 0.3, True, return_lse=True, shard=shard, seed=5
    )
    assert not out.any()
    assert (lse == -torch.inf).all()
    parts = tridrop.scaled_dot_product_attention_backward(
        out, out, lse, q, k, v, None, 0.3, True, shard=shard, seed=5
    )
    assert not any(t.any() for t in parts)


def test_bad_arguments_of_the_backward_say_what_is_wrong():
    q, k, v = (t.detach() for t in operands())
    out, lse = tridrop.scaled_dot_product_attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=r"lse \(2, 4, 15\); they must be"):
        tridrop.scaled_dot_product_attention_backward(out, out, lse[..., 1:], q, k, v, seed=1)
    with pytest.raises(ValueError, match="give four dimensions"):
        tridrop.scaled_dot_product_attention_backward(out, out, lse, q[0], k[0], v[0], seed=1)


def test_the_ring_is_the_one_of_the_docs():
    root = Path(__file__).parents[2]
    listing = (root / "tests" / "ring.py").read_text()
    assert f"```python\n{listing}```" in (root / "docs" / "distributed.md").read_text()


# --------------------------------------------- on four processes, which test_distributed.py starts


def ring():
    rank = dist.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    for is_causal in (False, True):
        expected, weights, grads = one_process(is_causal)
        parts = [t.detach()[:, :, mine].clone().requires_grad_() for t in operands()]
        seed = tridrop.fold_in(5, 0)
        out = RingAttention.apply(*parts, 0.3, is_causal, seed, dist.group.WORLD)
        out.backward(weights[:, :, mine])
        keep = tridrop.attention_keep_mask(5, (2, 4, 16, 16), 0.3)[:, :, mine]
        if is_causal:
            keep = keep & torch.ones(16, 16).tril().bool()[mine]
        assert torch.equal(out != 0, keep)
        close(out, expected[:, :, mine])
        for part, grad in zip(parts, grads, strict=True):
            close(part.grad, grad[:, :, mine])


def heads_instead_of_queries():
    """Ulysses: from sequences to heads and back, an all-to-all each way."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("cp",))
    expected, weights, grads = one_process(True)
    parts = [distribute_tensor(t.detach(), mesh, [Shard(2)]).requires_grad_() for t in operands()]
    q, k, v = (t.redistribute(placements=[Shard(1)]) for t in parts)
    out = tridrop.scaled_dot_product_attention(q, k, v, None, 0.3, True, seed=5)
    assert out.placements == (Shard(1),)
    out = out.redistribute(placements=[Shard(2)])
    out.backward(distribute_tensor(weights, mesh, [Shard(2)]))
    assert torch.equal(out.full_tensor() != 0, expected != 0)
    close(out.full_tensor(), expected)
    for part, grad in zip(parts, grads, strict=True):
        close(part.grad.full_tensor(), grad)
