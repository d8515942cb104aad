"""Nested tensors for layers that compute on padded tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nested:
    """A nested tensor [N, lengths, E], padded with zeros to the longest."""

    padded: Tensor  # the nested tensor itself where no sample has a row
    lengths: tuple[int, ...]
    layout: torch.layout

    @staticmethod
    def of(t: Tensor, name: str) -> Nested:
        """``t`` padded; ValueError if it has no samples, or samples that are not matrices."""
        samples = t.unbind()
        if not samples:
            raise ValueError(f"{name} is a nested tensor without samples: give one or more")
        if any(sample.dim() != 2 for sample in samples):
            raise ValueError(
                f"{name} is a nested tensor of samples with {samples[0].dim()} dimensions; give "
                "samples [length, features]"
            )
        lengths = tuple(sample.shape[0] for sample in samples)
        padded = torch.nested.to_padded_tensor(t, 0.0) if any(lengths) else t
        return Nested(padded, lengths, t.layout)

    @property
    def longest(self) -> int:
        """The length of the longest sample, to which the others are padded."""
        return max(self.lengths)

    def padding(self) -> Tensor:
        """[N, longest]: True where a sample has ended."""
        ends = torch.tensor(self.lengths, device=self.padded.device)[:, None]
        return torch.arange(self.longest, device=self.padded.device) >= ends

    def cut(self, out: Tensor) -> Tensor:
        """A padded result as a nested tensor."""
        samples = [sample[:length] for sample, length in zip(out, self.lengths, strict=True)]
        return torch.nested.as_nested_tensor(samples, layout=self.layout)


def attend(
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The attention of nested tensors, by the ``forward`` for padded tensors with the batch first.

    The weights are those of the padded samples, with zeros for padding, as torch returns them.
    """
    if not (query.is_nested and key.is_nested and value.is_nested):
        raise TypeError("some of query, key and value are nested tensors: make all three nested")
    queries = Nested.of(query, "query")
    # Equal tensors stay one object, so that their projections can be joined.
    keys = queries if key is query else Nested.of(key, "key")
    values = keys if value is key else Nested.of(value, "value")
    if keys.lengths != values.lengths:
        raise ValueError(
            f"key has samples of lengths {keys.lengths} and value of lengths {values.lengths}: "
            "give each key a value"
        )
    if len(keys.lengths) != len(queries.lengths):
        raise ValueError(
            f"query has {len(queries.lengths)} samples and key has {len(keys.lengths)}: give both "
            "the same number"
        )
    if not queries.longest and queries is keys is values:
        return query, None
    if not (queries.longest and keys.longest):
        raise ValueError("all samples of query or of key are empty: give one sample a row or more")
    out, weights = forward(
        queries.padded, keys.padded, values.padded, keys.padding(), need_weights=need_weights
    )
    if weights is not None:
        rows = queries.padding()[:, :, None]
        weights = weights.masked_fill(rows if weights.dim() == 3 else rows[:, None], 0.0)
    return queries.cut(out), weights
