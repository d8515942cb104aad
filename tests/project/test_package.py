"""The layers of the package, and what importing it needs."""

import ast
from pathlib import Path

import pytest
from apart import printed
from hosts import imported_with

import tridrop

PACKAGE = Path(tridrop.__file__).parent
# A layer may import itself and those below it; what stands on one line does not know of each other.
LAYERS = [
    ["__main__"],
    ["commands"],
    ["monte_carlo", "schedules", "shims"],
    ["swapping"],
    ["integrations"],
    ["nn", "keras"],
    ["functional"],
    ["ops"],
    ["backends", "distributed"],
    ["backends.triton", "backends.cpu"],
    ["backends.reference"],
    ["spec"],
    ["contract"],
    ["base", "masks"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """The layer of a module, named from inside the package: "backends.triton" of its mask."""
    while module not in LEVEL:
        module, _, rest = module.rpartition(".")
        assert rest, f"{rest} is in no layer"
    return module


def imports(path: Path) -> list[str]:
    """The modules that a file imports: dotted names, those of this package from inside it."""
    here = ["tridrop", *path.relative_to(PACKAGE).with_suffix("").parts]
    if here[-1] == "__init__":
        here.pop()
        package = here
    else:
        package = here[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                inner = PACKAGE.joinpath(*source[1:], alias.name)
                is_module = source[:1] == ["tridrop"] and (
                    inner.is_dir() or inner.with_suffix(".py").exists()
                )
                found.append(".".join([*source, alias.name] if is_module else source))
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = layer_of(".".join(p for p in parts if p != "__init__"))
    for name in imports(path):
        if name.split(".")[0] == "triton":
            assert own == "backends.triton", "only the Triton backend imports triton"
        if not name.startswith("tridrop."):
            continue
        other = layer_of(name.removeprefix("tridrop."))
        below = own == other or LEVEL[own] < LEVEL[other]
        assert below, f"{own} imports {other}, which is no layer below it"
        if own.startswith("backends."):
            allowed = {own, "spec", "contract", "base"}
            # It hands over what its loops do not take.
            allowed |= {"backends.reference"} if own == "backends.cpu" else set()
            assert other in allowed, f"backend {own} imports {other}"
        if name.split(".")[0] == "numba":
            assert "loops" in parts, "only the loops import numba"


def test_only_the_user_imports_the_callbacks():
    for path in FILES:
        for name in ("trainer", "lightning"):
            assert f"tridrop.swapping.{name}" not in imports(path), path.name


def test_masks_for_other_frameworks_stand_by_themselves():
    for path in (PACKAGE / "masks").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("tridrop", "torch")]


def test_philox_is_in_the_mask_modules_alone():
    allowed = {PACKAGE / "contract" / "mask.py", PACKAGE / "backends" / "triton" / "mask.py"}
    allowed |= set((PACKAGE / "masks").glob("*_mask.py"))  # each to be copied by itself
    for path in FILES:
        text = path.read_text()
        for word in ("0xD2511F53", "tl.rand", "tl.philox", "bernoulli"):
            # swapping knows a library's drop path by its text, and names and counts others' draws.
            names = ("forms.py", "measure.py", "draws.py", "watch.py")
            quoted = path.name in names and path.parent.name == "swapping" and word == "bernoulli"
            assert path in allowed or word not in text or quoted, f"{word} in {path.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short_and_kernels_narrow(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            assert len(node.args.args) <= 16, node.name


WITHOUT_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)

import torch, tridrop, tridrop.commands.info
x = torch.ones(8, requires_grad=True)
y = tridrop.dropout_add(x, x, 0.5, bias=torch.ones(8), activation="gelu", seed=1)
y.sum().backward()
assert "triton" not in sys.modules
try:
    with tridrop.backend("triton"):
        tridrop.dropout(x, 0.5)
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise SystemExit("the triton backend ran without triton")
assert "triton is not installed" in tridrop.commands.info.render(tridrop.commands.info.collect())
"""

WITHOUT_GPU = """
import torch, tridrop, sys
tridrop.dropout(torch.ones(8), 0.5)
assert "triton.language" not in sys.modules
try:
    with tridrop.backend("triton"):
        tridrop.dropout(torch.ones(8), 0.5)
except RuntimeError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    raise SystemExit("compiled kernels ran on a CPU")
"""


WITHOUT_MODEL_LIBRARIES = """
import sys, torch, tridrop
tridrop.dropout(torch.ones(8), 0.5)
names = {name.split(".")[0] for name in sys.modules}
found = names & {"transformers", "accelerate", "peft", "timm", "torchvision", "liger_kernel"}
found |= names & {"sklearn", "matplotlib", "keras"}
assert not found, f"import tridrop imports {found}"
assert "torch.distributed.tensor" not in sys.modules
# What a script that only calls ops does without: they are a third of a second.
assert not {"rich", "tridrop.swapping"} & set(sys.modules)
for name in tridrop.__all__:
    assert getattr(tridrop, name) is getattr(tridrop, name)
    assert name in dir(tridrop)
assert "tridrop.swapping" in sys.modules
"""

PROGRAMS = {
    "triton": WITHOUT_TRITON,
    "gpu": WITHOUT_GPU,
    "model libraries": WITHOUT_MODEL_LIBRARIES,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_import_and_reference_work_without(program):
    printed("-c", program, CUDA_VISIBLE_DEVICES="")


def test_backend_choice(monkeypatch):
    import torch

    choose = tridrop.backends.name_for
    imported_with(monkeypatch)
    assert choose(torch.device("cpu")) == "cpu"
    assert choose(torch.device("cuda")) == "triton"
    imported_with(monkeypatch, TRIDROP_BACKEND="triton")
    assert choose(torch.device("cpu")) == "triton"
    with tridrop.backend("reference"):
        assert choose(torch.device("cuda")) == "reference"
    imported_with(monkeypatch, TRIDROP_BACKEND="cuda")
    with pytest.raises(ValueError, match="TRIDROP_BACKEND names the backend 'cuda'"):
        choose(torch.device("cpu"))
    with pytest.raises(ValueError, match="known: triton, cpu, reference"):
        tridrop.backend("jax")  # when it is made, not when it is entered


READ_ONCE = """
import os, torch, tridrop
cpu = torch.device("cpu")
def call():
    tridrop.dropout(torch.ones(8), 0.5)
    return tridrop.backends.name_for(cpu)
print(call())
os.environ |= {"TRIDROP_BACKEND": "cpu", "TRIDROP_CPU": "numba"}
print(call())
os.environ |= {"TRIDROP_BACKEND": "nonsense", "TRIDROP_CPU": "nonsense"}
print(call())
with tridrop.backend("cpu"):
    print(tridrop.backends.name_for(cpu))
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"TRIDROP_BACKEND": "reference"},
        {"TRIDROP_BACKEND": "reference", "TRIDROP_CPU": "numba"},
        {"TRIDROP_BACKEND": "", "TRIDROP_CPU": "torch"},
    ],
)
def test_the_environment_is_read_once(variables):
    """When tridrop is imported; in a running process tridrop.backend names a backend."""
    assert printed("-c", READ_ONCE, **variables).split() == ["reference"] * 3 + ["cpu"]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("TRIDROP_BACKEND", "TRIDROP_BACKEND names the backend 'jax'; known: triton, cpu, ref"),
        ("TRIDROP_CPU", "TRIDROP_CPU is 'jax'; known: numba, torch"),
    ],
)
def test_a_wrong_name_in_the_environment_is_an_error_at_the_first_call(variable, message):
    program = """
import torch, tridrop
try:
    tridrop.dropout(torch.ones(8), 0.5)
except ValueError as error:
    print(error)
"""
    text = printed("-c", program, **{variable: "jax"})
    assert message in text
    assert f"{variable} is read once, when tridrop is imported" in text
    told = printed("-m", "tridrop", "info", **{variable: "jax"})
    assert f"default on cpu: none: {message}" in told
    assert f"{variable}=jax" in told


def test_the_version_is_the_packages():
    import importlib.metadata

    assert importlib.metadata.version("tridrop") == tridrop.__version__
