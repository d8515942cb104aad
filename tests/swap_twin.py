"""Eager twins of swapped models: the same dropouts, with the masks that tridrop exports.

A swapped model runs inside :func:`logged`, which notes whose seed is taken, in order. Its twin, the
model before the swap, runs inside :func:`replayed`: torch's dropout there looks up the next entry
and applies that mask. What a switch leaves to torch is logged with a seed of its own, so that the
two can be compared whatever the switches.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import tridrop
from tridrop.contract import seeds
from tridrop.contract.mask import scale, threshold
from tridrop.swapping import Report

SEED, LEFT = 11, 12  # of the sites, and of what was left to torch
NAMES = ("dropout", "attention", "inside", "across")
SWITCHES = [dict(zip(NAMES, c, strict=True)) for c in itertools.product((True, False), repeat=4)]
# All, all but one, and none.
FEW = [s for s in SWITCHES if sum(s.values()) in (0, 3, 4)]
for _switches in (SWITCHES, FEW):
    _switches.insert(1, {**_switches[0], "memory": True})
RATES = {"p", "dropout", "drop_prob", "attn_dropout", "rate"}
torch_dropout, torch_attention = F.dropout, F.scaled_dot_product_attention
seed_for = seeds.seed_for


@dataclass(frozen=True)
class Event:
    """One mask: of a site, or the n-th of those that were left."""

    site: int | None
    left: int = 0
    path: bool = False

    def seed(self) -> Tensor:
        whose = (LEFT, self.left) if self.site is None else (SEED, self.site)
        return tridrop.fold_in(*whose)


def keep(x: Tensor, mask: Tensor, p: float, scaled: bool = True) -> Tensor:
    gain = scale(threshold(p)) if scaled else 1.0
    return torch.where(mask, x * gain, torch.zeros((), dtype=x.dtype))


class _Instead(TorchFunctionMode):
    """Calls functions in the place of others."""

    def __init__(self, functions: dict[Callable, Callable]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.functions.get(function, function)(*args, **(kwargs or {}))


class Masks:
    """Stands in for torch's dropouts: ``next`` names the mask."""

    def __init__(self, report: Report | None, heads: int) -> None:
        self.sites = {} if report is None else {s.stream: s for s in report.sites}
        self.heads = heads

    def next(self, path: nn.Module | None = None) -> Event:
        raise NotImplementedError

    def dropout(self, input, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return input
        event = self.next()
        site = self.sites.get(event.site) if event.site is not None else None
        if site is not None and "softmax" in site.parts:
            shape = input.shape
            if site.kind == "MultiheadAttention":
                shape = (-1, self.heads, *shape[-2:])
            shape = input.reshape(shape).shape if input.dim() > 2 else (1, 1, *input.shape)
            if len(shape) == 3:
                shape = (1, *shape)
            lead = (math.prod(shape[:-3]), *shape[-3:])
            mask = tridrop.attention_keep_mask(event.seed(), lead, p).view(input.shape)
        else:
            mask = tridrop.keep_mask(event.seed(), input.shape, p)
        out = keep(input, mask, p)
        return input.copy_(out) if inplace else out

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                  scale=None, enable_gqa=False):  # fmt: skip
        if dropout_p == 0:
            return torch_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        event = self.next()
        scores = query @ key.transpose(-1, -2)
        scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(hidden, float("-inf"))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask
        mask = tridrop.attention_keep_mask(event.seed(), scores.shape, dropout_p)
        return keep(scores.softmax(-1), mask, dropout_p) @ value

    def drop_path(self, module, x):
        if not module.training or not module.drop_prob:
            return x
        event = self.next(module)
        shape = x.shape if event.site is not None else (len(x), *(1,) * (x.dim() - 1))
        mask = tridrop.keep_mask(event.seed(), shape, module.drop_prob, domain="drop_path")
        return keep(x, mask, module.drop_prob, module.scale_by_keep)

    @contextmanager
    def instead_of_torch(self) -> Iterator[None]:
        with ExitStack() as stack:
            if F.dropout is torch_dropout:  # else a test gave it another
                stack.enter_context(patch.object(F, "dropout", self.dropout))
            if F.scaled_dot_product_attention is torch_attention:
                stack.enter_context(patch.object(F, "scaled_dot_product_attention", self.attention))
            timm_drop = sys.modules.get("timm.layers.drop")
            if timm_drop is not None:
                forward = lambda module, x: self.drop_path(module, x)  # noqa: E731
                stack.enter_context(patch.object(timm_drop.DropPath, "forward", forward))
            yield


class Logged(Masks):
    """Notes the sites whose seeds are taken, and gives what is left masks of its own.

    By a mode: functions that were replaced would be found out, and nothing exchanged.
    """

    def __init__(self) -> None:
        super().__init__(None, 1)
        self.log: list[Event] = []
        self.left = 0

    def drawn(self, mask, keep_rate):
        """A drop path's ``mask.bernoulli_(keep_rate)``."""
        event = self.next(nn.Identity())
        kept = tridrop.keep_mask(event.seed(), mask.shape, 1 - keep_rate, domain="drop_path")
        return mask.copy_(kept)

    def multi_head(self, *args, **kwargs):
        """It runs outside the mode, as every function does that a mode is asked about."""
        with super().instead_of_torch():
            return F.multi_head_attention_forward(*args, **kwargs)

    @contextmanager
    def instead_of_torch(self) -> Iterator[None]:
        with _Instead({
            F.dropout: self.dropout,
            F.scaled_dot_product_attention: self.attention,
            F.multi_head_attention_forward: self.multi_head,
            torch.Tensor.bernoulli_: self.drawn,
        }):  # fmt: skip
            yield

    def next(self, path: nn.Module | None = None) -> Event:
        self.log.append(Event(None, self.left, path is not None))
        self.left += 1
        return self.log[-1]

    def seed_for(self, device, seed, site=None):
        if seed is None:
            assert site is not None, "a place without a number"
            self.log.append(Event(site))
        return seed_for(device, seed, site)


class Replayed(Masks):
    """Gives the twin the masks of a log."""

    def __init__(self, log: list[Event], report: Report, model: nn.Module, heads: int) -> None:
        super().__init__(report, heads)
        self.model = model
        self.rest = list(log)
        self.last: Event | None = None

    def next(self, path: nn.Module | None = None) -> Event:
        if path is not None and not self._is_of(path):
            assert self.last is not None
            return self.last  # one op with the dropout before it
        assert self.rest, "the twin drops more often"
        self.last = self.rest.pop(0)
        return self.last

    def _is_of(self, path: nn.Module) -> bool:
        """Whether the next mask is that of this drop path."""
        if not self.rest or self.rest[0].site is None:
            return bool(self.rest) and self.rest[0].path
        site = self.sites[self.rest[0].site]
        module = self.model.get_submodule(site.module)
        called = re.match(r"self\.([\w.]+)\(", site.code)
        return path is (module.get_submodule(called[1]) if called else module)


@contextmanager
def logged(seed: int = SEED) -> Iterator[list[Event]]:
    """The log of what runs inside, under ``tridrop.rng(seed)``."""
    masks = Logged()
    seeds_taken = patch.object(seeds, "seed_for", masks.seed_for)
    with seeds_taken, masks.instead_of_torch(), tridrop.rng(seed):
        yield masks.log


@contextmanager
def replayed(log: list[Event], report: Report, model: nn.Module, heads: int = 1) -> Iterator[None]:
    """Torch's dropouts inside take the masks of ``log``, all of them."""
    masks = Replayed(log, report, model, heads)
    with masks.instead_of_torch():
        yield
    assert not masks.rest, f"the twin drops less often: {masks.rest}"


def fill(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """Random parameters in float64: biases and scales begin as constants, which hide mistakes."""
    model.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 100 * seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def clone(model: nn.Module) -> nn.Module:
    """A copy. (That of torch's decoder layer hides a module ``activation`` behind F.relu.)"""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in module._modules:
            vars(module).pop(name, None)
    return model


def quiet(model: nn.Module) -> nn.Module:
    """A copy whose rates are 0."""
    model = clone(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if name in RATES and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def outcome(model: nn.Module, inputs: tuple, **given: Any) -> dict[str, Any]:
    """The result, and the gradients of floating-point inputs and of the parameters."""
    leaves = [x.clone().requires_grad_() if _floats(x) else x for x in inputs]
    # A leaf that takes part in nothing in place.
    out = model(*[x * 1 if _floats(x) else x for x in leaves], **given)
    tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if _floats(t)]
    loss = sum((t * draw(*t.shape, seed=7)).sum() for t in tensors)
    targets = {f"input {i}": x for i, x in enumerate(leaves) if _floats(x)}
    targets |= dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(targets.values()), allow_unused=True)
    found = dict(zip(targets, gradients, strict=True))
    zeros = {n: torch.zeros_like(targets[n]) for n, g in found.items() if g is None}
    return {"out": tensors, **found, **zeros}


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def hold(
    model: nn.Module, *inputs: Any, heads: int = 1, switches: Any = SWITCHES, **given: Any
) -> Report:
    """Hold a swapped model to the original, in evaluation, at p = 0 and at p > 0.

    Returns:
        the report of all switches on.
    """
    before = {name: type(m) for name, m in model.named_modules()}
    at_zero = outcome(quiet(model).train(), inputs, **given)
    in_eval = outcome(clone(model).eval(), inputs, **given)
    with torch.no_grad():
        without_gradients = clone(model).eval()(*inputs, **given)
    by_seeds: dict[tuple, Any] = {}
    reports = []
    for chosen in switches:
        ours = clone(model)
        report = tridrop.swap(ours, **chosen)
        reports.append(report)

        equal(outcome(ours.eval(), inputs, **given), in_eval)
        with torch.no_grad():
            equal(ours(*inputs, **given), without_gradients)
        if chosen in (switches[0], switches[-1]) or "memory" in chosen:
            silent = quiet(model)
            tridrop.swap(silent, **chosen)
            equal(outcome(silent.train(), inputs, **given), at_zero)

        nothing = {s.stream for s in report.sites if s.stream is not None and s.p == 0}
        state = torch.get_rng_state()
        with logged() as log:
            found = outcome(ours.train(), inputs, **given)
        log = [e for e in log if e.site not in nothing]
        twin = clone(model).train()
        with replayed(log, report, twin, heads):
            expected = outcome(twin, inputs, **given)
        equal(found, expected)
        assert torch.equal(torch.get_rng_state(), state), "under rng nothing else is drawn"
        _honest(report, log)
        # What became of a place does not change its mask: same seeds, same numbers.
        same = by_seeds.setdefault((chosen["attention"], *log), found)
        equal(found, same)

        tridrop.unswap(ours)
        assert {name: type(m) for name, m in ours.named_modules()} == before
        assert not [n for m in ours.modules() for n in vars(m) if n.startswith("_tridrop")]
    return reports[0]


def _honest(report: Report, log: list[Event]) -> None:
    """What was logged is what the report says."""
    streams = [s.stream for s in report.sites if s.stream is not None]
    assert len(set(streams)) == len(streams), "two sites with one number"
    taken = {e.site for e in log if e.site is not None}
    assert taken <= set(streams), "a site that the report does not name"
    for site in report.sites:
        assert bool(site.parts) == (site.stream is not None)
        if site.parts and site.reason:  # nothing is seen to call it, and nothing did
            assert site.reason.startswith("unknown: ")
            assert site.stream not in taken
        assert site.parts or site.reason
    if any(e.site is None for e in log):
        assert report.counts()["left"], "a dropout was left and is not reported"
