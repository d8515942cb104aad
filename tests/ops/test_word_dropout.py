"""Dropout of words: rows of an embedding, and their numbers."""

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import nn
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.contract.mask import ONE, threshold
from tridrop.nn import EmbeddingDropout, WordDropout

WORDS, WIDTH = 50, 12


def scale(p):
    return ONE / (ONE - threshold(p))


def text():
    return torch.randint(WORDS, (6, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def rows_kept(seed, p):
    return tridrop.keep_mask(seed, (WORDS, WIDTH), p, noise_shape=(WORDS, 1), device=DEVICE)


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_looks_up_in_a_dropped_matrix(dtype, backend, as_tensor):
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float16
    p = torch.tensor(0.3, dtype=torch.float64, device=DEVICE) if as_tensor else 0.3
    weight = torch.randn(WORDS, WIDTH, device=DEVICE).to(dtype).requires_grad_()
    words, keep = text(), rows_kept(5, 0.3)
    with tridrop.backend(backend):
        out = tridrop.embedding_dropout(words, weight, p, seed=5)
        (found,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(out != 0, keep[words])
    wide = weight.detach().to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(out, torch.where(keep, wide * scale(0.3), 0)[words].to(dtype))
    count = torch.bincount(words.flatten(), minlength=WORDS)[:, None]
    expected = torch.where(keep, count * torch.tensor(scale(0.3)).to(found), 0)
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 1.0},
        {"max_norm": 2.0, "norm_type": 1.0}, {"sparse": True}, {"padding_idx": -1, "sparse": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_options_are_torchs(options):
    words, keep = text(), rows_kept(5, 0.3)
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        weight = torch.randn(WORDS, WIDTH).to(DEVICE).requires_grad_()
        if own:
            out = tridrop.embedding_dropout(words, weight, 0.3, seed=5, **options)
        else:
            rows = nn.functional.embedding(words, weight, **options)
            out = torch.where(keep[words], rows * scale(0.3), 0)
        out.square().sum().backward()
        assert weight.grad.is_sparse == options.get("sparse", False)
        results.append((out, weight.grad.to_dense(), weight))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_saved_is_what_an_embedding_saves():
    weight = torch.randn(WORDS, 512, requires_grad=True)
    words = text().cpu()
    found = []
    for call in (
        lambda: nn.functional.embedding(words, weight),
        lambda: tridrop.embedding_dropout(words, weight, 0.3),
    ):
        kept = {}

        def pack(t, kept=kept):
            kept[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call()
        found.append(sum(kept.values()))
    assert found[1] - found[0] == 16


def test_the_ends_of_the_range_and_evaluation():
    weight = torch.randn(WORDS, WIDTH)
    weight[0] = torch.nan
    words = torch.tensor([0, 1, 2])
    plain = nn.functional.embedding(words, weight)
    for found in (
        tridrop.embedding_dropout(words, weight, 0.0),
        tridrop.embedding_dropout(words, weight, 0.5, False),
    ):
        torch.testing.assert_close(found, plain, equal_nan=True, rtol=0, atol=0)
    for p in (1.0, torch.tensor(1.0)):
        assert not tridrop.embedding_dropout(words, weight, p).any()
    assert tridrop.embedding_dropout(torch.tensor(3), weight, 0.5, seed=1).shape == (WIDTH,)
    assert tridrop.embedding_dropout(words[:0], weight, 0.5).shape == (0, WIDTH)


def test_the_share_of_dropped_words():
    weight = torch.ones(100_000, 1)
    kept = tridrop.embedding_dropout(torch.arange(100_000), weight, 0.2, seed=3) != 0
    assert abs(float(kept.double().mean()) - 0.8) < 6 * (0.16 / 1e5) ** 0.5


def test_it_is_compiled_recomputed_transformed_and_differentiated_twice():
    words = text().cpu()
    weight = torch.randn(WORDS, 3, dtype=torch.float64, requires_grad=True)
    seed = tridrop.new_seed()

    def call(weight, words=words):
        return tridrop.embedding_dropout(words, weight, 0.3, seed=seed)

    expected = call(weight)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), expected)
    grads = [torch.autograd.grad(f(weight).square().sum(), weight)[0] for f in (call, compiled)]
    assert torch.equal(*grads)
    torch.autograd.gradcheck(call, weight)
    torch.autograd.gradgradcheck(lambda w: call(w).square(), weight)
    assert torch.equal(torch.vmap(lambda w: call(weight, w))(words), expected)
    torch.manual_seed(1)
    plain = tridrop.embedding_dropout(words, weight, 0.3).square().sum()
    torch.manual_seed(1)
    again = checkpoint(
        lambda w: tridrop.embedding_dropout(words, w, 0.3), weight, use_reentrant=False
    )
    (a,), (b,) = (torch.autograd.grad(t, weight) for t in (plain, again.square().sum()))
    assert torch.equal(a, b)


def test_seeds_of_their_own_under_vmap():
    weight, words = torch.ones(WORDS, 2), text().cpu()
    seeds = torch.stack([tridrop.fold_in(3, i) for i in range(4)])
    together = torch.vmap(lambda s: tridrop.embedding_dropout(words, weight, 0.3, seed=s))(seeds)
    numbers = torch.vmap(lambda s: tridrop.word_dropout(words, 0.3, token=99, seed=s))(seeds)
    for i, seed in enumerate(seeds):
        expected = tridrop.embedding_dropout(words, weight, 0.3, seed=seed)
        assert torch.equal(together[i], expected)
        assert torch.equal(numbers[i], tridrop.word_dropout(words, 0.3, token=99, seed=seed))


def test_the_module_is_torchs_with_a_rate():
    torch.manual_seed(0)
    plain = nn.Embedding(WORDS, WIDTH, padding_idx=2, scale_grad_by_freq=True)
    torch.manual_seed(0)
    layer = EmbeddingDropout(WORDS, WIDTH, 2, scale_grad_by_freq=True, p=0.4)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert repr(layer) == "EmbeddingDropout(50, 12, padding_idx=2, scale_grad_by_freq=True, p=0.4)"
    words = text().cpu()
    assert torch.equal(layer.eval()(words), plain(words))
    tridrop.nn.number_sites(layer.train())
    with tridrop.rng(6):
        out = layer(words)
    expected = tridrop.embedding_dropout(
        words, layer.weight, 0.4, padding_idx=2, seed=tridrop.fold_in(6, 0)
    )
    assert torch.equal(out, expected)
    taken = EmbeddingDropout.from_pretrained(torch.ones(4, 2), p=0.25)
    assert (taken.p, taken.weight.requires_grad) == (0.25, False)
    assert EmbeddingDropout.from_pretrained(torch.ones(4, 2)).p == 0.1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_words_give_way_to_a_token(dtype):
    words = text().to(dtype)
    keep = tridrop.keep_mask(4, words.shape, 0.4, device=DEVICE)
    out = tridrop.word_dropout(words, 0.4, token=99, seed=4)
    assert out.dtype == dtype
    assert torch.equal(out, torch.where(keep, words, 99))
    spared = tridrop.word_dropout(words, 0.4, token=99, exempt=(7, 8), seed=4)
    assert torch.equal(spared, torch.where(keep | (words == 7) | (words == 8), words, 99))
    assert tridrop.word_dropout(words, 0.0, token=99) is words
    assert tridrop.word_dropout(words, 0.4, False, token=99) is words
    assert bool((tridrop.word_dropout(words, 1.0, token=99) == 99).all())
    layer = WordDropout(0.4, token=99, exempt=[7])
    tridrop.nn.number_sites(layer)
    with tridrop.rng(4):
        first = layer(words)
    with tridrop.rng(4):
        assert torch.equal(layer(words), first)
    assert layer.eval()(words) is words
    assert not torch.equal(first, words)


def test_bad_input():
    words, weight = torch.tensor([1]), torch.ones(4, 2)
    with pytest.raises(TypeError, match="give integers"):
        tridrop.word_dropout(torch.ones(2), 0.5, token=0)
    with pytest.raises(TypeError, match=r"give a torch\.Tensor"):
        tridrop.word_dropout([1, 2], 0.5, token=0)
    with pytest.raises(TypeError, match=r"token is 1\.5 of type float"):
        tridrop.word_dropout(words, 0.5, token=1.5)
    with pytest.raises(ValueError, match=r"exempt: 300 is outside torch\.uint8"):
        tridrop.word_dropout(words.to(torch.uint8), 0.5, token=0, exempt=[300])
    for call in (
        lambda p: tridrop.word_dropout(words, p, token=0),
        lambda p: tridrop.embedding_dropout(words, weight, p),
        lambda p: EmbeddingDropout(4, 2, p=p),
        lambda p: EmbeddingDropout.from_pretrained(weight, p=p),
        lambda p: WordDropout(p, token=0),
    ):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(1.5)
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        tridrop.embedding_dropout(words, torch.ones(4), 0.5)
    with pytest.raises(TypeError, match="weight has dtype"):
        tridrop.embedding_dropout(words, torch.ones(4, 2, dtype=torch.int64), 0.5)
    with pytest.raises(IndexError):
        tridrop.embedding_dropout(torch.tensor([9]), weight, 0.5)
