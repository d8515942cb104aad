"""Conformance of tridrop.masks where CI does not go: `python3 run.py frameworks`.

TensorFlow is too large for every run of the tests, and JAX compiles each place by itself.
"""

import re
from pathlib import Path

import pytest
from conformance import hold

import tridrop

PAGE = Path(__file__).resolve().parents[2] / "docs" / "masks-elsewhere.md"


def test_every_bit_in_tensorflow():
    hold("tensorflow")


def test_every_bit_in_jax_with_64_bits():
    hold("jax", JAX_ENABLE_X64="1")


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_every_bit_in_keras(backend):
    hold("keras", places=15, KERAS_BACKEND=backend)


def test_the_page_runs_in_tensorflow():
    (block,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(block, {"tridrop": tridrop})
