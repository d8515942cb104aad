"""Variational (locked) dropout of sequences."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..base import arguments as spec_values
from ..contract.seeds import batch_origin
from ..spec import elementwise as spec
from .elementwise import dropout, in_batch
from .rows import drop_rows

Sequences = TypeVar("Sequences", Tensor, PackedSequence)


def locked_dropout(
    input: Sequences,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    batch_first: bool = False,
    seed: int | Tensor | None = None,
) -> Sequences:
    """Dropout of sequences with one mask for all time steps of a sequence.

        out[t, b, c] = where(keep[b, c], input[t, b, c] * scale, 0)

    Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016; the LockedDropout of Merity, Keskar and Socher, "Regularizing and optimizing
    LSTM language models", 2018. ``keep`` is ``tridrop.keep_mask(seed, (batch, features), p)``,
    whatever the layout and the number of steps. Whether padded (time first or batch first) or
    packed in any order, a sample has the mask of its place in the batch, and a sequence that is
    processed in pieces has the same mask under one seed.

    Args:
        input: ``[T, B, C]``, or ``[T, C]`` without a batch, or a PackedSequence. A sample's place
            in a PackedSequence is its place before pack_sequence or pack_padded_sequence.
        p, training, seed: as in :func:`tridrop.dropout`.
        batch_first: tensors are ``[B, T, C]``.

    Returns:
        The same type and shape as input, with the strides that :func:`tridrop.dropout` gives;
        ``input`` itself if nothing is dropped.

    Raises:
        ValueError: p outside [0, 1], a tensor of other than 2 or 3 dimensions.
        TypeError: as :func:`tridrop.dropout`.

    >>> import torch
    >>> locked_dropout(torch.ones(2, 2, 4), 0.5, seed=1)  # two steps of two samples
    tensor([[[2., 0., 2., 0.],
             [2., 2., 0., 2.]],
    <BLANKLINE>
            [[2., 0., 2., 0.],
             [2., 2., 0., 2.]]])
    """
    packed = isinstance(input, PackedSequence)
    x = input.data if isinstance(input, PackedSequence) else input
    spec.check_input(x, "input")
    spec.check_probability(p, tensor_allowed=True)
    spec_values.check_flag(batch_first, "batch_first")
    if not packed and x.dim() not in (2, 3):
        raise ValueError(
            f"input has shape {tuple(x.shape)}; locked_dropout takes [T, B, C] ([B, T, C] with "
            "batch_first=True), [T, C] or a PackedSequence: use tridrop.dropout with a noise_shape "
            "for others"
        )
    if not spec.drops(p, training):
        return input
    if isinstance(input, PackedSequence):
        return _packed(input, p, seed)
    if x.dim() == 2:
        return dropout(x, p, noise_shape=(1, None), shard=in_batch(x.shape, dim=None), seed=seed)
    if batch_first:
        # With time first, a sample's coordinate does not depend on the number of steps.
        return locked_dropout(x.transpose(0, 1), p, seed=seed).transpose(0, 1)
    where = in_batch(x.shape, dim=1)
    return dropout(x, p, noise_shape=(1, None, None), shard=where, seed=seed)


def _packed(input: PackedSequence, p: float | Tensor, seed: int | Tensor | None) -> PackedSequence:
    data, sizes, order, _ = input
    batch, width = int(sizes[0]), data.shape[1]
    # A step has one row for each of the first samples, which are sorted by length.
    places = torch.arange(batch)
    rows = torch.cat([places[:size] for size in sizes.tolist()]).to(data.device)
    if order is not None:
        rows = order[rows]
    first = batch_origin(batch)
    return input._replace(data=drop_rows(data, rows + first, p, first + batch, width, seed))
