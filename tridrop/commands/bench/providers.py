"""The providers that compute a row: eager PyTorch, torch.compile, torch's attentions, tridrop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..check.case import Case, Drop, Inputs, unmasked

EAGER, BY_HAND, COMPILED, TRIDROP = "eager", "by-hand", "torch.compile", "tridrop"
PACKED, PADDED = "tridrop-packed", "tridrop-padded"
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PROVIDERS = (EAGER, BY_HAND, COMPILED, *SDPA, TRIDROP, PACKED, PADDED)
Make = Callable[[Case], Callable[[Inputs], Any]]


@dataclass(frozen=True)
class Provider:
    """``make`` gives the function that computes a case at its p, where p = 0 means no dropout."""

    name: str
    make: Make
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def torch_dropout(case: Case) -> Drop:
    """The random part by F.dropout. Models make a shared mask from a tensor of ones, as here."""

    def drop(domain: str, value: Tensor) -> Tensor:
        shape = case.drawn_shape(domain)
        if shape == list(case.mask_shape):
            return F.dropout(value, case.rates[domain])
        return value * F.dropout(value.new_ones(shape), case.rates[domain])

    return drop if case.p else unmasked


def _eager(case: Case) -> Callable[[Inputs], Any]:
    drop = torch_dropout(case)
    return lambda inputs: case.eager(inputs, drop)


def _by_hand(case: Case) -> Callable[[Inputs], Any]:
    drop, by_hand = torch_dropout(case), case.by_hand
    assert by_hand is not None
    return lambda inputs: by_hand(inputs, drop)


def _compiled(case: Case) -> Callable[[Inputs], Any]:
    # Compiles a graph for each size, and raises an error instead of falling back to eager.
    return torch.compile(_eager(case), dynamic=False, fullgraph=True)


def _sdpa(case: Case) -> Callable[[Inputs], Any]:
    of_torch = case.of_torch
    assert of_torch is not None
    return lambda inputs: of_torch(inputs, case.p)


def tridrop_call(case: Case) -> Callable[[Inputs], Any]:
    """The op itself, which draws a seed in every call."""
    return lambda inputs: case.call(inputs, None, case.p, True)


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: sdpa_kernel(backend)


def of(case: Case) -> list[Provider]:
    """The providers of a case, whether they can run on this machine or not."""
    found = [Provider(EAGER, _eager)]
    if case.by_hand is not None:
        found.append(Provider(BY_HAND, _by_hand))
    found.append(Provider(COMPILED, _compiled))
    if case.of_torch is not None:
        found += [Provider(name, _sdpa, _only(backend)) for name, backend in SDPA.items()]
    return [*found, Provider(TRIDROP, tridrop_call)]
