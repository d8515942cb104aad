"""The text that the demo trains on, as bytes, and its split."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from torch import Tensor

from .options import DemoError

DEFAULT_NAME = "pydoc_data.topics"


def reference_text() -> bytes:
    """The reference pages that CPython includes for ``help()``: each paragraph once, shuffled.

    Some pages quote whole sections of others. A repeated paragraph could be in both the training
    and the validation part, and a model that knows it by heart would look as if it had learnt the
    language. The fixed random order draws both parts from the same pages; in the order of the
    pages, it would depend on the pages at the split how similar the two parts are.

    Raises DemoError if the installation of Python lacks the pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(
            "this Python lacks pydoc_data.topics, the default text: give --text FILE"
        ) from error
    pages = (topics[name].strip("\n") for name in sorted(topics))
    paragraphs = list(dict.fromkeys(p for page in pages for p in re.split(r"\n{2,}", page)))
    random.Random(0).shuffle(paragraphs)
    return "\n\n".join(paragraphs).encode()


def load(path: Path | None) -> tuple[str, bytes]:
    """(name, bytes) of the file at ``path``, or of the default text if that is None.

    Raises DemoError if the file cannot be read.
    """
    if path is None:
        return DEFAULT_NAME, reference_text()
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise DemoError(f"--text {path}: {error.strerror or error}") from error


def split(text: bytes, train_bytes: int, valid_bytes: int) -> tuple[Tensor, Tensor]:
    """The first ``train_bytes`` of the text and its last ``valid_bytes``, as int64 vectors.

    Raises DemoError if the text is too short for two disjoint parts.
    """
    if train_bytes + valid_bytes > len(text):
        raise DemoError(
            f"the text has {len(text):,} bytes, fewer than --train-bytes {train_bytes:,} and "
            f"--valid-bytes {valid_bytes:,} together: lower them or give a longer text"
        )
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[:train_bytes], tokens[len(text) - valid_bytes :]
