"""The masks and blocks of the cpu backend: the bits of the contract, the reference's numbers."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hosts import imported_with
from hypothesis import given, settings
from hypothesis import strategies as st

import tridrop
from tridrop.backends.cpu import masks, own_threads, selection, serving, threads
from tridrop.backends.cpu import memory as cpu_memory
from tridrop.backends.reference import elementwise
from tridrop.commands import info
from tridrop.commands.check.measure import error, tolerance
from tridrop.contract import mask
from tridrop.contract.mask import Shard

needs_numba = pytest.mark.skipif(not serving._has_numba, reason="numba is not installed")
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "mask_vectors.json").read_text())
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
THRESHOLD = st.integers(0, 1 << 32) | st.sampled_from([0, 1, (1 << 32) - 1, 1 << 32])
exact = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    imported_with(monkeypatch)


def pair(seed, stream=0):
    return torch.tensor([seed, stream])


# --------------------------------------------------------------------------------------- the bits


@needs_numba
@pytest.mark.parametrize("v", VECTORS["vectors"], ids=lambda v: v["name"])
def test_golden_vectors(v):
    domain = ["elements", "drop_path"][v["domain"]]
    noise = v["noise_shape"] or [None] * len(v["shape"])
    shared = [d for d, n in enumerate(noise) if n == 1]
    if domain == "drop_path":
        shared = list(range(1, len(v["shape"])))
    shard = Shard(tuple(v["global_shape"]), tuple(v["origin"])) if v["global_shape"] else None
    keep = masks.keep_mask(
        pair(v["seed"], v["stream"]), v["shape"], v["threshold"],
        shared=shared, shard=shard, domain=domain,
    )  # fmt: skip
    assert "".join("01"[k] for k in keep.flatten().tolist()) == v["keep"]


@st.composite
def places(draw):
    """A shape, the dimensions that share, and where it lies in a larger tensor."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 11, 17, 40]), min_size=0, max_size=4))
    shared = [d for d in range(len(shape)) if draw(st.booleans())]
    if not shape or draw(st.booleans()):
        return shape, shared, None
    sizes = [max(1, n) for n in shape]
    room = ((1 << 63) - 1) // math.prod(sizes)
    whole, origin = list(sizes), [0] * len(shape)
    for dim in draw(st.permutations(range(len(shape)))):
        factor = draw(st.integers(1, min(room, 5)) | st.integers(1, room))
        room //= factor
        whole[dim] *= factor
        origin[dim] = draw(st.integers(0, whole[dim] - shape[dim]))
    return shape, shared, Shard(tuple(whole), tuple(origin))


@needs_numba
@exact
@given(places(), INT64, INT64, THRESHOLD)
def test_masks_are_those_of_the_contract(place, seed, stream, t):
    shape, shared, shard = place
    for domain in ("elements", "drop_path"):
        if domain == "drop_path":
            shared = sorted({*shared, len(shape) - 1}) if shape else shared
            if not shape:
                continue
        given_ = {"shared": shared, "shard": shard, "domain": domain}
        quick = masks.keep_mask(pair(seed, stream), shape, t, **given_)
        plain = mask.keep_mask(pair(seed, stream), shape, t, **given_)
        assert quick.shape == plain.shape
        assert quick.is_contiguous()
        assert torch.equal(quick, plain)


@needs_numba
@exact
@given(
    st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 80)), INT64, THRESHOLD,
    st.tuples(*(st.sampled_from([0, 1, 7]) | st.integers(0, n - 100) for n in
                (1 << 32, 1 << 28, 1 << 32, 1 << 35))),
)  # fmt: skip
def test_masks_of_attention_are_those_of_the_contract(shape, seed, t, origin):
    quick = masks.attention_keep_mask(pair(seed), shape, t, origin=origin)
    plain = mask.attention_keep_mask(pair(seed), shape, t, origin=origin)
    assert torch.equal(quick, plain)


@needs_numba
@pytest.mark.parametrize("columns", [1, 7, 1024, 1029, 2500])
@pytest.mark.parametrize("at", [0, 5, (1 << 35) + 3, (1 << 40) + 1])
def test_long_rows_and_far_columns(columns, at):
    shard = Shard((1 << 20, 1 << 42), ((1 << 19) + 1, at))
    t = mask.threshold(0.3)
    quick = masks.keep_mask(pair(3, 4), (5, columns), t, shard=shard)
    assert torch.equal(quick, mask.keep_mask(pair(3, 4), (5, columns), t, shard=shard))


needs_torchs_threads = pytest.mark.skipif(
    not threads._parallel, reason="torch's library has no GOMP_parallel here"
)


@pytest.fixture(params=[pytest.param("torch's threads", marks=needs_torchs_threads), "own threads"])
def parallel(request, monkeypatch):
    """The loops run in threads of torch, or of tridrop."""
    if request.param == "own threads":
        monkeypatch.setattr(threads, "_parallel", 0)


def test_torchs_threads_are_found():
    """They are wherever torch's library is linked with an OpenMP on Linux."""
    openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    if sys.platform.startswith("linux") and openmp:
        assert threads._parallel
        assert threads.report() == "the threads of torch"


@needs_numba
def test_threads_share_rows_without_a_trace(parallel):
    t, before = mask.threshold(0.2), torch.get_num_threads()
    shape = (1031, 1000)
    plain = mask.keep_mask(pair(9), shape, t)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(masks.keep_mask(pair(9), shape, t), plain)
            scores = masks.attention_keep_mask(pair(9), (1, 2, 515, 1000), t)
            expected = mask.attention_keep_mask(pair(9), (1, 2, 515, 1000), t)
            assert torch.equal(scores, expected)
            assert own_threads._workers < 5
    finally:
        torch.set_num_threads(before)


@needs_numba
@needs_torchs_threads
def test_the_threads_of_torch_take_the_parts(monkeypatch):
    """Each part is done once, by as many threads as torch has."""
    before, seen = own_threads._workers, set()
    torch.set_num_threads(4)
    monkeypatch.setattr(own_threads, "share", lambda *_: seen.add("own"))
    rows = torch.ones(4096, 4096)
    there = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    out = tridrop.dropout(rows, 0.5, seed=1)
    now = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    assert torch.equal(out != 0, tridrop.keep_mask(1, rows.shape, 0.5))
    assert not seen
    assert own_threads._workers == before
    assert len(now - there) <= 3


@needs_numba
def test_calls_from_several_threads_at_once(parallel):
    x, r = torch.randn(700, 1000), torch.randn(700, 1000)
    alone = [tridrop.dropout_add(x, r, 0.1, seed=i) for i in range(6)]
    found: dict[int, torch.Tensor] = {}
    before = torch.get_num_threads()

    def call(i):
        torch.set_num_threads(2)
        found[i] = tridrop.dropout_add(x, r, 0.1, seed=i)

    try:
        callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
        [t.start() for t in callers]
        [t.join() for t in callers]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[i], alone[i]) for i in range(6))


FORKED = """
import os, torch, tridrop
torch.set_num_threads(2)
x = torch.randn(800, 1000)
def drawn():  # as bytes: an operator of torch that its threads share would not end in the child
    return tridrop.dropout(x, 0.1, seed=1).numpy().tobytes()
before = drawn()
child = os.fork()
if child == 0:
    os._exit(0 if drawn() == before else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_draws_the_same():
    run = python(FORKED)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------------------------- the ops


def both(call):
    """The results of ``call`` by the loops and by the reference."""
    results = []
    for name in ("cpu", "reference"):
        with tridrop.backend(name):
            results.append(call())
    return results


def tensors(dtype, rows=300, columns=1001):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3)]


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_dropout_add_is_bitwise_the_same(dtype, layout, monkeypatch):
    x, r, grad = tensors(dtype, 37, 1001)
    if layout == "transposed":
        x, r, grad = (t.t() for t in (x, r, grad))
    elif layout == "expanded":
        x, grad = x[:1].expand(37, 1001), grad[:1, :1].expand(37, 1001)

    def call():
        a, b = x.detach().requires_grad_(), r.detach().requires_grad_()
        out = tridrop.dropout_add(a, b, 0.3, seed=5)
        return out.detach(), *torch.autograd.grad(out, (a, b), grad)

    for quick, plain in zip(*both(call), strict=True):
        assert quick.dtype == plain.dtype
        assert torch.equal(quick, plain)


OPS = {
    "gelu": lambda x, r, w, b: tridrop.activation_dropout(x, 0.3, activation="gelu", seed=1),
    "gelu_tanh": lambda x, r, w, b: tridrop.activation_dropout(
        x, 0.3, activation="gelu_tanh", bias=b, seed=1
    ),
    "relu": lambda x, r, w, b: tridrop.activation_dropout(x, 0.3, activation="relu", seed=1),
    "silu": lambda x, r, w, b: tridrop.activation_dropout(x, 0.3, activation="silu", seed=1),
    "swiglu": lambda x, r, w, b: tridrop.activation_dropout(
        x[:, :1000], 0.3, activation="swiglu", seed=1
    ),
    "everything": lambda x, r, w, b: tridrop.dropout_add(
        x, r, 0.3, bias=b, activation="gelu", layer_scale=w, seed=1
    ),
    "drop_path": lambda x, r, w, b: tridrop.dropout_add(x, r, 0.3, drop_path=0.5, seed=1),
    "shared": lambda x, r, w, b: tridrop.dropout_add(x, r, 0.3, noise_shape=(None, 1), seed=1),
    "layer_norm": lambda x, r, w, b: tridrop.dropout_add_layer_norm(x, r, w, b, 0.3, seed=1),
    "layer_norm plain": lambda x, r, w, b: tridrop.dropout_add_layer_norm(
        x, r, None, None, 0.3, bias=b, layer_scale=w, seed=1
    ),
    "layer_norm without residual": lambda x, r, w, b: tridrop.dropout_add_layer_norm(
        x, None, w, None, 0.3, seed=1
    ),
    "rms_norm": lambda x, r, w, b: tridrop.dropout_add_rms_norm(x, r, w, p=0.3, seed=1),
    "after": lambda x, r, w, b: tridrop.layer_norm_dropout(x, w, b, 0.3, residual=r, seed=1),
    "softmax": lambda x, r, w, b: tridrop.softmax_dropout(x + r, 0.3, seed=1),
}


def compare(op, given_, grad, monkeypatch, largest=0.0):
    """Values and gradients by numba: at most twice as far from fp64 as those by torch.

    ``largest`` is what a difference was taken of, whose rounding no fp32 can do without.
    """
    floor = largest * torch.finfo(torch.float32).eps

    def call(*given_):
        leaves = [t.detach().clone().requires_grad_() for t in given_]
        out = OPS[op](*leaves)
        g = grad[:, : out.shape[1]].to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, g, allow_unused=True)

    exactly = call(*(t.double() for t in given_))
    quick, plain = both(lambda: call(*given_))
    for q, p, e in zip(quick, plain, exactly, strict=True):
        if q is None:
            assert p is None
            continue
        assert q.dtype == p.dtype
        # The rule of the harness, with the composition in place of eager torch.
        assert error(q, e) <= tolerance(p, e) + floor * max(1, float(e.abs().max()))


@needs_numba
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ops_are_the_same_within_rounding(op, dtype, monkeypatch):
    x, r, grad = tensors(dtype)  # two parts
    w, b = grad[0].abs() + 0.5, grad[1].clone()
    compare(op, (x, r, w, b), grad, monkeypatch)


@needs_numba
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dropped_elements_are_exactly_zero(value):
    x = torch.full((40, 64), value, requires_grad=True)
    keep = tridrop.keep_mask(2, x.shape, 0.4)
    for activation in ("none", "gelu", "silu"):
        out = tridrop.dropout_add(x, torch.zeros(40, 64), 0.4, activation=activation, seed=2)
        assert (out[~keep] == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert (grad[~keep] == 0).all()


def unscaled(name, tensors, *arguments):
    """Call a kernel that keeps everything, as far as a mask can, with a scale of 1.

    It reads the seed and the tensors, of which all but None have one shape.
    """
    shape = tensors[0].shape
    reads = cpu_memory.Reads.of(
        cpu_memory.SEED, *[cpu_memory.Operand("t", shape.numel())] * len(tensors)
    )
    drop = selection.selection(tuple(shape), 1, 1.0)
    drop.call(name, (pair(1), *tensors), reads, None, *arguments)


def convert(value, dtype):
    out = torch.empty_like(value, dtype=dtype)
    unscaled("forward", (value, None, None, None), cpu_memory.matrix(out), (0, False))
    return out


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(dtype):
    stored = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(64, -1)
    equal = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(convert(stored, torch.float32), stored.float(), **equal)
    # Around every number of the dtype and every middle between two: its neighbours in fp32.
    exact = stored.double().flatten()
    exact = exact[exact.isfinite()].sort().values
    middles = (exact[1:] + exact[:-1]) / 2
    where = torch.cat([exact, middles]).float().view(torch.int32)
    ends = torch.tensor([math.inf, math.nan, 65504, 65519.996, 65520, 3e38, 1e-45]).view(
        torch.int32
    )
    bits = torch.cat([where - 1, where, where + 1, ends, ends | -(1 << 31)])
    value = bits.view(torch.float32)[None]
    torch.testing.assert_close(convert(value, dtype), value.to(dtype), **equal)


@needs_numba
def test_numbers_of_kinds_are_the_kernels():
    from tridrop.backends.cpu.loops import storage as loop_storage

    for name, dtype in (("FP32", "float32"), ("BF16", "bfloat16"), ("FP16", "float16")):
        assert getattr(loop_storage, name) == cpu_memory.CODES[getattr(torch, dtype)]


# -------------------------------------------------------------------------------------- functions

LARGEST = torch.finfo(torch.float32).max


def on_a_grid(name, x, short=False):
    """f(x) and f'(x) by the kernels, for fp32 x of any shape."""
    address = serving.kernels().functions[name][short].address
    u = x.reshape(1, -1)
    value, slope, ones = torch.empty_like(u), torch.empty_like(u), torch.ones_like(u)
    v, s = map(cpu_memory.matrix, (value, slope))
    unscaled("forward", (u, None, None, None), v, (address, False))
    unscaled(
        "backward", (ones, u, None, None), s, (address, False), (1, 1, (selection.ABSENT,) * 2)
    )
    return value.view_as(x), slope.view_as(x)


def in_fp64(name, x):
    """The same in fp64, with tails that do not cancel."""
    x = x.double()
    if name == "gelu":
        cdf = torch.erfc(-x * math.sqrt(0.5)) / 2
        return x * cdf, cdf + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    if name != "gelu_tanh":
        function = elementwise.FUNCTIONS[name]
        return function.value(x), function.slope(x)
    c = 2 * math.sqrt(2 / math.pi)
    y, dy = c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x**2)
    s = torch.sigmoid(y)
    return x * s, s + x * s * torch.sigmoid(-y) * dy


CURVED = [name for name, f in elementwise.FUNCTIONS.items() if f.curved]


@needs_numba
def test_every_curved_function_has_bounds():
    from tridrop.backends.cpu.loops import activations

    assert sorted(activations.BOUNDS) == sorted(CURVED)


@needs_numba
@pytest.mark.parametrize("name", CURVED)
def test_functions_are_accurate(name):
    from tridrop.backends.cpu.loops import activations

    x = torch.cat([torch.linspace(-12, 12, 1_500_001), torch.linspace(-1.2, 1.2, 500_001)])
    value, slope = on_a_grid(name, x)
    wanted, wanted_slope = in_fp64(name, x)
    eps = torch.finfo(torch.float32).eps
    tiny = torch.finfo(torch.float32).tiny
    ulp = torch.exp2(wanted.abs().clamp(min=tiny).log2().floor()) * eps
    units = (value.double() - wanted).abs() / ulp
    body, tail = activations.BOUNDS[name]
    assert units[x > -1].max() < body
    assert units.max() < tail
    # The slope has a zero; its largest value is about 1.1.
    assert (slope.double() - wanted_slope).abs().max() < 2 * eps
    leaf = x.clone().requires_grad_()
    eager = elementwise.FUNCTIONS[name].torchs(leaf)
    (eager_slope,) = torch.autograd.grad(eager.sum(), leaf)
    assert (value - wanted).abs().max() <= 2 * (eager.detach() - wanted).abs().max()
    assert (slope - wanted_slope).abs().max() <= 2 * (eager_slope - wanted_slope).abs().max()


@needs_numba
@pytest.mark.parametrize("name", CURVED)
def test_short_functions_are_right_to_2e_5(name):
    x = torch.cat([torch.linspace(-12, 12, 1_500_001), torch.linspace(-1.2, 1.2, 500_001)])
    value, slope = on_a_grid(name, x, short=True)
    wanted, wanted_slope = in_fp64(name, x)
    # The tail of gelu_tanh goes on below what fp32 holds, and has the error of y, up to 180.
    inside = x > (-4 if name == "gelu_tanh" else -12)
    assert ((value - wanted).abs() <= 2e-5 * wanted.abs())[inside].all()
    assert (slope - wanted_slope).abs().max() <= 2e-5


@needs_numba
@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_16_bits_are_the_nearest_or_the_next(name, dtype):
    x = torch.linspace(-8, 8, 200_001).to(dtype).requires_grad_()
    out = tridrop.activation_dropout(x, 0.0, activation=name, bias=torch.zeros(1).expand(x.shape))
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    for found, wanted in zip((out, slope), in_fp64(name, x.detach()), strict=True):
        ulp = torch.exp2(wanted.abs().clamp(min=2.0**-14).log2().floor()) * torch.finfo(dtype).eps
        assert ((found - wanted).abs() <= 0.55 * ulp + 3e-6).all()


@needs_numba
@pytest.mark.parametrize("name", ["relu", *CURVED])
@pytest.mark.parametrize("short", [False, True])
def test_functions_at_special_values(name, short):
    short = short and name != "relu"
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e5, 1e20, LARGEST, math.inf])
    value, slope = on_a_grid(name, x, short)
    assert torch.equal(value[5:], x[5:])
    small = x[:5].double()
    small = small * elementwise.FUNCTIONS[name].slope(small)  # f(0) is 0
    torch.testing.assert_close(value[:5].double(), small, rtol=1e-5 if short else 1e-6, atol=2e-45)
    assert (slope[5:8] == 1).all()
    value, slope = on_a_grid(name, -x[5:8], short)
    assert (value == 0).all()
    assert (slope == 0).all()
    value, slope = on_a_grid(name, torch.tensor([math.nan]), short)
    assert value.isnan().all()
    assert name == "relu" or slope.isnan().all()
    value, _ = on_a_grid(name, torch.tensor([-math.inf]), short)
    assert value.isnan().all() if name != "relu" else value == 0  # -inf * 0, as in torch


# ------------------------------------------------------------------------------------- the kernels

MIXTURES = {  # x, residual, vectors
    "x bf16": (torch.bfloat16, torch.float32, torch.float32),
    "residual bf16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "x fp16": (torch.float16, torch.float32, torch.float16),
    "fp16": (torch.float16, torch.float16, torch.float32),
}


@needs_numba
@pytest.mark.parametrize("op", ["everything", "layer_norm", "rms_norm", "after"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("columns", [1, 7, 1025])
def test_mixed_dtypes_and_odd_widths(op, mixture, columns, monkeypatch):
    dtypes = MIXTURES[mixture]
    x, r, grad = tensors(torch.float32, 33, columns)
    w, b = grad[0].abs() + 0.5, grad[1].clone()
    given_ = [t.to(d) for t, d in zip((x, r, w, b), (*dtypes, dtypes[2]), strict=True)]
    compare(op, given_, grad, monkeypatch)


@needs_numba
@pytest.mark.parametrize("op", ["everything", "swiglu"])
@pytest.mark.parametrize("origin", [1, 4, 1003])
def test_shards_that_begin_inside_a_group(op, origin):
    x, r, grad = tensors(torch.float32, 9, 2100)
    w, b = grad[0].abs() + 0.5, grad[1].clone()
    cut = slice(origin, origin + 1051)

    def call(part, shard):
        leaves = [t[..., part].clone().requires_grad_() for t in (x, r, w, b)]
        if op == "swiglu":
            u = torch.cat([leaves[0], leaves[1]], -1)
            out = tridrop.activation_dropout(u, 0.3, activation="swiglu", seed=1, shard=shard)
        else:
            u, s, gain, shift = leaves
            out = tridrop.dropout_add(
                u, s, 0.3, bias=shift, activation="gelu", layer_scale=gain, seed=1, shard=shard
            )
        found = torch.autograd.grad(out, leaves, grad[:, part], allow_unused=True)
        return [t for t in (out.detach(), *found) if t is not None]

    whole = call(slice(0, 2100), None)
    part = call(cut, Shard((9, 2100), (0, origin)))
    for a, b_ in zip(whole, part, strict=True):
        torch.testing.assert_close(b_, a[..., cut], rtol=1e-6, atol=1e-6)
        assert torch.equal(b_ == 0, a[..., cut] == 0)


@needs_numba
@pytest.mark.parametrize("op", ["everything", "swiglu", "layer_norm", "layer_norm plain", "after"])
def test_results_do_not_depend_on_the_number_of_threads(op):
    x, r, grad = tensors(torch.float32, 1031, 1000)
    w, b = grad[0].abs() + 0.5, grad[1].clone()
    before, results = torch.get_num_threads(), []

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().clone().requires_grad_() for t in (x, r, w, b)]
            out = OPS[op](*leaves)
            g = grad[:, : out.shape[1]]
            results.append([out, *torch.autograd.grad(out, leaves, g, allow_unused=True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b_ in zip(results[0], other, strict=True):
            assert (a is None and b_ is None) or torch.equal(a, b_)


@needs_numba
def test_norms_of_rows_with_a_large_mean(monkeypatch):
    x = torch.randn(40, 1000) + 1000
    r, w, b = torch.zeros(40, 1000), torch.ones(1000), torch.zeros(1000)
    compare("after", (x, r, w, b), torch.randn(40, 1000), monkeypatch, largest=1000.0)
    out = tridrop.layer_norm_dropout(torch.full((4, 64), 3.25), w[:64], b[:64], 0.3, seed=1)
    assert (out == 0).all()


@needs_numba
def test_large_results_are_whole():
    rows = cpu_memory._MAPPED_ANEW // 4096 + 1
    value, (address, kind) = cpu_memory.result(cpu_memory.blanks((rows, 1024))[torch.float32])
    assert (address, kind) == (value.data_ptr(), 0)
    assert value.is_contiguous()
    assert value.fill_(1).sum(dtype=torch.float64) == rows * 1024


@needs_numba
def test_second_derivatives_are_those_of_torch(monkeypatch):
    x, r, _ = tensors(torch.float64, 6, 16)

    def call():
        leaf = x.float().requires_grad_()
        out = tridrop.activation_dropout(leaf, 0.3, activation="gelu", seed=4)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * r.float()).sum(), leaf)
        return first.detach(), second

    for quick, plain in zip(*both(call), strict=True):
        torch.testing.assert_close(quick, plain)
    mine = tridrop.dropout
    grad = torch.func.grad(lambda t: mine(t, 0.5, seed=1).square().sum())
    hessian = torch.func.jacrev(grad)(r[0].float())
    assert torch.equal(hessian.diagonal() != 0, tridrop.keep_mask(1, (16,), 0.5))


@needs_numba
def test_modes_of_torch():
    x = torch.randn(600, 1000)
    expected = tridrop.activation_dropout(x, 0.1, activation="gelu", seed=3)
    with torch.inference_mode():
        assert torch.equal(tridrop.activation_dropout(x, 0.1, activation="gelu", seed=3), expected)
    meta = tridrop.dropout(torch.empty(3, 8, device="meta"), 0.1)
    assert meta.device.type == "meta"
    assert tridrop.dropout(torch.empty(0, 8), 0.1).shape == (0, 8)
    assert tridrop.dropout(torch.tensor(1.0), 0.5, seed=1).shape == ()


# ------------------------------------------------------------------------------------- the choice


def test_an_unknown_choice_raises(monkeypatch):
    imported_with(monkeypatch, TRIDROP_CPU="numbr")
    with pytest.raises(ValueError, match="TRIDROP_CPU is 'numbr'; known: numba, torch"):
        tridrop.dropout(torch.ones(8), 0.5)
    assert "known: numba, torch" in info.render(info.collect())


def test_numba_asked_for_but_absent_says_what_to_do(monkeypatch):
    monkeypatch.setattr(serving, "_has_numba", False)
    assert tridrop.backends.name_for(torch.device("cpu")) == "reference"
    assert "numba is not installed" in info.render(info.collect())
    imported_with(monkeypatch, TRIDROP_CPU="numba")
    with pytest.raises(ImportError, match="pip install numba"):
        tridrop.dropout(torch.ones(8), 0.5)


def test_a_broken_numba_is_reported(monkeypatch):
    monkeypatch.setattr(serving, "_has_numba", True)
    monkeypatch.setattr(serving, "_loaded", None)
    monkeypatch.setattr(serving, "_broken", None)
    monkeypatch.setitem(sys.modules, "tridrop.backends.cpu.loops.mask", None)
    monkeypatch.delattr(tridrop.backends.cpu.loops, "mask", raising=False)
    with pytest.warns(UserWarning, match="numba cannot be imported"):
        tridrop.dropout(torch.ones(8), 0.5)
    assert "numba cannot be imported" in serving.report()
    monkeypatch.setattr(serving, "_broken", None)
    imported_with(monkeypatch, TRIDROP_CPU="numba")
    with pytest.raises(ImportError):
        tridrop.dropout(torch.ones(8), 0.5)


def test_torch_by_choice(monkeypatch):
    imported_with(monkeypatch, TRIDROP_CPU="torch")
    assert tridrop.backends.name_for(torch.device("cpu")) == "reference"
    assert "default on cpu: reference" in info.render(info.collect())
    with tridrop.backend("cpu"):  # what is named goes before it
        assert tridrop.backends.name_for(torch.device("cpu")) == "cpu"


LAZY = """
import sys, torch, tridrop
tridrop.nn.Dropout(0.5)
assert "numba" not in sys.modules
tridrop.dropout(torch.ones(8), 0.5)
assert "numba" not in sys.modules or {expected}
"""


@pytest.mark.parametrize("choice", ["", "torch"])
def test_numba_is_imported_when_it_is_used(choice):
    run = python(LAZY.format(expected=choice != "torch"), TRIDROP_CPU=choice)
    assert run.returncode == 0, run.stderr


FIRST = """
import torch, tridrop
call = lambda x: tridrop.dropout(x, 0.5, seed=3)
x = torch.ones(4, 16)
found = torch.compile(call, fullgraph=True, backend="eager")(x)
assert torch.equal(found, call(x))
"""


def test_the_first_call_may_be_a_compiled_one():
    """Which the compiler traces, and not the import of the loops."""
    run = python(FIRST)
    assert run.returncode == 0, run.stderr


CACHED = """
import torch
from tridrop.backends.cpu import masks
from tridrop.backends.cpu.loops import mask as loops  # the one that compiles in the least time
masks.keep_mask(torch.tensor([3, 1]), (2, 40), 1 << 31)
print(loops.keep_rows._cache.__class__.__name__)
"""


@needs_numba
def test_the_cache_can_be_moved_and_switched_off(tmp_path):
    moved = python(CACHED, NUMBA_CACHE_DIR=str(tmp_path))
    assert moved.returncode == 0, moved.stderr
    assert "LoopCache" in moved.stdout
    assert list(tmp_path.rglob("mask.keep_rows-*.loop"))
    off = python(CACHED, NUMBA_CACHE_DIR=str(tmp_path / "none"), TRIDROP_CPU_CACHE="0")
    assert "NullCache" in off.stdout, off.stderr
    assert not (tmp_path / "none").exists()
