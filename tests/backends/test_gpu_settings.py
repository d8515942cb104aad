"""Launch settings follow the GPU that the operands are on; the GPUs here are made up."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tridrop.backends.triton import attention_launch, gpu, launch
from tridrop.backends.triton.compile import SHARED, TARGETS
from tridrop.spec.attention import AttentionInputs, AttentionOptions
from tridrop.spec.operands import AttentionBackward


class Machine:
    """A driver of several GPUs, and the kernels that were launched, with their settings."""

    def __init__(self, *archs):
        self.archs, self.current, self.utils, self.launched = archs, 0, self, []

    def get_current_device(self):
        return self.current

    def get_current_target(self):
        return TARGETS[self.archs[self.current]]

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[self.archs[device]]}

    @contextmanager
    def on(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def __getitem__(self, grid):
        return lambda *args, **settings: self.launched.append((self.current, settings))


@pytest.fixture
def machine(monkeypatch):
    own = Machine("sm_90", "sm_86", "sm_100", "gfx942")
    monkeypatch.setattr(driver, "_active", own)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "on", own.on)
    for name in vars(attention_launch):
        if name.endswith("_kernel"):
            monkeypatch.setattr(attention_launch, name, own)
    gpu._present.cache_clear()
    yield own
    gpu._present.cache_clear()


def test_each_device_is_asked_for_its_own_figures(machine):
    found = [gpu.of(torch.device("cuda", i)) for i in range(4)]
    assert found == [(90, 232448), (80, 101376), (100, 232448), (0, 65536)]
    machine.current = 1
    assert gpu.of(torch.device("cuda", 0)) == (90, 232448)


@pytest.mark.parametrize("current", [0, 1, 2])
def test_tiles_are_those_of_the_operands_device(machine, current):
    machine.current = current
    options = AttentionOptions(scale=1.0, max_query=300, max_key=300)
    needs = (True, True, True, False, False)
    for index in range(4):
        machine.launched.clear()
        device = torch.device("cuda", index)
        with FakeTensorMode():  # tensors of a device that is not there
            query = torch.empty(1, 2, 300, 256, dtype=torch.float32, device=device)
            lse = torch.empty(1, 2, 300, device=device)
            inputs = AttentionInputs(query, query, query)
            attention_launch.attention_forward(inputs, options)
            attention_launch.attention_backward(
                AttentionBackward(query, None, query, lse, *inputs), options, needs
            )
        assert {at for at, _ in machine.launched} == {index}
        blocks = [s["BLOCKS"] for _, s in machine.launched if "BLOCKS" in s]
        kind = gpu.Gpu({"sm_90": 90, "sm_86": 80, "sm_100": 100, "gfx942": 0}[machine.archs[index]],
                       SHARED[machine.archs[index]])  # fmt: skip
        choices = ("forward_tile", "dquery_tile", "dkey_tile")
        tiles = [getattr(attention_launch, name)(256, 4, kind) for name in choices]
        assert [(b.M, b.N, b.RELOAD) for b in blocks] == [
            (t.queries, t.keys, t.reload) for t in tiles
        ]
        # only the GPU with little of it cannot hold keys and values beside the products' operands
        small = machine.archs[index] == "sm_86"
        assert bool(blocks[2].RELOAD) is small


def test_tiles_of_16_bits_follow_the_generation(machine):
    tiles = [
        attention_launch.forward_tile(128, 2, gpu.of(torch.device("cuda", i))) for i in range(4)
    ]
    assert [t.keys for t in tiles] == [128, 64, 128, 64]


HOPPER = gpu.Gpu(90, SHARED["sm_90"])


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("mask", [0, 1, 2, 4])
def test_hoppers_tiles_load_ahead_as_far_as_there_is_room(width, mask):
    forward = attention_launch.forward_tile(width, 2, HOPPER, mask)
    assert forward == attention_launch.Tile(128, 64 if mask else 128, 8, 3, ahead=True)
    dquery = attention_launch.dquery_tile(width, 2, HOPPER, mask)
    assert dquery == attention_launch.Tile(128, 64, 8, 3)
    narrow, wide = (64, 64, 4, 3), (128, 64, 8, 2)
    dkey = attention_launch.dkey_tile(width, 2, HOPPER)
    assert dkey == attention_launch.Tile(*(narrow if width <= 64 else wide), apart=True)


@pytest.mark.parametrize("mask", [0, 1, 2, 4])
def test_with_less_shared_memory_tiles_are_smaller_by_rule(mask):
    """In the place of an error of Triton's, which knows what a kernel takes once it is compiled."""
    found = {}
    for choose in (attention_launch.forward_tile, attention_launch.dquery_tile):
        tiles = []
        for shared in range(HOPPER.shared, 96 << 10, -1 << 10):
            tile = choose(128, 2, gpu.Gpu(90, shared), mask)
            if tile not in tiles:
                tiles.append(tile)
        sizes = [(t.keys, t.num_stages) for t in tiles]
        assert sizes == sorted(sizes, reverse=True)
        found[choose.__name__] = sizes
    smaller = [(64, 3), (64, 2)]
    assert found["dquery_tile"] == smaller
    assert found["forward_tile"] == (smaller if mask else [(128, 3), (128, 2), *smaller])


@pytest.mark.parametrize("generation", [0, 80, 100])
def test_other_gpus_keep_two_stages_and_draw_where_they_need(generation):
    kind = gpu.Gpu(generation, 227 << 10)
    for width in (64, 128, 256):
        tiles = [attention_launch.dkey_tile(width, 2, kind)]
        for choose in (attention_launch.forward_tile, attention_launch.dquery_tile):
            tiles += [choose(width, 2, kind, mask) for mask in (0, 4)]
        assert all(tile.num_stages <= 2 for tile in tiles)
        assert not any(tile.ahead or tile.apart for tile in tiles)


@pytest.mark.parametrize(
    ("arch", "generation"), [(80, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)]
)
def test_generations(machine, monkeypatch, arch, generation):
    target = GPUTarget("cuda", arch, 32)
    monkeypatch.setattr(machine, "get_current_target", lambda: target)
    assert gpu.of(torch.device("meta")).generation == generation


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_whose_positions_do_not_fit_32_bits_are_refused(packed):
    long = attention_launch.LENGTH_LIMIT + 1
    tensor = torch.empty(1, 1, long, 16, device="meta")
    offsets = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    inputs = AttentionInputs(tensor, tensor, tensor, cu_query=offsets, cu_key=offsets)
    options = AttentionOptions(scale=1.0, max_query=long, max_key=long)
    with pytest.raises(ValueError, match=rf"{long} queries and {long} keys; .*up to {long - 1}"):
        attention_launch.attention_forward(inputs, options)
