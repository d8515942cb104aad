"""What Hopper's asynchronous products hide, in the machine code of attention with every feature.

Held for the pinned Triton and for 3.6.0, which comes with torch 2.11; another version schedules
anew, and is held to what does not depend on it. Of the features those in ``USUAL`` are asked, since
each takes half a minute to compile, and all of them where TRIDROP_FEATURES=all is set.
"""

import json
import os
from pathlib import Path

import hopper_machine_code as program
import pytest
import triton
from apart import printed

PROGRAM = Path(program.__file__)
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
HELD = triton.__version__ == "3.6.0" or f"triton=={triton.__version__}" in CONSTRAINTS.read_text()
USUAL = ("plain", "causal", "bool mask")
FEATURES = tuple(program.FEATURES) if os.environ.get("TRIDROP_FEATURES") == "all" else USUAL
CASES = [(feature, width) for feature in FEATURES for width in program.WIDTHS]
PRODUCTS = {"forward": 2, "dquery": 3, "dkey": 4}  # of the source
held = pytest.mark.skipif(not HELD, reason=f"Triton {triton.__version__} schedules by itself")


@pytest.fixture(scope="module")
def records():
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    found = json.loads(printed(PROGRAM, *FEATURES))
    return {(r["arch"], r["kernel"], r["feature"], r["width"]): r for r in found}


def test_everything_is_there(records):
    kernels = {(r["arch"], r["kernel"]) for r in records.values()}
    assert kernels == {("sm_80", "forward"), *(("sm_90", kernel) for kernel in PRODUCTS)}
    assert len(records) == 4 * len(CASES)


@held
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mask_is_drawn_in_the_shadow_of_the_products(records, case):
    """None of Philox's products between the wait for the scores and the product with values."""
    products = records[("sm_90", "forward", *case)]["products"]
    # with a mask a few of 62 are left
    assert products["philox"] <= (0 if "mask" not in case[0] else 4)


# Bytes that forward spills, all of them in the few tiles at the edge.
AT_THE_EDGE = {
    ("3.7.1", "sm_80", "bool mask", 128): 8,
    ("3.7.1", "sm_80", "bf16 mask", 128): 16,
    ("3.6.0", "sm_80", "bool mask", 128): 56,
    ("3.6.0", "sm_80", "bool mask, causal", 128): 16,
    ("3.6.0", "sm_80", "bf16 mask", 128): 16,
    ("3.6.0", "sm_90", "window", 128): 16,
    ("3.6.0", "sm_90", "shard inside a tile", 128): 16,
}
BUDGET = {("plain", 64): 500, ("plain", 128): 480, ("causal", 64): 500, ("causal", 128): 480}


@held
@pytest.mark.parametrize("case", BUDGET, ids=str)
def test_little_is_left_between_the_products_of_forward(records, case):
    """It was 808 with dropout at 128 columns, and is 368 without."""
    r = records[("sm_90", "forward", *case)]
    assert r["tile"] == [128, 128]
    assert r["products"]["instructions"] <= BUDGET[case]


@held
@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_waited_for_in_the_groups_of_the_source(records, kernel, case):
    """Else ptxas waits for each by itself: see attention_tiles.place_of for what makes it."""
    assert records[("sm_90", kernel, *case)]["products"]["groups"] == PRODUCTS[kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loops_load_ahead(records, case):
    # a block of keys and one of values; or of queries, gradients and both statistics of these,
    # of which three stages do not fit at 128 columns
    ahead = {"forward": 2, "dquery": 2} | ({"dkey": 4} if case[1] == 64 else {})
    for kernel, groups in ahead.items():
        r = records[("sm_90", kernel, *case)]
        assert r["loads_pending"] >= groups, kernel
        assert r["shared"] <= r["limit"]


@held
@pytest.mark.parametrize("arch", program.ARCHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_spills_nothing_whatever_the_feature(records, arch, case):
    r = records[(arch, "forward", *case)]
    assert r["spilled_in_the_loop"] == 0
    assert r["spill_bytes"] <= AT_THE_EDGE.get((triton.__version__, arch, *case), 0)


@held
@pytest.mark.parametrize(("width", "most"), [(64, 48), (128, 120)])
def test_the_gradients_of_keys_spill_little_with_a_mask(records, width, most):
    """It was 344 and 528 bytes."""
    assert records[("sm_90", "dkey", "bool mask", width)]["spill_bytes"] <= most
