"""Right arguments, by the names of parameters, and by their annotations where a name says nothing.

A parameter that is found neither way has no right argument: tests/project/test_abuse.py then fails,
and the name belongs into this table.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tridrop.spec.elementwise import ACTIVATIONS


@dataclass
class Plan:
    """What the right arguments of one call agree on."""

    target: str
    random: random.Random
    dtype: torch.dtype
    batch: int
    length: int
    width: int
    activation: str | None
    gated: bool

    @classmethod
    def of(cls, target: str, chooser: random.Random, module: bool) -> Plan:
        dtypes = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]
        activation = chooser.choice([None, *ACTIVATIONS])
        return cls(
            target, chooser,
            torch.float32 if module else chooser.choice(dtypes),
            chooser.choice([1, 2, 3]), chooser.choice([1, 2, 5]),
            16 if module else chooser.choice([2, 8, 14, 24, 64, 130, 600]),
            activation, activation is not None and ACTIVATIONS[activation][1],
        )  # fmt: skip

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, dtype=torch.float64)
        return drawn.to(dtype or self.dtype)

    def drawn(self, *values: Any) -> Any:
        return self.random.choice(values)

    def vector(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor(self.width, dtype=dtype)

    def maybe(self, value: Callable[[], Any]) -> Any:
        """``value`` in one of two calls, else None."""
        return value() if self.random.random() < 0.5 else None


Maker = Callable[[Plan], Any]

HEADS, DIM, WORDS, OUT, RANK = 2, 8, 11, 6, 4


def _cells(plan: Plan) -> Any:
    return plan.drawn(nn.LSTM, nn.GRU, nn.RNN)(16, 16, plan.drawn(1, 2), batch_first=True)


def _model(plan: Plan) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def _result(plan: Plan) -> tuple[int, int, int]:
    width = plan.width // 2 if plan.gated else plan.width
    return plan.batch, plan.length, width


def _head(plan: Plan, length: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return plan.tensor(plan.batch, HEADS, length or plan.length + 2, DIM, dtype=dtype)


def _maps(plan: Plan) -> Tensor:
    return plan.tensor(plan.batch, 3, 5, 7)


def _words(plan: Plan) -> Tensor:
    return torch.arange(plan.batch * plan.length).reshape(plan.batch, plan.length) % WORDS


# name of a parameter -> its right value. Where a name means several things, "function.name".
RIGHT: dict[str, Maker] = {
    "x": lambda plan: plan.tensor(plan.batch, plan.length, plan.width),
    "input": lambda plan: plan.tensor(plan.batch, plan.length, plan.width),
    "p": lambda plan: plan.drawn(0.0, 0.1, 0.5, 0.5, 1.0),
    "rate": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "gaussian_dropout.p": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "patch_dropout.p": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "training": lambda plan: plan.drawn(True, True, False),
    "noise_shape": lambda plan: plan.drawn(None, None, (None, 1, None), (None, None, 1)),
    "shard": lambda plan: None,
    "seed": lambda plan: plan.drawn(1, 5, None, torch.tensor([3, 4])),
    "inplace": lambda plan: plan.drawn(False, False, False, True),
    "residual": lambda plan: plan.tensor(*_result(plan)),
    "bias": lambda plan: plan.maybe(plan.vector),
    "layer_scale": lambda plan: plan.maybe(lambda: plan.tensor(_result(plan)[-1])),
    # One of the two at a time.
    "dropout_add.layer_scale": lambda plan: (
        None if plan.length == 2 else plan.maybe(lambda: plan.tensor(_result(plan)[-1]))
    ),
    "gate": lambda plan: (
        plan.tensor(plan.batch, *plan.drawn([], [1]), _result(plan)[-1])
        if plan.length == 2
        else None
    ),
    "weight": lambda plan: plan.maybe(plan.vector),
    "norm_bias": lambda plan: plan.maybe(plan.vector),
    "activation": lambda plan: plan.activation,
    "drop_path": lambda plan: plan.drawn(0.0, 0.0, 0.3),
    "eps": lambda plan: plan.drawn(1e-5, 1e-3, None),
    "prenorm": lambda plan: plan.drawn(False, True),
    "residual_in_fp32": lambda plan: plan.drawn(False, True),
    "zero_centered_weight": lambda plan: plan.drawn(False, True),
    "out_dtype": lambda plan: plan.drawn(None, None, torch.float32, torch.bfloat16),
    "scores": lambda plan: plan.tensor(plan.batch, HEADS, plan.length + 2, plan.width),
    "softmax_dropout.mask": lambda plan: plan.maybe(
        lambda: plan.drawn(
            plan.tensor(plan.length + 2, plan.width), plan.tensor(plan.width) > -1
        )
    ),
    "is_causal": lambda plan: plan.drawn(False, True),
    "scale": lambda plan: plan.drawn(None, 1.0, 0.3),
    "return_softmax": lambda plan: plan.drawn(False, True),
    "query": _head,
    "key": lambda plan: _head(plan, 9),
    "value": lambda plan: _head(plan, 9),
    "grad": _head,
    "out": _head,
    "lse": lambda plan: plan.tensor(plan.batch, HEADS, plan.length + 2, dtype=torch.float32),
    "attn_mask": lambda plan: plan.maybe(
        lambda: plan.drawn(plan.tensor(plan.length + 2, 9), plan.tensor(plan.length + 2, 9) > -1)
    ),
    "dropout_p": lambda plan: plan.drawn(0.0, 0.1, 0.5, 1.0),
    "enable_gqa": lambda plan: plan.drawn(False, True),
    "window": lambda plan: plan.drawn(None, None, 2, (1, 2), (None, 1), (3, None)),
    "key_mask": lambda plan: plan.maybe(lambda: plan.tensor(plan.batch, 9) > -1),
    "sinks": lambda plan: plan.maybe(lambda: plan.tensor(HEADS)),
    "softcap": lambda plan: plan.drawn(None, None, 5.0),
    "return_lse": lambda plan: plan.drawn(False, True),
    "scaled_dot_product_attention_backward.seed": lambda plan: 1,
    "shape": lambda plan: (plan.batch, plan.length, plan.width),
    "attention_keep_mask.shape": lambda plan: (plan.batch, HEADS, 3, 40),
    "attention_keep_mask.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "keep_mask.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "kept_indices.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "normal_noise.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "fold_in.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "rng.seed": lambda plan: plan.drawn(1, torch.tensor([3, 4])),
    "mc_predict.seed": lambda plan: plan.drawn(None, 5),
    "GaussianDropout.seed": lambda plan: None,
    "SpatialDropout1D.seed": lambda plan: None,
    "SpatialDropout2D.seed": lambda plan: None,
    "SpatialDropout3D.seed": lambda plan: None,
    "domain": lambda plan: "elements",
    "device": lambda plan: None,
    "new_seed.device": lambda plan: "cpu",
    "dtype": lambda plan: None,
    "generator": lambda plan: None,
    "k": lambda plan: plan.drawn(0, 1, 2),
    "drop_block2d.input": _maps,
    "drop_block3d.input": lambda plan: plan.tensor(plan.batch, 3, 5, 7, 3),
    "drop_block2d.eps": lambda plan: 1e-6,
    "drop_block3d.eps": lambda plan: 1e-6,
    "block_size": lambda plan: plan.drawn(1, 3),
    "dropout2d.x": _maps,
    "dropout3d.x": lambda plan: plan.tensor(plan.batch, 3, 5, 7, 3),
    "branch": lambda plan: torch.exp,
    "dropconnect_linear.weight": lambda plan: plan.tensor(OUT, plan.width),
    "dropconnect_linear.bias": lambda plan: plan.maybe(lambda: plan.tensor(OUT)),
    "activation_dropout_linear.weight": lambda plan: plan.tensor(OUT, _result(plan)[-1]),
    "linear_bias": lambda plan: plan.maybe(lambda: plan.tensor(OUT)),
    "weights": lambda plan: [plan.tensor(OUT, plan.width) for _ in range(2)],
    "linear_biases": lambda plan: plan.maybe(lambda: [plan.tensor(OUT), None]),
    # An RMSNorm has no bias, and only one may be centered at zero.
    "norm": lambda plan: "rms_norm" if plan.gated else "layer_norm",
    "norm_linear.norm_bias": lambda plan: None if plan.gated else plan.maybe(plan.vector),
    "norm_linear.zero_centered_weight": lambda plan: plan.gated and plan.drawn(False, True),
    "embedding_dropout.input": _words,
    "embedding_dropout.weight": lambda plan: plan.tensor(WORDS, plan.width),
    "padding_idx": lambda plan: plan.drawn(None, 0, -1),
    "max_norm": lambda plan: None,
    "norm_type": lambda plan: 2.0,
    "scale_grad_by_freq": lambda plan: plan.drawn(False, True),
    "sparse": lambda plan: False,
    "word_dropout.input": _words,
    "token": lambda plan: 7,
    "exempt": lambda plan: plan.drawn((), (1, 2)),
    "stream": lambda plan: 3,
    "dim": lambda plan: 1,
    "rescale": lambda plan: plan.drawn("expected", "kept"),
    "layers": lambda plan: [nn.Identity(), nn.Tanh(), nn.ReLU()],
    "layer_drop.layers": lambda plan: ["a", "b", "c"],
    "batch_first": lambda plan: plan.drawn(False, True),
    "A": lambda plan: plan.tensor(RANK, plan.width),
    "B": lambda plan: plan.tensor(OUT, RANK),
    "As": lambda plan: [plan.tensor(RANK, plan.width) for _ in range(2)],
    "Bs": lambda plan: [plan.tensor(OUT, RANK) for _ in range(2)],
    "base_out": lambda plan: plan.tensor(plan.batch, plan.length, OUT),
    "lora_delta.bias": lambda plan: plan.maybe(lambda: plan.tensor(OUT)),
    "lora_linear.bias": lambda plan: plan.maybe(lambda: plan.tensor(OUT)),
    "scaling": lambda plan: plan.drawn(1.0, 0.5),
    "biases": lambda plan: None,
    "shared_mask": lambda plan: plan.drawn(False, True),
    "num_prefix_tokens": lambda plan: plan.drawn(0, 1),
    "ordered": lambda plan: plan.drawn(False, True),
    "return_indices": lambda plan: plan.drawn(False, True),
    "mode": lambda plan: plan.drawn("batch", "row"),
    "model": _model,
    "mc_predict.x": lambda plan: plan.tensor(plan.batch, 16, dtype=torch.float32),
    "samples": lambda plan: 2,
    "members": lambda plan: None,
    "output": lambda plan: "values",
    "mc_predict.dim": lambda plan: -1,
    "call": lambda plan: None,
    "chunk": lambda plan: 256,
    "vectorize": lambda plan: plan.drawn(True, False),
    "progress": lambda plan: False,
    "fold_rank": lambda plan: None,
    "name": lambda plan: "reference",
    "global_shape": lambda plan: (4, 8),
    "origin": lambda plan: (0, 0),
    "schedule": lambda plan: lambda step: 0.1,
    "where": lambda plan: None,
    "first": lambda plan: 0,
    "module": lambda plan: nn.Linear(16, 8),
    "remove_weight_drop.module": lambda plan: _dropped(),
    "names": lambda plan: "weight",
    # Modules.
    "dropout": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "swap.dropout": lambda plan: plan.drawn(True, False),
    "drop_prob": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "DropPathSubset.branch": lambda plan: nn.Linear(16, 16),
    "in_features": lambda plan: 16,
    "out_features": lambda plan: OUT,
    "LoRALinear.in_features": lambda plan: None,
    "LoRALinear.out_features": lambda plan: None,
    "base": lambda plan: nn.Linear(16, OUT),
    "r": lambda plan: RANK,
    "alpha": lambda plan: None,
    "normalized_shape": lambda plan: 16,
    "num_embeddings": lambda plan: WORDS,
    "embedding_dim": lambda plan: 16,
    "EmbeddingDropout.input": _words,
    "WordDropout.input": _words,
    "embed_dim": lambda plan: 16,
    "num_heads": lambda plan: HEADS,
    "kdim": lambda plan: None,
    "vdim": lambda plan: None,
    "d_model": lambda plan: 16,
    "nhead": lambda plan: HEADS,
    "dim_feedforward": lambda plan: 24,
    "mlp_dim": lambda plan: plan.drawn(None, 24),
    "activation_p": lambda plan: plan.drawn(0.0, 0.1),
    "attention_p": lambda plan: plan.drawn(0.0, 0.1),
    "TransformerBlock.dim": lambda plan: 16,
    "TransformerBlock.activation": lambda plan: "gelu",
    "TransformerEncoderLayer.activation": lambda plan: plan.drawn("relu", "gelu", torch.relu),
    "TransformerDecoderLayer.activation": lambda plan: plan.drawn("relu", "gelu", torch.relu),
    "DropoutAdd.activation": lambda plan: plan.activation if not plan.gated else None,
    "DropoutAdd.residual": lambda plan: plan.tensor(plan.batch, plan.length, 16),
    "DropoutAdd.layer_scale": lambda plan: None if plan.length == 2 else plan.maybe(plan.vector),
    "DropoutAdd.gate": lambda plan: plan.tensor(plan.batch, 16) if plan.length == 2 else None,
    **{
        f"{name}.bias": lambda plan: plan.drawn(True, False)
        for name in (
            "DropConnectLinear", "LoRALinear", "MultiheadAttention", "TransformerEncoderLayer",
            "TransformerDecoderLayer",
        )
    },
    **{
        f"{name}.{part}": lambda plan: plan.tensor(plan.batch, plan.length, 16)
        for name, part in (
            ("DropoutAddLayerNorm", "residual"), ("DropoutAddRMSNorm", "residual"),
            ("MultiheadAttention", "query"), ("MultiheadAttention", "key"),
            ("MultiheadAttention", "value"), ("TransformerEncoderLayer", "src"),
            ("TransformerDecoderLayer", "tgt"), ("TransformerDecoderLayer", "memory"),
        )
    },
    **{
        f"{name}.layer_scale": lambda plan: plan.maybe(plan.vector)
        for name in ("DropoutAddLayerNorm", "DropoutAddRMSNorm")
    },
    "DropoutAddLayerNorm.bias": lambda plan: plan.drawn(True, False),
    "DropoutAddLayerNorm.forward.bias": lambda plan: plan.maybe(plan.vector),
    **{
        name: lambda plan: None
        for name in (
            "key_padding_mask", "MultiheadAttention.attn_mask", "src_mask", "tgt_mask",
            "memory_mask", "src_key_padding_mask", "tgt_key_padding_mask",
            "memory_key_padding_mask", "hx", "GaussianDropout.training",
            "SpatialDropout1D.training", "SpatialDropout2D.training", "SpatialDropout3D.training",
        )
    },
    **{
        f"{name}.is_causal": lambda plan: False
        for name in ("MultiheadAttention", "TransformerEncoderLayer")
    },
    "tgt_is_causal": lambda plan: False,
    "memory_is_causal": lambda plan: False,
    "need_weights": lambda plan: plan.drawn(True, False),
    "average_attn_weights": lambda plan: True,
    "DropBlock2d.input": _maps,
    "DropBlock2d.eps": lambda plan: 1e-6,
    "DropBlock3d.input": lambda plan: plan.tensor(plan.batch, 3, 5, 7, 3),
    "DropBlock3d.eps": lambda plan: 1e-6,
    "Dropout2d.input": _maps,
    "Dropout3d.input": lambda plan: plan.tensor(plan.batch, 3, 5, 7, 3),
    "SpatialDropout2D.input": _maps,
    "SpatialDropout3D.input": lambda plan: plan.tensor(plan.batch, 3, 5, 7, 3),
    "LayerDrop.layers": lambda plan: [nn.Linear(16, 16) for _ in range(3)],
    "data_format": lambda plan: plan.drawn("channels_last", "channels_first"),
    "cell": lambda plan: plan.drawn(nn.LSTMCell, nn.GRUCell, nn.RNNCell)(16, 16),
    "rnn": _cells,
    "VariationalCell.input": lambda plan: plan.tensor(plan.batch, 16),
    "VariationalCell.seed": lambda plan: plan.drawn(None, 3),
    "input_dropout": lambda plan: plan.drawn(0.0, 0.3),
    "output_dropout": lambda plan: plan.drawn(0.0, 0.3),
    "layer_dropout": lambda plan: plan.drawn(None, 0.3),
    "recurrent_dropout": lambda plan: plan.drawn(0.0, 0.3),
    "recurrent_place": lambda plan: "hidden",
    # Functions of other libraries.
    "x_with_bias": lambda plan: (
        plan.tensor(plan.batch, plan.length, plan.width), plan.maybe(plan.vector)
    ),
    "prob": lambda plan: plan.drawn(0.0, 0.1, 0.5),
    "fused": lambda plan: plan.drawn(False, True),
    **{
        f"{name}.{part}": lambda plan: plan.tensor(plan.batch, plan.length, plan.width)
        for name in (
            "bias_dropout_add_fused_train", "bias_dropout_add_fused_inference", "layer_norm_fn",
            "rms_norm_fn", "dropout_add_layer_norm", "dropout_add_rms_norm", "layer_norm_dropout",
            "rms_norm_dropout",
        )
        for part in ("residual",)
    },
    **{
        f"{name}.layer_scale": lambda plan: plan.maybe(plan.vector)
        for name in ("dropout_add_layer_norm", "dropout_add_rms_norm")
    },
    **{
        f"{name}.{part}": lambda plan: None
        for name in ("layer_norm_fn", "rms_norm_fn")
        for part in ("x1", "weight1", "bias1", "rowscale", "out", "residual_out")
    },
    "return_dropout_mask": lambda plan: plan.drawn(False, False, True),
    "is_rms_norm": lambda plan: plan.drawn(False, True),
}  # fmt: skip

# Parameters that say nothing by their names.
BY_ANNOTATION: dict[str, Maker] = {
    "Tensor": lambda plan: plan.tensor(plan.batch, plan.length, plan.width),
    "Tensor | None": lambda plan: None,
    "float": lambda plan: plan.drawn(0.0, 0.5),
    "float | None": lambda plan: None,
    "float | Tensor": lambda plan: plan.drawn(0.0, 0.5),
    "bool": lambda plan: plan.drawn(False, True),
    "int | None": lambda plan: None,
}


def _dropped() -> nn.Module:
    import tridrop

    return tridrop.nn.weight_drop(nn.Linear(16, 8), "weight", 0.5)


def right(plan: Plan, name: str, annotation: str, of: str = "") -> Any:
    """The right value of a parameter; KeyError where nobody knows one.

    ``of`` is ".forward" for what a module's forward takes.
    """
    keys = (f"{plan.target}{of}.{name}", f"{plan.target}.{name}", name)
    found = [RIGHT[key] for key in keys if key in RIGHT]
    maker = found[0] if found else BY_ANNOTATION.get(annotation)
    if maker is None:
        raise KeyError(
            f"tests/abuse/right.py has no value for {name!r}, {annotation!r}, of {plan.target}"
        )
    return maker(plan)
