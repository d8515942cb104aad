"""Wrong and odd arguments by the thousand; `python -m tests.abuse` makes as many as are wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from abuse import __main__ as command
from abuse.calls import Call, torchs_attention
from abuse.child import changed
from abuse.outcomes import Outcome, difference, disagreement, of_error
from abuse.targets import targets

import tridrop
from tridrop.backends.cpu import serving

needs_numba = pytest.mark.skipif(not serving.can_serve(), reason="numba does not serve CPU tensors")
ROOT = Path(__file__).parents[2]
TARGETS = targets()


def abuse(*options):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "tests.abuse", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_no_wrong_call_crashes_disagrees_poisons_or_raises_what_is_not_clear():
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True)
    result = abuse("--calls", "2000", "--seed", "1")
    after = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ["all", "2000"] in [line.split() for line in result.stdout.splitlines()]
    assert after.stdout == before.stdout


@needs_numba
def test_tritons_kernels_agree_with_the_loops():
    """In the interpreter, also where arguments have odd strides."""
    result = abuse("--calls", "400", "--seed", "2", "--against", "triton")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ["all", "400"] in [line.split() for line in result.stdout.splitlines()]


def test_attention_has_torchs_as_a_third_way():
    """It decides where the loops and the composition differ, and is not asked what it cannot do."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 8) for length in (3, 9, 9))
    mask, keys = torch.rand(3, 9) < 0.8, torch.rand(2, 9) < 0.8
    options = {"attn_mask": mask, "is_causal": True, "scale": 1.0, "key_mask": keys | ~keys[0]}
    found = torchs_attention(q, k, v, **options, window=None, return_lse=False, seed=1)
    expected = tridrop.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    for other in ({"dropout_p": 0.1}, {"window": 2}, {"softcap": 1.0}):
        with pytest.raises(NotImplementedError):
            torchs_attention(q, k, v, **other)


def test_every_public_name_is_a_target():
    for place in (tridrop, tridrop.functional, tridrop.nn, tridrop.shims):
        for name in place.__all__:
            if callable(getattr(place, name)) and name != "Prediction":
                assert name in TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_right_calls_are_right(name):
    """What is odd in a call is then all that can be wrong; a new op may need a line in right.py."""
    outcomes = [Call(TARGETS[name], 1, number, oddities=0).run("reference") for number in range(4)]
    # Writing into a leaf that requires gradients is what torch refuses.
    allowed = ("a leaf Variable that requires grad",)
    wrong = [o.error for o in outcomes if o.kind != "ok" and not any(a in o.error for a in allowed)]
    assert not wrong


def raised(function):
    try:
        function()
    except Exception as error:
        return of_error(error)
    raise AssertionError("nothing was raised")


def test_outcomes_say_whose_an_error_is():
    assert raised(lambda: tridrop.dropout("x", 0.5)).kind == "TypeError"
    assert raised(lambda: tridrop.dropout(torch.ones(2), 2.0)).kind == "ValueError"
    leaf = torch.ones(2, requires_grad=True)
    assert raised(lambda: tridrop.nn.Dropout(inplace=True)(leaf)).kind == "torch's own error"
    # An attribute that is missing within the package is nobody else's.
    assert raised(lambda: tridrop.contract.mask.rate_table("x")).kind == "another error of ours"


def test_outcomes_are_compared():
    a, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert difference(a, a.clone()) is None
    assert difference(nan, nan.clone()) is None
    assert difference(torch.complex(a, nan), torch.complex(a, nan)) is None
    assert "NaN" in difference(torch.complex(a, a), torch.complex(a, nan))
    assert "NaN" in difference(a, nan)
    assert "infinities" in difference(a, torch.tensor([1.0, float("inf")]))
    assert "differ" in difference(a, a + 0.01)
    assert difference(a, a.double()) is not None
    assert difference(a, a[None]) is not None
    right, wrong = Outcome("ok", results=[a]), Outcome("ValueError", "no")
    assert disagreement(right, wrong)[0] == "only one way raises"
    assert disagreement(right, Outcome("ok", results=[nan]))[0] == "the two ways differ"
    assert disagreement(wrong, wrong) is None
    # In a row with NaN Triton's kernels may have more of them, and nothing else.
    apart, others = Outcome("ok", results=[nan]), Outcome("ok", results=[nan + 0.1])
    assert disagreement(right, apart, "triton")[0] == "not finite, and Triton differs"
    assert disagreement(right, others, "triton")[0] == "the two ways differ"
    refused = Outcome("another error of ours", "x: use tridrop.backend('reference')")
    assert disagreement(right, refused, "triton")[0] == "refused by Triton"
    assert disagreement(refused, right, "triton")[0] == "only one way raises"


def watched(monkeypatch, code):
    """What the parent makes of a child that runs ``code`` in the place of calls 3 to 8."""
    popen = subprocess.Popen

    def start(_, **options):
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(command.subprocess, "Popen", start)
    found = command.Found(0)
    after = command.child(1, 3, 9, None, "reference", found, False)
    return after, [(fault["kind"], fault["number"]) for fault in found.faults], found


BEGUN = "print('{\"begun\": 4}', flush=True)"


def test_a_crash_is_that_of_the_call_that_was_begun(monkeypatch):
    code = f"{BEGUN}; import os; os.kill(os.getpid(), 11)"
    after, faults, found = watched(monkeypatch, code)
    assert (after, faults) == (5, [("crash", 4)])
    assert ["crash", "1"] in [line.split() for line in command.table(found).splitlines()]


def test_a_call_that_does_not_end_is_one_that_hangs(monkeypatch):
    monkeypatch.setattr(command, "_PATIENCE", 1.0)
    after, faults, _ = watched(monkeypatch, f"{BEGUN}; import time; time.sleep(60)")
    assert (after, faults) == (5, [("hang", 4)])


def test_right_calls_are_compared_to_the_bit():
    a = torch.tensor([1.0, 2.0])
    before = [("right", Outcome("ok", results=[a]))]
    assert not changed(before, [("right", Outcome("ok", results=[a.clone()]))])
    assert changed(before, [("right", Outcome("ok", results=[torch.nextafter(a, a + 1)]))])
    assert changed(before, [("right", Outcome("TypeError", "poisoned"))])
