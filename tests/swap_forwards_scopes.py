"""Forwards with scopes and callables of their own."""

import functools

import torch
import torch.nn.functional
import torch.nn.functional as F
from swap_forwards import E, Parts, case
from torch import nn


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
