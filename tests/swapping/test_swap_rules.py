"""tridrop.swap of forwards that nobody foresaw: the numbers are eager's, and nothing raises.

Each class below is one way of writing a forward. What is fused in it does not matter here; only
that evaluation, p = 0 and p > 0 (with the exported masks) are what eager gives, for every
combination of switches, and that the report says what happened.
"""

import ast
import contextlib
import functools
import linecache
import math
import textwrap

import pytest
import swap_twin
import torch
import torch.nn.functional
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_twin import draw, fill, hold
from torch import nn
from torch.nn.functional import dropout as renamed

import tridrop
from tridrop.swapping import flow, source

N, T, E, H = 2, 5, 8, 2
ONE = swap_twin.SWITCHES[:1]
FORWARDS: dict[str, type] = {}


class Parts(nn.Module):
    """What the forwards use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(E, E), nn.Linear(E, E)
        self.norm, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.act, self.relu = nn.GELU(), nn.ReLU(inplace=True)
        self.drop, self.drop2, self.drop3 = nn.Dropout(0.2), nn.Dropout(0.3), nn.Dropout(0.4)
        self.inplace = nn.Dropout(0.3, inplace=True)
        self.drops = nn.ModuleList([nn.Dropout(0.2), nn.Dropout(0.3)])
        self.linears = nn.ModuleList([nn.Linear(E, E), nn.Linear(E, E)])
        self.rate, self.scale = 0.25, nn.Parameter(torch.ones(E))


def case(cls: type) -> type:
    FORWARDS[cls.__name__] = cls
    return cls


# Laziness: who needs the value, and when.


@case
class UsedTwice(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        return x + y + y * y


@case
class SumUsedTwice(Parts):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        y = self.norm(x)
        return x * y + self.drop2(self.other(y)) + x


@case
class SumThatIsNormedTwice(Parts):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        return self.norm(x) * self.norm2(x) + x


@case
class SumOfTwoDropouts(Parts):
    def forward(self, x):
        return self.norm(self.drop(self.linear(x)) + self.drop2(self.other(x)))


@case
class SumOfThree(Parts):
    def forward(self, x):
        y = self.linear(x)
        return self.norm2(self.norm(x) + self.drop(y) + self.drop2(self.other(x)) + y)


@case
class DropoutOfDropout(Parts):
    def forward(self, x):
        return x + self.drop2(self.drop(self.drop3(self.linear(x))))


@case
class SameModuleInOneExpression(Parts):
    def forward(self, x):
        return self.drop(self.act(self.linear(x))) - self.drop2(self.act(x)) * self.drop2.p


@case
class BroadcastResidual(Parts):
    def forward(self, x):
        return self.norm(x[:, :1] + self.drop(self.linear(x))) + self.drop2(x[:1]) + self.norm2(x)


@case
class WiderBranch(Parts):
    def forward(self, x):
        return self.norm(x.float() + self.drop(self.linear(x))) + self.drop2(x * 1) + x.float()


@case
class PlusANumber(Parts):
    def forward(self, x):
        return 1 + self.drop(self.linear(x)) + self.norm(2 + self.drop2(x))


@case
class PlusNothing(Parts):
    def forward(self, x):
        residual = None
        y = self.drop(self.linear(x))
        return y if residual is None else y + residual


@case
class Lists(Parts):
    def forward(self, x):
        kept = [self.drop(x), *[self.drop2(self.linear(x))]]
        return sum(kept) + (self.drop3(x),)[0]


@case
class Attributes(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        z = x + self.drop2(y)
        assert z.shape == x.shape
        assert y.dim() == 3
        return self.norm(z).mean() * z.mT.mT + len(y) + y.size(-1)


@case
class ChainedAssignment(Parts):
    def forward(self, x):
        a = b = self.drop(self.linear(x))
        c = d = x + a
        return self.norm(c) + self.norm2(d) + b


@case
class Unpacked(Parts):
    def forward(self, x):
        a, b = self.drop(self.linear(x)), self.drop2(x)
        (c, d), e = (x + a, x + b), a
        first, *others = [self.drop3(e), c, d]
        return self.norm(c) + self.norm2(d) + first + others[0]


@case
class Swapped(Parts):
    def forward(self, x):
        a = x + self.drop(self.linear(x))
        b = x + self.drop2(self.other(x))
        a, b = b, a
        return self.norm(a) + self.norm2(b) - b


@case
class Copies(Parts):
    def forward(self, x):
        x = x + self.drop(self.linear(x))
        residual = x
        x = self.norm(x)
        again = residual
        residual = again + self.drop2(self.other(x))
        return self.norm2(residual) + again


@case
class Walrus(Parts):
    def forward(self, x):
        if (y := self.drop(self.linear(x))).dim() == 3:
            x = x + y
        return self.norm(z := x + self.drop2(y)) + z


@case
class Conditional(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x)) if x.dim() == 3 else self.drop2(x)
        return self.norm(x + (y if y.dim() == 3 else x)) + (self.drop3(x) or x if y is None else x)


@case
class Compared(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        return x + torch.where(y > 0, y, self.drop2(x)) + (y == 0)


# Order, aliasing and effects.


@case
class OutOfOrder(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        x = x * 2
        z = self.drop2(self.other(x))
        return self.norm(x + z) + y


@case
class ChangedBetween(Parts):
    """The branch's input changes in place after its dropout was called."""

    def forward(self, x):
        x = x * 1
        y = self.drop(x)
        x.mul_(3)
        return y + x


@case
class ResidualChangedBetween(Parts):
    def forward(self, x):
        stream = x * 1
        z = stream + self.drop(self.linear(x))
        stream.add_(5)
        return self.norm(z) + stream


@case
class ResidualChangedInTheSum(Parts):
    def forward(self, x):
        stream = x * 1
        return self.drop(self.linear(x)) + stream.mul_(2) + self.norm(stream)


@case
class SumChangedInPlace(Parts):
    def forward(self, x):
        z = x + self.drop(self.linear(x))
        z += 1
        z.mul_(2)
        return self.norm(z) + z


@case
class ResultChangedInPlace(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        y.add_(x)
        y[:, 0] = 0
        return y


@case
class NormedThenChanged(Parts):
    def forward(self, x):
        with torch.no_grad():
            z = x + self.drop(self.linear(x))
            y = self.norm(z)
            z += 1
            w = self.norm2(z)
        return x * y * z * w


@case
class InplaceDropout(Parts):
    def forward(self, x):
        y = self.linear(x)
        z = self.inplace(y)
        return self.norm(y + z) + self.inplace(x * 2)


@case
class InplaceFunction(Parts):
    def forward(self, x):
        y = self.linear(x)
        F.dropout(y, self.rate, self.training, True)
        return x + F.dropout(y, self.rate, self.training, inplace=False)


@case
class InplaceActivation(Parts):
    def forward(self, x):
        y = self.linear(x)
        return self.drop(self.relu(y)) + y


@case
class ViewOfTheBranch(Parts):
    def forward(self, x):
        y = self.linear(x)
        first = y[:, 0]
        z = self.drop(y)
        first.zero_()
        return x + z + y


@case
class ActivationOfAChangedTensor(Parts):
    def forward(self, x):
        with torch.no_grad():
            y = x * 1
            hidden = self.act(y)
            y.zero_()
            z = self.drop(hidden) + y
        return x * z


@case
class ParameterChangedBetween(Parts):
    """A hidden weight that the forward itself replaces."""

    def forward(self, x):
        y = self.linear(x)
        bias, self.linear.bias = self.linear.bias, self.other.bias
        y = self.drop(y)
        self.linear.bias = bias
        return y + x


@case
class NormBetweenEffects(Parts):
    def forward(self, x):
        order = []
        y = x + self.drop(self.note(order, self.linear(x), "a"))
        z = self.norm(y) + self.drop2(self.note(order, self.other(x), "b"))
        assert order == ["a", "b"]
        return z

    def note(self, order, x, name):
        order.append(name)
        return x


@case
class RatesChangedBetween(Parts):
    def forward(self, x):
        self.drop.p = 0.5 if self.rate else 0.0
        y = self.drop(self.linear(x))
        self.drop.p = 0.1 if self.rate else 0.0
        out = x + y
        self.drop.p = 0.2 if self.rate else 0.0
        return out


@case
class TrainingChangedBetween(Parts):
    def forward(self, x):
        y = x + self.drop(self.linear(x))
        training = self.training
        self.eval()
        z = self.norm(y) + self.drop2(y)
        self.train(training)
        return z + self.drop3(x)


@case
class UnderNoGrad(Parts):
    def forward(self, x):
        with torch.no_grad():
            y = self.drop(self.linear(x))
            z = x + self.drop2(y)
        return self.norm(z) * x + y


@case
class DroppedUnderNoGradAddedOutside(Parts):
    def forward(self, x):
        with torch.no_grad():
            y = self.drop(self.linear(x))
        z = x + y
        with torch.no_grad():
            w = self.norm(z)
        return z * w


@case
class Detached(Parts):
    def forward(self, x):
        return x + self.drop(self.linear(x)).detach() + self.drop2(x.detach())


# Control flow.


@case
class Branches(Parts):
    def forward(self, x):
        if x.shape[0] > 1:
            y = self.drop(self.linear(x))
        elif x.shape[0] > 5:
            y = self.drop2(x)
        else:
            y = x
        if x.shape[1] > 100:
            z = y
        else:
            z = x + y
            z = z * 1
        return self.norm(z) + y


@case
class EarlyReturns(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        if x.dim() == 2:
            return y
        if x.dim() == 3:
            return self.norm(x + y), y
        return None


@case
class Loop(Parts):
    def forward(self, x):
        for linear, drop in zip(self.linears, self.drops, strict=True):
            x = x + drop(linear(x))
        return self.norm(x)


@case
class LoopWithAState(Parts):
    def forward(self, x):
        y = None
        for i in range(3):
            if y is not None:
                x = self.norm(x + y)
            y = self.linear(x)
            if i == 2:
                y = self.drop(y)
                break
        else:
            return x
        return x + y


@case
class LoopThatCarriesASum(Parts):
    """One dropout, thrice: each call draws the mask of its number."""

    def forward(self, x):
        y = x
        for _ in range(3):
            z = self.norm(y)
            y = x + self.drop(self.linear(z))
        return y


@case
class While(Parts):
    def forward(self, x):
        n = 0
        while n < 2:
            n += 1
            if n == 2:
                continue
            x = x + self.drop(self.linear(x))
        else:
            x = x + self.drop2(x)
        return self.norm(x)


@case
class TryExcept(Parts):
    def forward(self, x):
        y = x
        try:
            y = self.drop(self.linear(x))
            if x.dim() == 3:
                raise ValueError
            y = None
        except (KeyError, ValueError):
            y = x + y
        else:
            y = 2 * x
        finally:
            x = self.norm(y) + self.drop2(x)
        return x


@case
class ErrorOfAnAddition(Parts):
    """A sum that torch refuses is refused where it stands."""

    def forward(self, x):
        y = self.drop(self.linear(x))
        try:
            y = x[:, :2] + y
        except RuntimeError:
            y = x - y
        return self.norm(y)


@case
class ErrorOfANorm(Parts):
    def forward(self, x):
        wide = torch.cat([x, x], -1)
        try:
            z = wide + self.drop(wide)
            return self.norm(z)
        except RuntimeError:
            return self.norm(x) + z.sum()


@case
class With(Parts):
    def forward(self, x):
        with contextlib.nullcontext(self.drop(self.linear(x))) as y, contextlib.nullcontext():
            x = x + y
        return self.norm(x)


@case
class Match(Parts):
    def forward(self, x):
        match x.dim():
            case 3:
                x = x + self.drop(self.linear(x))
            case _:
                x = self.drop2(x)
        return self.norm(x)


@case
class Deleted(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        z = x + y
        del y
        return self.norm(z)


@case
class Asserted(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        assert y is not None
        assert isinstance(y, torch.Tensor), type(y)
        assert isinstance(x + y, torch.Tensor)
        return self.norm(x + y)


# Scopes.


@case
class Comprehension(Parts):
    def forward(self, x):
        ys = [drop(linear(x)) for linear, drop in zip(self.linears, self.drops, strict=True)]
        more = {i: self.drop(self.linear(x[i])) for i in range(1)}
        return x + sum(ys) + sum(d(x) for d in self.drops) + more[0]


@case
class ComprehensionOfOne(Parts):
    """A dropout within a comprehension's own scope, at one place and called twice."""

    def forward(self, x):
        return x + sum([self.drop(self.linear(y)) + y for y in (x, 2 * x)])


@case
class Lambda(Parts):
    def forward(self, x):
        branch = lambda y: y + self.drop(self.linear(y))  # noqa: E731
        return self.norm(branch(x))


@case
class Closure(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        z = x + self.drop2(y)

        def inner(scale):
            return scale * z + y

        def outer():
            nonlocal z
            z = self.drop3(z)
            return z

        return inner(2) + outer() + self.norm(z)


@case
class Generator(Parts):
    def forward(self, x):
        return x + sum(self.halves(x))

    def halves(self, x):
        for linear in self.linears:
            yield self.drop(linear(x)) + x
        yield x
        yield from (self.drop2(x),)


@case
class Helper(Parts):
    def forward(self, x):
        return self.norm(x + self.branch(x)) + self.pair(x)[0]

    def branch(self, x):
        return self.drop(self.linear(x))

    def pair(self, x):
        y = self.drop2(self.other(x))
        return y, x


@case
class HelperCalledTwice(Parts):
    def forward(self, x):
        return self.branch(self.drop, x) + self.branch(self.drop2, x)

    def branch(self, drop, x):
        return x + drop(self.linear(x))


@case
class HelperWithKeywords(Parts):
    def forward(self, x):
        return self.norm(x + self.branch(x=x, scale=2) + self.branch(x, scale=3, drop=self.drop2))

    def branch(self, x, *, scale=1, drop=None):
        return scale * (drop or self.drop)(self.linear(x))


@case
class Recursion(Parts):
    def forward(self, x, depth=0):
        if depth == 1:
            return x + self.drop(self.linear(x))
        return self.forward(x, depth + 1) + x


@case
class RecursiveHelper(Parts):
    def forward(self, x):
        return self.norm(x + self.again(x, self.drops))

    def again(self, x, drops):
        if not drops:
            return x
        return drops[0](self.again(self.linear(x), drops[1:]))


def outside(x, p, training):
    return F.dropout(x, p, training)


def outside_add(module, x):
    return module.drop(module.linear(x)) + x


@case
class OutsideHelpers(Parts):
    def forward(self, x):
        return self.norm(x + outside(self.linear(x), self.rate, self.training)) + outside_add(
            self, x
        )


@case
class StaticAndClassMethods(Parts):
    def forward(self, x):
        return self.norm(x + self.static(self.linear(x), self.drop)) + self.of_class(x, self.drop2)

    @staticmethod
    def static(x, drop):
        return drop(x)

    @classmethod
    def of_class(cls, x, drop):
        return drop(x) * len(cls.__name__)


@case
class Property(Parts):
    @property
    def chosen(self):
        return self.drop

    def forward(self, x):
        return x + self.chosen(self.linear(x))


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


def hidden(function):
    def wrapper(self, *args):
        return function(self, *args) + 1

    return wrapper


@case
class Decorated(Parts):
    @doubled
    @doubled
    def forward(self, x):
        return self.norm(x + self.branch(x))

    @doubled
    def branch(self, x):
        return self.drop(self.linear(x))


@case
class DecoratedWithoutTrace(Parts):
    @hidden
    def forward(self, x):
        return self.norm(x + self.drop(self.linear(x)))


@case
class DecoratedByTorch(Parts):
    @torch.enable_grad()
    def forward(self, x):
        return self.norm(x + self.branch(x)) + self.drop2(x)

    @torch.no_grad()
    def branch(self, x):
        return self.drop(self.linear(x))


@case
class PrivateNames(Parts):
    def __init__(self):
        super().__init__()
        self.__drop, self.__fc = nn.Dropout(0.2), nn.Linear(E, E)

    def forward(self, x):
        return self.norm(x + self.__branch(x)) + self.__drop(x)

    def __branch(self, x):
        __hidden = self.__fc(x)
        return self.drop2(__hidden)


class Base(Parts):
    def forward(self, x, scale=1.0):
        return self.norm(x + self.branch(x)) * scale

    def branch(self, x):
        return self.drop(self.linear(x))


@case
class Super(Base):
    def forward(self, x):
        return super().forward(x, scale=2.0) + self.drop2(self.other(x))


@case
class SuperByName(Base):
    def forward(self, x):
        return Base.forward(self, x) + super(SuperByName, self).branch(x)  # noqa: UP008


@case
class SuperOfAMethod(Base):
    def branch(self, x):
        return 3 * super().branch(x) + self.drop2(x)


@case
class Inherited(Base):
    pass


@case
class ClassCell(Parts):
    def forward(self, x):
        assert __class__ is ClassCell
        assert isinstance(self, __class__)
        return x + self.drop(self.linear(x))


@case
class Defaults(Parts):
    def forward(self, x, scale=2.0, *more, p=0.3, flag: bool = True, **rest):
        assert not more
        assert not rest
        return scale * x + F.dropout(
            self.linear(x), p if self.rate else 0.0, self.training and flag
        )


@case
class Self(Parts):
    def forward(this, x, /):
        return this.norm(x + this.drop(this.linear(x)))


@case
class SelfReplaced(Parts):
    def forward(self, x):
        out = x + self.drop(self.linear(x))
        self = None
        return out


@case
class ShadowedNames(Parts):
    def forward(self, x):
        F = self.norm
        dropout = self.drop
        _tridrop = self.linear
        return F(x + dropout(_tridrop(x)))


@case
class ImportedInside(Parts):
    def forward(self, x):
        from torch.nn import functional as G

        return x + G.dropout(self.linear(x), self.rate, self.training)


@case
class Global(Parts):
    def forward(self, x):
        global _calls
        _calls = self.drop(x)
        return x + _calls


# Aliases.


@case
class ResidualChangedThroughAView(Parts):
    def forward(self, x):
        s = x * 1
        v = s[:, :3]
        z = s + self.drop(self.linear(x))
        v.zero_()
        return self.norm(z) + s


@case
class ResidualChangedByAHelper(Parts):
    def touch(self, t):
        return t.mul_(2)

    def forward(self, x):
        s = x * 1
        z = s + self.drop(self.linear(x))
        w = self.touch(s)
        return self.norm(z) + w


@case
class ResidualChangedInAnArgument(Parts):
    def forward(self, x):
        s = x * 1
        z = s + self.drop(self.linear(x))
        return self.pair(s.add_(1), self.norm(z), z)

    def pair(self, a, b, d):
        return a + b * d


@case
class InputOfAHelperChanged(Parts):
    def br(self, x):
        return self.drop(x)

    def forward(self, x):
        s = x * 1
        y = self.br(s)
        s.mul_(2)
        return self.norm(s + y)


@case
class InputOfAHelperChangedInTheSum(Parts):
    def br(self, x):
        return self.drop(x)

    def forward(self, x):
        s = x * 1
        return self.norm(self.br(s) + s.mul_(2))


@case
class InputChangedInTheSum(Parts):
    def forward(self, x):
        s = x * 1
        return self.norm(self.drop(s) + s.mul_(2))


@case
class ResidualChangedInACall(Parts):
    def forward(self, x):
        s = x * 1
        return self.pair(s + self.drop(self.linear(x)), s.mul_(2))

    def pair(self, a, b):
        return a + b


@case
class SumPassedToHelper(Parts):
    def forward(self, x):
        z = x + self.drop(self.linear(x))
        return self.h(z, x)

    def h(self, z, x):
        z = z + self.drop2(self.other(self.norm(z)))
        return self.norm2(z) + x


@case
class SumsInAList(Parts):
    def forward(self, x):
        hs = []
        for linear, drop in zip(self.linears, self.drops, strict=True):
            x = x + drop(linear(x))
            hs.append(x)
            x = self.norm(x)
        return torch.stack(hs).sum(0) + x


@case
class YieldedSums(Parts):
    def gen(self, x):
        x = x + self.drop(self.linear(x))
        yield x
        y = self.norm(x)
        yield y + x

    def forward(self, x):
        return sum(self.gen(x))


@case
class InputOfANormChanged(Parts):
    def forward(self, x):
        with torch.no_grad():
            s = x * 1
            z = self.norm(s)
            s.zero_()
            y = self.drop(z)
        return x * y + s


@case
class NormUnderNoGrad(Parts):
    def forward(self, x):
        with torch.no_grad():
            z = self.norm(x)
        return x + self.drop(z)


@case
class ActivationUnderNoGrad(Parts):
    def forward(self, x):
        with torch.no_grad():
            z = self.act(self.linear(x))
        return x + self.drop(z)


@case
class Indexed(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))[..., :4]
        return torch.cat([y, self.drop2(self.other(x))[:, :, 4:]], -1) + x


@case
class StarredUse(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        a, b = y
        return torch.stack([*y]) + x + a + b


@case
class RequiresGradResidual(Parts):
    def forward(self, x):
        return self.norm(x.detach() + self.drop(self.linear(x.detach())))


@case
class Transposed(Parts):
    def forward(self, x):
        z = x.transpose(0, 1)
        z = z + self.drop(self.linear(z))
        return self.norm(z).transpose(0, 1).contiguous()


@case
class SumInAWhile(Parts):
    def forward(self, x):
        s = x + self.drop(self.linear(x))
        k = 0
        while k < 2:
            k += 1
            h = self.norm(s)
            s = s + self.drop2(self.other(h)) if k == 1 else s
        return s


@case
class SumInABranch(Parts):
    def forward(self, x):
        s = x
        if x.dim() == 3:
            s = x + self.drop(self.linear(x))
        h = self.norm(s)
        if h.dim() == 3:  # noqa: SIM108
            r = s
        else:
            r = x
        return r + self.drop2(self.other(h))


@case
class InnerFunction(Parts):
    def forward(self, x):
        s = x + self.drop(self.linear(x))

        def f(t):
            return self.norm(t) + self.drop2(self.other(t))

        return f(s) + s


@case
class DefaultOfALambda(Parts):
    def forward(self, x):
        y = self.drop(self.linear(x))
        f = lambda z=y: z + x  # noqa: E731
        return f()


@case
class InnerClass(Parts):
    def forward(self, x):
        y = x + self.drop(self.linear(x))

        class K:
            v = self.norm(y)

        return K.v + y


# Functions.


@case
class Functional(Parts):
    def forward(self, x):
        y = torch.nn.functional.dropout(self.linear(x), p=self.rate, training=self.training)
        y = F.gelu(F.dropout(y, training=self.training, p=self.rate))
        y = nn.functional.dropout(input=F.silu(y), p=self.rate, training=self.training)
        return self.norm(x + y)


class Renamed(Parts):
    def forward(self, x):
        return x + renamed(self.linear(x), 0.25, self.training)


def test_a_function_by_another_name():
    site = tridrop.swap(Renamed()).sites[0]
    assert site.code.startswith("renamed(")
    assert site.parts == ("linear", "dropout", "add")


@case
class FunctionalDefaults(Parts):
    def forward(self, x):
        if not self.training or not self.rate:
            return x
        return F.dropout(x) + torch.dropout(x, 0.0, True) + F.dropout(self.linear(x), training=True)


@case
class ComputedRate(Parts):
    def forward(self, x):
        rates = [self.rate, self.rate / 2]
        y = F.dropout(self.linear(x), max(rates), self.training)
        return self.norm(x + F.dropout(y, *[rates[1]], **{"training": self.training}))


@case
class StarredArguments(Parts):
    def forward(self, *args, **kwargs):
        (x,) = args
        y = self.drop(*[self.linear(x)])
        return self.norm(x + self.drop2(input=y))


@case
class Softmax(Parts):
    def forward(self, x):
        q = self.linear(x)
        weights = self.drop((q @ q.mT).softmax(-1))
        again = self.drop3(torch.softmax(x @ x.mT, -1))
        return weights @ x + (again + weights) @ x


@case
class SoftmaxOverQueries(Parts):
    """It is not fused: its mask is that of elements, and the report says so."""

    def forward(self, x):
        return self.drop2(F.softmax(x @ x.mT, dim=1)) @ x


@case
class SoftmaxUsedTwice(Parts):
    def forward(self, x):
        weights = F.softmax(x @ x.mT, dim=-1)
        return self.drop(weights) @ x + weights @ x


@case
class SoftmaxOfAChangedTensor(Parts):
    def forward(self, x):
        scores = x @ x.mT
        weights = scores.softmax(-1)
        scores = scores.mul_(0)
        return self.drop(weights) @ x + scores @ x


@case
class SoftmaxWithADtype(Parts):
    def forward(self, x):
        weights = F.softmax(x @ x.mT, dim=-1, dtype=torch.float64).to(x.dtype)
        return self.drop(weights) @ x


@case
class Others(Parts):
    def forward(self, x):
        y = F.alpha_dropout(x, self.rate * 0) + F.dropout1d(x, 0.0, self.training)
        return y + self.drop(x)


@case
class LayerScaleInPlaceOfNorm(Parts):
    def forward(self, x):
        return x + self.scale * self.drop(self.linear(x)) + self.drop2(self.other(x)) * self.scale


@case
class Mixed(Parts):
    def forward(self, x):
        x, y = x + self.drop(self.linear(x)), self.norm(x)
        x += self.drop2(y)
        y -= self.drop3(x)
        x = self.norm(x)
        x = self.drop(x)
        return x + y


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_forwards_equal_eager_with_every_switch(name):
    model = fill(FORWARDS[name]())
    report = hold(model, draw(N, T, E), switches=swap_twin.FEW)
    assert report.sites, "something drops in it"


# Whole models.


class NanoLayerNorm(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.bias = nn.Parameter(torch.zeros(E)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E, bias=bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.2), nn.Dropout(0.1)
        self.n_head, self.n_embd, self.dropout, self.flash = H, E, 0.2, flash
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None,
                dropout_p=self.dropout if self.training else 0, is_causal=True,
            )  # fmt: skip
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class NanoMLP(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(E, 4 * E, bias=bias), nn.Linear(4 * E, E, bias=bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.15)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x


class NanoBlock(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.ln_1, self.attn = NanoLayerNorm(bias), CausalSelfAttention(bias, flash)
        self.ln_2, self.mlp = NanoLayerNorm(bias), NanoMLP(bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class NanoGPT(nn.Module):
    def __init__(self, bias, flash):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(11, E),
                "wpe": nn.Embedding(T, E),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([NanoBlock(bias, flash) for _ in range(2)]),
                "ln_f": NanoLayerNorm(bias),
            }
        )
        self.lm_head = nn.Linear(E, 11, bias=False)

    def forward(self, idx, targets=None):
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_a_gpt_of_ones_own(bias, flash):
    words = torch.arange(N * T).view(N, T) % 11
    model = fill(NanoGPT(bias, flash))
    report = hold(model, words, targets=words.flip(1))
    assert report.counts()["left"] == 0
    parts = {site.code.partition("(")[0]: set(site.parts) for site in report.sites}
    assert parts["torch.nn.functional.scaled_dot_product_attention"] >= {"dropout", "matmul"}
    assert parts["self.attn_dropout"] == {"softmax", "dropout"}
    for name in ("self.resid_dropout", "self.dropout"):
        assert parts[name] > {"linear", "dropout"} if bias else {"dropout"}


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(x, **kwargs) + x


def feed_forward() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(E), nn.Linear(E, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, E),
        nn.Dropout(0.1),
    )  # fmt: skip


def test_sequences():
    """In the way of lucidrains' libraries; nested, indexed, shared and sliced."""
    hold(fill(feed_forward()), draw(N, T, E))
    hold(fill(Residual(feed_forward())), draw(N, T, E))
    report = hold(fill(nn.Sequential(Residual(feed_forward()), nn.LayerNorm(E))), draw(N, T, E))
    assert report.counts()["left"] == 0
    assert len(report.sites) == 2

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = feed_forward()

        def forward(self, x):
            y = self.net[:4](x)
            for layer in self.net[4:]:
                y = layer(y)
            return x + y + self.net(x)

    with pytest.warns(UserWarning, match="called twice"):
        hold(fill(Sliced()), draw(N, T, E), switches=ONE)


@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_shared_modules():
    class Shared(Parts):
        def __init__(self):
            super().__init__()
            self.drop2 = self.drop
            self.again = self.linear

        def forward(self, x):
            x = self.norm(x + self.drop(self.linear(x)))
            return self.norm(x + self.drop2(self.again(x)))

    block = fill(Shared())
    hold(block, draw(N, T, E))
    hold(nn.Sequential(block, block), draw(N, T, E))


FORWARD = """
def forward(self, x):
    return self.norm(x + self.drop(self.linear(x)))
"""


def test_a_forward_without_source():
    """From exec, from a string that is gone, and with the source of another function."""
    names: dict = {}
    exec(FORWARD, names)
    lost = type("Lost", (Parts,), {"forward": names["forward"]})
    report = hold(fill(lost()), draw(N, T, E))
    assert "source" in " ".join(site.reason for site in report.sites)

    text = FORWARD.replace("return", "y =") + "    return x - y\n"
    linecache.cache["<other>"] = (len(text), None, text.splitlines(True), "<other>")
    exec(compile(FORWARD, "<other>", "exec"), names)
    other = type("Other", (Parts,), {"forward": names["forward"]})
    report = hold(fill(other()), draw(N, T, E))
    assert "source" in " ".join(site.reason for site in report.sites)


def test_a_forward_on_the_instance():
    model = fill(FORWARDS["SumUsedTwice"]())
    model.forward = functools.partial(lambda self, x: x + self.drop(self.linear(x)), model)
    tridrop.swap(model)
    with swap_twin.logged() as log:
        out = model(draw(N, T, E))
    (event,) = log
    keep = tridrop.keep_mask(event.seed(), out.shape, model.drop.p)
    branch = torch.where(keep, model.linear(draw(N, T, E)) / (1 - model.drop.p), 0)
    torch.testing.assert_close(out, draw(N, T, E) + branch)


def test_p_of_one_and_of_a_schedule():
    """The rate is read at each call."""
    model = fill(FORWARDS["SumUsedTwice"]())
    ours = swap_twin.clone(model)
    report = tridrop.swap(ours)
    for p in (1.0, 0.0, 0.7):
        model.drop.p = ours.drop.p = p
        with swap_twin.logged() as log:
            found = swap_twin.outcome(ours, (draw(N, T, E),))
        with swap_twin.replayed(log, report, model):
            swap_twin.equal(found, swap_twin.outcome(model, (draw(N, T, E),)))


# Generated forwards.

VALUES = st.sampled_from(["x", "y", "z"])
EXPRESSIONS = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("self.{}({})".format, st.sampled_from(
            ["linear", "other", "act", "norm", "norm2", "drop", "drop2", "drop3", "inplace"]
        ), inner),
        st.builds("{} * {}".format, VALUES, inner),
        st.builds("F.dropout({}, self.rate, self.training)".format, inner),
        st.builds("F.gelu({})".format, inner),
    ),
    max_leaves=4,
)  # fmt: skip
SIMPLE = st.one_of(
    st.builds("{} = {}".format, VALUES, EXPRESSIONS),
    st.builds("{} = {}".format, VALUES, EXPRESSIONS),
    st.builds("{} += {}".format, VALUES, EXPRESSIONS),
    st.builds("{}.mul_(0.5)".format, VALUES),
    st.builds("{}, {} = {}, {}".format, VALUES, VALUES, EXPRESSIONS, EXPRESSIONS),
)


def indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


BLOCK = st.lists(SIMPLE, min_size=1, max_size=3).map(indented)
STATEMENTS = st.one_of(
    SIMPLE,
    SIMPLE,
    st.builds("if {}.sum() > 0:\n{}\nelse:\n{}".format, VALUES, BLOCK, BLOCK),
    st.builds("for i in range(2):\n{}".format, BLOCK),
    st.builds("for i in range(3):\n    if i == 1:\n        continue\n{}".format, BLOCK),
    st.builds("while z.sum() > 0:\n{}\n    break\nelse:\n{}".format, BLOCK, BLOCK),
    st.builds("try:\n{}\n    x.missing\nexcept AttributeError:\n{}".format, BLOCK, BLOCK),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(STATEMENTS, min_size=1, max_size=5), st.lists(EXPRESSIONS, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_generated_forwards(statements, results):
    """Whatever the forward: eager's numbers, where eager has any."""
    returned = f"return {' + '.join(results)}"
    body = indented(["x, y, z = x * 1, x * 2, x * 3", *statements, returned])
    text = f"def forward(self, x):\n{body}\n"
    name = f"<generated {abs(hash(text))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    names = {"F": F}
    exec(compile(text, name, "exec"), names)
    model = fill(type("Generated", (Parts,), {"forward": names["forward"]})(), 0.1)
    ours = swap_twin.clone(model)
    report = tridrop.swap(ours)
    with swap_twin.logged() as log, contextlib.suppress(RuntimeError):
        swap_twin.outcome(ours.train(), (draw(N, E),))
    try:
        with swap_twin.replayed(log, report, model):
            swap_twin.outcome(model.train(), (draw(N, E),))
        for twin in (swap_twin.quiet(model).train(), model.eval()):
            swap_twin.outcome(twin, (draw(N, E),))
    except RuntimeError:  # of a gradient of what was changed in place
        return
    hold(model, draw(N, E), switches=ONE)


# The machinery: reaching definitions.


def defined(text: str) -> tuple[dict[str, set[str]], flow.Flow]:
    """Of each use, as "name@line", the lines (0: a parameter) of what reaches it."""
    node = ast.parse(textwrap.dedent(text)).body[0]
    found = flow.analyse(node)
    uses: dict[str, set[str]] = {}
    for name, ids in found.reaching.items():
        lines = set()
        for i in ids:
            d = found.definitions[i]
            lines.add(d.statement.lineno if d.statement is not None else 0)
        uses.setdefault(f"{name.id}@{name.lineno}", set()).update(lines)
    return uses, found


FLOWS = {
    "straight": ("def f(x):\n x = x\n return x", {"x@2": {0}, "x@3": {2}}),
    "if": (
        "def f(x, c):\n if c:\n  x = 1\n return x",
        {"c@2": {0}, "x@4": {0, 3}},
    ),
    "if that returns": (
        "def f(x, c):\n if c:\n  x = 1\n  return x\n return x",
        {"c@2": {0}, "x@4": {3}, "x@5": {0}},
    ),
    "loop": (
        "def f(x):\n for i in x:\n  y = x\n  x = y\n return x",
        {"x@2": {0}, "x@3": {0, 4}, "y@4": {3}, "x@5": {0, 4}},
    ),
    "break": (
        "def f(x):\n while x:\n  x = 1\n  if x:\n   break\n  x = 2\n else:\n  x = x\n return x",
        {"x@2": {0, 6}, "x@4": {3}, "x@8": {0, 6}, "x@9": {3, 8}},
    ),
    "continue": (
        "def f(x):\n for i in []:\n  if i:\n   x = 1\n   continue\n  x = 2\n return x",
        {"i@3": {2}, "x@7": {0, 4, 6}},
    ),
    "try": (
        "def f(x):\n try:\n  x = 1\n  x = 2\n except E:\n  x\n else:\n  x\n finally:\n  x\n",
        {"E@5": set(), "x@6": {0, 3, 4}, "x@8": {4}, "x@10": {0, 3, 4}},
    ),
    "augmented": ("def f(x, y):\n x += y\n return x", {"y@2": {0}, "x@2": {0}, "x@3": {2}}),
    "tuple": ("def f(x):\n a, b = x, x\n return b", {"x@2": {0}, "b@3": {2}}),
    "with": ("def f(x):\n with x as y:\n  x = y\n return x", {"x@2": {0}, "y@3": {2}, "x@4": {3}}),
    "annotated": ("def f(x):\n y: int = x\n z: int\n return y", {"x@2": {0}, "y@4": {2}}),
    "keyword only": ("def f(*a, x=1, **k):\n return a, x, k", {"a@2": {0}, "x@2": {0}, "k@2": {0}}),
    "return in try": (
        "def f(x):\n try:\n  x = 1\n  return x\n finally:\n  x\n",
        {"x@4": {3}, "x@6": {0, 3}},
    ),
    "break in try": (
        "def f(x):\n for i in []:\n  try:\n   x = 1\n   break\n  finally:\n   x\n return x",
        {"x@7": {0, 4}, "x@8": {0, 4}},
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_what_reaches_a_use(name):
    text, expected = FLOWS[name]
    assert defined(text)[0] == expected


@pytest.mark.parametrize(
    "line",
    [
        "g = lambda: y",
        "[y for _ in ()]",
        "def g():\n  return y",
        "class G:\n  a = y",
        "del y",
        "sum(y for _ in ())",
        "(y := 1)",
        "{**{1: y for _ in ()}}",
    ],
    ids=str,
)
def test_what_others_may_see_escapes(line):
    assert "y" in defined(f"def f(x):\n y = x\n {line}\n return x")[1].escaped


@pytest.mark.parametrize("line", ["locals()", "eval('x')", "exec('')", "vars()"])
def test_what_cannot_be_followed_is_refused(line):
    with pytest.raises(flow.Unfollowed):
        defined(f"def f(x):\n {line}\n return x")


# The machinery: source.


class Written:
    """A class whose methods are built again from their own trees."""

    __count = 3

    def plain(self, x, y=2, *more, z=3, **rest):
        return x, y, more, z, rest

    def positional(self, x, /, y: int = 4) -> tuple:
        """Its text."""
        return x, y

    def private(self):
        return self.__count

    def class_cell(self):
        return __class__

    def parent(self):
        return super().__init__

    def inner(self, x):
        y = [x + i for i in range(2)]

        def add(z):
            nonlocal x
            x += 1
            return x + z

        return add(1), y, (lambda: x)(), {k: x + i for i, k in enumerate("a")}

    def generator(self):
        yield from (1, 2)

    @doubled
    def decorated(self):
        return 21

    @doubled
    @doubled
    def twice(self):
        return 21


def closed(value):
    class Closed:
        def forward(self):
            return value, __class__

    return Closed


CALLS = {
    "plain": [(1,), (1, 5, 6)], "positional": [(1,), (1, 5)], "private": [()], "class_cell": [()],
    "inner": [(1,)], "decorated": [()], "twice": [()],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_method_is_built_again(name):
    method = Written.__dict__[name]
    function, rewrap = source.unwrap(method)
    again = rewrap(source.build(function, source.parse(function), {"_new": 1}))
    for arguments in CALLS[name]:
        assert again(Written(), *arguments) == method(Written(), *arguments)
    for attribute in ("__name__", "__qualname__", "__doc__", "__defaults__", "__kwdefaults__",
                      "__annotations__", "__module__"):  # fmt: skip
        assert getattr(again, attribute) == getattr(method, attribute)
    code, old = source.unwrap(again)[0].__code__, function.__code__
    assert (code.co_filename, code.co_name) == (old.co_filename, old.co_name)
    assert {line for *_, line in code.co_lines()} >= {line for *_, line in old.co_lines()} - {
        old.co_firstlineno
    }


def test_a_generator_and_a_parent_are_built_again():
    for name in ("generator", "parent"):
        function, _ = source.unwrap(Written.__dict__[name])
        again = source.build(function, source.parse(function), {})
        if name == "generator":
            assert list(again(Written())) == [1, 2]
        else:
            one = Written()
            assert again(one) == one.parent()


def test_closures_are_shared():
    one, two = closed(1), closed(2)
    for cls in (one, two):
        function, _ = source.unwrap(cls.__dict__["forward"])
        again = source.build(function, source.parse(function), {})
        assert again(None) == (1 if cls is one else 2, cls)
        assert all(a is b for a, b in zip(again.__closure__, function.__closure__, strict=True)), (
            "the cells themselves"
        )


def test_a_decorator_is_not_run_again():
    runs = []

    def counting(function):
        runs.append(function)
        return doubled(function)

    class Counted:
        @counting
        def forward(self):
            return 1

    method = Counted.__dict__["forward"]
    function, rewrap = source.unwrap(method)
    new = rewrap(source.build(function, source.parse(function), {}))
    assert new(Counted()) == 2
    assert len(runs) == 1
    assert method.__wrapped__ is function, "the old one is as it was"


@pytest.mark.parametrize(
    "function",
    [len, functools.partial(print), staticmethod(doubled), lambda self: 1, type("C", (), {})()],
    ids=["builtin", "partial", "static", "lambda", "object"],
)
def test_what_is_no_method_is_unreadable(function):
    with pytest.raises(source.Unreadable):
        source.parse(source.unwrap(function)[0])
