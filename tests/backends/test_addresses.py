"""Indices and offsets past 2^31: the TTIR of every kernel, and columns in the interpreter."""

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from apart import printed
from hosts import DEVICE

from tridrop import backends
from tridrop.backends.triton.tiles import Origin, columns_at

PROGRAM = Path(__file__).parents[1] / "wide_calls.py"


@pytest.fixture(scope="module")
def records():
    """Read in a process of its own: in this one Triton may be interpreting."""
    return json.loads(printed(PROGRAM))


KNOWN = {  # call -> what of its kernel wraps
    "block": "arith.muli",
    "stride": "arith.muli",
    "loop": "arith.muli",
    "mask": "arith.muli",
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_wraps_on_its_way_to_an_address_is_found(records, name):
    (record,) = (r for r in records if r["call"] == name)
    assert any(KNOWN[name] in fault and ": " in fault for fault in record["faults"])


def test_what_wraps_elsewhere_is_no_fault(records):
    (record,) = (r for r in records if r["call"] == "right")
    assert record["faults"] == []


def test_no_index_of_a_kernel_leaves_its_type_and_every_launch_says_how_it_rounds(records):
    own = [r for r in records if r["call"] not in (*KNOWN, "right")]
    assert [r for r in own if r["faults"]] == []
    assert all(r["addresses"] for r in own)
    # That products and sums are fused is asked for, as Triton's default changes with 3.10.
    assert all(r["fuses"] for r in own)
    here = Path(backends.__file__).parent / "triton"
    kernels = {
        line.split("def ")[1].split("(")[0]
        for path in here.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    # in calls of their own, and as `tridrop inspect` makes them
    for inspected in (False, True):
        assert {
            r["kernel"] for r in own if r["call"].startswith("inspect: ") == inspected
        } == kernels


@triton.jit
def _columns_kernel(out, groups, block, cols, origin, BLOCK_COLS: tl.constexpr):
    col, group = columns_at(block, cols, origin, BLOCK_COLS)
    tl.store(out + tl.arange(0, BLOCK_COLS), col.to(tl.int64))
    tl.store(groups + tl.arange(0, BLOCK_COLS // 8), group)


@pytest.mark.parametrize("cols", [1000, 2**31 - 1, 2**31, 2**31 + 4099, 2**40])
@pytest.mark.parametrize("shift", [0, 7])
@pytest.mark.parametrize("group", [0, 2**36])
def test_columns_and_groups_of_the_last_blocks(cols, shift, group):
    size = 64
    last = (cols + shift - 1) // size
    # blocks behind the last one: the axes of a grid cannot always have just their number
    for block in (0, last - 1, last, last + 1, last + 65535):
        found = torch.empty(size, dtype=torch.int64, device=DEVICE)
        groups = torch.empty(size // 8, dtype=torch.int64, device=DEVICE)
        _columns_kernel[(1,)](
            found, groups, block, cols, Origin((), (), group, shift), BLOCK_COLS=size
        )
        expected = torch.arange(size) + (block * size - shift)
        inside = (expected >= 0) & (expected < cols)
        found, groups = found.cpu(), groups.cpu()
        # 32 bits may wrap where columns end, and then to negative columns, which are masked off.
        assert torch.equal((found >= 0) & (found < cols), inside)
        assert torch.equal(found[inside], expected[inside])
        assert torch.equal(groups, torch.arange(size // 8) + (group + block * size // 8))
