"""Seeds of a ``rng`` block around and inside the capture of a CUDA graph; no device is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tridrop
from tridrop.contract import seeds

CUDA = torch.device("cuda", 0)


class Stream:
    capturing = False


@pytest.fixture
def stream(monkeypatch):
    """The stream of a device that is not there, whose tensors hold no data."""
    own = Stream()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: own.capturing)
    # Nothing can be computed on the device that is not there: tables are made on the CPU.
    as_seed = seeds.as_seed
    monkeypatch.setattr(seeds, "as_seed", lambda seed, *_: as_seed(seed))

    def table(self, seed, numbered, size=seeds._TABLE):
        return torch.zeros(size, 2, dtype=torch.int64)

    monkeypatch.setattr(seeds._Context, "_table", table)
    return own


def take(site=None):
    return seeds.seed_for(CUDA, None, site)


def seed_tensor():
    with FakeTensorMode():
        return torch.empty(2, dtype=torch.int64, device=CUDA)


@pytest.mark.parametrize("site", [None, 3])
def test_the_first_call_of_a_block_with_an_int_is_not_captured(stream, site):
    with tridrop.rng(7):
        stream.capturing = True
        with pytest.raises(RuntimeError, match="Give rng a seed tensor on that device"):
            take(site)
        stream.capturing = False
        assert take(site).shape == (2,)
        stream.capturing = True
        assert take(site).shape == (2,)  # the table is there


def test_a_seed_tensor_serves_a_capture_inside_its_block(stream):
    with tridrop.rng(seed_tensor()):
        stream.capturing = True
        assert take().shape == take(1023).shape == (2,)
        with pytest.raises(RuntimeError, match="no seed number 1024"):
            take(1024)  # the table would have to grow


@pytest.mark.parametrize("seed", [7, None])
def test_a_block_inside_the_capture_is_part_of_the_graph(stream, seed):
    stream.capturing = True
    with tridrop.rng(seed_tensor() if seed is None else seed):
        assert take(3).shape == take(1024).shape == (2,)


def test_calls_on_a_cpu_are_in_no_graph(stream):
    with tridrop.rng(7):
        stream.capturing = True
        assert seeds.seed_for(torch.device("cpu"), None).shape == (2,)


def test_without_a_cuda_context_nothing_asks_for_a_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    with tridrop.rng(7):
        assert tridrop.dropout(torch.ones(4), 0.5).shape == (4,)
