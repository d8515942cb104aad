"""Forwards whose order, aliases and effects matter."""

import torch
import torch.nn.functional
import torch.nn.functional as F
from swap_forwards import Parts, case


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
