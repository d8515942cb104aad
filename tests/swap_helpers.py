"""What the tests of tridrop.swap share: a step of a swapped model, and of its eager twin.

The twin is the original, run by torch, whose every dropout gets the mask that tridrop exports for
the place it stands in. The swapped model's step says which places dropped, in which order.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import tridrop
from tridrop.contract import seeds
from tridrop.swapping import Report

SEED = 7
# Gives masks to the dropouts that a swap leaves to torch: the n-th call has stream n.
LEFT_TO_TORCH = 1234567


@dataclass
class Outcome:
    """A loss and the gradients of the parameters."""

    loss: Tensor
    gradients: dict[str, Tensor]


# What dropped in a step, in order: the seed that each place took; None for one of torch's.
Draws = list[Tensor | None]


def numbers(draws: Draws) -> list[tuple[int, ...]]:
    """The seeds that were taken, without torch's."""
    return [tuple(seed.tolist()) for seed in draws if seed is not None]


class TorchDropout(TorchFunctionMode):
    """Puts ``apply(x, p)`` in the place of every call of torch's dropout that drops.

    ``uniform(shape)`` is for the random numbers of a drop path.
    """

    def __init__(
        self,
        apply: Callable[[Tensor, float], Tensor],
        uniform: Callable[[tuple[int, ...]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.apply, self.uniform = apply, uniform

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.rand and self.uniform is not None and args[0]:
            return self.uniform(args[0])
        if function is not F.dropout:
            return function(*args, **(kwargs or {}))
        given = {"p": 0.5, "training": True} | dict(
            zip(("input", "p", "training", "inplace"), args, strict=False), **(kwargs or {})
        )
        if not given["training"] or not given["p"]:
            return given["input"]
        return self.apply(given["input"], given["p"])


def drop(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """What the contract says of a value and its mask."""
    cut = round(p * 2**32)
    return torch.where(mask, x * (2**32 / (2**32 - cut)), torch.zeros((), dtype=x.dtype))


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> Outcome:
    """A forward and a backward; of a model without a loss of its own, that of fixed weights."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    loss = getattr(out, "loss", None)
    if loss is None:
        weights = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(3))
        loss = (out[0] * weights).mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.detach(), found)


def swapped_outcome(
    model: nn.Module, inputs: dict[str, Tensor], seed: int = SEED
) -> tuple[Outcome, Draws]:
    """A step of a swapped model under a seed tensor, and what dropped in it."""
    draws: Draws = []
    seed_for = seeds.seed_for
    device = next(model.parameters(), torch.empty(0)).device

    def record(device, given=None, site=None):
        taken = seed_for(device, given, site)
        if given is None:
            draws.append(taken)
        return taken

    def count_left() -> int:
        draws.append(None)
        return sum(seed is None for seed in draws) - 1

    with (
        mock.patch.object(seeds, "seed_for", record),
        TorchDropout(
            lambda x, p: dropped_by_torch(x, p, count_left()),
            lambda shape: uniform_of_torch(shape, count_left()),
        ),
        tridrop.rng(tridrop.fold_in(seed, 0).to(device)),
    ):
        return outcome(model, inputs), draws


def dropped_by_torch(x: Tensor, p: float, count: int) -> Tensor:
    """What torch's dropout is to give in its ``count``-th call."""
    return drop(x, tridrop.keep_mask(tridrop.fold_in(LEFT_TO_TORCH, count), x.shape, p), p)


def uniform_of_torch(shape: tuple[int, ...], count: int) -> Tensor:
    """What torch.rand is to give."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(count))


def twin_outcome(
    twin: nn.Module, inputs: dict[str, Tensor], report: Report, draws: Draws, seed: int = SEED
) -> Outcome:
    """A step of the original with the masks of a swapped model's step."""
    base = tridrop.fold_in(seed, 0)
    sites = {
        tuple(tridrop.fold_in(base, site.stream).tolist()): site
        for site in report.sites
        if site.stream is not None
    }
    waiting, by_torch = list(draws), itertools.count()

    def following(p: float, part: str) -> tuple[Tensor | None, tuple[str, ...]]:
        """The next seed, and what is one op in its place, ``part`` among it."""
        assert waiting, "the original drops more often than the swapped model"
        seed = waiting.pop(0)
        if seed is None:
            return None, ()
        site = sites[tuple(seed.tolist())]
        assert site.p is None or site.p == p, site
        assert part in site.parts, site
        return seed, site.parts

    def dropout(x: Tensor, p: float) -> Tensor:
        seed, parts = following(p, "dropout")
        if seed is None:
            return dropped_by_torch(x, p, next(by_torch))
        if "softmax" in parts:
            return drop(x, tridrop.attention_keep_mask(seed, x.shape, p), p)
        return drop(x, tridrop.keep_mask(seed, x.shape, p), p)

    def drop_path(module: nn.Module, x: Tensor) -> Tensor:
        p = module.drop_prob
        if not module.training or not p:
            return x
        seed, _ = following(p, "drop_path")
        if seed is None:
            uniform = uniform_of_torch((len(x), *(1,) * (x.dim() - 1)), next(by_torch))
            return x / (1 - p) * (uniform >= p)
        return drop(x, tridrop.keep_mask(seed, x.shape, p, domain="drop_path"), p)

    twin = copy.deepcopy(twin)
    for module in twin.modules():
        if type(module).__name__.endswith("DropPath"):
            module.forward = lambda x, module=module: drop_path(module, x)
    with TorchDropout(dropout):
        found = outcome(twin, inputs)
    assert not waiting, f"the swapped model drops {len(waiting)} times more than the original"
    return found


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    """Equal but for the order of fp32 sums, whose error scales with the largest value."""
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(float(g.abs().max()) for g in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=10 * tolerance, atol=tolerance * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def set_rates(model: nn.Module, p: float) -> None:
    """Give every dropout of a model another probability, wherever the model keeps it."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if isinstance(value, float) and (name == "p" or "drop" in name):
                    setattr(owner, name, p)


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]
