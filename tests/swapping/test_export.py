"""torch.export, torch.jit.trace, FlopCounterMode and forward mode of swapped models.

Each is held to what the model gave before the swap.
"""

import io

import pytest
import torch
from export_models import MODELS, W, close, pair
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tridrop

models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def operators(exported: torch.export.ExportedProgram) -> set[str]:
    """The names of all operators of a graph and of the graphs in it."""
    graphs = [m.graph for m in exported.graph_module.modules() if hasattr(m, "graph")]
    return {str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("tridrop.")}


# ---------------------------------------------------------------------------------- torch.export


@models
def test_both_kinds_of_export_have_our_ops_in_training(name):
    _, swapped, x = pair(name)
    found = []
    for strict in (False, True):
        exported = torch.export.export(swapped, (x,), strict=strict)
        names = operators(exported)
        assert not any("dropout" in n or "bernoulli" in n for n in names)
        found.append(ours(names))
        torch.manual_seed(3)
        expected = swapped(x)
        torch.manual_seed(3)
        close(exported.module()(x), expected)
    assert found[0] == found[1]
    assert "tridrop.new_seed.default" in found[0]


def test_export_by_default_fuses_what_eager_fuses():
    _, swapped, x = pair("block")
    names = ours(operators(torch.export.export(swapped, (x,))))
    assert names == {
        "tridrop.new_seed.default", "tridrop.forward.default", "tridrop.norm_forward.default",
    }  # fmt: skip


@models
@pytest.mark.parametrize("strict", [False, True], ids=["by default", "strict"])
def test_an_exported_evaluation_has_standard_operators_alone(name, strict):
    model, swapped, x = pair(name)
    exported = torch.export.export(swapped.eval(), (x,), strict=strict)
    names = operators(exported)
    assert not ours(names)
    assert all(n.startswith(("aten.", "<built-in function getitem>", "wrap_")) for n in names)
    close(exported.module()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["block", "attention", "weights", "encoder layer"])
def test_an_exported_evaluation_takes_other_shapes(name):
    model, swapped, x = pair(name)
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    exported = torch.export.export(swapped.eval(), (x,), dynamic_shapes=(dims,))
    other = torch.randn(3, 7, W)
    close(exported.module()(other), model.eval()(other))


def test_attention_of_an_exported_evaluation_is_torch_s_own():
    _, swapped, x = pair("causal")
    names = operators(torch.export.export(swapped.eval(), (x,)))
    assert "aten.scaled_dot_product_attention.default" in names
    assert "aten.exp.default" not in names  # no log-sum-exp that nobody reads


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, cross": {"is_causal": True, "keys": 9},
    "window": {"window": (1, 2)},
    "bool mask": {"attn_mask": torch.rand(2, 1, 5, 5) > 0.4},
    "float mask": {"attn_mask": torch.randn(4, 5, 5)},
    "mask and window": {"attn_mask": torch.randn(5, 5), "window": (2, 0)},
    "padding": {"key_mask": torch.tensor([[True] * 3 + [False] * 2, [False] * 5])},
    "padding, causal": {
        "key_mask": torch.tensor([[False] + [True] * 4, [True] * 5]), "is_causal": True,
    },
    "grouped": {"enable_gqa": True},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.randn(4)},
    "lse": {"return_lse": True},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_means_the_same_in_an_exported_graph_and_in_forward_mode(options):
    options = dict(options)
    generator = torch.Generator().manual_seed(0)
    keys, heads = options.pop("keys", 5), 2 if "enable_gqa" in options else 4
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, heads, keys, 8, generator=generator)

    class Call(nn.Module):
        def forward(self, q, k, v):
            return tridrop.scaled_dot_product_attention(q, k, v, **options)

    expected = Call()(q, k, v)
    exported = torch.export.export(Call(), (q, k, v))
    assert not ours(operators(exported))
    found = exported.module()(q, k, v)
    close(found, expected)
    traced = torch.jit.trace(Call(), (q, k, v))
    close(traced(q, k, v), expected)
    if "return_lse" not in options:
        out, tangent = torch.func.jvp(lambda q: Call()(q, k, v), (q,), (torch.ones_like(q),))
        close(out, expected)
        _, pull_back = torch.func.vjp(lambda q: Call()(q, k, v), q)
        # <J t, w> = <t, J^T w>
        close((tangent * out).sum(), pull_back(out)[0].sum())


ELEMENTWISE = {
    "activation": lambda x, b, r: tridrop.activation_dropout(
        x, 0.3, False, activation="gelu", bias=b
    ),
    "gated": lambda x, b, r: tridrop.activation_dropout(x, 0.3, False, activation="swiglu"),
    "nothing": lambda x, b, r: tridrop.activation_dropout(x, 0.3, False, activation=None),
    "add": lambda x, b, r: tridrop.dropout_add(x, r, 0.3, False, bias=b, layer_scale=b),
    "layer norm": lambda x, b, r: tridrop.dropout_add_layer_norm(x, r, b, b, 0.3, False, bias=b),
    "rms norm": lambda x, b, r: tridrop.dropout_add_rms_norm(
        x, r, b, None, 0.3, False, zero_centered_weight=True
    ),
    "norm first": lambda x, b, r: tridrop.layer_norm_dropout(x, b, b, 0.3, False, residual=r),
    "softmax": lambda x, b, r: tridrop.softmax_dropout(x, 0.3, False, is_causal=True, scale=0.5),
    "lora": lambda x, b, r: tridrop.lora_delta(
        x, b[None].expand(4, -1), b[:4].expand(8, 4), 0.3, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_op_that_drops_nothing_is_composed_where_it_is_exported(call, dtype):
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, 3, 5, W, generator=generator).to(dtype)
    b = torch.randn(W, generator=generator).to(dtype)

    class Call(nn.Module):
        def forward(self, x, b, r):
            return call(x, b, r)

    expected = Call()(x, b, r)
    exported = torch.export.export(Call(), (x, b, r))
    assert not ours(operators(exported))
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(exported.module()(x, b, r), expected, **tolerance)
    traced = torch.jit.trace(Call(), (x, b, r))
    torch.testing.assert_close(traced(x, b, r), expected, **tolerance)
    before = x.clone()
    traced(x, b, r).zero_()  # a result is never its operand
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------- torch.jit.trace


@models
def test_a_jit_traced_evaluation_needs_no_tridrop(name):
    model, swapped, x = pair(name)
    # torch's encoder layer takes another road where a gradient is wanted, and fails its own check.
    traced = torch.jit.trace(swapped.eval().requires_grad_(False), (x,))
    assert "tridrop::" not in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.load(file)(x), model.eval()(x))


def test_a_jit_traced_training_draws_in_this_process_and_refuses_to_be_saved():
    _, swapped, x = pair("block")
    traced = torch.jit.trace(swapped, (x,), check_trace=False)
    torch.manual_seed(1)
    expected = swapped(x)
    torch.manual_seed(1)
    close(traced(x), expected)
    assert not torch.equal(traced(x), traced(x))
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        torch.jit.save(traced, io.BytesIO())


# ------------------------------------------------------------------------------------- counting


def flops(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["block", "weights", "causal weights", "BERT"])
def test_flops_are_those_of_the_original(name, training):
    model, swapped, x = pair(name)
    model.train(training), swapped.train(training)
    assert flops(swapped, x) == flops(model, x) > 0


@pytest.mark.parametrize("name", ["attention", "causal", "encoder layer"])
def test_flops_of_attention_are_those_of_torch_s_function(name):
    """In evaluation on a CPU torch's function has no formula; elsewhere it has the one of ours."""
    model, swapped, x = pair(name)
    expected = flops(model, x)
    assert flops(swapped, x) == expected
    assert flops(swapped.eval(), x) == expected


def test_flops_of_backward_count_the_scores_once_more():
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    q.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = tridrop.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    product = 2 * 2 * 4 * 6 * 6 * 8
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


def test_flops_of_packed_attention_are_those_of_its_sequences():
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    x = torch.randn(1, 4, 6, 8)
    with FlopCounterMode(display=False) as counter:
        tridrop.scaled_dot_product_attention(
            x, x, x, dropout_p=0.3, cu_seqlens_q=offsets, cu_seqlens_k=offsets
        )
    assert counter.get_total_flops() == 2 * 2 * 4 * (2 * 2 + 4 * 4) * 8


def test_flops_of_lora_are_those_of_its_products():
    x, a, b = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8), torch.randn(6, 4)
    with FlopCounterMode(display=False) as counter:
        out = tridrop.lora_delta(x, a, b, 0.3)
    assert counter.get_total_flops() == 2 * 3 * (8 * 4 + 4 * 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * (8 * 4 + 4 * 6)  # x alone has a gradient


# --------------------------------------------------------------------------------- forward mode


def math(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """With the one kernel of torch's attention that knows forward mode."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return model(x)


@models
def test_forward_mode_of_an_evaluation_is_that_of_the_original(name):
    model, swapped, x = pair(name)
    model.eval(), swapped.eval()
    tangent = torch.randn(x.shape)
    expected = torch.func.jvp(lambda x: math(model, x), (x,), (tangent,))
    for found, wanted in zip(torch.func.jvp(swapped, (x,), (tangent,)), expected, strict=True):
        close(found, wanted)
    with torch.autograd.forward_ad.dual_level():
        out = swapped(torch.autograd.forward_ad.make_dual(x, tangent))
        close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected[1])


@pytest.mark.parametrize("name", ["block", "weights", "attention", "encoder layer"])
def test_the_hessian_of_an_evaluation_is_that_of_the_original(name):
    model, swapped, x = pair(name)
    model.eval(), swapped.eval()
    x = x[:1, :2]
    expected = torch.func.hessian(lambda x: math(model, x).square().sum())(x)
    close(torch.func.hessian(lambda x: swapped(x).square().sum())(x), expected)


@pytest.mark.parametrize("name", ["block", "weights", "attention", "encoder layer"])
def test_forward_mode_of_training_has_the_mask_of_backward(name):
    _, swapped, x = pair(name)

    def call(x):
        with tridrop.rng(7):
            return swapped(x)

    tangent = torch.randn(x.shape)
    out, pushed = torch.func.jvp(call, (x,), (tangent,))
    close(out, call(x))
    _, pull_back = torch.func.vjp(call, x)
    weights = torch.randn(out.shape)
    close((pushed * weights).sum(), (pull_back(weights)[0] * tangent).sum())
