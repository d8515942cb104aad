"""Dropout of words as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..base.arguments import check_sequence
from ..spec.elementwise import check_probability
from .modules import _Site


class EmbeddingDropout(nn.Embedding, _Site):
    """torch.nn.Embedding with :func:`tridrop.embedding_dropout`: whole words are dropped.

    Arguments, parameter and state_dict are torch's, so ``decoder.weight = embedding.weight`` ties a
    decoder to the undropped weight.

    Args:
        p: the probability of dropping a word of the vocabulary, in training.

    >>> import torch, tridrop
    >>> layer = EmbeddingDropout(4, 2, p=0.5)
    >>> words = torch.tensor([0, 1, 2, 3, 2, 1])
    >>> dropped = (layer(words) == 0).all(dim=1)
    >>> bool(dropped[1] == dropped[5]), bool(dropped[2] == dropped[4])
    (True, True)
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *args: Any, p: float = 0.1, **options: Any
    ) -> None:
        check_probability(p)
        super().__init__(num_embeddings, embedding_dim, *args, **options)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding_dropout(
            input,
            self.weight,
            self.p,
            self.training,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            seed=self._seed(self.weight),
        )

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, *args: Any, p: float = 0.1, **options: Any
    ) -> EmbeddingDropout:
        """torch.nn.Embedding.from_pretrained with an additional ``p``."""
        check_probability(p)
        layer: EmbeddingDropout = super().from_pretrained(embeddings, *args, **options)
        layer.p = p
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class WordDropout(_Site):
    """:func:`tridrop.word_dropout` as a module: ``token`` replaces dropped numbers of words.

    >>> import torch, tridrop
    >>> WordDropout(1.0, token=9, exempt=[0])(torch.arange(4))
    tensor([0, 9, 9, 9])
    """

    def __init__(self, p: float = 0.5, *, token: int, exempt: Sequence[int] = ()) -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        check_sequence(exempt, "exempt", "a tuple of numbers of words")
        self.token = token
        self.exempt = tuple(exempt)

    def forward(self, input: Tensor) -> Tensor:
        return F.word_dropout(
            input, self.p, self.training, token=self.token, exempt=self.exempt,
            seed=self._seed(input),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"p={self.p}, token={self.token}, exempt={self.exempt}"
