"""Without a CUDA device the Triton kernels run in Triton's interpreter, on CPU tensors."""

import importlib.metadata
import importlib.util
import os
import signal

import pytest
import torch
import torchvision_ops  # noqa: F401  # before anything imports torchvision

# The tensors are small, and torch's threads waiting for each other slow parallel workers badly.
torch.set_num_threads(1)
# Those of the programs that tests start sleep while they wait, and turn no loops.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not torch.cuda.is_available():
    # Read when the kernels are defined, so before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        import quick_interpreter  # noqa: F401

# What is started in the background may be told to ignore Ctrl-C; the tests raise it in themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

LIBRARIES = ("torch", "triton", "transformers", "peft", "timm", "keras")


@pytest.fixture(autouse=True)
def threads_are_as_before():
    """A library may change the number of torch's threads, by which products are rounded."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_report_header() -> str:
    """The versions that the results are about."""
    installed = {d.name for d in importlib.metadata.distributions()}
    names = [name for name in LIBRARIES if name in installed]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
