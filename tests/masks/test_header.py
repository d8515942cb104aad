"""tridrop_mask.h as C, C++ and CUDA, by the compilers that are here: every bit of every vector."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conformance import digits, drawn, golden

import tridrop
import tridrop.masks

HERE = Path(__file__).resolve().parent
FOLDER = Path(tridrop.masks.__file__).parent
PAGE = HERE.parents[1] / "docs" / "masks-elsewhere.md"
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic", "-O1")
COMPILERS = {
    "C99": ("cc", "-x", "c", "-std=c99", *STRICT),
    "C++11": ("c++", "-x", "c++", "-std=c++11", *STRICT),
    # With undefined behaviour trapped, such as a sum of int64 that overflows.
    "C17, checked": ("cc", "-x", "c", "-std=c17", "-fsanitize=undefined", "-fno-sanitize-recover"),
    "CUDA": ("nvcc", "-x", "cu", "-O1", "-Xcompiler", "-Wall"),
}
BAD = {"kind": "elements", "seed": 0, "stream": 0, "folds": [], "p": 0.5, "shard": None}
BAD |= {"domain": "elements", "noise_shape": None, "shape": [2, 3]}
NEAR = 1 << 62
REFUSED = [
    BAD | {"p": 1.5},
    BAD | {"p": -1e-300},
    BAD | {"p": float("nan")},
    BAD | {"shape": [2, -3]},
    BAD | {"noise_shape": [2, 2]},
    BAD | {"shard": [[2, 3], [0, 1]]},
    BAD | {"shard": [[2, 3], [-1, 0]]},
    BAD | {"shape": [1, 1], "shard": [[NEAR, 2], [0, 0]]},  # 2^63 elements
    BAD | {"shape": [3], "domain": "drop_path"},
    BAD | {"noise_shape": [2, 1], "domain": "drop_path"},
    BAD | {"kind": "attention", "shape": [1, 1, 1, 1], "shard": [[0] * 4, [1 << 32, 0, 0, 0]]},
    BAD
    | {"kind": "attention", "shape": [1, 2, 1, 1], "shard": [[0] * 4, [0, (1 << 28) - 1, 0, 0]]},
]


def line(case: dict) -> str:
    """A case as header.c reads it; ints that an int64 holds, and p exactly."""
    shape = case["shape"]
    noise = case.get("noise_shape")
    whole, origin = case["shard"] or (shape, [0] * len(shape))
    sizes = noise and [entry or 0 for entry in noise]  # 0 is C's None
    domain = ("elements", "drop_path").index(case.get("domain", "elements"))
    numbers = [case["kind"] == "attention", len(shape), bool(sizes), case["shard"] is not None]
    numbers += [len(case["folds"]), domain, case["seed"], case["stream"]]
    rest = [*shape, *(sizes or shape), *whole, *origin, *case["folds"]]
    return " ".join([*(str(int(n)) for n in numbers), float(case["p"]).hex(), *map(str, rest)])


@pytest.fixture(scope="module", params=COMPILERS, ids=[*COMPILERS])
def program(request, tmp_path_factory):
    compiler, *options = COMPILERS[request.param]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    path = tmp_path_factory.mktemp("header") / "header"
    command = [compiler, *options, f"-I{FOLDER}", "-o", str(path), str(HERE / "header.c")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return path


def masks(program: Path, cases: list[dict], *arguments: str) -> list[str]:
    asked = "".join(line(case) + "\n" for case in cases)
    command = [str(program), *arguments]
    run = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_every_bit_is_that_of_the_contract(program):
    cases = golden() + drawn(200)
    assert masks(program, cases) == ["=" + case["keep"] for case in cases]


def test_what_the_contract_does_not_allow_is_refused(program):
    assert masks(program, REFUSED) == ["refused"] * len(REFUSED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and nvcc")
def test_a_device_draws_the_same(request, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc here")
    path = tmp_path / "header"
    command = [*COMPILERS["CUDA"], "-arch=native", f"-I{FOLDER}", "-o", str(path)]
    subprocess.run([*command, str(HERE / "header.c")], check=True)
    cases = golden()
    assert masks(path, cases, "device") == ["=" + case["keep"] for case in cases]


def test_the_page_compiles(tmp_path):
    (block,) = re.findall(r"^```c\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "page.c").write_text(block)
    command = ["cc", *STRICT, f"-I{FOLDER}", "-o", str(tmp_path / "page"), str(tmp_path / "page.c")]
    subprocess.run(command, check=True)
    printed = subprocess.check_output([str(tmp_path / "page")], text=True)
    assert printed == digits(tridrop.keep_mask(1, (8,), 0.5))
    assert f"/* {printed} */" in block
