"""Ring attention with dropout. This is a listing of docs/distributed.md, word for word."""

import torch
import torch.distributed as dist

import tridrop


def pass_on(tensors, group):
    """Send the tensors to the next process of the ring, and take those of the one before."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:
        return tensors
    received = [torch.empty_like(t) for t in tensors]
    peers = [dist.get_global_rank(group, (rank + step) % world) for step in (1, -1)]
    works = [dist.P2POp(dist.isend, t.contiguous(), peers[0], group) for t in tensors]
    works += [dist.P2POp(dist.irecv, t, peers[1], group) for t in received]
    for work in dist.batch_isend_irecv(works):
        work.wait()
    return received


def combine(out, lse, more, its_lse):
    """The attention over two sets of keys, of the attention over each and its log-sum-exp."""
    total = torch.logaddexp(lse, its_lse)
    weights = [torch.exp(part - total).nan_to_num(0.0) for part in (lse, its_lse)]
    return out * weights[0][..., None] + more * weights[1][..., None], total


class RingAttention(torch.autograd.Function):
    """Attention of ``[B, H, L, E]``, of whose L every process has a block of equal length.

    Blocks of keys go around the ring, and in backward their gradients with them.
    """

    @staticmethod
    def blocks(query, key, is_causal, group):
        """For each step of the ring, where its scores lie; None where nobody sees a key."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        whole = (batch, heads, queries * world, keys * world)
        for owner in ((rank - step) % world for step in range(world)):
            hidden = is_causal and owner > rank
            yield None if hidden else tridrop.Shard(whole, (0, 0, rank * queries, owner * keys))

    @staticmethod
    def forward(ctx, query, key, value, p, is_causal, seed, group):
        out = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=torch.float32)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
        block = (key, value)
        for shard in RingAttention.blocks(query, key, is_causal, group):
            if shard is not None:
                more = tridrop.scaled_dot_product_attention(
                    query, *block, None, p, is_causal, return_lse=True, shard=shard, seed=seed
                )
                out, lse = combine(out, lse, *more)
            block = pass_on(block, group)
        out = out.to(query.dtype, copy=True)  # torch.compile of 2.11 wants a tensor of its own
        ctx.save_for_backward(query, key, value, out, lse, seed)
        ctx.given = p, is_causal, group
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, seed = ctx.saved_tensors
        p, is_causal, group = ctx.given
        dquery, dkey, dvalue = (
            torch.zeros_like(t, dtype=torch.float32) for t in (query, key, value)
        )
        for shard in RingAttention.blocks(query, key, is_causal, group):
            if shard is not None:
                parts = tridrop.scaled_dot_product_attention_backward(
                    grad, out, lse, query, key, value, None, p, is_causal, shard=shard, seed=seed
                )
                for total, part in zip((dquery, dkey, dvalue), parts, strict=True):
                    total += part
            key, value, dkey, dvalue = pass_on((key, value, dkey, dvalue), group)
        found = (t.to(query.dtype) for t in (dquery, dkey, dvalue))
        return *found, None, None, None, None
