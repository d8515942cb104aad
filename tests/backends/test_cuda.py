"""What only a CUDA device can show. The rest of the tests run there as well, by their DEVICE."""

import pytest
import torch

import tridrop
from tridrop.commands.check.measure import error, tolerance
from tridrop.contract.mask import scale, threshold

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_captured_graph_draws_a_fresh_mask_each_replay():
    x = torch.ones(4096, device="cuda")
    tridrop.dropout(x, 0.5)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tridrop.dropout(x, 0.5)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(out.clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_a_captured_graph_reads_an_explicit_seed_and_rate_when_replayed():
    x = torch.ones(4096, device="cuda")
    seed, p = tridrop.new_seed("cuda"), torch.tensor(0.5, device="cuda")
    tridrop.dropout(x, p, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tridrop.dropout(x, p, seed=seed)
    for value in (0.1, 0.9):
        seed.copy_(tridrop.new_seed("cuda"))
        p.fill_(value)
        graph.replay()
        assert torch.equal(out, tridrop.dropout(x, p.clone(), seed=seed.clone()))


def test_more_than_2_to_the_31_elements():
    rows, cols = (1 << 31) // 4096 + 8, 4096
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    out = tridrop.dropout(x, 0.5, seed=1)
    shard = tridrop.Shard((rows, cols), (rows - 16, 0))
    keep = tridrop.keep_mask(1, (16, cols), 0.5, shard=shard, device="cuda")
    assert torch.equal(out[-16:] != 0, keep)
    flat = tridrop.dropout(x.view(-1), 0.5, seed=1)
    shard = tridrop.Shard((rows * cols,), (rows * cols - 4096,))
    keep = tridrop.keep_mask(1, (4096,), 0.5, shard=shard, device="cuda")
    assert torch.equal(flat[-4096:] != 0, keep)


def test_a_rate_outside_0_1_on_the_device_makes_the_result_nan():
    out = tridrop.dropout(torch.ones(64, device="cuda"), torch.tensor(1.5, device="cuda"), seed=1)
    assert out.isnan().all()


def test_both_backends_agree_on_the_device():
    x = torch.randn(300, 777, device="cuda")
    with tridrop.backend("reference"):
        expected = tridrop.dropout(x, 0.3, seed=5)
    torch.testing.assert_close(tridrop.dropout(x, 0.3, seed=5), expected, rtol=1e-6, atol=0)
    masks = [
        tridrop.keep_mask(5, (300, 777), 0.3, device=device).cpu() for device in ("cuda", "cpu")
    ]
    assert torch.equal(*masks)


def test_no_synchronisation():
    x = torch.ones(1024, device="cuda", requires_grad=True)
    p = torch.tensor(0.5, device="cuda")
    tridrop.dropout_add(x, x, p).sum().backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        tridrop.dropout_add(x, x, p).sum().backward()
        tridrop.dropout_add(x, x, 0.1, seed=3).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _attention(dtype=torch.bfloat16, length=512, dim=64, **options):
    """Operands on the device, and attention of them with dropout."""
    torch.manual_seed(0)
    shape = (2, 4, length, dim)
    tensors = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    options = {"dropout_p": 0.2, "seed": 3} | options
    return tensors, lambda *t: tridrop.scaled_dot_product_attention(*t, **options)


def _results(tensors, call):
    out = call(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_as_accurate_as_eager(dtype, dim, is_causal):
    tensors, call = _attention(dtype, 300, dim, is_causal=is_causal)
    keep = tridrop.attention_keep_mask(3, (2, 4, 300, 300), 0.2, device="cuda")

    def eager(query, key, value):
        scores = query @ key.transpose(-1, -2) * dim**-0.5
        if is_causal:
            hidden = torch.ones(300, 300, dtype=torch.bool, device="cuda").triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return (torch.softmax(scores, -1) * keep * scale(threshold(0.2))) @ value

    exact = _results([t.detach().double().requires_grad_() for t in tensors], eager)
    plain = _results(tensors, eager)
    for found, own, want in zip(_results(tensors, call), plain, exact, strict=True):
        assert error(found, want) <= tolerance(own, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_repeats_bitwise(is_causal):
    tensors, call = _attention(is_causal=is_causal)
    first = _results(tensors, call)
    for _ in range(200):
        for a, b in zip(_results(tensors, call), first, strict=True):
            assert torch.equal(a, b)


def test_attention_in_a_captured_graph_reads_its_seed():
    tensors, _ = _attention()
    seed = tridrop.new_seed("cuda")

    def run():
        return tridrop.scaled_dot_product_attention(*tensors, dropout_p=0.2, seed=seed)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        seed.copy_(tridrop.new_seed("cuda"))
        graph.replay()
        assert torch.equal(out, run())


def test_attention_needs_no_memory_of_the_size_of_the_scores():
    tensors, call = _attention(length=16384)
    _results(tensors, call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _results(tensors, call)
    # the result, its gradient, three gradients and fp32 numbers a row; scores would be 4 GiB
    assert torch.cuda.max_memory_allocated() - before <= 8 * tensors[0].nbytes
