"""Dropout of words: of whole rows of an embedding, and of the numbers of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import arguments as spec_values
from ..contract.seeds import seed_for
from ..spec import elementwise as spec
from .elementwise import in_batch
from .masks import keep_mask
from .rows import drop_rows


def embedding_dropout(
    input: Tensor,
    weight: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Look up words in an embedding in which whole rows, words of the vocabulary, are dropped.

        out[..., :] = where(keep[input], weight[input] * scale, 0)

    A dropped word is dropped wherever it occurs in the batch, so the model cannot depend on single
    words (Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016). ``keep`` is ``tridrop.keep_mask(seed, weight.shape, p, noise_shape=(V, 1))``.
    No dropped matrix is made: rows are looked up and then dropped. Backward keeps the seed and what
    torch.nn.functional.embedding keeps.

    Args:
        input: numbers of words, any shape, as torch.nn.functional.embedding takes them.
        weight: ``[V, D]``.
        p, training, seed: as in :func:`tridrop.dropout`; p is the probability of dropping a word.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: as in
            torch.nn.functional.embedding. ``max_norm`` bounds the norm before the scaling.

    Returns:
        ``[*input.shape, D]``.

    Raises:
        ValueError, TypeError: as :func:`tridrop.dropout`; a weight of other than two dimensions.

    >>> import torch
    >>> words = torch.tensor([0, 1, 2, 3, 2, 1])
    >>> embedding_dropout(words, torch.ones(4, 2), 0.5, seed=7)[:, 0]
    tensor([2., 0., 0., 2., 0., 0.])
    """
    spec_values.check_tensor(input, "input")
    spec.check_input(weight, "weight")
    spec.check_device(input, "input", weight, "weight")
    spec.check_probability(p, tensor_allowed=True)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; an embedding's is [V, D]")
    out = torch.nn.functional.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    )
    if not spec.drops(p, training):
        return out
    return drop_rows(out, input, p, len(weight), 1, seed)


def word_dropout(
    input: Tensor,
    p: float | Tensor,
    training: bool = True,
    *,
    token: int,
    exempt: Sequence[int] = (),
    seed: int | Tensor | None = None,
) -> Tensor:
    """Replace each number of a word with probability p by ``token``, such as the unknown word's.

        out = where(keep | input in exempt, input, token)

    Each occurrence has a decision of its own, and nothing is scaled. A decoder that does not see
    its last word must use its latent state (Bowman et al., "Generating sentences from a continuous
    space", 2016), and a classifier sees many shorter texts (Iyyer et al., "Deep unordered
    composition rivals syntactic methods for text classification", 2015). ``keep`` is
    ``tridrop.keep_mask(seed, input.shape, p)``.

    Args:
        input: numbers of words, of any shape and integer dtype.
        p, training, seed: as in :func:`tridrop.dropout`; at p = 0, and without training, the result
            is ``input`` itself.
        token: the number that replaces a dropped word.
        exempt: words that are never replaced, such as padding and the markers of beginning and end.

    Raises:
        ValueError: p outside [0, 1]; a token or an exempt word outside input's dtype.
        TypeError: input not of integers, token or a word of exempt not an int.

    >>> import torch
    >>> word_dropout(torch.arange(8), 0.5, token=99, exempt=[5], seed=1)
    tensor([ 0, 99,  2, 99,  4,  5,  6,  7])
    """
    spec_values.check_tensor(input, "input")
    if input.is_floating_point() or input.is_complex() or input.dtype == torch.bool:
        raise TypeError(f"input has dtype {input.dtype}; give integers, the numbers of words")
    spec.check_probability(p, tensor_allowed=True)
    spec.check_rate(p, input.device)
    limits = torch.iinfo(input.dtype)
    spec_values.check_sequence(exempt, "exempt", "a tuple of numbers of words")
    for name, word in (("token", token), *(("exempt", word) for word in exempt)):
        spec_values.check_whole(word, name)
        if not limits.min <= word <= limits.max:
            raise ValueError(f"{name}: {word} is outside {input.dtype}")
    if not spec.drops(p, training):
        return input
    where = in_batch(input.shape)
    kept = keep_mask(seed_for(input.device, seed), input.shape, p, shard=where)
    for word in exempt:
        kept = kept | (input == word)
    return torch.where(kept, input, token)
