"""Forwards that call functions of torch."""

import torch
import torch.nn.functional
import torch.nn.functional as F
from swap_forwards import Parts, case
from torch import nn


@case
class Functional(Parts):
    def forward(self, x):
        y = torch.nn.functional.dropout(self.linear(x), p=self.rate, training=self.training)
        y = F.gelu(F.dropout(y, training=self.training, p=self.rate))
        y = nn.functional.dropout(input=F.silu(y), p=self.rate, training=self.training)
        return self.norm(x + y)


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
