"""On a CUDA device the Triton backend takes its tensors alone, and tests must give it those.

Without one the kernels run in Triton's interpreter, on CPU tensors, and a test that forgets to ask
which it is passes. So the text of the tests is asked: a test that runs the Triton backend has
``DEVICE`` in it, or in a function, fixture or global of its file that it uses.
"""

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[1].rglob("test_*.py"))
DEVICES = {"DEVICE", "is_available"}
# Of these only a refusal is wanted, which does not depend on the device.
REFUSED = {
    "test_known.py": ["test_what_a_backend_refuses_stays_refused"],
    "test_softmax.py": ["test_fp64_masks_run_on_the_reference_only"],
}


def names_in(node: ast.AST) -> set[str]:
    """Names, attributes and arguments: a fixture is used by the name of an argument."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.arg):
            found.add(part.arg)
    return found


def runs_triton(node: ast.AST) -> bool:
    """Whether ``backend("triton")`` is in a function, its decorators or a global, or both names."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and names_in(part.func) & {"backend"}:
            given = part.args
        elif isinstance(part, ast.Tuple | ast.List | ast.Set):
            rows = [e.elts if isinstance(e, ast.Tuple) else [e] for e in part.elts]
            given = [entry for row in rows for entry in row]
            if not any(ast.unparse(e) in ("PLAIN", "'reference'") for e in given):
                continue
        else:
            continue
        if any(isinstance(e, ast.Constant) and e.value == "triton" for e in given):
            return True
    return False


def forgetful(text: str) -> list[str]:
    """The tests of a file that run the Triton backend and ask for no device."""
    tree = ast.parse(text)
    parts: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in names_in(ast.Tuple(targets)):
                parts.setdefault(name, []).append(node)
    wrong = []
    for test in (n for n in parts if n.startswith("test_")):
        seen, waiting = set(), [test]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += {n for node in parts.get(name, ()) for n in names_in(node)}
        used = [node for name in seen for node in parts.get(name, ())]
        if any(map(runs_triton, used)) and not seen & DEVICES:
            wrong.append(test)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_who_runs_the_kernels_asks_for_their_device(path):
    assert forgetful(path.read_text()) == REFUSED.get(path.name, [])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('def test_a():\n    with backend("triton"):\n        call(torch.ones(3))', ["test_a"]),
        ('def test_a():\n    with backend("triton"):\n        call(ones(3, DEVICE))', []),
        ('@mark(["reference", "triton"])\ndef test_a(b):\n    call(b, torch.ones(3))', ["test_a"]),
        ('@fixture(params=("reference", "triton"))\ndef b(): ...\ndef test_a(b): ...', ["test_a"]),
        ('B = ["reference", "triton"]\n@mark(B)\ndef test_a(b):\n    call(x)', ["test_a"]),
        ('@mark([("reference", 1), ("triton", 2)])\ndef test_a(b): ...', ["test_a"]),
        (
            'def x():\n    return ones(3, DEVICE)\n@mark("reference", "triton")\ndef test_a(): ...',
            [],
        ),
        ('def draw(): ones(3, DEVICE)\ndef test_a():\n    backend("triton"), draw()', []),
        ('def test_a():\n    with backend("reference"): ...', []),
    ],
)
def test_texts_that_forget_are_found(text, found):
    assert forgetful(text) == found
