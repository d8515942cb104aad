"""What the tests of `tridrop demo` share: a tiny training, and its surroundings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch
from hosts import imported_with

import tridrop.commands.demo

TINY = [
    "--layers=1", "--dim=16", "--heads=2", "--context=8", "--batch=2",
    "--train-bytes=200", "--valid-bytes=100", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend is chosen by the device, and torch has one thread."""
    imported_with(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(threads)


def parse(*arguments: object) -> argparse.Namespace:
    """The options that `tridrop demo` makes of its arguments."""
    parser = argparse.ArgumentParser(prog="tridrop demo")
    tridrop.commands.demo.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])
