"""The last stage of sums over rows: its values, and one order on all of NVIDIA's GPUs."""

import json
import re

import pytest
import torch
from apart import printed
from hosts import DEVICE

from tridrop.backends.triton import sums


@pytest.mark.parametrize("strips", [1, 2, 127, 128, 300])
@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (3, 65)])
def test_sums_are_those_of_fp64(strips, shape):
    torch.manual_seed(0)
    partial = torch.randn(strips, *shape, device=DEVICE)
    (found,) = sums.totals([partial], [torch.float32])
    assert found.shape == shape
    error = (found.double() - partial.double().sum(0)).abs()
    # a rounding for each addition, of what is added in magnitude
    assert bool((error <= partial.abs().double().sum(0) * strips * 2**-24).all())
    (again, half) = sums.totals([partial, partial], [torch.float32, torch.float16])
    assert torch.equal(again, found)
    assert torch.equal(half, found.half())  # rounded once


@pytest.mark.parametrize("strips", [1, 3])
def test_sums_of_equal_sizes_are_one_launch(strips, monkeypatch):
    launches = []
    run = sums.launch.run
    monkeypatch.setattr(
        sums.launch, "run", lambda *args, **kwargs: launches.append(args) or run(*args, **kwargs)
    )
    torch.manual_seed(0)
    partials = [torch.randn(strips, 9, device=DEVICE) for _ in range(4)]
    dtypes = [torch.bfloat16, None, torch.bfloat16, torch.float32]
    found = sums.totals([*partials, None], [*dtypes, torch.float32])
    assert found[1] is None
    assert found[4] is None
    for i in (0, 2, 3):
        torch.testing.assert_close(found[i], partials[i].sum(0).to(dtypes[i]))
    # one for bfloat16 and one for fp32; a single strip is the sum already
    assert len(launches) == (0 if strips == 1 else 2)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 2, 4)])
def test_sums_of_nothing_are_zero(shape):
    (found,) = sums.totals([torch.empty(shape, device=DEVICE)], [torch.float16])
    assert found.shape == shape[1:]
    assert found.dtype == torch.float16
    assert not found.any()


PROGRAM = """
import json, torch
from tridrop.backends import triton as backend
from tridrop.backends.triton.compile import capture
from tridrop.commands.inspection.rows import TABLE

rows = ["dropout_add bias backward", "dropout_add_layer_norm backward", "softmax_dropout backward"]
texts = {}
for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
    for name in rows:
        call = lambda: TABLE[name].call(backend, torch.bfloat16, "tridrop")
        for found in capture(arch, call, "ttgir"):
            texts.setdefault(found.kernel, {})[arch] = found.text
print(json.dumps(texts))
"""


def summed(text):
    """Of every tt.reduce of a kernel, in order, the type and the layout of what it sums."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\S+<\{.*\}>)", text, flags=re.M))
    types = re.findall(r"\}\) (?:\{[^}]*\} )?: \((tensor<[^#]*)(#\w+)>\) ->", text)
    return [(kind, layouts[layout]) for kind, layout in types]


def test_one_order_on_all_of_nvidias_gpus():
    """The order in which threads add follows the compiler's layouts, which are the same."""
    sums_of = {"backward": 1, "norm_backward": 4, "softmax_backward": 4, "sum": 1}
    for name, texts in json.loads(printed("-c", PROGRAM)).items():
        found = {arch: summed(text) for arch, text in texts.items()}
        assert len(found["sm_80"]) == sums_of[name.removesuffix("_kernel")], name
        assert found["sm_86"] == found["sm_90"] == found["sm_100"] == found["sm_80"], name
        assert found["gfx942"] != found["sm_80"], name  # wider warps
