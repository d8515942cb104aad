"""Keras' own tests of its layers, which its wheel has, hold for tridrop's."""

import os
import re
from pathlib import Path

from apart import printed
from keras_shared import keras

LAYERS = Path(keras.__file__).parent / "src" / "layers"
NAMES = ("dropout", "spatial_dropout", "gaussian_dropout", "alpha_dropout")
FILES = [LAYERS / "regularization" / f"{name}_test.py" for name in NAMES]
FILES.append(LAYERS / "attention" / "multi_head_attention_test.py")


def test_keras_own_tests():
    tests = Path(__file__).parents[1]
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "keras_suite",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    out = printed(*command, "--rootdir", LAYERS, *FILES, PYTHONPATH=paths, KERAS_BACKEND="torch")
    assert int(re.search(r"(\d+) passed", out)[1]) >= 80  # 81 with Keras 3.15.1
