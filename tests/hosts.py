"""What tests run on: the device of their tensors, and what serves it beside Triton."""

import pytest
import torch

from tridrop import backends
from tridrop.functional import known

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The compiled loops on a CPU; a CUDA tensor has the reference alone.
PLAIN = backends.name_for(torch.device("cpu")) if DEVICE == "cpu" else "reference"


def imported_with(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """As if tridrop had been imported with these variables in the environment, and no others.

    What they name is no part of a known call's key, since it does not change in a process. So no
    call is known afterwards.
    """
    fields = {backends.ENVIRONMENT: "named", backends.CPU_ENVIRONMENT: "of_cpu_tensors"}
    assert variables.keys() <= fields.keys()
    for variable, field in fields.items():
        value = variables.get(variable)
        monkeypatch.setattr(backends._state, field, value)
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr(known, "_known", {})
