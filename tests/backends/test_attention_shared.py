"""The shared memory of attention's kernels, laid out without a GPU, and the tile that saves it.

Every GPU, dtype, width, kind of mask and precision is asked for, but of their combinations those
that take most of what a GPU has, since each call takes seconds to compile. All of them are where
TRIDROP_FEATURES=all is set.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from apart import printed
from hosts import DEVICE

import tridrop
from tridrop.backends.triton import attention_launch

PROGRAM = Path(__file__).parents[1] / "attention_shared.py"

ALL = os.environ.get("TRIDROP_FEATURES") == "all"
# What the rule for Hopper's tiles tells apart: all kinds and D = 64 take minutes to compile.
KINDS = "plain,causal,own bool mask,float mask,float mask of the dtype"
# name -> lists of arguments of the program: archs, dtypes, widths, kinds of masks, precisions.
# "float mask" is the mask that takes most: in fp32, with a row for each query.
CALLS = {
    # in bf16 the kinds that differ in the bytes of a mask
    "widest": [
        ("sm_86", "fp32", "256"),
        ("sm_86", "bf16", "256", "plain,own bool mask,float mask,float mask of the dtype"),
    ],
    "sm_89": [("sm_86,sm_89", "fp32", "256", "plain,float mask")],
    # from 128 columns on, 16 bits take as much as 32
    "widths": [
        ("sm_86", "fp32", "16,32,64,128,256", "float mask"),
        ("sm_86", "fp16", "16,128", "float mask"),
        ("sm_86", "bf16", "64,256", "float mask"),
    ],
    "tf32": [("sm_86", "fp32", "128,256", "float mask", "high")],
    # the dtype and the width that take most of what is there
    "others": [
        ("sm_80,sm_120,gfx942", "fp32", "256", "float mask"),
        ("sm_90,sm_100", "bf16", "256", "float mask"),
        ("gfx942", "bf16", "128", "float mask"),
    ],
    "hopper": [("sm_90", "bf16", "128", KINDS)],
}
if ALL:
    CALLS = {
        "widest": [("sm_86", "fp32,bf16", "256")],
        "sm_89": [("sm_86,sm_89", "fp32,bf16", "256", "plain,float mask")],
        "widths": [("sm_86", "fp32,fp16,bf16", "16,32,64,128,256", "float mask")],
        "tf32": [("sm_86", "fp32", "128,256", "float mask,causal", "high")],
        "others": [("sm_80,sm_90,sm_100,sm_120,gfx942", "fp32,bf16", "128,256", "float mask")],
        "hopper": [("sm_90", "bf16", "64,128")],
    }
NAMES = ("arch", "dtype", "width", "kind", "precision")


@pytest.fixture(scope="module")
def compiled():
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    arguments = [text for given in CALLS.values() for call in given for text in ("--", *call)]
    return json.loads(printed(PROGRAM, *arguments[1:]))


def records(compiled, name):
    """The records of one entry of the calls."""
    entries = [dict(zip(NAMES, given, strict=False)) for given in CALLS[name]]
    return [
        r
        for r in compiled
        if any(
            all(str(r[n]) in given.split(",") for n, given in asked.items())
            for asked in ({"precision": "highest"} | entry for entry in entries)
        )
    ]


def too_much(found):
    return [r for r in found if r["shared"] > r["limit"]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_widest_heads_fit_every_mask(compiled, dtype):
    found = [r for r in records(compiled, "widest") if r["dtype"] == dtype]
    assert {r["limit"] for r in found} == {101376}
    assert len({r["kind"] for r in found}) == (11 if ALL or dtype == "fp32" else 4)
    kernels = {"forward", "delta", "dquery", "dkey", "dmask"}
    assert {r["kernel"].split("_")[1] for r in found} == kernels
    assert too_much(found) == []


def test_sm_89_is_as_sm_86(compiled):
    found = records(compiled, "sm_89")
    sizes = [[r["shared"] for r in found if r["arch"] == arch] for arch in ("sm_86", "sm_89")]
    # kernels without and with a mask that learns
    assert len(sizes[0]) >= len({r["dtype"] for r in found}) * (4 + 5)
    assert sizes[0] == sizes[1]
    assert too_much(found) == []


def test_every_width_and_dtype_fits(compiled):
    found = records(compiled, "widths")
    assert {r["dtype"] for r in found} == {"fp32", "fp16", "bf16"}
    assert {r["width"] for r in found} == {16, 32, 64, 128, 256}
    assert len({(r["width"], r["dtype"]) for r in found}) == (15 if ALL else 9)
    assert too_much(found) == []


def test_tf32_fits(compiled):
    found = records(compiled, "tf32")
    assert {r["precision"] for r in found} == {"high"}
    assert {r["width"] for r in found} == {128, 256}
    assert len({(r["width"], r["kind"]) for r in found}) == (4 if ALL else 2)
    assert too_much(found) == []


def test_other_gpus_have_room_as_well(compiled):
    found = records(compiled, "others")
    assert len({r["limit"] for r in found}) == 4
    assert len({(r["arch"], r["dtype"]) for r in found}) == (10 if ALL else 6)
    assert too_much(found) == []


def test_hoppers_three_stages_fit_every_mask(compiled):
    found = records(compiled, "hopper")
    assert {*KINDS.split(",")} <= {r["kind"] for r in found}
    assert too_much(found) == []
    # what the rule counts with is what is laid out
    held = {(r["kernel"], r["kind"]): r["shared"] for r in found if r["width"] == 128}
    for kernel, kind, loads, masks in (
        ("attention_forward_kernel", "plain", 229376, 0),
        ("attention_forward_kernel", "own bool mask", 131072, 1),
        ("attention_forward_kernel", "float mask", 131072, 4),
        ("attention_dquery_kernel", "causal", 163840, 0),
        ("attention_dquery_kernel", "float mask of the dtype", 163840, 2),
    ):
        assert held[kernel, kind] == loads + masks * 2 * 128 * 64, (kernel, kind)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_keys_and_values_that_are_read_again_are_the_same(monkeypatch, masked, heads):
    """The gradients are those of the tile that holds them, to the bit."""
    torch.manual_seed(0)
    query = torch.randn(2, heads[0], 40, 16, device=DEVICE, requires_grad=True)
    key, value = (
        torch.randn(2, heads[1], 70, 16, device=DEVICE, requires_grad=True) for _ in range(2)
    )
    mask = torch.rand(2, 1, 40, 70, device=DEVICE) < 0.7 if masked else None
    asked = []

    def gradients(again):
        def tile(*_):
            asked.append(again)
            return attention_launch.Tile(16, 32, 4, 1, again)

        monkeypatch.setattr(attention_launch, "dkey_tile", tile)
        with tridrop.backend("triton"):
            out = tridrop.scaled_dot_product_attention(
                query, key, value, mask, 0.2, not masked, enable_gqa=heads[0] != heads[1], seed=3
            )
            return torch.autograd.grad(out.square().sum(), (query, key, value))

    for held, read in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(held, read)
        assert held.abs().max() > 0
    assert asked == [False, True]
