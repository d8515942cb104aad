"""GPT-2, BERT and ViT of transformers with random weights, and random data for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MASKED = 0.15  # the fraction of positions to predict, as in BERT
_IGNORED = -100  # the label of positions that are not to be predicted


@dataclass(frozen=True)
class Size:
    """The size of a model and of its batches; ``length`` is in tokens, for ViT in patches."""

    layers: int
    width: int
    heads: int
    length: int
    vocabulary: int
    batch: int


@dataclass(frozen=True)
class Architecture:
    """``build`` makes a model of a size with a rate p; ``data`` makes its arguments on a device."""

    title: str
    build: Callable[[Size, float], nn.Module]
    data: Callable[[Size, str], dict[str, Tensor]]
    full: Size
    tiny: Size


def _gpt2(size: Size, p: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocabulary, n_positions=size.length, n_embd=size.width,
            n_layer=size.layers, n_head=size.heads, embd_pdrop=p, resid_pdrop=p, attn_pdrop=p,
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def _bert(size: Size, p: float) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=size.vocabulary, max_position_embeddings=size.length,
            hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            intermediate_size=4 * size.width, hidden_dropout_prob=p,
            attention_probs_dropout_prob=p, pad_token_id=None,
        )
    )  # fmt: skip


_PATCH = 16
_CLASSES = 1000


def _vit(size: Size, p: float) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=_pixels(size), patch_size=_PATCH, hidden_size=size.width,
            num_hidden_layers=size.layers, num_attention_heads=size.heads,
            intermediate_size=4 * size.width, hidden_dropout_prob=p,
            attention_probs_dropout_prob=p, num_labels=_CLASSES,
        )
    )  # fmt: skip


def _pixels(size: Size) -> int:
    """The side, in pixels, of a square image with this many patches."""
    return _PATCH * int(size.length**0.5)


def _tokens(size: Size, device: str) -> Tensor:
    return torch.randint(size.vocabulary, (size.batch, size.length), device=device)


def _next_tokens(size: Size, device: str) -> dict[str, Tensor]:
    tokens = _tokens(size, device)
    return {"input_ids": tokens, "labels": tokens}


def _hidden_tokens(size: Size, device: str) -> dict[str, Tensor]:
    tokens = _tokens(size, device)
    hidden = torch.rand(tokens.shape, device=device) < _MASKED
    hidden[:, 0] = True  # every sequence has a position to predict
    return {"input_ids": tokens, "labels": tokens.masked_fill(~hidden, _IGNORED)}


def _images(size: Size, device: str) -> dict[str, Tensor]:
    side = _pixels(size)
    return {
        "pixel_values": torch.randn(size.batch, 3, side, side, device=device),
        "labels": torch.randint(_CLASSES, (size.batch,), device=device),
    }


# Full: the published sizes of GPT-2 small, BERT base and ViT-B/16 at 224 pixels.
ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT-2", _gpt2, _next_tokens,
        Size(12, 768, 12, 1024, 50257, 8), Size(2, 64, 2, 64, 512, 2),
    ),
    "bert": Architecture(
        "BERT", _bert, _hidden_tokens,
        Size(12, 768, 12, 512, 30522, 16), Size(2, 64, 2, 64, 512, 2),
    ),
    "vit": Architecture(
        "ViT", _vit, _images, Size(12, 768, 12, 196, 0, 64), Size(2, 64, 2, 16, 0, 2)
    ),
}  # fmt: skip


def check() -> None:
    """Raise an ImportError that says what to install, if transformers cannot be imported."""
    try:
        for name in ARCHITECTURES:
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("--steps needs transformers: pip install 'tridrop[hf]'") from error
