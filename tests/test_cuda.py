"""What only a CUDA device can show. The rest of the tests run there as well, by their DEVICE."""

import pytest
import torch

import tridrop

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
