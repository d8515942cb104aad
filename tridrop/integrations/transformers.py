"""tridrop as an attention implementation of Hugging Face transformers, 5.0 and later.

    import tridrop
    model.set_attn_implementation("tridrop")

or pass ``attn_implementation="tridrop"`` when a model is made. This works for every model that
calls its attention through transformers' AttentionInterface. The name is registered when both
packages have been imported, in either order.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import seeds
from ..functional import scaled_dot_product_attention, softmax_dropout
from ..nn.attention import merge_masks
from . import transformers_masks
from .transformers_config import allow_output_attentions
from .transformers_masks import NAME, attention_mask, pattern_of

# Set by register(): the object with which newer releases of transformers collect outputs.
_collector: Any = None

# Modules that are not causal although they lack the attribute is_causal. transformers' own sdpa
# takes a module without it for causal, and so these run eager there.
_NOT_CAUSAL = {
    "AlignTextSelfAttention",
    "ChineseCLIPTextSelfAttention",
    "ChineseCLIPVisionAttention",
    "ClapTextSelfAttention",
    "LayoutLMSelfAttention",
    "MarkupLMSelfAttention",
    "MllamaTextCrossAttention",
    "MllamaVisionAttention",
    "SplinterSelfAttention",
}


def register() -> None:
    """Register the attention and its masks with transformers, under the name "tridrop".

    A configuration with this attention may set output_attentions, as with "eager".

    ``import tridrop`` calls this automatically. The attention and its masks must be registered
    together, since transformers gives an attention without its own masks none, which would ignore
    padding.

    Raises:
        ImportError: transformers is not installed, or is older than 5.0.
    """
    global _collector
    try:
        from transformers import PreTrainedConfig, masking_utils
        from transformers.modeling_utils import AttentionInterface

        _ = (masking_utils.sdpa_mask, masking_utils.eager_mask)
        mask_interface = masking_utils.AttentionMaskInterface
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers' attention interface was not found ({error}); install transformers>=5.0"
        ) from error
    transformers_masks.use(masking_utils)
    try:
        from transformers.utils import output_capturing
    except ImportError:
        _collector = None  # the first releases of 5 pass output_attentions to the attention instead
    else:
        _collector = getattr(output_capturing, "_active_collector", None)
    allow_output_attentions(PreTrainedConfig)
    mask_interface.register(NAME, attention_mask)
    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float | Tensor = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' modules call. It computes what eager computes.

    Only a query with nothing to attend to, such as left padding, differs: it gives zeros, as with
    torch's sdpa, while eager gives the mean of the values. The mask of the probabilities is
    :func:`tridrop.attention_keep_mask` at (batch, head, query, key).

    The seed is drawn from torch's generator. Under :func:`tridrop.rng` it is the seed of the
    module's number, its attribute ``_tridrop_attention_site``; without a number, the next seed of
    the rng block. Modules in eval mode drop nothing.

    Args:
        module: the attention module, whose ``training`` and ``is_causal`` are read.
        query: [B, H, L, D].
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], with heads that are not repeated.
        attention_mask: bool (True: the key takes part) or float (added to the scores),
            broadcastable to [B, H, L, S].
        dropout: the probability of dropping.
        scaling: by default 1 / sqrt(D).
        is_causal: by default the module's. It applies only without a mask and with more than one
            query. Query i then sees the keys j <= i, even if S > L, as in a static cache that is
            being filled.
        position_bias: float, added to the scores in addition to any mask (T5). It has a gradient.
        softcap: as in :func:`tridrop.scaled_dot_product_attention` (Gemma 2).
        sliding_window: ignored, as in eager: the mask contains the window, and is omitted only if
            the window hides nothing.
        s_aux: [H], sinks (GPT-OSS).
        kwargs: other arguments that modules pass:

            ==================================  ====================================================
            cu_seq_lens_q, cu_seq_lens_k        int offsets of packed sequences, B = 1: a token sees
            (max_length_q, max_length_k)        its sequence only; memory is linear in the tokens
            sinks                               [B, H, L, 1], one sink per query (Inkling 2)
            output_attentions                   returns the weights
            cache, indices, block_indices       ValueError: paged caches, keys chosen by an indexer
            position_ids, deterministic, other  ignored, as in eager
            ==================================  ====================================================

    Returns:
        ``(out, weights)``. out is [B, L, H, Dv], contiguous. weights are the probabilities after
        dropout, [B, H, L, S], in memory of their size, if attentions are requested, else None.
        They are requested by ``output_attentions`` in the call, in the configuration or in the
        arguments of a calling function, and by transformers' collector of outputs. The arguments
        of calling functions cannot be seen inside torch.compile.

    Raises:
        ValueError, TypeError: as scaled_dot_product_attention, and as stated above.
    """
    for name in ("cache", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}=, which attn_implementation={NAME!r} does "
                'not support: use model.set_attn_implementation("eager")'
            )
    want_weights = _are_weights_wanted(module, kwargs)
    if not getattr(module, "training", True):
        dropout = 0.0
    causal = False
    if attention_mask is None and query.shape[2] > 1:
        causal = _is_causal(module) if is_causal is None else bool(is_causal)
    mask, key_mask, pattern = attention_mask, None, pattern_of(attention_mask)
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    packed: dict[str, Any] = {}
    if (cu_q is None) != (cu_k is None):
        raise ValueError("give both cu_seq_lens_q and cu_seq_lens_k, or neither")
    if cu_q is not None and cu_k is not None:
        if want_weights:
            raise ValueError(
                "attention weights of sequences packed by cu_seq_lens_q have no single shape: "
                "leave out either cu_seq_lens_q and cu_seq_lens_k, or output_attentions"
            )
        if pattern is not None and pattern.key_mask is None:
            mask, causal = None, True  # this mask follows from position_ids, like the offsets
        if causal and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{query.shape[2]} packed queries and {key.shape[2]} keys: causal attention aligns "
                "the starts of the sequences, so give as many keys as queries"
            )
        if mask is None and position_bias is None:
            packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            packed["max_seqlen_q"] = _as_int(kwargs.get("max_length_q"))
            packed["max_seqlen_k"] = _as_int(kwargs.get("max_length_k"))
        else:  # a mask or a bias has the coordinates of tokens, not of positions in sequences
            mask = merge_masks(_same_sequence(query, key, cu_q, cu_k), mask)
    elif pattern is not None and pattern.key_mask is not None:
        mask, key_mask, causal = None, pattern.key_mask, True
    elif mask is not None:
        mask, key_mask = _split_padding(mask, max(query.shape[0], key.shape[0]))
    if position_bias is not None:
        mask = merge_masks(mask, position_bias)
    drops = isinstance(dropout, Tensor) or dropout > 0
    seed = _seed(module, query) if drops else None
    sinks = kwargs.get("sinks")
    if want_weights:
        mask = merge_masks(None if key_mask is None else key_mask[:, None, None, :], mask)
        if s_aux is not None:
            sinks = s_aux[:, None, None]
        weights = _weights(query, key, mask, causal, dropout, scaling, softcap, sinks, seed)
        out = weights @ _repeated(value, query)
        return out.transpose(1, 2).contiguous(), weights
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scaling,
        # in torch.jit.trace the shapes are tensors
        enable_gqa=bool(query.shape[1] != key.shape[1]),
        key_mask=key_mask,
        sinks=s_aux,
        softcap=softcap,
        return_lse=sinks is not None,
        seed=seed,
        **packed,
    )
    if isinstance(result, tuple):
        assert sinks is not None
        # A sink reduces the probabilities of all keys in a row by the same factor.
        out, lse = result
        out = out * torch.sigmoid(lse[..., None] - sinks).to(out.dtype)
    else:
        out = result
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module) -> bool:
    given = getattr(module, "is_causal", None)
    if given is None:
        return not any(cls.__name__ in _NOT_CAUSAL for cls in type(module).__mro__)
    return bool(given)


def _seed(module: nn.Module, query: Tensor) -> Tensor | None:
    site = getattr(module, "_tridrop_attention_site", None)
    if site is None or not seeds.active():
        return None
    return seeds.seed_for(query.device, None, site)


def _are_weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    collected = None if _collector is None else _collector.get()
    if collected is not None:
        return any("attentions" in name for name in collected)
    return not torch.compiler.is_compiling() and _do_callers_want_weights()


def _do_callers_want_weights() -> bool:
    """Whether a calling function was given output_attentions.

    The first releases of 5 have no collector. Some of their models have layers that take the
    argument and do not pass it to the attention; in others a wrapper (check_model_inputs) keeps it.
    """
    frame = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if "output_attentions" in names and frame.f_locals.get("output_attentions"):
            return True
        recorded = frame.f_locals.get("recordable_keys") if code.co_name == "wrapper" else None
        if isinstance(recorded, dict) and recorded.get("output_attentions"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _split_padding(mask: Tensor, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """(mask, None), or (None, key_mask) if a bool mask is the same for all queries."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return mask, None
    if mask.shape[0] not in (1, batch) or (mask.shape[2] != 1 and mask.stride(2) != 0):
        return mask, None
    return None, mask[:, 0, 0].expand(batch, -1)


def _same_sequence(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """Bool [L, S]: whether a query and a key are in the same packed sequence."""
    ids = []
    for x, offsets in ((query, cu_q), (key, cu_k)):
        tokens = torch.arange(x.shape[2], device=x.device, dtype=offsets.dtype)
        ids.append(torch.bucketize(tokens, offsets[1:], right=True))
    return ids[0][:, None] == ids[1][None, :]


def _as_int(length: Any) -> int | None:
    return int(length) if isinstance(length, Tensor) else length


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, Hkv, S, D], repeated to the number of the query's heads."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    p: float | Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """The probabilities [B, H, L, S] after dropout; ``sinks`` broadcasts to [B, H, L, 1]."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaled before the product, so that scores stay in the range of float16.
    scores = (query * scale) @ _repeated(key, query).transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is None:
        return softmax_dropout(scores, p, mask=mask, is_causal=causal, seed=seed)
    # The sink is one more key that every query sees: the last, so that others keep their place.
    visible = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
    mask = merge_masks(visible.tril() if causal else visible, mask)
    assert mask is not None
    seen = True if mask.dtype == torch.bool else 0.0
    mask = nn.functional.pad(mask.expand(*mask.shape[:-1], scores.shape[-1]), (0, 1), value=seen)
    scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    return softmax_dropout(scores, p, mask=mask, seed=seed)[..., :-1]
