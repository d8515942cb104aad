"""The files of tridrop.masks whose frameworks CI has; TensorFlow's are in frameworks.py."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conformance import hold

from tridrop.masks import numpy_mask

FOLDER = Path(numpy_mask.__file__).parent
FILES = sorted(FOLDER.glob("*_mask.py"))


def test_every_bit_in_numpy():
    hold("numpy")


def test_every_bit_in_jax():
    # Each place is compiled by itself, which is what takes long.
    hold("jax", places=12)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned Keras needs Python 3.11")
def test_every_bit_in_keras_on_torch():
    hold("keras", KERAS_BACKEND="torch")


def test_the_lines_for_all_are_the_same_in_each_file():
    assert len(FILES) == 5
    begin, end = "# ----- Seeds, rates and coordinates", "\n# ----- "
    texts = [path.read_text() for path in FILES]
    shared = {text[text.index(begin) :].partition(end)[0] for text in texts}
    assert len(shared) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_needs_its_framework_alone(path):
    tree = ast.parse(path.read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    framework = path.stem.removesuffix("_mask")
    roots = {name.split(".")[0] for name in found}
    plain = {"__future__", "collections", "math", "numbers", "operator", "typing"}
    assert roots == {*plain, framework}
    public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
    assert {"keep_mask", "attention_keep_mask", "fold_in", "threshold", "scale"} <= public


def test_the_header_needs_nothing():
    text = (FOLDER / "tridrop_mask.h").read_text()
    assert set(re.findall(r"#include (\S+)", text)) == {"<stddef.h>", "<stdint.h>"}


BAD = [
    ({"p": 1.5}, ValueError, r"p = 1\.5 is not a probability; give a number in \[0, 1\]"),
    ({"p": float("nan")}, ValueError, "p = nan"),
    ({"p": "0.1"}, TypeError, "p is a str; give the probability of dropping"),
    ({"p": True}, TypeError, "p is a bool"),
    ({"seed": 1 << 63}, ValueError, "give integers from -9223372036854775808 up to"),
    ({"seed": 1.0}, TypeError, r"seed has 1\.0, a float; give integers"),
    ({"seed": (1, 2, 3)}, ValueError, r"give an int or a pair \(seed, stream\)"),
    ({"shape": 4}, TypeError, "shape is a int; give a tuple"),
    ({"shape": (2, -1)}, ValueError, "shape has -1"),
    ({"shape": (1 << 62, 2)}, ValueError, r"2\^63 elements or more"),
    ({"noise_shape": (2, 2)}, ValueError, r"noise_shape = \(2, 2\) for shape \(2, 3\)"),
    ({"noise_shape": (1,)}, ValueError, "give for each dimension 1"),
    ({"shard": ((2, 3), (1, 0))}, ValueError, "origin \\+ shape within global_shape"),
    ({"shard": ((2, 3, 4), (0, 0, 0))}, ValueError, "each with an entry per dimension"),
    ({"domain": "attention"}, ValueError, "give one of elements, drop_path"),
    ({"domain": "drop_path", "shape": (3,)}, ValueError, "two dimensions or more"),
]


@pytest.mark.parametrize(("given", "error", "said"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments_are_named(given, error, said):
    with pytest.raises(error, match=said):
        numpy_mask.keep_mask(**{"seed": 1, "shape": (2, 3), "p": 0.5} | given)


def test_attention_takes_four_dimensions_within_the_limits():
    with pytest.raises(ValueError, match=r"\(batch, heads, queries, keys\)"):
        numpy_mask.attention_keep_mask(1, (2, 3, 4), 0.5)
    with pytest.raises(ValueError, match=r"at most \(4294967296, .* of each"):
        numpy_mask.attention_keep_mask(1, (1, (1 << 28) + 1, 0, 1), 0.5)


def test_numbers_of_numpy_are_numbers():
    expected = numpy_mask.keep_mask(3, (4, 9), float(np.float32(0.1)))
    found = numpy_mask.keep_mask(np.int64(3), (np.int32(4), 9), np.float32(0.1))
    assert np.array_equal(found, expected)
