"""Forwards with control flow."""

import contextlib

import torch
import torch.nn.functional
from swap_forwards import Parts, case


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
