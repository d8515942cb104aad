"""tridrop.swap of forwards that nobody foresaw: the numbers are eager's, and nothing raises."""

import pytest
import swap_forwards_control  # noqa: F401
import swap_forwards_effects  # noqa: F401
import swap_forwards_functions  # noqa: F401
import swap_forwards_laziness  # noqa: F401
import swap_forwards_scopes  # noqa: F401
import swap_twin
from swap_forwards import FORWARDS, E, N, Parts, T
from swap_twin import draw, fill, hold
from torch.nn.functional import dropout as renamed

import tridrop


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.filterwarnings("ignore:site . was called twice")
def test_forwards_equal_eager_with_every_switch(name):
    model = fill(FORWARDS[name]())
    report = hold(model, draw(N, T, E), switches=swap_twin.FEW)
    assert report.sites, "something drops in it"


class Renamed(Parts):
    def forward(self, x):
        return x + renamed(self.linear(x), 0.25, self.training)


def test_a_function_by_another_name():
    site = tridrop.swap(Renamed()).sites[0]
    assert site.code.startswith("renamed(")
    assert site.parts == ("linear", "dropout", "add")
