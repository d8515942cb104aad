"""The models of the demo: its own small GPT, and small random models of transformers.

Each maps tokens [batch, context] to logits [batch, context, vocabulary]. The demo's GPT is written
twice, with eager dropout and with tridrop; models of transformers are swapped by tridrop.swap.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tridrop
from tridrop.swapping import Report

from .model import GPT, VOCABULARY
from .options import DemoError, Options

MASK = VOCABULARY  # the token that hides one which BERT is to predict
_MASKED = 0.15  # the fraction of positions to predict, as in BERT
IGNORED = -100  # the label of positions that are not to be predicted


def _gpt2(options: Options, p: float, attention_p: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=options.context, n_embd=options.dim,
            n_layer=options.layers, n_head=options.heads, embd_pdrop=p, resid_pdrop=p,
            attn_pdrop=attention_p, initializer_range=_STD, use_cache=False, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


def _bert(options: Options, p: float, attention_p: float) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY + 1, max_position_embeddings=options.context,
            hidden_size=options.dim, num_hidden_layers=options.layers,
            num_attention_heads=options.heads, intermediate_size=4 * options.dim,
            type_vocab_size=1, hidden_dropout_prob=p, attention_probs_dropout_prob=attention_p,
            initializer_range=_STD, pad_token_id=None,
        )
    )  # fmt: skip


# Small models learn faster from larger initial weights than the 0.02 of the published ones.
_STD = 0.05
_BUILDERS: dict[str, Callable[[Options, float, float], Any]] = {"gpt2": _gpt2, "bert": _bert}
TITLES = {"block": "GPT", "gpt2": "GPT-2", "bert": "BERT"}


class Logits(nn.Module):
    """A model of transformers as a function of tokens only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def check(name: str) -> None:
    """Raise a DemoError that says what to install, if the model's library is missing."""
    if name not in _BUILDERS:
        return
    if importlib.util.find_spec("transformers") is None:
        raise DemoError(f"--model {name} needs transformers: pip install 'tridrop[hf]'")
    try:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--model {name}: transformers cannot be imported: {reason}") from error


def build(options: Options, *, fused: bool, drops: bool = True) -> tuple[nn.Module, Report | None]:
    """The model that ``options`` ask for, on the CPU, and the report if it was swapped.

    Args:
        options: the architecture, its sizes and drop rates.
        fused: whether dropout is tridrop's; else torch's. The state_dict keys are the same.
        drops: False sets every drop rate to 0.
    """
    if options.model not in _BUILDERS:
        return GPT(options, fused=fused, drops=drops), None
    p, attention_p = (options.p, options.attention_p) if drops else (0.0, 0.0)
    model = Logits(_BUILDERS[options.model](options, p, attention_p))
    return model, tridrop.swap(model, memory=options.memory) if fused else None


def examples(options: Options, windows: Tensor, generator: torch.Generator) -> Tensor:
    """The inputs and targets, [n, 2, context], for windows [n, context + 1] of the text.

    The targets are the next bytes; for BERT, the bytes at some positions, which a mask token hides.
    """
    tokens = windows[:, :-1]
    if options.model != "bert":
        return torch.stack((tokens, windows[:, 1:]), dim=1)
    hidden = torch.rand(tokens.shape, generator=generator) < _MASKED
    hidden[:, 0] |= ~hidden.any(1)  # every window has a position to predict
    return torch.stack((tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, IGNORED)), 1)
