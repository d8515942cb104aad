"""What the forwards of swap_forwards_*.py are made of, and the table of them.

Each class there is one way of writing a forward. What is fused in it does not matter; only that
evaluation, p = 0 and p > 0 (with the exported masks) are what eager gives, for every combination of
switches, and that the report says what happened.
"""

import torch
from torch import nn

N, T, E, H = 2, 5, 8, 2
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
