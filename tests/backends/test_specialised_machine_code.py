"""The specialised forward of attention in Hopper's machine code: what each group of warps does.

Held for the pinned Triton and for 3.6.0, which comes with torch 2.11; of other versions that are
not refused, the instructions and spills are not held.
"""

import json
from pathlib import Path

import pytest
import specialised_machine_code as program
import triton
from apart import printed

from tridrop.backends.triton import specialised
from tridrop.spec.attention import SPECIALIZE

PROGRAM = Path(program.__file__)
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
HELD = triton.__version__ == "3.6.0" or f"triton=={triton.__version__}" in CONSTRAINTS.read_text()
held = pytest.mark.skipif(not HELD, reason=f"Triton {triton.__version__} schedules by itself")
CASES = [(f, w) for f in program.FEATURES for w in program.WIDTHS]
# Philox's products per turn and thread, for 64 scores: 8 calls, which share the first two rounds.
PHILOX = 124
# Instructions per turn with dropout, 2 to 4 % above the most that was seen.
BUDGET = {"dense": 970, "dense, odd length": 1080, "p on the device": 1000}
WITH_BOUNDS = 1120


@pytest.fixture(scope="module")
def records():
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    found = json.loads(printed(PROGRAM, **{SPECIALIZE: "1"}))
    return {(r["feature"], r["width"], r["p"], r["dtype"]): r for r in found}


def test_this_version_is_not_refused():
    """Otherwise every test here would fail, on a version that was not tried."""
    assert ".".join(triton.__version__.split(".")[:2]) in specialised.VERSIONS


def test_three_groups_of_warps_divide_the_work(records):
    assert len(records) == len(CASES) + (5 if program.EVERY else 2)
    for about, r in records.items():
        assert r["threads"] == 3 * 128, about
        loading = [g for g in r["groups"] if g["loads"]]
        computing = [g for g in r["groups"] if g["products"]]
        assert len(r["groups"]) == 3, about
        (one,) = loading
        assert (one["loads"], one["products"], one["philox"]) == (2, 0, 0), about
        for group in computing:
            # Q K and P V, of 64 of the 128 queries
            assert (group["products"], group["rows"], group["loads"]) == (2, 64, 0), about
            drawn = PHILOX if about[2] else 0
            assert group["philox"] == drawn if HELD else bool(group["philox"]) == bool(drawn), about
        # The loading group gives its registers to the others.
        assert {40, 232} <= set(r["registers"]), about


def test_it_fits_the_shared_memory(records):
    assert all(r["shared"] <= r["limit"] for r in records.values())


@held
def test_nothing_spills(records):
    for about, r in records.items():
        assert r["spill_bytes"] == 0, about
        assert all(g["spills"] == 0 for g in r["groups"]), about


def test_descriptors_are_as_large_as_the_memory_that_they_fill(records):
    """Triton 3.6 compiles a divided load of an undivided descriptor, which would write too far."""
    for about, r in records.items():
        width = about[1]
        queries, keys = ([f"{n}x{width}"] * 2 for n in (64, 128))
        assert r["copies"] == [queries, queries, keys, keys], about


def test_each_half_has_rows_of_its_own(records):
    """The mask, the bounds and the stores of the second group begin 64 queries later."""
    for about, r in records.items():
        first, second = r["ranges"]
        # columns have ranges as well: of the keys, and of the values where they are stored
        columns = [[0, n] for n in {128, about[1]}]
        assert [0, 64] in first, about
        assert [64, 128] in second, about
        assert all(x in ([0, 64], *columns) for x in first), about
        assert all(x in ([64, 128], *columns) for x in second), about


def test_dense_blocks_are_not_compared_with_bounds(records):
    for (feature, *_), r in records.items():
        assert r["bounds"] == (0 if feature in ("dense", "p on the device") else 2)


@held
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bound_costs_two_instructions_a_score(records, case):
    feature, width = case
    most = max(g["instructions"] for g in records[feature, width, 0.1, "bfloat16"]["groups"])
    assert most <= BUDGET.get(feature, WITH_BOUNDS)
