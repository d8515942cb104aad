"""tridrop.nn.MultiheadAttention against torch's, and the attention of TransformerBlock."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tridrop

N, L, S, E, H = 3, 4, 5, 12, 2
WIDTHS = {"kdim": 6, "vdim": 10}
DOUBLE = torch.float64
BOTH = [True, False]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 100 * seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def pair(**arguments) -> tuple[nn.Module, nn.Module]:
    """(torch's module, tridrop's), with the same parameters."""
    theirs = nn.MultiheadAttention(E, H, dtype=DOUBLE, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases begin as zeros, which would hide them
            parameter.copy_(0.3 * draw(*parameter.shape))
    ours = tridrop.nn.MultiheadAttention(E, H, dtype=DOUBLE, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(layer: nn.Module, batched: bool = True) -> list[Tensor]:
    shapes = [(N, L, E), (N, S, layer.kdim), (N, S, layer.vdim)]
    tensors = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    if not batched:
        return [t[0] for t in tensors]
    return [t if layer.batch_first else t.transpose(0, 1) for t in tensors]


def outcome(layer: nn.Module, tensors: list[Tensor], **arguments) -> dict[str, Tensor | None]:
    """Results, and gradients of the inputs and the parameters. An input may be there twice."""
    leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
    out, weights = layer(*(leaves[id(t)] for t in tensors), **arguments)
    loss = (out * draw(*out.shape, seed=7)).sum()
    if weights is not None:
        loss = loss + (weights * draw(*weights.shape, seed=8)).sum()
    names = [f"gradient of input {i}" for i in range(len(leaves))]
    names += [name for name, _ in layer.named_parameters()]
    targets = [*leaves.values(), *layer.parameters()]
    gradients = torch.autograd.grad(loss, targets, allow_unused=True)
    return {"out": out, "weights": weights, **dict(zip(names, gradients, strict=True))}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        own = found[name]
        if value is None or own is None:  # a gradient that is missing is one of zeros
            assert not any(t is not None and t.any() for t in (own, value)), name
        else:
            torch.testing.assert_close(own, value, msg=lambda m, name=name: f"{name}: {m}")


# Key 0 is never left out: torch's weights are NaN where a query has no key.
PADDING = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
EACH = draw(N * H, L, S, seed=3)
PADDINGS = {"none": None, "bool": PADDING, "float": draw(N, S, seed=4)}
MASKS = {
    "none": None,
    "bool": torch.ones(L, S).triu(2).bool(),
    "float": EACH[0],
    "bool a head": (EACH > 0.5) & (torch.arange(S) > 0),
    "float a head": EACH,
    "causal": torch.ones(L, S).triu(1).bool(),
}
CONFIGURATIONS = [
    {"batch_first": first, "bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, **widths}
    for first, bias, kv, zero, widths in itertools.product(*[BOTH] * 4, [{}, WIDTHS])
]


def label(arguments: dict) -> str:
    return "-".join(name for name, value in arguments.items() if value) or "plain"


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:key_padding_mask and")
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_equals_torch_with_every_mask(configuration):
    """In eval and, at p = 0, in training; with weights and without; values and gradients."""
    theirs, ours = pair(**configuration)
    tensors = inputs(ours)
    appended = configuration["add_bias_kv"] or configuration["add_zero_attn"]
    for (mask_name, mask), padding, need_weights, training in itertools.product(
        MASKS.items(), PADDINGS.values(), BOTH, BOTH
    ):
        given = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
        hint = mask_name == "causal"
        ours.dropout = theirs.dropout = 0.0 if training else 0.5
        # Given the hint, torch's short path hides the appended keys from every query.
        taken = hint and not appended
        expected = outcome(theirs.train(training), tensors, is_causal=taken, **given)
        assert_same(outcome(ours.train(training), tensors, is_causal=hint, **given), expected)


@pytest.mark.parametrize("average", BOTH)
@pytest.mark.parametrize("configuration", [{}, {"add_bias_kv": True, **WIDTHS}], ids=label)
def test_equals_torch_without_a_batch(configuration, average):
    for first in (True, False):
        theirs, ours = pair(batch_first=first, **configuration)
        tensors = inputs(ours, batched=False)
        masks = (None, MASKS["bool"], MASKS["bool a head"][:H])
        for padding, mask, need_weights in itertools.product((None, PADDING[0]), masks, BOTH):
            given = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": need_weights}
            given["average_attn_weights"] = average
            assert_same(outcome(ours, tensors, **given), outcome(theirs, tensors, **given))


@pytest.mark.parametrize("repeated", ["all", "key and value", "query and key", "none"])
@pytest.mark.parametrize("batch_first", BOTH)
def test_equals_torch_however_the_inputs_are_shared(repeated, batch_first):
    """Tensors that are one are projected together."""
    x, y, z = (draw(N, L, E, seed=i) for i in range(3))
    tensors = {
        "all": [x, x, x],
        "key and value": [x, y, y],
        "query and key": [x, x, y],
        "none": [x, y, z],
    }[repeated]
    theirs, ours = pair(batch_first=batch_first)
    for average in (True, False):
        expected = outcome(theirs, tensors, average_attn_weights=average)
        assert_same(outcome(ours, tensors, average_attn_weights=average), expected)
    assert ours(*tensors)[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", BOTH)
def test_in_eval_as_accurate_as_torch(dtype, need_weights):
    """Torch takes its inference path here, which has no dropout either."""
    exact, _ = pair(batch_first=True)
    theirs, ours = (layer.eval() for layer in pair(batch_first=True, dropout=0.5))
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    exact.load_state_dict(ours.state_dict())
    x = draw(N, 33, E).to(dtype)
    with torch.inference_mode():
        expected = exact(x.double(), x.double(), x.double())[0]
        error = (theirs(x, x, x, need_weights=need_weights)[0] - expected).abs().max()
        own = (ours(x, x, x, need_weights=need_weights)[0] - expected).abs().max()
    assert own <= 2 * error + torch.finfo(dtype).eps * expected.abs().max()


# ---------------------------------------------------------------------------- torch's own module


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)
def test_parameters_and_state_dict_are_those_of_torch(configuration):
    made = []
    for kind in (nn.MultiheadAttention, tridrop.nn.MultiheadAttention):
        torch.manual_seed(5)
        made.append(kind(E, H, 0.1, **configuration))
    theirs, ours = made
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    assert repr(theirs) == repr(ours)
    for target, source in (made, made[::-1]):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict())
        assert all(map(torch.equal, theirs.parameters(), ours.parameters()))


@pytest.mark.parametrize("training", BOTH)
def test_inside_torch_encoder_layer(training):
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=DOUBLE)
    twin = copy.deepcopy(layer)
    twin.self_attn = tridrop.nn.MultiheadAttention(E, H, batch_first=True, dtype=DOUBLE)
    twin.load_state_dict(layer.state_dict())
    x, causal = draw(N, S, E), nn.Transformer.generate_square_subsequent_mask(S, dtype=DOUBLE)
    for given in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": causal, "is_causal": True}):
        found, expected = (m.train(training)(x, **given) for m in (twin, layer))
        torch.testing.assert_close(found, expected)


def test_copies_and_pickles():
    _, ours = pair(dropout=0.4)
    tridrop.nn.number_sites(ours, first=6)
    tensors = inputs(ours)
    with tridrop.rng(3):
        expected = ours(*tensors)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(twin, tridrop.nn.MultiheadAttention)
        assert twin.site == 6
        with tridrop.rng(3):
            assert torch.equal(twin(*tensors)[0], expected)


# -------------------------------------------------------------------------------- dropped weights


def eager(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch-first layer computes with this mask, in plain torch."""
    parts = zip((q, k, v), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (H, -1)).transpose(1, 2) for x, w, b in parts
    )  # [N, H, L, D]
    scores = q @ k.transpose(-1, -2) / math.sqrt(E // H)
    weights = torch.where(keep, scores.softmax(-1) / (1 - layer.dropout), 0)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


@pytest.mark.parametrize("need_weights", BOTH)
def test_dropout_equals_eager_with_the_exported_mask(need_weights):
    _, ours = pair(batch_first=True, dropout=0.25)
    tridrop.nn.number_sites(ours, first=3)
    keep = tridrop.attention_keep_mask(tridrop.fold_in(11, 3), (N, H, L, S), 0.25)
    assert 0 < keep.sum() < keep.numel()

    class Twin(tridrop.nn.MultiheadAttention):
        def forward(self, *tensors):
            out, weights = eager(self, *tensors, keep)
            return out, weights if need_weights else None

    twin = copy.deepcopy(ours)
    twin.__class__ = Twin
    with tridrop.rng(11):
        found = outcome(ours, inputs(ours), need_weights=need_weights, average_attn_weights=False)
    assert_same(found, outcome(twin, inputs(ours)))


@pytest.mark.parametrize("need_weights", BOTH)
def test_gradients_of_float_masks(need_weights):
    """A learnt bias of the scores, such as one of relative positions."""
    theirs, ours = pair()
    gradients = []
    for layer in (theirs, ours):
        masks = [PADDINGS["float"].clone().requires_grad_(), EACH.clone().requires_grad_()]
        out, _ = layer(*inputs(ours), masks[0], need_weights, masks[1])
        gradients.append(torch.autograd.grad((out * draw(*out.shape)).sum(), masks))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_weights_or_not_the_output_is_the_same(dtype):
    """One draw of torch's generator a forward, for the same mask on either way."""
    _, ours = pair(dropout=0.5, add_zero_attn=True)
    ours = ours.to(dtype)
    tensors = [t.to(dtype) for t in inputs(ours)]
    exact = copy.deepcopy(ours).double()
    outs, states = [], []
    for layer, need_weights in ((ours, True), (ours, False), (exact, False)):
        torch.manual_seed(2)
        given = [t.to(layer.out_proj.weight.dtype) for t in tensors]
        outs.append(layer(*given, PADDING, need_weights=need_weights)[0])
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    bound = 4 * torch.finfo(dtype).eps * float(exact.out_proj.weight.detach().norm() + 1)
    for out in outs[:2]:
        torch.testing.assert_close(out.double(), outs[2], rtol=0, atol=bound)


def test_eval_and_p_0_draw_nothing():
    _, ours = pair(dropout=0.5)
    state = torch.get_rng_state()
    ours.eval()(*inputs(ours))
    ours.dropout = 0.0
    ours.train()(*inputs(ours))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("need_weights", BOTH)
def test_a_query_without_a_key_gives_the_bias(need_weights):
    _, ours = pair(batch_first=True, dropout=0.3)
    padding = torch.tensor([[True] * S, [False] * S, [True] * S])
    for mask in (padding, torch.zeros(N, S, dtype=DOUBLE).masked_fill(padding, -math.inf)):
        given = {"key_padding_mask": mask, "need_weights": need_weights}
        found = outcome(ours, inputs(ours), **given)
        assert all(t is None or t.isfinite().all() for t in found.values())
        assert torch.equal(found["out"][::2], ours.out_proj.bias.expand(2, L, E))
        if need_weights:
            assert not found["weights"][0].any()


def test_without_weights_nothing_of_the_size_of_the_scores_is_saved():
    length, saved = 160, []
    layer = tridrop.nn.MultiheadAttention(8, 1, 0.1, batch_first=True)
    x = torch.randn(2, length, 8)
    padding = torch.arange(length) >= torch.tensor([[100], [140]])
    causal = torch.ones(length, length).triu(1).bool()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, x, x, padding, need_weights=False, attn_mask=causal, is_causal=True)
    assert 0 < max(t.numel() for t in saved) < length * length


# ------------------------------------------------------------------------------- what torch does


@pytest.mark.parametrize("need_weights", BOTH)
def test_compiled_equals_eager(need_weights):
    torch._dynamo.reset()
    _, ours = pair(dropout=0.5, batch_first=True)
    x = draw(N, S, E)

    def call(layer):
        torch.manual_seed(4)
        x_ = x.clone().requires_grad_()
        out, weights = layer(x_, x_, x_, PADDING, need_weights, torch.ones(S, S).triu(2).bool())
        loss = out.square().sum() + (0 if weights is None else weights.square().sum())
        return out, torch.autograd.grad(loss, (x_, ours.in_proj_weight))

    torch.testing.assert_close(call(torch.compile(ours, fullgraph=True)), call(ours))


@pytest.mark.parametrize("need_weights", BOTH)
@pytest.mark.parametrize("configuration", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_autocast(configuration, need_weights):
    theirs, ours = (layer.float() for layer in pair(**configuration))
    tensors = [t.float() for t in inputs(ours)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(*tensors, need_weights=need_weights)[0] for m in (ours, theirs))
    assert found.dtype == expected.dtype == torch.bfloat16
    exact = theirs(*tensors)[0]
    floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + floor


@pytest.mark.parametrize("use_reentrant", BOTH)
@pytest.mark.parametrize("need_weights", BOTH)
def test_checkpointed_gradients_are_the_same(need_weights, use_reentrant):
    _, ours = pair(dropout=0.5)
    tridrop.nn.number_sites(ours)

    def gradients(recomputed: bool, seed: int | None) -> list[Tensor]:
        torch.manual_seed(6)
        x = draw(L, N, E).requires_grad_()

        def run(x):
            return ours(x, x, x, need_weights=need_weights)[0]

        def step():
            out = checkpoint(run, x, use_reentrant=use_reentrant) if recomputed else run(x)
            ours.zero_grad()
            out.square().sum().backward()
            return [x.grad, ours.in_proj_weight.grad]

        if seed is None:
            return step()
        with tridrop.rng(seed):
            return step()

    for seed in (None, 9):
        torch.testing.assert_close(gradients(True, seed), gradients(False, seed), rtol=0, atol=0)


ERRORS = [
    ({"is_causal": True}, RuntimeError, "is_causal"),
    ({"attn_mask": torch.ones(L, S).long()}, AssertionError, "attn_mask has dtype torch.int64"),
    ({"key_padding_mask": torch.ones(N, S).long()}, AssertionError, "use key_padding_mask.bool"),
    ({"attn_mask": torch.ones(S, L)}, RuntimeError, r"it must be \(4, 5\)"),
    ({"attn_mask": torch.ones(1, L, S)}, RuntimeError, r"it must be \(6, 4, 5\)"),
    ({"attn_mask": torch.ones(L)}, AssertionError, "attn_mask has 1 dimensions; give 2 or 3"),
    ({"key_padding_mask": torch.ones(S, N)}, AssertionError, r"\(N, S\) = \(3, 5\)"),
    ({"query": torch.ones(N, L, E + 1)}, AssertionError, "must be embed_dim = 12"),
    ({"key": torch.ones(N, S, E + 1)}, AssertionError, "its last dimension must be 12"),
    ({"value": torch.ones(N, S + 1, E)}, AssertionError, "differ in length"),
    ({"query": torch.ones(1, L, E)}, RuntimeError, "query has a batch of 1 and key one of 3"),
    ({"key": torch.ones(S, E)}, AssertionError, "key has 2 dimensions; give 3"),
    ({"query": torch.ones(1, N, L, E)}, AssertionError, "query has 4 dimensions"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS)
def test_bad_input_raises_what_torch_raises(changed, kind, message):
    layer = tridrop.nn.MultiheadAttention(E, H, batch_first=True)
    given = {"query": torch.ones(N, L, E), "key": torch.ones(N, S, E), "value": torch.ones(N, S, E)}
    with pytest.raises(kind, match=message):
        layer(**given | changed)
    with pytest.raises(kind):
        nn.MultiheadAttention(E, H, batch_first=True)(**given | changed)


def test_other_errors_and_the_warning():
    with pytest.raises(ValueError, match=r"dropout = 1\.5"):
        tridrop.nn.MultiheadAttention(E, H, dropout=1.5)
    _, ours = pair()
    with pytest.warns(UserWarning, match="deprecated in torch"):
        ours(*inputs(ours), PADDING, attn_mask=EACH)
