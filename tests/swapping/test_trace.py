"""torch.fx.symbolic_trace of swapped models, by hand and by the libraries' feature extractors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import (
    create_feature_extractor,
    get_graph_node_names,
)
from torchvision.models.swin_transformer import SwinTransformer

import tridrop

timm = pytest.importorskip("timm")
from timm.models import _features_fx, vision_transformer  # noqa: E402

W = 16


class Block(nn.Module):
    """Post-norm: everything that is fused within a forward."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(W), nn.GELU()
        self.up, self.down = nn.Linear(W, 64), nn.Linear(64, W)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x):
        y = self.drop1(self.act(self.up(x)))
        x = x + self.drop2(self.down(y))
        return self.norm(x)


class Child(nn.Module):
    """Its parent takes over its end."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(W, W), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.linear(x))


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.child, self.softmax = nn.LayerNorm(W), Child(), nn.Softmax(-1)
        self.attn_drop, self.sequence = nn.Dropout(0.3), nn.Sequential(nn.Linear(W, W), nn.ReLU())
        self.sequence.append(nn.Dropout(0.3))
        self.position = nn.Parameter(torch.randn(W))
        self.position_drop = nn.Dropout(0.3)

    def forward(self, x):
        x = x + self.child(self.norm(x)) + self.position_drop(self.position)
        weights = self.attn_drop(self.softmax(x @ x.transpose(-2, -1)))
        return self.sequence(weights @ x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(W, 2, dropout=0.3, batch_first=True)
        self.drop = nn.Dropout1d(0.3)

    def forward(self, x):
        return self.drop(self.attention(x, x, x, need_weights=False)[0])


class Functions(nn.Module):
    """What drops here is no module: a graph has torch's mode of the trace."""

    def forward(self, x):
        x = F.dropout(x, 0.3, self.training)
        p = 0.3 if self.training else 0.0
        return F.scaled_dot_product_attention(x, x, x, dropout_p=p)


VIT = {
    "img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3,
    "drop_path_rate": 0.4, "drop_rate": 0.15, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1,
}  # fmt: skip


def _timm() -> nn.Module:
    return vision_transformer.VisionTransformer(**VIT)


def _torchvision() -> nn.Module:
    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
        dropout=0.3, attention_dropout=0.3, num_classes=3,
    )  # fmt: skip
    nn.init.normal_(model.heads[0].weight)  # zeros, which would hide everything
    return model


def _swin() -> nn.Module:
    return SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [2, 2], dropout=0.3, attention_dropout=0.3,
        stochastic_depth_prob=0.4, num_classes=3,
    )  # fmt: skip


TEXT, IMAGE = (3, 6, W), (3, 3, 16, 16)
LIVE = {
    "block": (Block, TEXT), "attention": (Attention, TEXT), "torchvision": (_torchvision, IMAGE),
    "timm": (_timm, IMAGE),
    "encoder layer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(W, 2, 32)), TEXT),
}  # fmt: skip
MODELS = LIVE | {"parent": (Parent, TEXT), "swin": (_swin, (2, 3, 32, 32))}


def pair(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model, the same swapped, and what they take."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    tridrop.swap(other)
    return model, other, torch.randn(shape)


def under(seed: int, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with tridrop.rng(seed):
        return model(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LIVE)
def test_a_traced_model_has_live_modes_and_the_masks_of_the_untraced(name, training):
    model, swapped, x = pair(name)
    graph = torch.fx.symbolic_trace(swapped.train(training))
    torch.testing.assert_close(graph.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    graph.train(), swapped.train()
    torch.testing.assert_close(under(5, graph, x), under(5, swapped, x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(under(5, graph, x), under(6, graph, x))


def test_rates_of_a_graph_are_live():
    model, swapped, x = pair("block")
    graph = torch.fx.symbolic_trace(swapped)
    graph.drop1.p = graph.drop2.p = 0.0
    torch.testing.assert_close(graph(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted({*MODELS} - {"timm"}))
def test_a_graph_is_that_of_the_original(name, training):
    model, swapped, _ = pair(name)
    graphs = [torch.fx.symbolic_trace(m.train(training)).graph for m in (model, swapped)]
    nodes = [[(n.op, n.name, str(n.args), str(n.kwargs)) for n in g.nodes] for g in graphs]
    assert nodes[0] == nodes[1]
    kept = [[n.target for n in g.nodes if n.op == "call_module"] for g in graphs]
    assert kept[0] == kept[1]


def test_a_library_s_drop_path_is_a_node_with_a_live_mode():
    _, swapped, x = pair("timm")
    graph = torch.fx.symbolic_trace(swapped.eval())
    kept = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    assert {"blocks.1.drop_path1", "blocks.1.drop_path2"} <= kept
    for module in graph.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(under(5, graph.train(), x), under(6, graph, x))


def test_functions_keep_the_mode_of_the_trace_and_draw_our_masks():
    x, model = torch.randn(3, 2, 6, W), Functions()
    tridrop.swap(model)
    graph = torch.fx.symbolic_trace(model.train())
    torch.testing.assert_close(under(5, graph.eval(), x), under(5, model, x))
    torch.testing.assert_close(
        torch.fx.symbolic_trace(model.eval()).train()(x), Functions().eval()(x)
    )
    state = torch.get_rng_state()
    whole = torch.ones(2, 64, 8, 8)
    with tridrop.rng(tridrop.fold_in(7, 0)):
        node = next(n for n in graph.graph.nodes if n.op == "call_function")
        found = node.target(*(whole if a is node.all_input_nodes[0] else a for a in node.args))
    keep = tridrop.keep_mask(tridrop.fold_in(tridrop.fold_in(7, 0), 0), whole.shape, 0.3)
    torch.testing.assert_close(found, keep / 0.7)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_leaf_of_the_tracer_is_not_looked_into():
    """Its parent takes over its end otherwise."""

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Child) or super().is_leaf_module(m, name)

    _, swapped, x = pair("parent")
    tracer = Whole()
    graph = torch.fx.GraphModule(swapped, tracer.trace(swapped))
    assert "child" in [n.target for n in graph.graph.nodes if n.op == "call_module"]
    torch.testing.assert_close(graph.eval()(x), swapped.eval()(x))


def test_a_graph_can_be_traced_copied_and_unswapped_again():
    model, swapped, x = pair("block")
    graph = copy.deepcopy(torch.fx.symbolic_trace(torch.fx.symbolic_trace(swapped)))
    torch.testing.assert_close(under(5, graph, x), under(5, swapped, x), rtol=1e-4, atol=1e-5)
    tridrop.unswap(graph)
    assert {type(m) for m in graph.modules()} <= {type(graph), *map(type, model.modules())}
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(x), expected)


def test_what_takes_the_place_of_module_call_hears_every_module(monkeypatch):
    _, swapped, x = pair("block")
    heard, call = [], nn.Module.__call__

    def listening(self, *args, **kwargs):
        heard.append(self)
        return call(self, *args, **kwargs)

    expected = under(5, swapped, x)
    monkeypatch.setattr(nn.Module, "__call__", listening)
    torch.testing.assert_close(under(5, swapped, x), expected, rtol=1e-4, atol=1e-5)
    assert set(swapped.modules()) == set(heard)


def test_ops_that_cannot_be_traced_say_what_to_do():
    block = tridrop.nn.TransformerBlock(W, 2, p=0.1)
    for traced in (tridrop.nn.Dropout(0.3), tridrop.nn.ActivationDropout("relu", 0.1)):
        with pytest.raises(TypeError, match=r"tridrop\.unswap"):
            torch.fx.symbolic_trace(traced)
    with pytest.raises((TypeError, torch.fx.proxy.TraceError)):
        torch.fx.symbolic_trace(block)


@pytest.mark.parametrize("name", ["torchvision", "swin"])
def test_torchvision_s_feature_extractor(name):
    model, swapped, x = pair(name)
    names = get_graph_node_names(model)
    assert get_graph_node_names(swapped) == names
    node = names[1][-4]
    before, after = (create_feature_extractor(m, [node]) for m in (model, swapped))
    expected = before.eval()(x)[node]
    torch.testing.assert_close(after.eval()(x)[node], expected, rtol=1e-4, atol=1e-5)
    after.train()
    assert not torch.equal(after(x)[node], after(x)[node])
    torch.testing.assert_close(after.eval()(x)[node], expected, rtol=1e-4, atol=1e-5)


def test_timm_s_feature_extractor():
    model, swapped, x = pair("timm")
    nodes = {"blocks.0.add_1": "a", "norm": "b"}
    before, after = (_features_fx.create_feature_extractor(m, nodes) for m in (model, swapped))
    for key, expected in before.eval()(x).items():
        torch.testing.assert_close(after.eval()(x)[key], expected, rtol=1e-4, atol=1e-5)
    after.train()
    assert not torch.equal(after(x)["b"], after(x)["b"])
