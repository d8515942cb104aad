"""The machine code of products with a dropped matrix, compiled without a GPU."""

import json
from pathlib import Path

import pytest
import triton
from apart import printed

MINOR = ".".join(triton.__version__.split(".")[:2])
PROGRAM = Path(__file__).parents[1] / "product_machine_code.py"


@pytest.fixture(scope="module")
def records():
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    return json.loads(printed(PROGRAM))


def test_nothing_spills_and_tensor_cores_multiply(records):
    assert {r["kernel"] for r in records} == {"product_kernel", "product_backward_kernel"}
    for r in records:
        assert r["spills"] == 0, r
        assert r["products"] > 0, r
        assert r["wide_loads"] > 0, r  # 16 bytes, to registers or to shared memory


def test_masks_take_no_shared_memory_of_their_own(records):
    """What may be added is the masked tile: an operand of the product, as the tile without a mask.

    On sm_90 both pass through shared memory, and nothing is added (two bytes an element for rank
    256, and in forward with Triton 3.8). sm_80 can take the tile that is not masked from its
    pipeline's buffer, and the masked one needs room: two bytes an element, in backward four, with
    the gradient on its way to the store.
    """
    operands = {}
    for r in records:
        key = (r["target"], r["kernel"], tuple(r["ranks"]))
        operands.setdefault(key, {}).setdefault(r["p"] > 0, []).append(r)
    for (target, kernel, ranks), found in operands.items():
        for plain, dropped in zip(found[False], found[True], strict=True):
            more = 0 if target == "sm_90" and ranks != (256,) else 4
            if MINOR == "3.8" and kernel == "product_kernel":
                more = max(more, 2)
            keys = 32 * len(ranks)  # what the compiler rounds up to
            limit = plain["shared"] + more * dropped["tile"] + keys
            assert dropped["shared"] <= limit, (target, kernel, ranks)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_programs_fit_the_shared_memory(records, target):
    limit = {"sm_80": 163 << 10, "sm_90": 227 << 10}[target]
    assert max(r["shared"] for r in records if r["target"] == target) <= limit
