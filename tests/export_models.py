"""Small models for the tests of export, with and without the swap."""

import copy

import torch
import transformers
from swap_families import batch, make
from torch import nn

import tridrop

W = 16


class Block(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(W), nn.GELU()
        self.up, self.down = nn.Linear(W, 32), nn.Linear(32, W)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x):
        y = self.drop1(self.act(self.up(x)))
        x = x + self.drop2(self.down(y))
        return self.norm(x)


class Logits(nn.Module):
    """BERT from embeddings to logits."""

    def __init__(self) -> None:
        super().__init__()
        transformers.logging.set_verbosity_error()
        self.bert = make("BERT")
        self.register_buffer("mask", batch("BERT")["attention_mask"])

    def forward(self, x):
        return self.bert(inputs_embeds=x, attention_mask=self.mask).logits


def _attention(**options):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(W, 2, dropout=0.3, batch_first=True)

        def forward(self, x):
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            given = {"attn_mask": causal, "is_causal": True} if "causal" in options else {}
            if "padding" in options:
                given["key_padding_mask"] = torch.tensor([[False] * 4 + [True], [True] * 5])[:, :5]
            out, weights = self.attention(x, x, x, need_weights="weights" in options, **given)
            return out if weights is None else torch.cat((out, weights), -1)

    return Attention


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(W, 2, 32, dropout=0.3, batch_first=True)

    def forward(self, x):
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return self.layer(x, src_key_padding_mask=padding)


def _decoder():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(W, 2, 32, dropout=0.3, norm_first=True)

        def forward(self, x):
            return self.layer(x, 2 * x)

    return Decoder()


SMALL = (2, 5, W)
MODELS = {
    "block": (Block, SMALL),
    "attention": (_attention(), SMALL),
    "weights": (_attention(weights=True), SMALL),
    "causal": (_attention(causal=True), SMALL),
    "causal weights": (_attention(causal=True, weights=True), SMALL),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(W, 2, 32, batch_first=True), SMALL),
    "padded": (Padded, SMALL),
    "decoder layer": (_decoder, SMALL),
    "BERT": (Logits, (3, 8, 32)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model, the same swapped, and what they take."""
    make_model, shape = MODELS[name]
    torch.manual_seed(0)
    model = make_model()
    other = copy.deepcopy(model)
    tridrop.swap(other)
    return model, other, torch.randn(shape)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
