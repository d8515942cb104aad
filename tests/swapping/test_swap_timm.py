"""tridrop.swap of timm's models and of their parts."""

import contextlib

import pytest
import swap_twin
import torch
from swap_twin import draw, fill, hold
from torch import nn

import tridrop

timm = pytest.importorskip("timm")
from timm.layers import Attention, DropPath, LayerScale, LayerScale2d, Mlp  # noqa: E402
from timm.models import vision_transformer  # noqa: E402

N, T, E, H = 3, 5, 8, 2
BOTH = [True, False]
ONE = swap_twin.SWITCHES[:1]
IMAGE = (draw(2, 3, 16, 16),)
RATES = {"proj_drop": 0.1, "attn_drop": 0.2, "drop_path": 0.3, "init_values": 0.5}
VIT = {
    "img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3,
    "drop_path_rate": 0.4, "drop_rate": 0.15, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2,
    "pos_drop_rate": 0.1,
}  # fmt: skip


def fused(model: nn.Module, on: bool) -> nn.Module:
    """With torch's attention function, or with its parts."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = on
    return model


attentions = pytest.mark.parametrize("attention", BOTH, ids=["function", "parts"])


class Branch(nn.Module):
    """residual + drop_path(layer_scale(dropout(linear)))."""

    def __init__(self, path: nn.Module, scale: nn.Module, p: float) -> None:
        super().__init__()
        self.linear, self.drop, self.scale, self.path = nn.Linear(E, E), nn.Dropout(p), scale, path

    def forward(self, x):
        return x + self.path(self.scale(self.drop(self.linear(x))))


@attentions
def test_a_block_equals_eager_with_every_switch(attention):
    block = fused(fill(vision_transformer.Block(E, H, qkv_bias=True, **RATES)), attention)
    report = hold(block, draw(N, T, E))
    assert report.counts()["left"] == 0
    parts = {site.code.partition("(")[0]: site.parts for site in report.sites}
    assert set(parts["self.drop_path1"]) >= {"scale", "drop_path", "add", "norm"}
    assert set(parts["self.drop_path2"]) >= {"scale", "drop_path", "add"}
    assert parts["self.drop1"] == ("linear", "activation", "dropout")
    assert parts["self.attn_drop"] == ("softmax", "dropout")


@attentions
@pytest.mark.parametrize("init_values", [None, 0.5])
def test_a_vision_transformer(attention, init_values):
    model = fill(vision_transformer.VisionTransformer(**VIT, init_values=init_values))
    report = hold(fused(model, attention), *IMAGE)
    assert report.counts()["left"] == 0
    assert {s.kind for s in report.sites} == {"VisionTransformer", "Attention", "Mlp", "Block"}


@pytest.mark.parametrize("name", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"])
def test_other_blocks(name):
    block = fill(getattr(vision_transformer, name)(E, H, **RATES))
    hold(block, draw(N, T, E))


@pytest.mark.parametrize("scale_by_keep", BOTH)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("inplace", BOTH)
def test_drop_path_and_layer_scale(scale_by_keep, p, inplace):
    branch = Branch(DropPath(0.4, scale_by_keep), LayerScale(E, inplace=inplace), p)
    for shape in ((N, T, E), (N, E), (N, 2, T, E)):
        report = hold(fill(branch), draw(*shape))
        assert report.counts()["left"] == 0


@pytest.mark.parametrize("scale_by_keep", BOTH)
@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 3, 2), (6, 0)], ids=str)
def test_drop_path_alone(scale_by_keep, shape):
    """Its mask is that of its number in the domain of drop paths."""
    model, x = DropPath(0.4, scale_by_keep), draw(*shape)
    hold(model, x)
    (site,) = tridrop.swap(model.train()).sites
    with tridrop.rng(5):
        out = model(x)
    seed = tridrop.fold_in(5, site.stream)
    mask = tridrop.keep_mask(seed, shape, 0.4, domain="drop_path")
    torch.testing.assert_close(out, torch.where(mask, x / (0.6 if scale_by_keep else 1.0), 0))
    assert x.numel() == 0 or 0 < mask.sum() < x.numel()


def test_layer_scale_of_images():
    class Images(Branch):
        def forward(self, x):
            return x + self.path(self.scale(self.drop(self.linear(x)).movedim(-1, 1))).movedim(
                1, -1
            )

    hold(fill(Images(DropPath(0.4), LayerScale2d(E), 0.2)), draw(N, T, T, E))


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("bias", BOTH)
def test_mlp(act, norm, bias):
    mlp = Mlp(E, 12, act_layer=act, norm_layer=norm, bias=bias, drop=(0.1, 0.2))
    report = hold(fill(mlp), draw(N, T, E), switches=swap_twin.SWITCHES if bias else ONE)
    first, second = report.sites
    if act is not nn.Tanh:
        assert "activation" in first.parts
    assert report.counts()["left"] == 0
    if bias:
        assert "linear" in second.parts
    convolved = fill(Mlp(E, 12, act_layer=act, use_conv=True, drop=0.2))
    hold(convolved, draw(N, E, 2, 2), switches=ONE)


@attentions
@pytest.mark.parametrize("masked", BOTH)
def test_attention(attention, masked):
    model = fill(Attention(E, H, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm,
                           attn_drop=0.2, proj_drop=0.1))  # fmt: skip
    given = {"attn_mask": draw(N, 1, T, T)} if masked else {"is_causal": True}
    report = hold(fused(model, attention), draw(N, T, E), **given)
    assert report.counts()["left"] == 0


def make(name: str, **more) -> nn.Module:
    if name == "mixer":
        return timm.models.mlp_mixer.MlpMixer(num_classes=3, drop_path_rate=0.4, **more)
    if name == "poolformer":
        return timm.models.metaformer.MetaFormer(num_classes=3, drop_path_rate=0.4, **more)
    return timm.create_model(name, pretrained=False, num_classes=3, drop_path_rate=0.4, **more)


TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2)}
DROPS = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_rate": 0.15}
FAMILIES = {
    "deit3_small_patch16_224": TINY | DROPS,
    "deit_tiny_distilled_patch16_224": TINY | DROPS,
    "beit_base_patch16_224": TINY | DROPS,
    "eva02_tiny_patch14_224": TINY | DROPS | {"embed_dim": 16},
    "cait_xxs24_224": TINY | DROPS,
    "xcit_nano_12_p16_224": TINY | DROPS | {"patch_size": 16, "img_size": 32},
    "swin_tiny_patch4_window7_224": WINDOWS | DROPS | {"num_heads": (2, 2)},
    "swinv2_tiny_window8_256": WINDOWS | DROPS | {"num_heads": (2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "drop_rate": 0.15},
    "mixer": {"img_size": 32, "embed_dim": 8, "num_blocks": 2, "proj_drop_rate": 0.1},
    "poolformer": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "proj_drop_rate": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@attentions
def test_other_families(name, attention):
    """Whatever is fused in them: the numbers are eager's."""
    model = fill(fused(make(name, **FAMILIES[name]), attention), 0.2)
    size = FAMILIES[name].get("img_size", 32)
    report = hold(model, draw(2, 3, size, size), switches=ONE + swap_twin.SWITCHES[-1:])
    assert report.counts()["fused"] + report.counts()["swapped"]


def test_a_state_dict_and_a_repr_stay():
    model = fill(vision_transformer.VisionTransformer(**VIT, init_values=0.5))
    before, text = dict(model.state_dict()), repr(model)
    tridrop.swap(model)
    assert list(model.state_dict()) == list(before)
    assert repr(model) == text
    with contextlib.suppress(RuntimeError):
        model.load_state_dict(before)
    model.load_state_dict(before, strict=True)
    assert isinstance(model.blocks[0], vision_transformer.Block)
