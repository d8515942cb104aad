"""Attention with dropout."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, ops
from ..base import arguments as spec_values
from ..ops import Attention, apply, torchs_attention
from ..spec import attention as spec_attention
from ..spec import elementwise as spec
from ..spec.attention import AttentionInputs, AttentionOptions, Window
from . import known
from .elementwise import ShardLike, distinct
from .softmax import as_four, rated_attention, settle_attention

_FAMILY = known.Family(
    "attention", Attention, ops.pack_attention, AttentionInputs, {"mask": "attn_mask"}
)


def _same_batch(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Query, key and value as [B, H, L, E], and the result's dimensions before L."""
    tensors = [t[None] if t.dim() == 2 else t for t in (query, key, value)]
    first, *others = (t.shape[:-3] for t in tensors)
    try:
        same = all(other == first for other in others)  # as usual; broadcast_shapes is slow
        batch = first if same else torch.broadcast_shapes(first, *others)
    except RuntimeError:
        raise ValueError(
            f"the dimensions before the heads of query {tuple(query.shape)}, key "
            f"{tuple(key.shape)} and value {tuple(value.shape)} do not broadcast together; give "
            "equal ones, or 1"
        ) from None
    heads = tensors[0].shape[-3]
    if heads == 1 and not enable_gqa and tensors[1].shape[-3] != 1:
        heads = tensors[1].shape[-3]  # one query head, for every key head
        tensors[0] = tensors[0].expand(*tensors[0].shape[:-3], heads, *tensors[0].shape[-2:])
    q, k, v = (
        t.expand(*batch, *t.shape[-3:]).reshape(-1, *t.shape[-3:])
        if t.dim() != 4 or batch != t.shape[:1]
        else t
        for t in tensors
    )
    return q, k, v, (*batch, heads) if query.dim() > 2 else ()


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors, cast under torch.autocast as torch's own function casts them."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return list(tensors)  # the checks refuse them
    dtype = spec.autocast_dtype(tensors[0].device)
    if dtype is None:
        return list(tensors)
    return [t.to(dtype) if t.dtype in spec.FLOATS[:3] else t for t in tensors]


class _Checked(NamedTuple):
    """A call that has been checked."""

    # Query, key, value, mask, key_mask, sinks and both offsets, in the op's dimensions.
    tensors: tuple[Tensor | None, ...]
    options: AttentionOptions  # without the rate
    outer: tuple[int, ...]  # the result's dimensions before the queries
    batch: int | None  # the number of sequences; None where a shard says which ones they are


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float | Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Window | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    packing: tuple[Tensor | None, Tensor | None, int | None, int | None],
    shard: ShardLike | None,
) -> _Checked:
    """The call in the form that the op takes; raises where an argument is not allowed."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packing
    spec_attention.check_dtypes(query, key=key, value=value)
    spec_values.check_flag(is_causal, "is_causal")
    spec_values.check_flag(enable_gqa, "enable_gqa")
    spec_attention.check_shapes(query, key, value, enable_gqa)
    spec.check_probability(dropout_p, "dropout_p", tensor_allowed=True)
    is_packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if is_packed:
        spec_attention.check_packed(query, key, cu_seqlens_q, cu_seqlens_k)
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q and max_seqlen_k belong to cu_seqlens_q and cu_seqlens_k")
    q, k, v, outer = _same_batch(query, key, value, enable_gqa)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    leading = outer
    if is_packed:
        assert cu_seqlens_q is not None
        batch = cu_seqlens_q.shape[0] - 1
        leading = (batch, heads)
        queries = spec_attention.resolve_longest(
            max_seqlen_q, queries, cu_seqlens_q, "max_seqlen_q"
        )
        assert cu_seqlens_k is not None
        keys = spec_attention.resolve_longest(max_seqlen_k, keys, cu_seqlens_k, "max_seqlen_k")
    lower, upper = spec_attention.resolve_band(is_causal, window)
    mask = attn_mask
    if type(mask).__name__ == "CausalBias":  # the import of the class would import triton
        if is_packed or shard is not None or upper is not None or lower is not None:
            raise ValueError(
                "attn_mask is a CausalBias, which cannot be combined with is_causal, window, shard "
                "or cu_seqlens: use is_causal=True or a bool mask"
            )
        lower_right = mask.variant.name == "LOWER_RIGHT"  # type: ignore[union-attr]
        upper = keys - queries if lower_right else 0
        mask = None
    spec_attention.check_mask(mask, (*leading, queries, keys), query)
    spec_attention.check_key_mask(key_mask, batch, keys, query)
    spec_attention.check_sinks(sinks, heads, query)
    local = (batch, heads, 0, 0) if is_packed else (batch, heads, queries, keys)
    origin = spec_attention.resolve_origin(shard, local)
    offset = origin[2] - origin[3]  # key - query in local indices is larger by this
    options = AttentionOptions(
        scale=spec_attention.resolve_scale(scale, 1 / math.sqrt(query.shape[-1])),
        lower=None if lower is None else lower + offset,
        upper=None if upper is None else upper + offset,
        softcap=spec_attention.resolve_softcap(softcap),
        origin=origin,
        max_query=queries,
        max_key=keys,
    )
    unbatched = query.dim() < 4 and not is_packed
    sequences = None if shard is not None or unbatched else batch
    tensors = (q, k, v, as_four(mask, leading), key_mask, sinks, cu_seqlens_q, cu_seqlens_k)
    return _Checked(tensors, options, outer, sequences)


def _settled(
    call: _Checked, p: float | Tensor, seed: int | Tensor | None
) -> tuple[AttentionInputs, AttentionOptions]:
    """All tensors of a checked call, with its seed, and its options, with the rate."""
    query = call.tensors[0]
    assert query is not None
    options, p_tensor, drawn = settle_attention(
        query, p, True, seed, call.options, call.batch, "dropout_p"
    )
    tensors = (*distinct(*call.tensors), drawn, p_tensor)
    return AttentionInputs(*tensors), options  # type: ignore[arg-type]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float | Tensor = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    shard: ShardLike | None = None,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with dropout on its probabilities, in memory that grows linearly with the lengths.

        score = scale * query key^T;   score = softcap * tanh(score / softcap) + attn_mask
        P = exp(score - lse),   lse = log(sum over keys of exp(score) + exp(sink))
        out = where(keep, P / (1 - p), 0) value

    The first eight parameters are those of
    :func:`torch.nn.functional.scaled_dot_product_attention` and mean the same. Neither forward nor
    backward holds a tensor of the size of the scores: forward keeps a running maximum and sum
    (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
    "FlashAttention", 2022), and backward starts from ``lse`` and draws the mask again. Gradients
    are deterministic: every sum has one order, and there are no atomics.

    Args:
        query: ``[..., H, L, E]``; float16, bfloat16, float32, or float64 (reference backend).
            Under torch.autocast query, key and value are cast as for torch's function.
        key, value: ``[..., H, S, E]`` and ``[..., H, S, Ev]`` of the same dtype. Any strides.
            The Triton backend takes E and Ev up to 256.
        attn_mask: bool (True: the key takes part) or floating-point (added to the scores),
            broadcastable to ``[..., H, L, S]``. It is read through its strides and never expanded,
            and its gradient is summed over the dimensions along which it is broadcast. A causal
            bias of torch.nn.attention.bias, upper left or lower right, is accepted too.
        dropout_p: the probability of dropping. As in torch's function, dropout happens whenever it
            is not 0, so pass 0.0 in evaluation. Give schedules a 0-d tensor.
        is_causal: query i sees the keys j <= i, also where L != S. It combines with every mask.
        scale: by default ``1 / sqrt(E)``.
        enable_gqa: key and value have fewer heads, each shared by ``H / Hkv`` query heads.
        window: ``(left, right)``: query i sees the keys from i - left to i + right. None stands for
            no bound, and an int for both.
        key_mask: bool ``[batch, S]``, True where a key takes part and False for padding.
        sinks: ``[H]``, one logit per head that takes part in the softmax but has no value (Xiao et
            al., "Efficient streaming language models with attention sinks", 2023; GPT-OSS).
        softcap: bounds the scores to (-softcap, softcap), before the mask (Gemma 2).
        cu_seqlens_q, cu_seqlens_k: int32 tensors with sequences + 1 offsets, for sequences that are
            packed along the tokens of ``[1, H, tokens, E]`` (or without the 1). A token sees only
            its own sequence. Masks, windows and the dropout's coordinates count from the start of a
            sequence, and the number of the sequence takes the place of the batch index:
            ``attn_mask`` then broadcasts to [sequences, H, longest, longest]. Tokens behind the
            last offset give zeros. Offsets on an accelerator are not checked, because reading them
            would wait for it.
        max_seqlen_q, max_seqlen_k: bounds of the packed lengths, by default the number of tokens; a
            tight bound saves empty blocks.
        return_lse: also return ``lse``, ``[..., H, L]`` in float32, differentiable.
        shard: where the scores lie in a larger ``[B, H, L, S]``: ``tridrop.Shard(global_shape,
            origin)``. The dropout mask, is_causal and window are then those of the larger tensor.
        seed: as in :func:`tridrop.dropout`; :func:`tridrop.attention_keep_mask` exports the mask.

    Returns:
        ``[..., H, L, Ev]`` of query's dtype. A query whose keys are all excluded gives zeros, as in
        torch's function; its ``lse`` is -inf and its gradients are zeros.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; dropout_p outside [0, 1];
            a window, softcap, scale or offset out of range.

    >>> q = k = v = torch.eye(4)[None, None]
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)[0, 0, 3]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    >>> out = scaled_dot_product_attention(q, k, v, dropout_p=0.5, scale=0.0, seed=1)
    """
    query, key, value = _autocast(query, key, value)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    operands = (query, key, value, attn_mask, key_mask, sinks)
    kept = None
    # Each is compared by itself: Dynamo of torch 2.11 cannot compare tuples that hold tensors.
    unpacked = cu_seqlens_q is None and cu_seqlens_k is None
    flags = (is_causal is False or is_causal is True) and (
        enable_gqa is False or enable_gqa is True
    )
    if flags and unpacked and max_seqlen_q is None and max_seqlen_k is None:
        # The types are part of the key: True and 1.0 equal 1, but True is refused.
        numbers = (type(scale), scale, type(softcap), softcap, spec_attention.typed(window))
        settings = ("attention", *numbers, is_causal, enable_gqa)
        kept = known.key_of(settings, dropout_p, None, shard, *operands)
    spec_values.check_flag(return_lse, "return_lse")
    results: tuple[Tensor, ...]
    found, call = known.recall(kept), None
    if found is None:
        call = _checked(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, key_mask,
            sinks, softcap, packing, shard,
        )  # fmt: skip
        in_place = all(a is b for a, b in zip(call.tensors[:3], operands[:3], strict=True))
        if kept is not None and in_place:
            options, _, drops = rated_attention(dropout_p, True, call.options)
            shape = tuple(query.shape)
            found = known.learn(_FAMILY, kept, shape, options, drops, *call.tensors)
    if found is not None:
        given = (query, key, value, as_four(attn_mask, ()), key_mask, sinks, None, None)
        results = known.call(_FAMILY, found, seed, *given)
        return (results[0], results[1]) if return_lse else results[0]
    assert call is not None
    inputs, options = _settled(call, dropout_p, seed)
    alone = None if return_lse else torchs_attention(inputs, options)
    if alone is None:
        packed = ops.pack_attention(options, backends.name_for(query.device))
        results = apply(Attention, *inputs, packed)
    else:
        results = (alone,)
    if query.dim() != 4:
        results = tuple(t.reshape(*call.outer, *t.shape[2:]) for t in results)
    return (results[0], results[1]) if return_lse else results[0]


def scaled_dot_product_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float | Tensor = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    shard: ShardLike | None = None,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of one block of keys in the gradients of attention over many blocks.

        P = exp(score - lse);    dP = where(keep, grad value^T / (1 - p), 0)
        dS = P * (dP - sum(grad * out));    dq = scale * dS key,    dk = scale * dS^T query
        dv = where(keep, P / (1 - p), 0)^T grad

    ``out`` and ``lse`` are the results over all keys, combined from those of the blocks, as in ring
    attention (Liu, Zaharia, Abbeel, "Ring attention with blockwise transformers", 2023;
    docs/distributed.md has an example). A block's gradients need nothing else from the other
    blocks. Sum the gradients of the query over the blocks of keys, and those of keys and values
    over the blocks of queries. The function is not differentiable.

    Args:
        grad, out: ``[B, H, L, Ev]``, grad of query's dtype; lse: ``[B, H, L]``.
        query, key, value: ``[B, H, L, E]``, ``[B, Hkv, S, E]`` and ``[B, Hkv, S, Ev]``.
        seed: the seed of the forward. All other arguments are as in the forward too.

    Returns:
        The gradients of query, key and value, in their dtypes.

    >>> q = k = v = torch.eye(4)[None, None]
    >>> out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    >>> grads = scaled_dot_product_attention_backward(q, out, lse, q, k, v, seed=1)
    """
    tensors = {"query": query, "key": key, "value": value, "grad": grad, "out": out, "lse": lse}
    for name, t in tensors.items():
        spec.check_input(t, name)
        spec.check_device(t, name, query, "query")
    if not query.dim() == key.dim() == value.dim() == 4 or seed is None:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} and "
            f"seed {seed}: give four dimensions, and the seed of the forward"
        )
    batch, heads, queries, _ = query.shape
    wanted = (batch, heads, queries, value.shape[-1])
    if tuple(out.shape) != wanted or grad.shape != out.shape or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"grad {tuple(grad.shape)}, out {tuple(out.shape)} and lse {tuple(lse.shape)}; they "
            f"must be {wanted}, {wanted} and {wanted[:-1]}"
        )
    query, key, value = _autocast(query, key, value)
    spec_attention.check_dtypes(query, grad=grad)
    with torch.no_grad():
        call = _checked(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, key_mask,
            None, softcap, (None,) * 4, shard,
        )  # fmt: skip
        inputs, options = _settled(call, dropout_p, seed)
        if inputs.query.shape[0] != batch:
            raise ValueError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: "
                f"with these the results have a batch of {inputs.query.shape[0]}, and grad, out "
                f"and lse have one of {batch}. Give query in the batch of the results"
            )
        packed = ops.pack_attention(options, backends.name_for(query.device))
        needs = [True, True, True, False, False]
        given = (grad, None, out, lse, *inputs, *packed, needs, True)
        dquery, dkey, dvalue, *_ = ops.attention.attention_backward(*given)
    return dquery, dkey, dvalue
