"""Makes the masks of attention_forward through transformers' own mask interface."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAME = "tridrop"

# transformers.masking_utils, once transformers has been imported.
masking: Any = None

# Models for which causal masks must not be omitted: Gemma 4 removes queries later, and Pegasus-X's
# decoder has no is_causal.
_CAUSAL_MASKS = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "pegasus_x"}
# Models whose code takes a missing causal mask for "not causal", or computes with mask values.
_EAGER_MASKS = {"doge", "deepseek_v4"}


def use(masking_utils: Any) -> None:
    """Use this module of transformers to make masks."""
    global masking
    masking = masking_utils
    # So Dynamo calls it once and does not trace it. Marking imports much of torch, which this
    # module of transformers has already imported.
    torch.compiler.assume_constant_result(needs_float_masks)


class Pattern(NamedTuple):
    """The structure of a mask that attention_mask made: causal, with padding or packing.

    It is kept in an attribute of the mask, and only saves work: the kernel can then skip the scores
    above the diagonal. A mask that was sliced, copied or written to loses it, and is read as usual.
    """

    key_mask: Tensor | None
    version: int


def attention_mask(**arguments: Any) -> Tensor | None:
    """The mask of a forward pass, which transformers requests through its mask interface.

    It is bool [B, 1, L, S], True where a key takes part. It is None if nothing is masked, or if
    ``is_causal`` expresses the whole mask. Padding alone is an expanded view of [B, 1, 1, S], in
    memory linear in the length. Models that compute with mask values get transformers' float masks.
    """
    config = arguments.get("config")
    if config is not None and needs_float_masks(config.__class__):
        mask: Tensor | None = masking.eager_mask(**arguments)
        return mask
    if getattr(config, "model_type", None) in _CAUSAL_MASKS:
        arguments["allow_is_causal_skip"] = False
    # The keyword for the number of queries is q_length; in older releases, cache_position.
    positions = arguments.get("cache_position")
    length = arguments["q_length"] if positions is None else positions.shape[0]
    function = arguments.get("mask_function", masking.causal_mask_function)
    if function is masking.bidirectional_mask_function:
        arguments["allow_is_causal_skip"] = False
        arguments |= {"q_length": 1} if positions is None else {"cache_position": positions[:1]}
        mask = masking.sdpa_mask(**arguments)
        return None if mask is None else mask.expand(-1, -1, length, -1)
    mask = masking.sdpa_mask(**arguments)
    # In compiled graphs the attribute is of no use, and inference tensors have no version counter.
    if mask is None or torch.compiler.is_compiling() or mask.is_inference():
        return mask
    padding = arguments.get("attention_mask")
    square = arguments["kv_length"] == length and arguments.get("kv_offset", 0) == 0
    if padding is None:
        causal = square and _is_packed_causal(function)
    else:
        causal = square and function is masking.causal_mask_function
        causal = causal and tuple(padding.shape) == (mask.shape[0], mask.shape[3])
    if causal:
        key_mask = None if padding is None else padding.bool()
        setattr(mask, "_tridrop_pattern", Pattern(key_mask, mask._version))  # noqa: B010
    return mask


def _is_packed_causal(function: Any) -> bool:
    """Whether a mask function is that of transformers for packed causal sequences.

    It is a closure over other functions, which can only be recognised by their names.
    """

    def parts(f: Any) -> list[Any]:
        cells = [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]
        return [g for c in cells for g in (c if isinstance(c, tuple) else (c,)) if callable(g)]

    causal = masking.causal_mask_function
    names = set()
    for part in parts(function):
        name = getattr(part, "__qualname__", "").split(".")[0]
        if part is causal or (name.startswith("remap_positions") and parts(part) == [causal]):
            names.add("causal")
        else:
            names.add(name)
    return names == {"causal", "packed_sequence_mask_function"}


def needs_float_masks(config: Any) -> bool:
    """Whether models of this configuration compute with the values of eager's float masks.

    These are models whose attention never calls the interface, and models that support only eager.
    """
    return _look_for_float_masks(config)


@functools.cache
def _look_for_float_masks(config: Any) -> bool:
    if getattr(config, "model_type", None) in _EAGER_MASKS:
        return True
    from transformers import PreTrainedModel

    models, found = [PreTrainedModel], []
    while models:
        model = models.pop()
        if getattr(model, "config_class", None) is config:
            found.append(model)  # classes derived from it share its attention
        else:
            models += model.__subclasses__()
    bypassing = [model.__name__ for model in found if _bypasses(sys.modules.get(model.__module__))]
    if bypassing:
        warnings.warn(
            f"{', '.join(bypassing)}: this model does not call transformers' AttentionInterface, "
            f'so that attn_implementation="{NAME}" has no effect: its attention stays eager',
            stacklevel=3,
        )
    fused = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
    return bool(bypassing) or any(
        not any(getattr(model, name, False) for name in fused) for model in found
    )


def _bypasses(module: Any) -> bool:
    """Whether a modeling file defines attention that does not use the interface."""
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    return any(
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and "Attention" in name
        and value.__module__ == module.__name__
        for name, value in vars(module).items()
    )


def pattern_of(mask: Tensor | None) -> Pattern | None:
    if mask is None or torch.compiler.is_compiling():
        return None
    pattern: Pattern | None = getattr(mask, "_tridrop_pattern", None)
    return pattern if pattern is not None and pattern.version == mask._version else None
