"""Forwards that use a value twice, late or not at all: who needs it, and when."""

import torch
import torch.nn.functional
from swap_forwards import Parts, case


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
