"""LayerDrop in the forwards of libraries: reported, never taken for a dropout."""

import random
import warnings
from pathlib import Path
from random import uniform

import numpy as np
import pytest
import torch
import transformers
from swap_families import BART, SPEECH, TEXT
from torch import nn
from torch.nn import functional as F

import tridrop


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


class Settings:
    layerdrop = 0.25


class Stack(nn.Module):
    """What the stacks of layers below share."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layerdrop, self.p, self.config = 0.5, p, Settings()


class ByTorch(Stack):
    def forward(self, x):
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0:
                dropout_probability = torch.rand([])
                if dropout_probability < self.layerdrop:
                    continue
            x = layer(x)
        return x


class ByNumPy(Stack):
    def forward(self, x):
        for layer in self.layers:
            layerdrop_prob = np.random.random()
            if not self.training or (layerdrop_prob > self.config.layerdrop):
                x = layer(x)
        return x


class ByPython(Stack):
    def forward(self, x):
        x = F.dropout(x, self.p, self.training)
        for layer in self.layers:
            if self.training and (random.uniform(0, 1) < self.layerdrop):
                continue
            x = layer(x)
        return x


class Imported(Stack):
    def forward(self, x):
        for layer in self.layers:
            skip = self.training and self.layerdrop >= uniform(0, 1)
            x = x if skip else layer(x)
        return x


class ByMask(Stack):
    """A drop path of one's own, with numbers for samples: a dropout."""

    def forward(self, x):
        for layer in self.layers:
            if self.training:
                x = x + layer(x) * (torch.rand(len(x), 1) >= self.layerdrop)
        return x


@pytest.mark.parametrize(
    ("kind", "whose"),
    [
        (ByTorch, "a generator"),
        (ByNumPy, "NumPy's generator"),
        (ByPython, "Python's random"),
        (Imported, "Python's random"),
    ],
    ids=["torch", "NumPy", "Python", "imported"],
)
def test_each_is_left_and_reported(kind, whose):
    (site,) = [s for s in tridrop.swap(kind()).sites if s.status == "left"]
    assert (site.kind, site.stream) == (kind.__name__, None)
    assert site.reason == f"it draws random numbers from {whose}"
    assert site.code in Path(__file__).read_text().splitlines()[site.line - 1]


def test_numbers_for_samples_are_a_dropout():
    with tridrop.mc_dropout(ByMask()) as names:
        assert names == ("",)


@pytest.mark.parametrize("kind", [ByTorch, ByNumPy, Imported], ids=lambda k: k.__name__)
def test_monte_carlo_leaves_it_off(kind):
    model = nn.Sequential(kind(), nn.Dropout(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tridrop.mc_dropout(model) as names:
            assert names == ("1",)
    with pytest.raises(ValueError, match="nothing in this"):
        tridrop.mc_dropout(kind()).__enter__()


def test_monte_carlo_warns_where_it_cannot_be_left_off():
    model = ByPython()
    said = r"something else.*ByPython\.forward, line"
    with pytest.warns(UserWarning, match=said) as found, tridrop.mc_dropout(model) as names:
        assert names == ("",)
    assert len(found) == 1
    model.layerdrop = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tridrop.mc_dropout(model):
            pass


@pytest.mark.parametrize(
    ("config", "model", "sizes", "left"),
    [
        ("OPT", "OPTModel", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3},
         {"OPTDecoder"}),
        ("Bart", "BartModel", BART | {"encoder_layerdrop": 0.3, "decoder_layerdrop": 0.2},
         {"BartEncoder", "BartDecoder"}),
        ("MusicgenDecoder", "MusicgenModel",
         {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48,
          "vocab_size": 20, "num_codebooks": 2, "layerdrop": 0.3},
         {"MusicgenDecoder"}),
        ("Wav2Vec2", "Wav2Vec2Model",
         SPEECH | {"layerdrop": 0.3, "add_adapter": True, "output_hidden_size": 32},
         {"Wav2Vec2Encoder", "Wav2Vec2Adapter"}),
    ],
    ids=["OPT", "BART", "MusicGen", "wav2vec2"],
)  # fmt: skip
def test_models_of_transformers(config, model, sizes, left):
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**sizes))
    report = tridrop.swap(made)
    assert {
        s.kind for s in report.sites if s.reason.startswith("it draws random numbers from")
    } >= left


def test_an_ensemble_of_wav2vec2_with_an_adapter():
    """Skipped convolutions of the adapter would change the length of the output."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SPEECH | {"layerdrop": 0.5, "add_adapter": True, "output_hidden_size": 32},
        hidden_dropout=0.3,
    )
    model = transformers.Wav2Vec2Model(config)
    tridrop.swap(model)
    x = torch.randn(2, 400)

    def call(v):
        return model(v).last_hidden_state

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            tridrop.mc_predict(
                model, x, samples=6, seed=1, call=call, vectorize=False, keep_samples=True
            )
            for _ in range(2)
        ]
    assert torch.equal(found[0].samples, found[1].samples)
    assert bool((found[0].spread > 0).any())
    with torch.no_grad(), tridrop.mc_dropout(model), tridrop.rng(tridrop.fold_in(1, 2)):
        torch.testing.assert_close(found[0].samples[2, 0], call(x[:1])[0])
