"""The attention function for transformers, its masks, and how its name becomes known."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils  # noqa: F401  # with it masks can be made
from hosts import DEVICE, PLAIN
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

import tridrop
from tridrop.integrations.transformers import attention_forward, attention_mask
from tridrop.integrations.transformers_masks import pattern_of


def by_hand(q, k, v, visible=None, bias=None, scale=None, softcap=None, sinks=None, keep=None):
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., : k.shape[2]]
    if keep is not None:
        weights = torch.where(keep, weights / 0.75, 0.0)
    return (weights @ v).transpose(1, 2), weights


def tensors(queries=6, keys=6, heads=4, key_heads=2, width=16):
    g = torch.Generator().manual_seed(queries + 7 * keys)
    shapes = (heads, queries), (key_heads, keys), (key_heads, keys)
    return [torch.randn(2, h, n, width, generator=g) for h, n in shapes]


def caller(**attributes) -> nn.Module:
    module = nn.Module().train()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


VISIBLE = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.3
VISIBLE[0, 0, 2] = False  # a query with nothing to attend to
BIAS = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(4))
LOWER = torch.ones(6, 6, dtype=torch.bool).tril()
PADDING = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None].expand(2, 1, 6, 6)
# The call's mask and options; what eager's visible keys and bias are.
CALLS = {
    "causal": (None, {"is_causal": True}, {"visible": LOWER}),
    "bool": (VISIBLE, {}, {"visible": VISIBLE}),
    "padding": (PADDING, {}, {"visible": PADDING}),
    "float": (BIAS, {}, {"bias": BIAS}),
    "position bias": (None, {"position_bias": BIAS, "is_causal": False}, {"bias": BIAS}),
    "position bias, causal": (
        None,
        {"position_bias": BIAS, "is_causal": True},
        {"bias": BIAS, "visible": LOWER},
    ),
    "position bias, bool": (
        VISIBLE,
        {"position_bias": BIAS},
        {"bias": BIAS, "visible": VISIBLE},
    ),
    "position bias, padding": (
        PADDING,
        {"position_bias": BIAS},
        {"bias": BIAS, "visible": PADDING},
    ),
    "position bias, float": (-BIAS.mT, {"position_bias": BIAS}, {"bias": BIAS - BIAS.mT}),
    "softcap and scaling": (
        None,
        {"is_causal": True, "softcap": 0.7, "scaling": 1.0},
        {"visible": LOWER, "softcap": 0.7, "scale": 1.0},
    ),
    "sinks": (
        None,
        {"is_causal": True, "s_aux": torch.arange(4.0)},
        {"visible": LOWER, "sinks": torch.arange(4.0)[:, None, None]},
    ),
    "sinks a query": (
        VISIBLE,
        {"sinks": BIAS[..., :1]},
        {"visible": VISIBLE, "sinks": BIAS[..., :1]},
    ),
}


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
@pytest.mark.parametrize("case", CALLS)
def test_function_equals_the_formula(case, backend):
    device = DEVICE if backend == "triton" else "cpu"
    mask, options, formula, inputs = tree_map_only(
        torch.Tensor, lambda t: t.to(device), (*CALLS[case], tensors())
    )
    keep = tridrop.attention_keep_mask(tridrop.fold_in(5, 3), (2, 4, 6, 6), 0.25).to(device)
    expected, probabilities = by_hand(*inputs, **formula, keep=keep)
    module = caller(_tridrop_attention_site=3)
    for wanted in (False, True):
        with tridrop.rng(5), tridrop.backend(backend):
            out, weights = attention_forward(
                module, *inputs, mask, 0.25, output_attentions=wanted, **options
            )
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if wanted:
            torch.testing.assert_close(weights, probabilities, rtol=1e-5, atol=1e-5)
        else:
            assert weights is None


def test_position_bias_has_a_gradient():
    for mask in (None, VISIBLE, PADDING):
        grads = []
        for forward in (attention_forward, None):
            bias = BIAS.clone().requires_grad_()
            if forward is None:
                out, _ = by_hand(*tensors(), visible=mask, bias=bias)
                out = out.masked_fill(out.isnan(), 0.0)
            else:
                out, _ = forward(caller(), *tensors(), mask, position_bias=bias, is_causal=False)
            rows = out[:, [0, 1, 3, 4, 5]]  # query 2 sees nothing, where softmax has no gradient
            grads.append(torch.autograd.grad(rows.square().sum(), bias)[0])
        torch.testing.assert_close(grads[0][:, :, [0, 1, 3]], grads[1][:, :, [0, 1, 3]])


def test_causality_is_the_modules_without_a_mask():
    whole, causal = (by_hand(*tensors(), visible=m)[0] for m in (None, LOWER))

    class SplinterSelfAttention(nn.Module):
        """Named as one that has no is_causal and is not causal."""

    for module, given, expected in (
        (caller(is_causal=True), None, causal),
        (caller(is_causal=False), None, whole),
        (caller(is_causal=True), False, whole),
        (caller(is_causal=False), True, causal),
        (caller(), None, causal),
        (SplinterSelfAttention(), None, whole),
    ):
        out, _ = attention_forward(module, *tensors(), None, is_causal=given)
        torch.testing.assert_close(out, expected)
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    out, _ = attention_forward(caller(is_causal=True), *tensors(), everything)
    torch.testing.assert_close(out, whole)
    # A decoding step sees all keys; a static cache being filled has room behind the queries.
    step = tensors(queries=1)
    out, _ = attention_forward(caller(is_causal=True), *step, None)
    torch.testing.assert_close(out, by_hand(*step)[0])
    q, k, v = tensors(queries=3, keys=6)
    out, _ = attention_forward(caller(is_causal=True), q, k, v, None)
    torch.testing.assert_close(out, by_hand(q, k[:, :, :3], v[:, :, :3], LOWER[:3, :3])[0])


def test_modules_in_evaluation_drop_nothing():
    out, _ = attention_forward(caller().eval(), *tensors(), None, 0.5, is_causal=False)
    torch.testing.assert_close(out, by_hand(*tensors())[0])


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices"])
def test_what_cannot_be_honoured_is_refused(name):
    with pytest.raises(ValueError, match=f"passes {name}="):
        attention_forward(caller(), *tensors(), None, **{name: torch.zeros(1)})


def test_packed_arguments():
    q, k, v = (t[:1] for t in tensors())
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    both = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    same = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    for mask, options, visible in (
        (None, {"is_causal": True, "max_length_q": torch.tensor(4)}, same & LOWER),
        (None, {"is_causal": False}, same),
        (None, {"is_causal": True, "position_bias": BIAS}, same & LOWER),
        (VISIBLE[1:], {}, same & VISIBLE[1:]),
    ):
        out, _ = attention_forward(caller(), q, k, v, mask, **both, **options)
        expected = by_hand(q, k, v, visible, options.get("position_bias"))[0]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="give both cu_seq_lens_q and cu_seq_lens_k"):
        attention_forward(caller(), q, k, v, None, cu_seq_lens_q=offsets)
    with pytest.raises(
        ValueError, match="leave out either cu_seq_lens_q and cu_seq_lens_k, or output_attentions"
    ):
        attention_forward(caller(), q, k, v, None, **both, output_attentions=True)
    with pytest.raises(ValueError, match="4 packed queries and 6 keys"):
        attention_forward(caller(), q[:, :, :4], k, v, None, is_causal=True, **both)


OLD = "cache_position" in masking_utils.sdpa_mask.__code__.co_varnames


def ask(queries=6, keys=6, kind="causal", padding=None, offset=0, **more):
    """A mask as transformers asks for one."""
    more |= {"mask_function": getattr(masking_utils, f"{kind}_mask_function")}
    if OLD:
        more["cache_position"] = torch.arange(queries) + offset
    else:
        more |= {"q_length": queries, "q_offset": offset}
    if kind == "bidirectional":
        more |= {"allow_is_bidirectional_skip": True}
    return attention_mask(batch_size=2, kv_length=keys, attention_mask=padding, **more)


FULL = torch.ones(2, 6, dtype=torch.bool)
PARTLY = PADDING[:, 0, 0]


def test_a_mask_that_hides_nothing_more_than_causality_is_not_made():
    for padding in (None, FULL):
        assert ask(padding=padding) is None
        assert ask(padding=padding, kind="bidirectional") is None
    assert ask(queries=1, offset=5) is None
    assert torch.equal(ask(queries=2, offset=4)[1, 0], LOWER[4:])


def test_padding_alone_takes_memory_linear_in_the_length():
    mask = ask(kind="bidirectional", padding=PARTLY)
    assert torch.equal(mask, PADDING)
    assert mask.untyped_storage().nbytes() <= 12
    assert mask.stride(2) == 0


def test_causality_with_padding_is_known_of_the_mask_until_it_is_changed(monkeypatch):
    mask = ask(padding=PARTLY)
    assert torch.equal(mask, LOWER & PADDING)
    assert torch.equal(pattern_of(mask).key_mask, PARTLY)
    expected, _ = by_hand(*tensors(), visible=mask)
    out, _ = attention_forward(caller(), *tensors(), mask)
    torch.testing.assert_close(out, expected)
    assert pattern_of(mask[:, :, :3]) is None
    assert pattern_of(mask.clone()) is None
    mask[0, 0, 0, 5] = True
    assert pattern_of(mask) is None
    expected, _ = by_hand(*tensors(), visible=mask)
    out, _ = attention_forward(caller(), *tensors(), mask)
    torch.testing.assert_close(out, expected)
    with torch.inference_mode():
        assert pattern_of(ask(padding=PARTLY)) is None


@pytest.mark.parametrize("name", ["gemma4_text", "pegasus_x"])
def test_models_that_cannot_rely_on_is_causal_get_every_causal_mask(name):
    assert torch.equal(ask(config=SimpleNamespace(model_type=name))[0, 0], LOWER)


BEFORE = """
import sys, tridrop
assert "transformers" not in sys.modules
import transformers
assert "transformers.modeling_utils" not in sys.modules
"""
AFTER = "import transformers.modeling_utils, tridrop"
HAND = """
import sys, tridrop
sys.meta_path[:] = [f for f in sys.meta_path if "tridrop" not in type(f).__module__]
import transformers.modeling_utils
assert "tridrop" not in transformers.AttentionInterface().valid_keys()
from tridrop.integrations.transformers import register
register()
register()
"""
REGISTERED = """
import sys, importlib.util
from transformers import modeling_utils, masking_utils
assert "tridrop" in modeling_utils.AttentionInterface().valid_keys()
assert "tridrop" in masking_utils.AttentionMaskInterface().valid_keys()
finders = [f for f in sys.meta_path if "tridrop" in type(f).__module__]
assert "transformers.modeling_utils" not in [f.name for f in finders]
assert "tridrop" not in type(modeling_utils.__spec__.loader).__module__
assert "tridrop" not in type(modeling_utils.__loader__).__module__
"""
WITHOUT = """
import sys, warnings
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
sys.meta_path.insert(0, Blocked())
import tridrop
try:
    from tridrop.integrations.transformers import register
    register()
except ImportError as error:
    assert "install transformers>=5.0" in str(error), error
else:
    raise SystemExit("registered with nothing")
"""
TOO_OLD = """
import sys, types, warnings
import tridrop
class Old:
    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import ModuleSpec
        if name.split(".")[0] == "transformers":
            return ModuleSpec(name, self, is_package=name == "transformers")
    def create_module(self, spec): return None
    def exec_module(self, module): module.done = True
sys.meta_path.insert(1, Old())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import transformers.modeling_utils
assert transformers.modeling_utils.done
assert "did not register itself" in str(said[0].message), said
"""
PROGRAMS = {
    "tridrop first": BEFORE + REGISTERED,
    "transformers first": AFTER + REGISTERED,
    "by hand": HAND + REGISTERED,
    "without transformers": WITHOUT,
    "too old": TOO_OLD,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_registration(name):
    program = "import torchvision_ops\n" + PROGRAMS[name]
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
