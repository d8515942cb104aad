"""Monte Carlo dropout: a trained network with dropout, used as an ensemble of its sub-networks.

Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in deep
learning", ICML 2016.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base.arguments import check_choice, check_flags, check_module, check_whole, given
from .base.modules import is_keras
from .contract import seeds
from .contract.mask import as_seed, fold_in, key_of
from .swapping.dropping import find

_MOST_MEMBERS = 1 << 31
_OUTPUTS = ("values", "logits", "probabilities")


@contextmanager
def mc_dropout(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """A block in which the dropouts of ``model`` are on, and everything else is in eval mode.

    These modules, but not their children, are in training mode: torch's dropouts and attention, the
    modules of tridrop.nn that drop, drop paths of libraries, torch's recurrent layers with a rate,
    torch's transformer layers (whose inference path has no dropout), and modules that read
    ``self.training`` for a dropout of their own, rewritten by :func:`tridrop.swap` or not. Batch
    norms use their running statistics and do not change them. LayerDrop, which skips whole layers,
    does not count as a dropout. After the block every module has its former mode again.

    The ``with`` statement gives the names of the modules that were turned on. To leave dropout on,
    enter the block without leaving it:
    ``contextlib.ExitStack().enter_context(tridrop.mc_dropout(model))``.

    It warns of modules that are turned on and also read ``self.training`` for something else, which
    then runs as in training; of forwards with a dropout that cannot be read (the module is turned
    on); and of modules compiled by TorchScript (which are not turned on).

    Raises:
        ValueError: nothing in the model drops, or it is a Keras model, which has no mode.
        TypeError: ``model`` is not a module.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    >>> with mc_dropout(model) as names:
    ...     names, model[1].training, model[2].training
    (('2',), False, True)
    >>> model[2].training
    False
    """
    check_module(model)
    if is_keras(model):
        raise ValueError(
            "a Keras model takes training as an argument and has no mode to turn on: call it as "
            "model(x, training=True) inside tridrop.rng(seed), with another seed for each member"
        )
    found, unknown = find(model)
    if not any(d.drops for d in found):
        raise ValueError(
            f"nothing in this {type(model).__name__} drops: its forwards have no dropout that "
            "training mode would turn on. "
            + ("Could not be read: " + "; ".join(unknown) if unknown else "Add one and train it")
        )
    others = [place for d in found for place in d.others]
    if others:
        warnings.warn(
            "modules that drop by self.training also read it for something else, which now runs "
            "as in training: " + "; ".join(others),
            stacklevel=3,
        )
    if unknown:
        warnings.warn("could not be read: " + "; ".join(unknown), stacklevel=3)
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        for d in found:
            d.module.training = True
        yield tuple(d.name for d in found)
    finally:
        for module, mode in before:
            module.training = mode


@dataclass(frozen=True)
class Prediction:
    """The predictions of an ensemble for N inputs.

    Attributes:
        mean: the mean over the members, [N, ...]; for classes, the mean of their probabilities.
        spread: the standard deviation over the members (with denominator n - 1), of mean's shape;
            NaN for a single member.
        entropy: the entropy of the mean, in nats, without the class dimension; None for
            ``output="values"``. It is the whole uncertainty of a prediction.
        mutual_information: the mutual information of class and member, in nats, of entropy's shape:
            the entropy minus the members' mean entropy. It is the part of the uncertainty in which
            the members disagree, and which more data could reduce (Houlsby et al., "Bayesian active
            learning for classification and preference learning", 2011: BALD).
        members: the numbers of the members, in order.
        seed: the seed with which the same members are drawn again.
        samples: the output of each member, [members, N, ...], if ``keep_samples`` was set.
    """

    mean: Tensor
    spread: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    members: tuple[int, ...]
    seed: int
    samples: Tensor | None = None


def mc_predict(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    *,
    samples: int = 50,
    seed: int | None = None,
    members: Sequence[int] | None = None,
    output: str = "values",
    dim: int = -1,
    call: Callable[..., Tensor] | None = None,
    chunk: int = 256,
    vectorize: bool = True,
    keep_samples: bool = False,
    progress: bool = False,
) -> Prediction:
    """The mean and the spread of a model's predictions over the sub-networks that dropout makes.

        mean = 1/S sum_s f_s(x),    f_s = the model under the s-th masks

    Member s is one network: all inputs get the same masks, those of a batch of one under
    ``tridrop.rng(tridrop.fold_in(seed, s))`` (dropouts that are not tridrop's draw from torch's
    generator, which is seeded from the same pair). So member s's output for an input does not
    depend on the rest of the batch, on ``chunk`` or on the other members, except for the rounding
    of matrix products, whose order may depend on their size. :func:`mc_dropout` says which modules
    are turned on.

    Args:
        model: called as ``model(x)`` (or ``model(*x)``) on a batch, without gradients.
        x: N inputs along the first dimension of a tensor, or of each of several.
        samples: S, how many members.
        seed: an int that fixes the members; None draws one from torch's generator.
        members: the numbers of the members, by default ``range(samples)``; ``[3]`` stands for the
            fourth member alone.
        output: "values"; "logits", which a softmax turns into probabilities; or "probabilities".
        dim: the class dimension of a batch of outputs. Used for logits and probabilities.
        call: a function to call instead of the model, which returns the output as a tensor,
            [N, ...]; for instance ``lambda ids: model(input_ids=ids).logits``.
        chunk: how many pairs of a member and an input are computed at a time, at least one.
        vectorize: whether torch.vmap runs these together. Pass False to run one at a time: for
            models whose control flow depends on data, and for torch's recurrent layers, which
            torch.vmap does not support. Members whose dropouts draw from torch's generator run one
            at a time, with all inputs of a chunk together.
        keep_samples: return the output of each member as well.
        progress: show a progress bar.

    Raises:
        ValueError: nothing in the model drops; no inputs or no members; an unknown output; outputs
            that are not probabilities.
        TypeError: arguments or outputs of another type.
        RuntimeError: torch.vmap cannot run the model.

    >>> import tridrop
    >>> model = nn.Sequential(nn.Linear(4, 8), tridrop.nn.Dropout(0.5), nn.Linear(8, 3))
    >>> p = mc_predict(model, torch.randn(5, 4), samples=20, seed=1, output="logits")
    >>> p.mean.shape, p.entropy.shape, bool((p.mutual_information <= p.entropy).all())
    (torch.Size([5, 3]), torch.Size([5]), True)
    """
    inputs = _checked_inputs(x)
    numbers = _checked_members(samples, members)
    check_choice(output, "output", _OUTPUTS)
    chunk = check_whole(chunk, "chunk", 1, "how many pairs to compute at a time, an int")
    dim = check_whole(dim, "dim")
    check_flags(vectorize=vectorize, keep_samples=keep_samples, progress=progress)
    check_module(model)
    if call is not None and not callable(call):
        raise TypeError(f"{given(call, 'call')}; give a function of the inputs, or None")
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    as_seed(seed)  # raises unless it is a seed
    ensemble = _Ensemble(call or model, seed, inputs[0].device, vectorize)
    parts = [tuple(t[i : i + chunk] for t in inputs) for i in range(0, len(inputs[0]), chunk)]
    with torch.no_grad(), mc_dropout(model), _bar(progress, len(parts) * len(numbers)) as advance:
        results = []
        for part in parts:
            moments = _Moments(output, dim, keep_samples)
            for out in ensemble.outputs(numbers, part, max(1, chunk // len(part[0]))):
                moments.add(out)
                advance()
            results.append(moments)
    classes = output != "values"
    return Prediction(
        mean=torch.cat([m.mean for m in results]),
        spread=torch.cat([m.spread() for m in results]),
        entropy=torch.cat([m.entropy() for m in results]) if classes else None,
        mutual_information=torch.cat([m.information() for m in results]) if classes else None,
        members=numbers,
        seed=seed,
        samples=torch.cat([torch.stack(m.kept) for m in results], 1) if keep_samples else None,
    )


def _checked_inputs(x: Any) -> tuple[Tensor, ...]:
    inputs = (x,) if isinstance(x, Tensor) else tuple(x) if isinstance(x, (tuple, list)) else ()
    if not inputs or not all(isinstance(t, Tensor) for t in inputs):
        raise TypeError(
            f"x is a {type(x).__name__}; give a tensor or a tuple of tensors, and pass other "
            "arguments of the model with call=lambda x: model(x, ...)"
        )
    sizes = [tuple(t.shape) for t in inputs]
    if any(len(s) == 0 for s in sizes) or len({s[0] for s in sizes}) != 1 or sizes[0][0] == 0:
        raise ValueError(f"x has shapes {sizes}; the first dimension holds the inputs, one or more")
    return inputs


def _checked_members(samples: int, members: Sequence[int] | None) -> tuple[int, ...]:
    if members is None:
        samples = check_whole(samples, "samples", 1, "the number of members, an int")
        if samples >= _MOST_MEMBERS:
            raise ValueError(f"samples = {samples}; give fewer than 2^31")
        return tuple(range(samples))
    if not isinstance(members, Iterable):
        raise TypeError(f"{given(members, 'members')}; give their numbers, such as range(3)")
    found = tuple(check_whole(m, "a number of members", 0) for m in members)
    if not found:
        raise ValueError("members has no number; give at least one")
    return found


class _Ensemble:
    """The sub-networks of a model, which have numbers."""

    def __init__(
        self, call: Callable[..., Tensor], seed: int, device: torch.device, vectorize: bool
    ) -> None:
        self.call, self.seed, self.device, self.vectorize = call, seed, device, vectorize

    def outputs(
        self, members: tuple[int, ...], x: tuple[Tensor, ...], together: int
    ) -> Iterator[Tensor]:
        """The outputs of the members for the inputs, one member after the other."""
        # The first member runs alone, to see whether the state of torch's generator changes. If
        # something draws from it, members cannot run together, as each needs its own generator.
        first, drew = self._one(members[0], x)
        yield first
        if drew or not self.vectorize:
            for member in members[1:]:
                yield self._one(member, x)[0]
            return
        for i in range(1, len(members), together):
            seeds_ = torch.stack([self._seed(m) for m in members[i : i + together]])
            yield from self._vmap(lambda s: self._under(s, x), (seeds_,), "error").unbind()

    def _seed(self, member: int) -> Tensor:
        return fold_in(as_seed(self.seed, self.device), member)

    def _one(self, member: int, x: tuple[Tensor, ...]) -> tuple[Tensor, bool]:
        """A member's output, and whether it drew from torch's generator."""
        seed = self._seed(member)
        low, high = (int(word) for word in key_of(seed))
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(high << 32 | low)
            before = self._generator()
            if self.vectorize:
                out = self._under(seed, x)
            else:
                out = torch.stack([self._alone(seed, before, row) for row in zip(*x, strict=True)])
            states = zip(before, self._generator(), strict=True)
            return out, any(not torch.equal(a, b) for a, b in states)

    def _generator(self) -> list[Tensor]:
        """The states of torch's generators for the CPU and for the inputs' GPU."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _under(self, seed: Tensor, x: tuple[Tensor, ...]) -> Tensor:
        """The outputs of all inputs under one seed, each as in a batch of its own."""
        with seeds.rng(seed):
            # randomness="same": numbers that torch itself draws are the same for all inputs too.
            return self._vmap(self._single, x, "same")

    def _alone(self, seed: Tensor, states: list[Tensor], row: tuple[Tensor, ...]) -> Tensor:
        """The output of one input under a seed, with torch's generators in given states."""
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)
        with seeds.rng(seed):
            return self._single(*row)

    def _single(self, *row: Tensor) -> Tensor:
        out = self.call(*(t[None] for t in row))
        if not isinstance(out, Tensor) or not out.is_floating_point():
            what = f"dtype {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise TypeError(
                f"the model returned {what}; give call=lambda x: ..., which returns its output as "
                "a floating-point tensor"
            )
        if out.dim() == 0 or out.shape[0] != 1:
            raise ValueError(
                f"for a batch of one the model returned shape {tuple(out.shape)}; the first "
                "dimension of its output must be that of the inputs"
            )
        return out[0]

    def _vmap(self, function: Callable[..., Tensor], x: Any, randomness: str) -> Tensor:
        try:
            return torch.vmap(function, randomness=randomness)(*x)
        except RuntimeError as error:
            if "vectorize=False" in str(error):
                raise
            raise RuntimeError(
                "the model failed under torch.vmap, which runs members and inputs together: "
                f"{error}. If it works without torch.vmap, pass vectorize=False"
            ) from error


@dataclass
class _Moments:
    """Mean and variance by Welford's updates, which stay exact where the spread is small."""

    output: str
    dim: int
    keep: bool
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    entropies: Tensor = field(default_factory=lambda: torch.zeros(()))
    kept: list[Tensor] = field(default_factory=list)

    def add(self, out: Tensor) -> None:
        """Add the output of one member, [N, ...]."""
        eps = torch.finfo(out.dtype).eps
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.output != "values":
            out = self._probabilities(out, eps)
            self.entropies = self.entropies + torch.special.entr(out).sum(self.dim)
        self.count += 1
        difference = out - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (out - self.mean)
        if self.keep:
            self.kept.append(out)

    def _probabilities(self, out: Tensor, eps: float) -> Tensor:
        if out.dim() < 2 or not -out.dim() <= self.dim < out.dim() or self.dim % out.dim() == 0:
            raise ValueError(
                f"outputs of shape {tuple(out.shape)} have no class dimension {self.dim} behind "
                "that of the inputs: give dim"
            )
        if self.output == "logits":
            return out.softmax(self.dim)
        # n probabilities are each rounded by at most eps / 2; this allows twice that, for the
        # softmax's own sum.
        slack = out.shape[self.dim] * eps
        if bool((out < 0).any()) or bool(((out.sum(self.dim) - 1).abs() > slack).any()):
            raise ValueError(
                'output = "probabilities", but the outputs have values below 0, or a sum that is '
                f'not 1 along dim = {self.dim}: give output="logits", or apply the softmax'
            )
        return out

    def spread(self) -> Tensor:
        """The standard deviation; NaN, 0 / 0, for a single member."""
        return (self.squares / (self.count - 1 or torch.nan)).sqrt()

    def entropy(self) -> Tensor:
        """The entropy of the mean."""
        return torch.special.entr(self.mean).sum(self.dim)

    def information(self) -> Tensor:
        """The entropy of the mean minus the mean of the entropies."""
        return (self.entropy() - self.entropies / self.count).clamp(min=0)


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of members; the block gets a function that advances it by one."""
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress

    from .base.terminal import live

    with Progress(console=live()) as bar:
        task = bar.add_task("members", total=total)
        yield lambda: bar.advance(task)
